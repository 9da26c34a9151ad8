"""Counts over any number of rows in bounded memory: what a report needs to know of millions of rows.

Distinct   how many different texts: exact, or nearly so when there are very many
Groups     rows by name and kind, of names without number: exact, or with a stated bound when there are too many
Quantiles  of positive numbers, each within 1 %
Timeline   rows by kind over time, in bins that widen as the run grows longer
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

MAX_NAMES = 50_000
"""Names that `Groups` keeps when there are more than twice as many."""

ACCURACY = 0.01
"""Largest relative error of a quantile."""

PAUSE_S = 120.0
"""A run that finishes nothing for so long was not running."""


MAX_DISTINCT = 1 << 23
"""Different texts up to which `Distinct` counts exactly; it takes eight bytes for each."""


class Distinct:
    """Counts different texts by hashes of 64 bits.

    Of more than `max_kept` only the smallest hashes are kept, whose largest says how dense they lie: the count is then
    within 1 / √max_kept of the truth (one standard deviation).  Source: Bar-Yossef et al., "Counting distinct elements
    in a data stream", RANDOM 2002.
    """

    def __init__(self, max_kept: int = MAX_DISTINCT) -> None:
        self.max_kept = max_kept
        self.is_exact = True
        self._kept = np.zeros(0, np.uint64)
        self._new: list[NDArray[np.uint64]] = []

    def add(self, texts: pa.ChunkedArray) -> None:
        """Count some more; nulls do not count."""
        different = pc.unique(texts).drop_null().to_pylist()
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in different)
        hashes = np.frombuffer(digests, np.uint64)
        self._new.append(hashes if self.is_exact else hashes[hashes < self._kept[-1]])
        if sum(map(len, self._new)) > self.max_kept // 4:
            self._settle()

    def __len__(self) -> int:
        self._settle()
        if self.is_exact:
            return len(self._kept)
        return round((self.max_kept - 1) / (int(self._kept[-1]) / 2**64))

    def _settle(self) -> None:
        self._kept = np.unique(np.concatenate([self._kept, *self._new]))
        self._new.clear()
        if len(self._kept) > self.max_kept:
            self._kept, self.is_exact = self._kept[: self.max_kept].copy(), False


class Groups:
    """Counts by name and kind.

    When there are more than twice `max_names` names, the rarest are put together into `others` (as in Misra & Gries,
    "Finding repeated elements", 1982): no row is lost, and `undercount` says by how much a name that is left may be
    too low.  0: every count is exact.
    """

    def __init__(self, num_kinds: int, max_names: int = MAX_NAMES) -> None:
        self.max_names = max_names
        self.others = np.zeros(num_kinds, np.int64)
        self.undercount = 0
        self._places: dict[str, int] = {}
        self._counts = np.zeros((1024, num_kinds), np.int64)

    def add(self, names: Sequence[str], kinds: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """`counts[i]` more rows of kind `kinds[i]` under `names[i]`; a name may come several times."""
        known = self._places
        places = [known.setdefault(name, len(known)) for name in names]
        while len(known) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        flat = np.array(places, np.int64) * self._counts.shape[1] + kinds
        np.add.at(self._counts.reshape(-1), flat, counts)
        if len(known) > 2 * self.max_names:
            self._put_together()

    @property
    def names(self) -> list[str]:
        return list(self._places)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(names, kinds), in the order of `names`."""
        return self._counts[: len(self._places)]

    def _put_together(self) -> None:
        names, counts = self.names, self.counts
        order = np.argsort(-counts.sum(axis=1), kind="stable")
        kept, dropped = np.sort(order[: self.max_names]), order[self.max_names :]
        self.others += counts[dropped].sum(axis=0)
        self.undercount += int(counts[dropped].sum(axis=1).max())
        self._counts = counts[kept].copy()
        self._places = {names[place]: index for index, place in enumerate(kept)}


