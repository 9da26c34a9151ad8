"""Packs of samples as tensors.

    pack 0:  [sample a ............][sample b .....][sample c ...]~~~~     ~ padding
    positions 0 1 2 3 ...            0 1 2 ...       0 1 2 ...    0 1 2    each run is attended to alone

The language model keeps samples apart where positions start again, so no attention mask is handed over.  Padding is a
run of its own at the end of a row and carries no loss; being behind everything else, it is seen by nothing.

Shapes: B packs, T tokens of the longest pack, N pictures of all packs, S side of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinyvlm.images import normalise

IGNORED = -100
"""Label of a token that carries no loss."""


class Sample(Protocol):
    """One conversation, encoded (`model/processing.py`)."""

    @property
    def input_ids(self) -> npt.NDArray[np.int32]:
        """(T,)"""

    @property
    def supervised(self) -> npt.NDArray[np.bool_]:
        """(T,)"""

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """(N,S,S,3)"""


@dataclass(frozen=True)
class Batch:
    """What enters the model in one forward pass."""

    input_ids: Tensor
    """(B,T) int64"""
    position_ids: Tensor
    """(B,T) int64"""
    labels: Tensor
    """(B,T) int64, IGNORED where nothing is learned"""
    pixels: Tensor | None
    """(N,S,S,3) uint8, pictures in the order in which their tokens stand, row by row; None without any"""

    @property
    def pixel_values(self) -> Tensor | None:
        """(N,3,S,S) float32, as the vision tower reads them; made where `pixels` lie."""
        return None if self.pixels is None else normalise(self.pixels)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        pixels = None if self.pixels is None else self.pixels.to(device, non_blocking=True)
        ids, positions = self.input_ids.to(device, non_blocking=True), self.position_ids.to(device, non_blocking=True)
        return Batch(ids, positions, self.labels.to(device, non_blocking=True), pixels)


def assemble(packs: Sequence[Sequence[Sample]], pad_token_id: int) -> Batch:
    """Lay samples out in rows, one row a pack.  Empty packs are the caller's to leave out."""
    length = max(sum(len(sample.input_ids) for sample in pack) for pack in packs)
    ids = np.full((len(packs), length), pad_token_id, np.int64)
    positions = np.zeros((len(packs), length), np.int64)
    labels = np.full((len(packs), length), IGNORED, np.int64)
    for row, pack in enumerate(packs):
        end = 0
        for sample in pack:
            start, end = end, end + len(sample.input_ids)
            ids[row, start:end] = sample.input_ids
            positions[row, start:end] = np.arange(end - start)
            labels[row, start:end] = np.where(sample.supervised, sample.input_ids, IGNORED)
            labels[row, start] = IGNORED
        positions[row, end:] = np.arange(length - end)
    pictures = [sample.pixels for pack in packs for sample in pack if len(sample.pixels)]
    pixels = torch.from_numpy(np.concatenate(pictures)) if pictures else None
    return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels), pixels)
