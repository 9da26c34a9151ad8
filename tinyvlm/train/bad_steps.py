"""A step whose loss or gradient is no finite number: its conversations are named, its tensors kept to look at again.

    {folder}/bad-steps/step-00000012/rank-00000.json  loss, norm, and of each suspect its key and where it lies
                                     rank-00000.pt    the batches of each worker, as they entered the model

    from tinyvlm.model import load
    from tinyvlm.train.bad_steps import replay
    model, _ = load("…/model")
    for pack in replay(model, "…/bad-steps/step-00000012"):
        print(pack.keys, pack.loss)

Steps are named as people count them, from 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyvlm.folders import write_atomic
from tinyvlm.train.batch import Batch
from tinyvlm.train.plan import Item, Pack


@dataclass(frozen=True)
class BadStep:
    """What one worker knows of a step that went wrong.  Loss and norm are the same on all of them."""

    step: int
    """From 0."""
    loss: float
    norm: float
    batches: Sequence[Batch]
    """This worker's."""
    losses: Sequence[float]
    """Summed loss of each of them."""

    @property
    def suspects(self) -> list[Pack]:
        """Packs of the batches whose loss is no finite number; none if only the gradient went wrong, or elsewhere."""
        return [
            pack
            for batch, loss in zip(self.batches, self.losses, strict=True)
            if not math.isfinite(loss)
            for pack in batch.packs
        ]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"step-{self.step + 1:08d}"


def keep(folder: Path, bad: BadStep, rank: int) -> None:
    """Leave this worker's part of a bad step in the run's folder."""
    place = folder / "bad-steps" / bad.name
    place.mkdir(parents=True, exist_ok=True)
    content = [
        {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
            "pixels": batch.pixels,
            "features": batch.features,
            "sizes": [list(size) for size in batch.sizes],
            "packs": [[list(item) for item in pack] for pack in batch.packs],
        }
        for batch in bad.batches
    ]
    torch.save(content, place / f"rank-{rank:05d}.pt")
    about = {
        "step": bad.step + 1,
        "loss": str(bad.loss),
        "gradient_norm": str(bad.norm),
        "losses": [str(loss) for loss in bad.losses],
        "suspects": [item._asdict() for pack in bad.suspects for item in pack],
    }
    write_atomic(place / f"rank-{rank:05d}.json", json.dumps(about, indent=2))


@dataclass(frozen=True)
class Replayed:
    """One pack of a bad step, alone."""

    keys: list[int]
    loss: float
    """Mean over its supervised tokens."""


def replay(model: Any, folder: str | Path) -> Iterator[Replayed]:
    """Forward each pack of a kept step alone, to find the conversation that is to blame.

    Args:
        model: with the weights to try; those of the newest checkpoint are nearest to what they were.
        folder: `bad-steps/step-…`.
    """
    device = next(model.parameters()).device
    for path in sorted(Path(folder).glob("rank-*.pt")):
        for content in torch.load(path, weights_only=True):
            for row, batch in enumerate(_rows(content)):
                with torch.no_grad():
                    moved = batch.to(device)
                    output = model(
                        input_ids=moved.input_ids,
                        position_ids=moved.position_ids,
                        labels=moved.labels,
                        pixel_values=moved.pixel_values,
                        image_features=moved.features,
                        loss_reduction="sum",
                        use_cache=False,
                    )
                keys = [Item(*item).key for item in content["packs"][row]]
                yield Replayed(keys, float(output.loss) / max(1, output.num_supervised))


def _rows(content: dict[str, Any]) -> Iterator[Batch]:
    """Each row of a batch as a batch of its own, without padding."""
    begin = 0
    for row, (tokens, pictures) in enumerate(content["sizes"]):
        ids, positions, labels = (content[name][row : row + 1, :tokens] for name in _NAMES)
        shown = slice(begin, begin + pictures)
        pixels, features = (
            content[name][shown] if pictures and content[name] is not None else None for name in ("pixels", "features")
        )
        begin += pictures
        yield Batch(ids, positions, labels, pixels, ((tokens, pictures),), features=features)


_NAMES = ("input_ids", "position_ids", "labels")
