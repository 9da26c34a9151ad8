"""What stands behind many links of the whole input: the cheap signs of a placeholder, found before any is encoded.

    sha256, phash, url, final_url of every row ──sketch──▶ values that may be frequent ──count──▶ frequent ones
        sha256      the same bytes behind many links                                      placeholder.repeated
        final_url   where many links were redirected to                                   placeholder.redirect
        phash       nearly equal hashes behind many links ─┬─ thumbnails of some alike ─▶  placeholder.similar
        image       of a few rows of such groups ──────────┘

Two passes over the light columns in bounded memory: the first adds into a table of fixed size, in which a frequent
value always stands out; the second counts exactly the values that do.  The perceptual hash alone is not trusted: on a
plain ground few of its bits say anything, and unlike drawings share it.  What is found is small, and travels to
the workers with the stage.

Shapes: V values, C looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tinyvlm import schema
from tinyvlm.data.placeholder import THUMB, thumbnail
from tinyvlm.folders import part_paths
from tinyvlm.images import ImageError, LimitConfig, decode
from tinyvlm.storage import readable

SIMILAR_BITS = 4
"""Hashes that differ in no more of their 64 bits are nearly equal."""
SIMILAR_LEVELS = 6.0
"""Thumbnails whose levels (0 … 255) differ by no more on average look the same."""

SKETCH_BITS = 24
"""The table of the first pass has at most 2^this counters of four bytes."""
MAX_CENTRES, MAX_GROUPS, MAX_MEMBERS, SAMPLES = 50_000, 200, 16, 16
"""Most hashes that are compared, groups that are looked at, hashes of one group, and pictures of one hash."""

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 ÷ the golden ratio: products with it have evenly spread high bits (Fibonacci hashing)."""


@dataclass(frozen=True)
class Repeats:
    """What was found to stand behind many links."""

    hashes: frozenset[str] = frozenset()
    """sha256 of pictures."""
    targets: frozenset[str] = frozenset()
    """Addresses that links were redirected to."""
    look_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """(C,): perceptual hashes in whose neighbourhood a look is frequent …"""
    look_thumbs: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, THUMB, THUMB, 3), np.uint8))
    """(C, 16, 16, 3): … and that look."""

    def is_target(self, url: str | None, final_url: str | None) -> bool:
        """Whether a link was redirected to an address that many were redirected to."""
        return final_url != url and final_url in self.targets

    def is_look(self, phash: int | None, pixels: NDArray[np.uint8]) -> bool:
        """Whether a picture (S, S, 3) nearly equals one that stands behind many links."""
        if phash is None or not len(self.look_hashes):
            return False
        near = np.bitwise_count(self.look_hashes ^ np.uint64(phash)) <= SIMILAR_BITS
        return bool(near.any() and _alike(self.look_thumbs[near], thumbnail(pixels)).any())


