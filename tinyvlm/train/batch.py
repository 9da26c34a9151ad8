"""Packs of samples as tensors.

    pack 0:  [sample a ............][sample b .....][sample c ...]~~~~     ~ padding
    positions 0 1 2 3 ...            0 1 2 ...       0 1 2 ... →           each run is attended to alone

The language model keeps samples apart where positions start again, so no attention mask is handed over.  Padding
carries no loss and is behind everything else, so nothing sees it.  It goes on counting: rows of one sample each are
then plain causal rows, for which attention is cheapest.

Shapes: B packs, T tokens of the longest pack, N pictures of all packs, S side of a picture in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
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
    sizes: tuple[tuple[int, int], ...]
    """Of each row: tokens that are not padding, and pictures"""
    packs: tuple[Pack, ...] = ()
    """What the plan calls each row; its last ones may be shorter, where a sample could not be read and was left out"""
    kinds: Tensor | None = None
    """(L,) int64, the kind of each supervised token, row by row (kinds.py); None where they are not told apart"""
    features: Tensor | None = None
    """(N,K,Dv), what a frozen tower made of the same pictures earlier; there are no pixels then"""

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Of each row, 32 hex digits over ids, positions, labels and pictures: what a model sees of it, and no more.

        How rows were put into batches, and so the padding behind them, makes no difference.  Wants a batch on the CPU.
        """
        ends = [0, *accumulate(pictures for _, pictures in self.sizes)]
        found = []
        for row, ((tokens, _), (begin, end)) in enumerate(zip(self.sizes, pairwise(ends), strict=True)):
            digest = hashlib.sha256(f"{tokens} {end - begin}\n".encode())
            for tensor in (self.input_ids, self.position_ids, self.labels):
                digest.update(tensor[row, :tokens].contiguous().numpy().data)
            shown = self.features if self.pixels is None else self.pixels
            if shown is not None and end > begin:
                digest.update(shown[begin:end].contiguous().view(torch.uint8).numpy().data)
            found.append(digest.hexdigest()[:32])
        return tuple(found)

    @property
    def pixel_values(self) -> Tensor | None:
        """(N,3,S,S) float32, as the vision tower reads them; made where `pixels` lie."""
        return None if self.pixels is None else normalise(self.pixels)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        ids, positions = self.input_ids.to(device, non_blocking=True), self.position_ids.to(device, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        pixels, kinds, features = (
            None if given is None else given.to(device, non_blocking=True)
            for given in (self.pixels, self.kinds, self.features)
        )
        return Batch(ids, positions, labels, pixels, self.sizes, self.packs, kinds, features)

    def pin(self) -> Batch:
        """The same batch with its large tensors in page-locked memory, from where copies to a GPU wait for nobody."""
        pixels, features = (None if given is None else given.pin_memory() for given in (self.pixels, self.features))
        return replace(self, pixels=pixels, features=features)


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


def assemble(packs: Sequence[Sequence[Sample]], pad_token_id: int, planned: Sequence[Pack] = ()) -> Batch:
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
    sizes = tuple((sum(len(s.input_ids) for s in pack), sum(map(_num_pictures, pack))) for pack in packs)
    rows = torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels)
    return Batch(*rows, pixels, sizes, tuple(planned), features=_features(packs))


def nothing(pad_token_id: int) -> Batch:
    """A batch from which nothing is learned, for a worker that must keep step with others."""
    ids = torch.full((1, 2), pad_token_id)
    return Batch(ids, torch.arange(2)[None], torch.full((1, 2), IGNORED), None, ((2, 0),))


def with_pixels(batch: Batch, side: int) -> Batch:
    """The same batch, with no pictures as a tensor of no pictures, so that the tower is passed."""
    if batch.pixels is not None or batch.features is not None:
        return batch
    return replace(batch, pixels=torch.zeros((0, side, side, 3), dtype=torch.uint8))


def _num_pictures(sample: Sample) -> int:
    return len(sample.pixels) or len(getattr(sample, "features", ()))


def _features(packs: Sequence[Sequence[Sample]]) -> Tensor | None:
    """The features of samples that bring them instead of pixels."""
    found = [getattr(sample, "features", None) for pack in packs for sample in pack]
    given = [one for one in found if one is not None and len(one)]
    return torch.from_numpy(np.concatenate(given)) if given else None
