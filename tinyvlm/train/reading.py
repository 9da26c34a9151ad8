"""What carrying out a plan reads: computed from the plan and the sizes of row groups, before anything is read.

Each worker keeps a window of the row groups that it used last (`data.Conversations`).  A row group that has left it and
is wanted again is read again, and so is one that two workers want.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tinyvlm.train.data import group_bytes
from tinyvlm.train.plan import Plan


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


def group_sizes(files: Sequence[Path]) -> dict[tuple[int, int], GroupSize]:
    """(part, group) → its size, from the files' footers."""
    sizes = {}
    for part, path in enumerate(files):
        metadata = pq.read_metadata(path)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            sizes[part, number] = GroupSize(group.num_rows, group_bytes(group))
    return sizes


def reading(plan: Plan, sizes: Mapping[tuple[int, int], GroupSize], world: int) -> Reading:
    """What `world` workers read when they carry a plan out."""
    places = plan.items["part"].astype(np.int64) << 32 | plan.items["group"]
    found, groups = np.unique(places, return_inverse=True)
    known = [sizes[int(place) >> 32, int(place) & (1 << 32) - 1] for place in found]
    num_bytes = [size.bytes for size in known]
    per_row = np.array([size.bytes / size.rows for size in known])
    used = float((np.bincount(groups.reshape(-1), minlength=len(known)) * per_row).sum())
    groups_read = bytes_read = most = 0
    capacity = plan.shape.groups_held(world)
    for rank in range(world):
        held: OrderedDict[int, None] = OrderedDict()
        now = 0
        for step in range(plan.num_steps):
            begin, end = plan.samples(step, rank, world)
            for group in dict.fromkeys(groups[begin:end].tolist()):
                if group in held:
                    held.move_to_end(group)
                    continue
                while len(held) >= capacity:
                    now -= num_bytes[held.popitem(last=False)[0]]
                held[group] = None
                now += num_bytes[group]
                groups_read, bytes_read, most = groups_read + 1, bytes_read + num_bytes[group], max(most, now)
    return Reading(
        workers=world,
        groups_read=groups_read,
        read_bytes=bytes_read,
        used_bytes=round(used),
        ratio=round(bytes_read / max(1.0, used), 3),
        window_groups=capacity,
        window_bytes=most,
    )