class Quantiles:
    """Quantiles of positive numbers by group, each within `ACCURACY` of a value that lies there.

    Bins grow by a constant factor, so that the middle of a bin is near to all in it.  Source: Masson, Rim & Lee,
    "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019.
    """

    LOWEST, HIGHEST = 1e-2, 1e9
    """Smaller numbers count as 0, larger ones as `HIGHEST`."""

    def __init__(self, num_groups: int) -> None:
        self._growth = (1 + ACCURACY) / (1 - ACCURACY)
        self._first = math.ceil(math.log(self.LOWEST, self._growth))
        num_bins = math.ceil(math.log(self.HIGHEST, self._growth)) - self._first + 2
        self._counts = np.zeros((num_groups, num_bins), np.int64)
        self.highest = np.zeros(num_groups)

    def add(self, groups: NDArray[np.int64], values: NDArray[np.floating]) -> None:
        """Numbers and the group of each; NaN is left out."""
        real = ~np.isnan(values)
        groups, values = groups[real], values[real].astype(np.float64)
        np.maximum.at(self.highest, groups, values)
        place = np.ceil(np.log(np.clip(values, self.LOWEST, self.HIGHEST)) / math.log(self._growth)) - self._first + 1
        place = np.where(values < self.LOWEST, 0, place).astype(np.int64)
        shape = self._counts.shape
        self._counts += np.bincount(groups * shape[1] + place, minlength=shape[0] * shape[1]).reshape(shape)

    def num_values(self, group: int | None = None) -> int:
        return int(self._of(group).sum())

    def at(self, share: float, group: int | None = None) -> float:
        """The number below which `share` of all numbers lie (of one group); 0 when there is none."""
        counts = self._of(group)
        if not counts.any():
            return 0.0
        rank = min(counts.sum() - 1, math.floor(share * (counts.sum() - 1)))
        place = int(np.searchsorted(np.cumsum(counts), rank, side="right"))
        return 0.0 if place == 0 else 2 * self._growth ** (place - 1 + self._first) / (self._growth + 1)

    def maximum(self, group: int | None = None) -> float:
        """Exact."""
        return float(self.highest.max() if group is None else self.highest[group])

    def _of(self, group: int | None) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = self._counts.sum(axis=0) if group is None else self._counts[group]
        return counts


@dataclass(frozen=True)
class Curve:
    """Rows by kind over the working time, in bins of equal width; the last may be shorter."""

    starts_s: NDArray[np.float64]
    widths_s: NDArray[np.float64]
    counts: NDArray[np.int64]
    """(bins, kinds)"""
    num_pauses: int
    """How often nothing was finished for `PAUSE_S`; that time is left out."""
    seconds: float
    """The working time."""


class Timeline:
    """Rows by kind over time.  Bins are a second wide, and twice as wide whenever there are more than `max_bins`."""

    def __init__(self, num_kinds: int, max_bins: int = 8192) -> None:
        self.num_kinds, self.max_bins = num_kinds, max_bins
        self.width_s = 1
        self._bins: dict[int, NDArray[np.int64]] = {}

    def add(self, seconds: NDArray[np.int64], kinds: NDArray[np.int64]) -> None:
        """Rows that were finished at `seconds` (since any moment)."""
        codes, counts = np.unique(seconds // self.width_s * self.num_kinds + kinds, return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            bin_, kind = divmod(code, self.num_kinds)
            self._bin(bin_)[kind] += count
        while len(self._bins) > self.max_bins:
            before, self._bins = self._bins, {}
            self.width_s *= 2
            for bin_, row in before.items():
                self._bin(bin_ // 2)[:] += row

    def curve(self, max_points: int = 60) -> Curve:
        """At most `max_points` bins over the time in which something was done."""
        if not self._bins:
            nothing = np.zeros(0)
            return Curve(nothing, nothing, np.zeros((0, self.num_kinds), np.int64), 0, 0.0)
        bins = np.array(sorted(self._bins))
        gaps = np.diff(bins) * self.width_s
        pauses = gaps > max(PAUSE_S, 2 * self.width_s)
        steps = np.where(pauses, self.width_s, gaps)
        starts = np.concatenate([[0], np.cumsum(steps)])
        end = int(starts[-1]) + self.width_s
        width = self.width_s * math.ceil(end / (max_points * self.width_s))
        counts = np.zeros((math.ceil(end / width), self.num_kinds), np.int64)
        np.add.at(counts, starts // width, np.stack([self._bins[bin_] for bin_ in bins.tolist()]))
        edges = np.minimum(np.arange(len(counts) + 1) * width, end).astype(np.float64)
        return Curve(edges[:-1], np.diff(edges), counts, int(pauses.sum()), float(end))

    def _bin(self, bin_: int) -> NDArray[np.int64]:
        if bin_ not in self._bins:
            self._bins[bin_] = np.zeros(self.num_kinds, np.int64)
        return self._bins[bin_]
