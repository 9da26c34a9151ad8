"""Packs of samples as tensors.

    pack 0:  [sample a ............][sample b .....][sample c ...]~~~~     ~ padding
    positions 0 1 2 3 ...            0 1 2 ...       0 1 2 ... →           each run is attended to alone

The language model keeps samples apart where positions start again, so no attention mask is handed over.  Padding
carries no loss and is behind everything else, so nothing sees it.  It goes on counting: rows of one sample each are
then plain causal rows, for which attention is cheapest.

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
from tinyvlm.train.plan import Pack

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
    kinds: Tensor | None = None
    """(L,) int64, the kind of each supervised token, row by row (kinds.py); None where they are not told apart"""

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
        kinds = None if self.kinds is None else self.kinds.to(device, non_blocking=True)
        return Batch(ids, positions, self.labels.to(device, non_blocking=True), pixels, kinds)


def group(packs: Sequence[Pack], max_packs: int, max_tokens: int) -> list[list[Pack]]:
    """Cut packs into batches of at most `max_packs` packs and `max_tokens` tokens, padding included (0: no limit).

    The longest come first, so that batches are of similar lengths and hardly padded.
    """
    batches: list[list[Pack]] = []
    longest = 0
    for length, pack in sorted(((_length(pack), pack) for pack in packs), key=lambda item: -item[0]):
        longest = max(longest, length)
        too_many = batches and max_tokens and (len(batches[-1]) + 1) * longest > max_tokens
        if not batches or too_many or len(batches[-1]) == max_packs:
            batches.append([])
            longest = length
        batches[-1].append(pack)
    return batches


def _length(pack: Pack) -> int:
    return sum(item.tokens for item in pack)


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
            positions[row, start:] = np.arange(length - start)
            labels[row, start:end] = np.where(sample.supervised, sample.input_ids, IGNORED)
            labels[row, start] = IGNORED
    pictures = [sample.pixels for pack in packs for sample in pack if len(sample.pixels)]
    pixels = torch.from_numpy(np.concatenate(pictures)) if pictures else None
    return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels), pixels)
