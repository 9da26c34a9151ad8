"""Row groups in memory, and what carrying out a plan reads: known from the plan and the files' footers beforehand.

A worker keeps a window of row groups.  When it is full, the one goes that is wanted again last: that is the best choice
there is (Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5, 1966), and
here it can be made, for the plan knows what comes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tinyvlm.train.plan import Plan

Place = tuple[int, int]
"""(part, group) of a row group."""


PAUSE = 16
"""A row group that nothing wants for so many steps is given up at once."""

READ_COLUMNS = ("key", "messages", "images.list.element.sha256", "images.list.element.bytes")
"""What is read of a row group for its samples."""

_NEVER = np.zeros(0, np.int32)


class Window:
    """Which row groups one worker holds.

    Args:
        capacity: the most.
        uses: row group → the steps that want it, ascending.  Without any, the newest are held.
    """

    def __init__(self, capacity: int, uses: Mapping[Place, npt.NDArray[np.int32]] | None = None) -> None:
        self.capacity, self._uses = capacity, uses or {}
        self._held: dict[Place, None] = {}

    @classmethod
    def of(cls, plan: Plan, rank: int, world: int) -> Window:
        """For one worker's share of a plan."""
        edges = np.array([plan.samples(step, rank, world) for step in range(plan.num_steps)], np.int64).reshape(-1, 2)
        sizes = edges[:, 1] - edges[:, 0]
        places = np.repeat(edges[:, 0] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        steps = np.repeat(np.arange(plan.num_steps), sizes)
        items = plan.items[places]
        found, number = np.unique(_places(items), return_inverse=True)
        del items, places
        pairs = np.unique(number.reshape(-1) * plan.num_steps + steps)
        ends = np.searchsorted(pairs, (np.arange(len(found)) + 1) * plan.num_steps)
        wanted = np.split((pairs % max(1, plan.num_steps)).astype(np.int32), ends[:-1])
        uses = dict(zip(map(_place, found.tolist()), wanted, strict=False))
        return cls(plan.shape.groups_held(world), uses)

    def __contains__(self, place: Place) -> bool:
        return place in self._held

    def enter(self, place: Place, step: int) -> list[Place]:
        """Hold one row group more, for a step; which ones are given up for it."""
        stay = list(self._held)
        if self._uses:
            coming = {held: use for held in stay if (use := self._next_use(held, step)) <= step + PAUSE}
            stay = sorted(coming, key=lambda held: -coming[held])
        stay = stay[max(0, len(stay) + 1 - self.capacity) :]
        gone = [held for held in self._held if held not in stay]
        self._held = dict.fromkeys([*stay, place])
        return gone

    def _next_use(self, place: Place, step: int) -> float:
        """The first step from `step` on that wants it."""
        at = self._uses.get(place, _NEVER)
        number = int(np.searchsorted(at, step))
        return float(at[number]) if number < len(at) else math.inf


@dataclass(frozen=True)
class GroupSize:
    """Of one row group."""

    rows: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What all workers together read in one training stage."""

    workers: int
    groups_read: int
    read_bytes: int
    used_bytes: int
    """Of the samples seen, each with its share of its row group."""
    ratio: float
    """Bytes read ÷ bytes used."""
    window_groups: int
    """Row groups that one worker may hold."""
    window_bytes: int
    """The most that one worker holds at a time, as the bytes lie on disk."""


def group_bytes(group: pq.RowGroupMetaData) -> int:
    """Bytes of a row group that are read for its samples."""
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(chunk.total_compressed_size for chunk in chunks if _is_read(chunk.path_in_schema))


def _is_read(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in READ_COLUMNS)


def group_sizes(files: Sequence[Path]) -> dict[Place, GroupSize]:
    """(part, group) → its size, from the files' footers."""
    sizes = {}
    for part, path in enumerate(files):
        metadata = pq.read_metadata(path)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            sizes[part, number] = GroupSize(group.num_rows, group_bytes(group))
    return sizes


def reading(plan: Plan, sizes: Mapping[Place, GroupSize], world: int) -> Reading:
    """What `world` workers read when they carry a plan out."""
    found, numbers, counts = np.unique(_places(plan.items), return_inverse=True, return_counts=True)
    places = [_place(place) for place in found.tolist()]
    each = [sizes[place] for place in places]
    used = sum(count * size.bytes / size.rows for count, size in zip(counts.tolist(), each, strict=True))
    groups_read = bytes_read = most = 0
    for rank in range(world):
        window, now = Window.of(plan, rank, world), 0
        for step in range(plan.num_steps):
            begin, end = plan.samples(step, rank, world)
            for place in (places[number] for number in numbers[begin:end].tolist()):
                if place not in window:
                    now += sizes[place].bytes - sum(sizes[gone].bytes for gone in window.enter(place, step))
                    groups_read, bytes_read, most = groups_read + 1, bytes_read + sizes[place].bytes, max(most, now)
    return Reading(
        workers=world,
        groups_read=groups_read,
        read_bytes=bytes_read,
        used_bytes=round(used),
        ratio=round(bytes_read / max(1.0, used), 3),
        window_groups=plan.shape.groups_held(world),
        window_bytes=most,
    )


def _places(items: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """(part, group) of each sample as one number."""
    places: npt.NDArray[np.int64] = items["part"].astype(np.int64) << 32 | items["group"]
    return places


def _place(number: int) -> Place:
    return number >> 32, number & (1 << 32) - 1
