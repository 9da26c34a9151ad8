"""The loss of each source and family, told apart on the device: no step waits for it.

    lengths ──▶ Kinds: (part, group, row) ──▶ number of a kind ┐  (with the batch)
    token losses of a batch (L,) ──index_add──▶ Tally (2,K+1) ◀┘  every k steps: sum over workers, fetch, clear
                                                                  ──▶ {"sources": {name: {"loss", "tokens"}}, …}

Shapes: L supervised tokens of a batch, K kinds and one more for what belongs to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tinyvlm.data.mixture import Kind
from tinyvlm.train.batch import Sample
from tinyvlm.train.collective import Collective
from tinyvlm.train.plan import Item, Pack, kinds_of


class Kinds:
    """Of which kind the conversation of each item is; six bytes for each conversation."""

    COLUMNS = ("part", "group", "row", "source", "family")
    """What is needed of the lengths."""

    def __init__(self, lengths: pa.Table) -> None:
        """`lengths`: what the plan is made from (`plan.LENGTHS`), rows in the order of the files."""
        names, codes = kinds_of(lengths)
        present, inverse = np.unique(codes, return_inverse=True)
        self.names: list[Kind] = [names[code] for code in present]
        self._codes = inverse.reshape(-1).astype(np.int16)
        self._rows: npt.NDArray[np.int32] = lengths["row"].to_numpy()
        places = lengths["part"].to_numpy().astype(np.int64) << 32 | lengths["group"].to_numpy()
        edges = np.flatnonzero(np.diff(places, prepend=-1))
        ends = np.append(edges[1:], len(places)).tolist()
        self._groups = dict(zip(places[edges].tolist(), zip(edges.tolist(), ends, strict=True), strict=True))

    def of(self, item: Item) -> int:
        """Place in `names`."""
        first, end = self._groups[item.part << 32 | item.group]
        return int(self._codes[first + int(np.searchsorted(self._rows[first:end], item.row))])

    def of_tokens(self, packs: Sequence[Pack], samples: Sequence[Sequence[Sample]]) -> Tensor:
        """(L,) int64: the kind of each supervised token of a batch, row by row.

        Of a pack that lacks a sample (one that could not be read), nobody can tell whose tokens are whose: they are of
        no kind, which is the number `len(names)`.
        """
        codes: list[int] = []
        counts: list[int] = []
        for pack, loaded in zip(packs, samples, strict=True):
            is_whole = len(pack) == len(loaded)
            codes += [self.of(item) for item in pack] if is_whole else [len(self.names)] * len(loaded)
            counts += [int(sample.supervised[1:].sum()) for sample in loaded]
        return torch.from_numpy(np.repeat(np.array(codes, np.int64), counts))


@dataclass(frozen=True)
class LossSums:
    """Summed loss and supervised tokens of each kind, over all workers."""

    kinds: Sequence[Kind]
    losses: Sequence[float]
    tokens: Sequence[int]

    @property
    def any(self) -> bool:
        """There are some."""
        return any(self.tokens)

    def told(self) -> dict[str, Any]:
        """Mean loss and tokens of each source and of each family that had any: a line of metrics.jsonl."""
        return {"sources": self._by("source"), "families": self._by("family")}

    def _by(self, field: str) -> dict[str, dict[str, float]]:
        sums: dict[str, list[float]] = {}
        for kind, loss, tokens in zip(self.kinds, self.losses, self.tokens, strict=True):
            both = sums.setdefault(getattr(kind, field) or "unnamed", [0.0, 0])
            both[0], both[1] = both[0] + loss, both[1] + tokens
        return {
            name: {"loss": loss / tokens, "tokens": tokens} for name, (loss, tokens) in sorted(sums.items()) if tokens
        }


class Tally:
    """Adds up losses by kind, without waiting for the device.

    A step's losses count once `keep` was called: those of a step that was left out never do.
    """

    def __init__(self, kinds: Sequence[Kind], device: torch.device) -> None:
        self.kinds = kinds
        self._sums = torch.zeros(2, len(kinds) + 1, dtype=torch.float64, device=device)
        self._step = torch.zeros_like(self._sums)

    def begin(self) -> None:
        """A step begins."""
        self._step.zero_()

    def add(self, token_losses: Tensor, kinds: Tensor) -> None:
        """Losses of supervised tokens (L,) and the kind of each (L,)."""
        values = torch.stack([token_losses.double(), torch.ones_like(token_losses, dtype=torch.float64)])
        self._step.index_add_(1, kinds, values)

    def keep(self) -> None:
        """The step counts."""
        self._sums += self._step
        self._step.zero_()

    def take(self, collective: Collective) -> LossSums:
        """What was kept on all workers, who call this together, since they last did."""
        collective.sum(self._sums)
        losses, tokens = self._sums.tolist()
        self._sums.zero_()
        return LossSums(self.kinds, losses[:-1], [int(count) for count in tokens[:-1]])