def find_repeats(folder: Path, *, repeated_links: int, similar_links: int, redirect_links: int) -> Repeats:
    """Look through a folder of preprocessed pictures; a number of links of 0 leaves that sign out."""
    least = {"sha256": repeated_links, "phash": similar_links, "final_url": redirect_links}
    least = {column: number for column, number in least.items() if number}
    if not least:
        return Repeats()
    paths = part_paths(folder)
    # A hash's neighbours add up, so a part of the number is enough to be looked at.
    counted = {column: max(2, number // 8) if column == "phash" else number for column, number in least.items()}
    seen = _count(paths, counted)
    frequent = {
        column: frozenset(str(value) for value, links in seen[column].items() if links.number >= least[column])
        for column in least
        if column != "phash"
    }
    hashes, thumbs = _looks(paths, seen["phash"], similar_links) if similar_links else ([], [])
    return Repeats(
        frequent.get("sha256", frozenset()),
        frequent.get("final_url", frozenset()),
        np.array(hashes, np.uint64),
        np.array(thumbs, np.uint8).reshape(-1, THUMB, THUMB, 3),
    )


@dataclass
class _Links:
    """The links behind one value."""

    enough: int
    rows: int = 0
    urls: set[int] = field(default_factory=set)
    """Hashes of different links, no more than `enough`."""
    digests: set[str] = field(default_factory=set)
    """Up to two sha256."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """Index of the part and key of some rows, drawn by their keys."""

    def add(self, url: str, digest: str | None, part: int, key: int) -> None:
        self.rows += 1
        if len(self.urls) < self.enough:
            self.urls.add(hash(url))
        if digest is not None and len(self.digests) < 2:
            self.digests.add(digest)
        # Reservoir sampling (Vitter's algorithm R), with the key in place of a random number.
        place = self.rows - 1 if self.rows <= SAMPLES else (key * _GOLDEN % 2**64 >> 20) % self.rows
        if place < SAMPLES:
            self.places[place : place + 1] = [(part, key)]

    @property
    def number(self) -> int:
        """Different links; beyond `enough` every row counts as one."""
        return self.rows if len(self.urls) >= self.enough else len(self.urls)


class _Sketch:
    """How often values occur, never too low and sometimes too high, in a table of fixed size.

    A count-min sketch of one row: Cormode and Muthukrishnan, 2005.
    """

    def __init__(self, num_rows: int) -> None:
        self._bits = min(SKETCH_BITS, max(10, (4 * num_rows).bit_length()))
        self._counts = np.zeros(1 << self._bits, np.uint32)

    def add(self, values: NDArray[np.uint64]) -> None:
        places, counts = np.unique(self._places(values), return_counts=True)
        self._counts[places] += counts.astype(np.uint32)

    def may_reach(self, values: NDArray[np.uint64], least: int) -> NDArray[np.bool_]:
        return self._counts[self._places(values)] >= least

    def _places(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return (values * np.uint64(_GOLDEN)) >> np.uint64(64 - self._bits)


def _count(paths: Sequence[Path], least: Mapping[str, int]) -> dict[str, dict[str | int, _Links]]:
    """column → value → its links, for every value that occurs at least `least[column]` times (and for some others)."""
    num_rows = sum(pq.read_metadata(readable(path)).num_rows for path in paths)
    sketches = {column: _Sketch(num_rows) for column in least}
    for _, rows in _light(paths):
        for column, sketch in sketches.items():
            sketch.add(_numbers(_with(rows, column)[column]))
    found: dict[str, dict[str | int, _Links]] = {column: {} for column in least}
    for part, rows in _light(paths):
        for column, sketch in sketches.items():
            known = _with(rows, column)
            often = known.filter(pa.array(sketch.may_reach(_numbers(known[column]), least[column])))
            columns = [often[name].to_pylist() for name in (column, "url", "sha256", "key")]
            for value, url, digest, key in zip(*columns, strict=True):
                found[column].setdefault(value, _Links(8 * least[column])).add(url, digest, part, key)
    return {
        column: {v: links for v, links in values.items() if links.number >= least[column]}
        for column, values in found.items()
    }


def _light(paths: Sequence[Path]) -> Iterator[tuple[int, pa.Table]]:
    """Each part's usable rows, without pictures."""
    columns = ["key", "url", "sha256", "phash", "final_url"]
    for part, path in enumerate(paths):
        yield part, pq.read_table(readable(path), columns=columns, filters=[("status", "=", schema.OK)])


def _with(rows: pa.Table, column: str) -> pa.Table:
    """The rows that have a value; an address counts only when the link was redirected to it."""
    if column == "final_url":
        return rows.filter(pc.fill_null(pc.not_equal(rows["final_url"], rows["url"]), False))
    return rows.filter(pc.is_valid(rows[column]))


def _numbers(values: pa.ChunkedArray) -> NDArray[np.uint64]:
    """(V,): a number for each value, the same for the same value within this process."""
    if pa.types.is_integer(values.type):
        return np.asarray(values.to_numpy(), np.uint64)
    return np.fromiter(map(hash, values.to_pylist()), np.int64, len(values)).view(np.uint64)


def _looks(
    paths: Sequence[Path], seen: Mapping[str | int, _Links], least: int
) -> tuple[list[int], list[NDArray[np.uint8]]]:
    """Pairs of a hash and a look that at least `least` links have in the hash's neighbourhood."""
    groups = _groups({int(value): links for value, links in seen.items()}, least)
    wanted = [place for members in groups.values() for links in members for place in links.places]
    thumbs = _read_thumbs(paths, wanted)
    hashes: list[int] = []
    looks: list[NDArray[np.uint8]] = []
    for centre, members in groups.items():
        shown = [(links.number, [thumbs[place] for place in links.places if place in thumbs]) for links in members]
        for look in _frequent_looks([(number, some) for number, some in shown if some], least):
            hashes.append(centre)
            looks.append(look)
    return hashes, looks


def _groups(seen: Mapping[int, _Links], least: int) -> dict[int, list[_Links]]:
    """The most frequent hashes, each with its neighbours, which belong to one centre only."""
    order = sorted(seen, key=lambda value: (-seen[value].number, value))[:MAX_CENTRES]
    values, free = np.array(order, np.uint64), np.ones(len(order), bool)
    groups: dict[int, list[_Links]] = {}
    for index, centre in enumerate(order):
        if len(groups) == MAX_GROUPS:
            break
        if free[index]:
            near = np.flatnonzero(free & (np.bitwise_count(values ^ values[index]) <= SIMILAR_BITS))
            members = [seen[order[place]] for place in near]
            digests = set().union(*(links.digests for links in members))
            if sum(links.number for links in members) >= least and len(digests) > 1:
                free[near] = False
                groups[centre] = members[:MAX_MEMBERS]
    return groups


def _frequent_looks(shown: Sequence[tuple[int, list[NDArray[np.uint8]]]], least: int) -> Iterator[NDArray[np.uint8]]:
    """Thumbnails that stand for `least` links or more; `shown`: each hash's number of links and some of its looks."""
    thumbs = np.array([thumb for _, some in shown for thumb in some])
    weights = np.array([number / len(some) for number, some in shown for _ in some])
    while len(thumbs):
        alike = np.array([_alike(thumbs, thumb) for thumb in thumbs])
        links = alike @ weights
        best = int(links.argmax())
        if links[best] < least:
            return
        yield thumbs[best]
        thumbs, weights = thumbs[~alike[best]], weights[~alike[best]]


def _alike(thumbs: NDArray[np.uint8], thumb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of (V, 16, 16, 3) look like one (16, 16, 3): (V,)."""
    apart = np.abs(thumbs.astype(np.int16) - thumb.astype(np.int16)).mean(axis=(1, 2, 3))
    return np.asarray(apart <= SIMILAR_LEVELS)


def _read_thumbs(paths: Sequence[Path], places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], NDArray[np.uint8]]:
    """(part, key) → how that row's picture looks; rows whose picture is damaged are left out."""
    by_part: dict[int, list[int]] = {}
    for part, key in places:
        by_part.setdefault(part, []).append(key)
    found: dict[tuple[int, int], NDArray[np.uint8]] = {}
    for part, keys in by_part.items():
        rows = pq.read_table(readable(paths[part]), columns=["key", "image"], filters=[("key", "in", keys)])
        for key, image in zip(rows["key"].to_pylist(), rows["image"].to_pylist(), strict=True):
            try:
                found[part, key] = thumbnail(np.asarray(decode(image or b"", LimitConfig())))
            except ImageError:
                continue
    return found
