"""The plan: which samples go into which pack of which step, written down before training starts.

    lengths (one row a conversation) ──choose, shuffle──▶ order of samples ──fill──▶ packs ──cut──▶ steps

It is made from lengths alone, so it costs no picture, and it is saved with the run (`plan.parquet`, one row for each
sample in the order in which it is seen).  A step is a fixed list of packs; rank r of w takes packs r, r+w, r+2w, …, so
any number of workers, and a run that was interrupted and continued with another number, sees the same steps.

Row groups are shuffled first and samples inside a window of them, so that each group is read about once an epoch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyvlm import schema
from tinyvlm.errors import CheckpointError, ConfigError, DataError
from tinyvlm.train.settings import TrainConfig

Ints = npt.NDArray[np.int64]

LENGTHS = pa.schema(
    [
        pa.field("key", pa.int64(), False),
        pa.field("part", pa.int32(), False),
        pa.field("group", pa.int32(), False),
        pa.field("row", pa.int32(), False),
        pa.field("family", pa.string(), False),
        pa.field("split", pa.string(), False),
        pa.field("status", pa.string(), False),
        pa.field("tokens", pa.int32(), False),
        pa.field("pictures", pa.int32(), False),
        pa.field("supervised", pa.int32(), False),
    ]
)
"""What the plan is made from.  `part`: number of the data file, `group`: row group in it, `row`: row in the group."""

OPEN_PACKS = 16
"""Packs that are filled at the same time."""


class Item(NamedTuple):
    """One sample in the plan: where its conversation lies, and its lengths."""

    key: int
    part: int
    group: int
    row: int
    tokens: int
    pictures: int
    supervised: int


Pack = list[Item]


@dataclass(frozen=True)
class Plan:
    """Packs in order, `packs_per_step` of them a step; the last step may have fewer."""

    items: Ints
    """(samples, 7): the columns of `Item`."""
    starts: Ints
    """(packs + 1): pack p holds the samples starts[p] … starts[p + 1]."""
    packs_per_step: int

    @property
    def num_packs(self) -> int:
        return len(self.starts) - 1

    @property
    def num_steps(self) -> int:
        return -(-self.num_packs // self.packs_per_step)

    def packs(self, step: int, rank: int = 0, world: int = 1) -> list[Pack]:
        """The packs of a step that a rank works on; empty ones fill up, so that all ranks have equally many."""
        first = step * self.packs_per_step
        numbers = range(first, min(first + self.packs_per_step, self.num_packs))
        mine = [self._pack(number) for number in numbers[rank::world]]
        return mine + [[]] * (-(-len(numbers) // world) - len(mine))

    def _pack(self, number: int) -> Pack:
        rows = self.items[self.starts[number] : self.starts[number + 1]].tolist()
        return [Item(*row) for row in rows]

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over everything that decides the order."""
        digest = hashlib.sha256(f"{self.packs_per_step}\n".encode())
        digest.update(np.ascontiguousarray(self.starts).tobytes())
        digest.update(np.ascontiguousarray(self.items).tobytes())
        return digest.hexdigest()

    def summary(self, pack_length: int) -> dict[str, Any]:
        """Totals for a person."""
        tokens = int(self.items[:, 4].sum())
        return {
            "steps": self.num_steps,
            "packs": self.num_packs,
            "samples": len(self.items),
            "conversations": len(np.unique(self.items[:, 0])),
            "tokens": tokens,
            "supervised_tokens": int(self.items[:, 6].sum()),
            "pictures": int(self.items[:, 5].sum()),
            "fill": round(tokens / max(1, self.num_packs * pack_length), 4),
            "fingerprint": self.fingerprint,
        }

    def save(self, path: Path) -> None:
        """Write the plan as Parquet, one row for each sample."""
        numbers = np.repeat(np.arange(self.num_packs), np.diff(self.starts))
        columns = {"step": numbers // self.packs_per_step, "pack": numbers}
        columns |= {name: self.items[:, place] for place, name in enumerate(Item._fields)}
        table = pa.table(columns).replace_schema_metadata({"packs_per_step": str(self.packs_per_step)})
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        pq.write_table(table, temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises CheckpointError when the file cannot be read."""
        try:
            table = pq.read_table(path)
            packs_per_step = int(table.schema.metadata[b"packs_per_step"])
            packs = table["pack"].to_numpy()
        except (OSError, KeyError, TypeError, pa.ArrowInvalid) as error:
            raise CheckpointError(f"The plan {path} cannot be read ({error}); delete it and run again.") from None
        items = np.stack([table[name].to_numpy() for name in Item._fields], axis=1).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(np.bincount(packs))]).astype(np.int64)
        return cls(items, starts, packs_per_step)


def build(lengths: pa.Table, config: TrainConfig) -> Plan:
    """The plan of a whole stage.

    Raises:
        DataError: no conversation is left to train on.
        ConfigError: more steps are wanted than the epochs give.
    """
    table = usable(lengths, config, "train")
    if table.num_rows == 0:
        raise DataError(
            f"The input has no training conversation of the families {', '.join(config.families)} with at most "
            f"{config.pack_length} tokens; choose other families, or a larger pack_length."
        )
    order = np.concatenate([_epoch_order(table, config, epoch) for epoch in range(config.epochs)])
    plan = _cut(table, order, config)
    if config.steps > plan.num_steps:
        raise ConfigError(
            f"steps is {config.steps}, but epochs={config.epochs} give {plan.num_steps}; raise epochs or lower steps."
        )
    if config.steps:
        starts = plan.starts[: config.steps * config.packs_per_step + 1]
        plan = Plan(plan.items[: starts[-1]], starts, config.packs_per_step)
    return plan


def build_validation(lengths: pa.Table, config: TrainConfig) -> Plan:
    """Held-out conversations of the same families, at most `max_validation`, each once, in one fixed order."""
    table = usable(lengths, config, "validation")
    order = np.random.default_rng([config.seed, 0]).permutation(table.num_rows)[: config.max_validation]
    return _cut(table, order.astype(np.int64), config)


def usable(lengths: pa.Table, config: TrainConfig, split: str) -> pa.Table:
    """The conversations of a split that this stage may see."""
    families = [family for family, weight in config.families.items() if weight > 0]
    keep = pc.and_(pc.equal(lengths["status"], schema.OK), pc.equal(lengths["split"], split))
    keep = pc.and_(keep, pc.is_in(lengths["family"], pa.array(families, pa.string())))
    return lengths.filter(pc.and_(keep, pc.less_equal(lengths["tokens"], config.pack_length)))


def count_statuses(lengths: pa.Table, config: TrainConfig) -> dict[str, int]:
    """How many training conversations of this stage's families are usable, and why the others are not."""
    families = pa.array([family for family, weight in config.families.items() if weight > 0], pa.string())
    table = lengths.filter(pc.and_(pc.equal(lengths["split"], "train"), pc.is_in(lengths["family"], families)))
    too_long = pc.and_(pc.equal(table["status"], schema.OK), pc.greater(table["tokens"], config.pack_length))
    statuses = pc.if_else(too_long, "too_long", table["status"])
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(statuses).to_pylist()}


def _epoch_order(table: pa.Table, config: TrainConfig, epoch: int) -> Ints:
    """Row numbers of `table` in the order of one epoch."""
    random = np.random.default_rng([config.seed, epoch + 1])
    weights = np.array([config.families[family] for family in table["family"].to_pylist()], np.float64)
    copies = np.floor(weights).astype(np.int64) + (random.random(len(weights)) < weights % 1.0)
    chosen = np.repeat(np.arange(table.num_rows), copies)
    places = np.stack([table["part"].to_numpy(), table["group"].to_numpy()], axis=1)
    groups, group = np.unique(places, axis=0, return_inverse=True)
    window = random.permutation(len(groups))[group.reshape(-1)] // config.window_groups
    shuffled: Ints = chosen[np.lexsort((random.random(len(chosen)), window[chosen]))]
    return shuffled


def _cut(table: pa.Table, order: Ints, config: TrainConfig) -> Plan:
    """Fill packs in order; inside a step the heaviest come first, so that ranks get equal shares."""
    columns = np.stack([table[name].to_numpy() for name in Item._fields], axis=1).astype(np.int64)
    tokens, pictures = columns[:, 4], columns[:, 5]
    packs = fill(tokens[order].tolist(), config.pack_length, config.samples_per_pack)
    members = [order[pack] for pack in packs]
    ordered: list[Ints] = []
    for first in range(0, len(members), config.packs_per_step):
        step = members[first : first + config.packs_per_step]
        ordered += sorted(step, key=lambda pack: (-int(pictures[pack].sum()), -int(tokens[pack].sum())))
    starts = np.concatenate([[0], np.cumsum([len(pack) for pack in ordered])]).astype(np.int64)
    flat = np.concatenate(ordered) if ordered else np.zeros(0, np.int64)
    return Plan(columns[flat], starts, config.packs_per_step)


def fill(lengths: Sequence[int], pack_length: int, samples_per_pack: int = 0) -> list[list[int]]:
    """Put samples (by number) into packs of at most `pack_length` tokens, in order.

    A sample goes to the oldest open pack that has room, and the oldest is closed when one more is needed: so packs fill
    well, and no sample stays behind for long, which would make its row group be read twice.
    """
    if samples_per_pack == 1:
        return [[number] for number in range(len(lengths))]
    done: list[list[int]] = []
    packs: list[list[int]] = []
    room: list[int] = []
    for number, length in enumerate(lengths):
        place = next((place for place, left in enumerate(room) if left >= length), len(packs))
        if place == len(packs):
            if place == OPEN_PACKS:
                done.append(packs.pop(0))
                room.pop(0)
                place -= 1
            packs.append([])
            room.append(pack_length)
        packs[place].append(number)
        room[place] -= length
        if room[place] == 0 or len(packs[place]) == samples_per_pack:
            done.append(packs.pop(place))
            room.pop(place)
    return done + packs
