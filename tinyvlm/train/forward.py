"""One batch through the model, in the layout and precision that suit the device.

    Batch (B,T) ──lay out──▶ one row (1,ΣT) without padding, where attention knows rows (attention.py), else as it is
                ──transfer──▶ device ──autocast──▶ model ──▶ summed loss, number of supervised tokens

Which tokens are supervised is known before the transfer, so that no batch makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvlm.train.attention import Row, packed_attention
from tinyvlm.train.batch import IGNORED, Batch
from tinyvlm.train.features import FrozenTower
from tinyvlm.train.settings import TrainConfig

STATIC_STARTS = 64
"""Compiled, a row's number of samples is rounded up to a multiple of this."""


class Forward:
    """The forward pass of training and of the held-out loss.

    Args:
        model: called as it is, wrapped or not.
        tower: remembers what a frozen tower made of pictures.
        is_compiled: shapes are to be the same every time.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        device: torch.device,
        tower: FrozenTower | None = None,
        *,
        is_compiled: bool = False,
    ) -> None:
        self.model, self.config, self.device, self.tower, self.is_compiled = model, config, device, tower, is_compiled
        # On a CPU every length is a kernel call of its own, for which a compiled layer would be compiled again.
        knows_rows = config.precision == "bf16" if device.type == "cuda" else not is_compiled
        self.in_rows = config.attention == "packed" or (config.attention == "auto" and knows_rows)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within, batches may be passed; backward passes belong inside as well."""
        with packed_attention(self.model.language) if self.in_rows else nullcontext():
            yield

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss, and (L,) without a gradient that of each supervised token."""
        rows: dict[str, Any] = {}
        if self.in_rows:
            batch, row = self._in_one_row(batch)
            rows["packed_row"] = row.to(self.device)
        supervised = _supervised(batch.labels)
        batch = batch.to(self.device)
        with self._precision():
            output = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                labels=batch.labels,
                supervised=supervised.to(self.device, non_blocking=True),
                **self._pictures(batch),
                **rows,
                loss_reduction="sum",
                use_cache=False,
            )
        return output.loss, output.token_losses

    def _in_one_row(self, batch: Batch) -> tuple[Batch, Row]:
        """All rows one behind another, without their padding; compiled, with padding up to what all batches have."""
        each = [(row, tokens) for row, (tokens, _) in enumerate(batch.sizes)]
        ids, positions, labels = (
            torch.cat([tensor[row, :tokens] for row, tokens in each])
            for tensor in (batch.input_ids, batch.position_ids, batch.labels)
        )
        edges = torch.cat([(positions == 0).nonzero().squeeze(1), torch.tensor([len(positions)])])
        lengths = edges.diff().tolist()
        missing = self.config.packs_per_batch * self.config.pack_length - len(ids) if self.is_compiled else 0
        if missing > 0:
            lengths += [self.config.pack_length] * (missing // self.config.pack_length)
            lengths += [missing % self.config.pack_length] if missing % self.config.pack_length else []
            ids = torch.cat([ids, ids.new_zeros(missing)])
            positions = torch.cat([positions, torch.arange(missing) % self.config.pack_length])
            labels = torch.cat([labels, labels.new_full((missing,), IGNORED)])
        row = Row.of(lengths)
        if self.is_compiled:
            starts = -(-(len(lengths) + 1) // STATIC_STARTS) * STATIC_STARTS
            row = Row.of(lengths, longest=self.config.pack_length, num_starts=starts)
        flat = replace(batch, input_ids=ids[None], position_ids=positions[None], labels=labels[None])
        return flat, row

    def _pictures(self, batch: Batch) -> dict[str, Tensor | None]:
        """The pictures of a batch, or what the frozen tower makes of them, or made of them earlier."""
        if batch.features is not None:
            return {"image_features": batch.features}
        if self.tower is None or batch.pixels is None:
            return {"pixel_values": batch.pixel_values}
        return {"image_features": self.tower(batch.pixels)}

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _supervised(labels: Tensor) -> Tensor:
    """(L,), the places in front of labelled ones in the flattened (B,T) labels on the host."""
    given = labels.numpy()
    given = np.concatenate([given[:, 1:], np.full((len(given), 1), IGNORED)], axis=1)
    return torch.from_numpy(np.flatnonzero(given != IGNORED))
