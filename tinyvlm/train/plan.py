"""The plan: which samples go into which pack of which step, written down before training starts.

    lengths (one row a conversation) ──mixture──▶ this epoch's rows ──order──▶ windows ──fill──▶ packs ──▶ steps

It is made from lengths alone (order.py), so it costs no picture, and it is saved with the run (`plan.parquet`, one row
for each sample in the order in which it is seen).  A step is a fixed list of packs, of which rank r of w takes the r-th
of w stretches; so any number of workers, and a run that was interrupted and continued with another number, sees the
same steps.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import schema
from tinyvlm.data import mixture
from tinyvlm.data.mixture import Kind, Quota
from tinyvlm.errors import CheckpointError, ConfigError, DataError
from tinyvlm.train import order
from tinyvlm.train.order import Numbers, Shape
from tinyvlm.train.settings import TrainConfig

Ints = npt.NDArray[np.int64]

_NAME = pa.dictionary(pa.int32(), pa.string())

LENGTHS = pa.schema(
    [
        pa.field("key", pa.int64(), False),
        pa.field("part", pa.int32(), False),
        pa.field("group", pa.int32(), False),
        pa.field("row", pa.int32(), False),
        pa.field("source", _NAME, False),
        pa.field("family", _NAME, False),
        pa.field("split", _NAME, False),
        pa.field("status", _NAME, False),
        pa.field("tokens", pa.int32(), False),
        pa.field("pictures", pa.int32(), False),
        pa.field("supervised", pa.int32(), False),
    ]
)
"""What the plan is made from.  `part`: number of the data file among those of all folders, in the order in which the
folders are given; `group`: row group in it; `row`: row in the group.  `key` is unique in its folder only."""


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

BATCH = 8
"""Padded samples that go through the model together, where the fill of a plan is told: the published number."""

_ITEM = np.dtype([(name, np.int64 if name == "key" else np.int32) for name in Item._fields])


@dataclass(frozen=True)
class Plan:
    """Packs in order, `shape.packs_per_step` of them a step; the last step may have fewer."""

    items: npt.NDArray[np.void]
    """(samples,): records of `Item`."""
    starts: Ints
    """(packs + 1): pack p holds the samples starts[p] … starts[p + 1]."""
    shape: Shape
    mixture: list[dict[str, Any]]
    """Of each source and family, what is seen of it (`mixture.table`)."""
    remarks: list[str]
    """What a person should know of it (`mixture.remarks`)."""

    @property
    def num_packs(self) -> int:
        return len(self.starts) - 1

    @property
    def num_steps(self) -> int:
        return -(-self.num_packs // self.shape.packs_per_step)

    def packs(self, step: int, rank: int = 0, world: int = 1) -> list[Pack]:
        """The packs of a step that a rank works on; empty ones fill up, so that all ranks have equally many."""
        mine = self._share(step, rank, world)
        most = max(len(self._share(step, other, world)) for other in range(world))
        return [self._pack(pack) for pack in mine] + [[]] * (most - len(mine))

    def samples(self, step: int, rank: int = 0, world: int = 1) -> tuple[int, int]:
        """Where in `items` a rank's share of a step begins and ends."""
        mine = self._share(step, rank, world)
        return int(self.starts[mine.start]), int(self.starts[mine.stop])

    def _share(self, step: int, rank: int, world: int) -> range:
        """Numbers of the packs of a step that a rank works on."""
        first = step * self.shape.packs_per_step
        number = min(self.shape.packs_per_step, self.num_packs - first)
        return range(first + number * rank // world, first + number * (rank + 1) // world)

    def _pack(self, number: int) -> Pack:
        rows = self.items[self.starts[number] : self.starts[number + 1]].tolist()
        return [Item(*row) for row in rows]

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over everything that decides the order."""
        digest = hashlib.sha256(f"{self.shape.packs_per_step}\n".encode())
        digest.update(np.ascontiguousarray(self.starts).data)
        digest.update(np.ascontiguousarray(self.items).view(np.uint8).data)
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Totals for a person."""
        tokens = int(self.items["tokens"].sum(dtype=np.int64))
        places = np.unique(self.items["part"].astype(np.int64) << 32 | self.items["group"])
        return {
            "steps": self.num_steps,
            "packs": self.num_packs,
            "samples": len(self.items),
            "conversations": sum(kind["seen"] for kind in self.mixture),
            "tokens": tokens,
            "supervised_tokens": int(self.items["supervised"].sum(dtype=np.int64)),
            "pictures": int(self.items["pictures"].sum(dtype=np.int64)),
            "pictures_per_pack": self.shape.pictures_per_pack,
            "row_groups": len(places),
            "fill": round(tokens / max(1, self._positions()), 4),
            "fingerprint": self.fingerprint,
        }

    def _positions(self) -> int:
        """Positions that the samples lie in: a pack's are fixed; padded ones are as many as the longest of their batch.

        Batches are `BATCH` samples of a step that are neighbours by length.
        """
        if self.shape.samples_per_pack != 1:
            return self.num_packs * self.shape.pack_length
        positions = 0
        for step in range(self.num_steps):
            begin, end = self.samples(step)
            tokens = np.sort(self.items["tokens"][begin:end])[::-1]
            positions += BATCH * int(tokens[::BATCH].sum()) - int(tokens[-1]) * (-len(tokens) % BATCH)
        return positions

    def save(self, path: Path) -> None:
        """Write the plan as Parquet, one row for each sample."""
        packs = np.repeat(np.arange(self.num_packs, dtype=np.int32), np.diff(self.starts))
        columns = {"step": packs // np.int32(self.shape.packs_per_step), "pack": packs}
        columns |= {name: self.items[name] for name in Item._fields}
        about = {
            "shape": json.dumps(asdict(self.shape)),
            "mixture": json.dumps(self.mixture),
            "remarks": json.dumps(self.remarks),
        }
        table = pa.table(columns).replace_schema_metadata(about)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises CheckpointError when the file cannot be read."""
        try:
            table = pq.read_table(path)
            shape = Shape(**json.loads(table.schema.metadata[b"shape"]))
            kinds, remarks = (json.loads(table.schema.metadata[name]) for name in (b"mixture", b"remarks"))
            packs = table["pack"].to_numpy()
            items = _records(table, np.arange(table.num_rows))
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowInvalid) as error:
            raise CheckpointError(f"The plan {path} cannot be read ({error}); delete it and run again.") from None
        starts = np.concatenate([[0], np.cumsum(np.bincount(packs))]).astype(np.int64)
        return cls(items, starts, shape, kinds, remarks)


def build(lengths: pa.Table, config: TrainConfig) -> Plan:
    """The plan of a whole stage.

    Raises:
        DataError: no conversation is left to train on.
        ConfigError: the mixture names what is not there; more steps are wanted than the epochs give; or a conversation
            has more pictures than a pack may hold.
    """
    kinds, codes = kinds_of(lengths)
    in_split, usable = _usable(lengths, config, "train")
    chosen = mixture.quotas(_count(kinds, codes[in_split]), _count(kinds, codes[usable]), config.mixture)
    taken = [quota for quota in chosen if quota.samples]
    if not taken:
        raise DataError(
            f"The input has no training conversation of {config.mixture} with at most {config.pack_length} tokens; "
            "choose others, or a larger pack_length."
        )
    number = {quota.kind: place for place, quota in enumerate(taken)}
    codes = np.array([number.get(kind, -1) for kind in kinds], np.int32)[codes]
    rows = np.flatnonzero(usable & (codes >= 0))
    items, codes = _records(lengths, rows), codes[rows]
    del rows, usable, in_split
    made, shape = order.arrange(_of(items), codes, taken, config)
    if config.steps > -(-len(made.sizes) // config.packs_per_step):
        raise ConfigError(
            f"steps is {config.steps}, but epochs={config.epochs} give "
            f"{-(-len(made.sizes) // config.packs_per_step)}; raise epochs or lower steps."
        )
    if config.steps:
        made = made.first(config.steps * config.packs_per_step)
    seen = _seen(made.members, codes, chosen, taken)
    return Plan(items[made.members], made.starts, shape, seen, mixture.remarks(chosen))


def build_validation(lengths: pa.Table, config: TrainConfig) -> Plan:
    """Held-out conversations of the same entries, at most `max_validation`, each once, in one fixed order."""
    kinds, codes = kinds_of(lengths)
    wanted = np.array([mixture.takes(kind, config.mixture) for kind in kinds], bool)
    rows = np.flatnonzero(_usable(lengths, config, "validation")[1] & wanted[codes])
    rows = np.sort(np.random.default_rng([config.seed, 0]).permutation(rows)[: config.max_validation])
    items = _records(lengths, rows)
    quota = [Quota(Kind("", ""), "", len(rows), len(rows))] if len(rows) else []
    made, shape = order.arrange(_of(items), np.zeros(len(rows), np.int32), quota, config, epochs=1)
    return Plan(items[made.members], made.starts, shape, [], [])


def count_statuses(lengths: pa.Table, config: TrainConfig) -> dict[str, int]:
    """How many training conversations of this stage's entries are usable, and why the others are not."""
    kinds, codes = kinds_of(lengths)
    wanted = np.array([mixture.takes(kind, config.mixture) for kind in kinds], bool)
    statuses, status = _names(lengths["status"])
    mine = _is(lengths["split"], "train") & wanted[codes]
    too_long = mine & _is(lengths["status"], schema.OK) & (_numbers(lengths, "tokens") > config.pack_length)
    counts = dict(zip(statuses, np.bincount(status[mine & ~too_long], minlength=len(statuses)).tolist(), strict=True))
    counts["too_long"] = counts.get("too_long", 0) + int(too_long.sum())
    return {name: count for name, count in counts.items() if count}


def _seen(members: Numbers, codes: Numbers, chosen: list[Quota], taken: list[Quota]) -> list[dict[str, Any]]:
    """`mixture.table` of what a plan really shows."""
    samples = np.bincount(codes[members], minlength=len(taken)).tolist()
    once = np.zeros(len(codes), bool)
    once[members] = True
    conversations = np.bincount(codes[once], minlength=len(taken)).tolist()
    numbers = {quota.kind: pair for quota, *pair in zip(taken, samples, conversations, strict=True)}
    return mixture.table(chosen, numbers)


def _of(items: npt.NDArray[np.void]) -> order.Rows:
    places = items["part"].astype(np.int64) << 32 | items["group"]
    groups = np.unique(places, return_inverse=True)[1].reshape(-1).astype(np.int32)
    return order.Rows(np.ascontiguousarray(items["tokens"]), np.ascontiguousarray(items["pictures"]), groups)


def _records(table: pa.Table, rows: Ints) -> npt.NDArray[np.void]:
    records = np.empty(len(rows), _ITEM)
    for name in Item._fields:
        records[name] = table[name].to_numpy()[rows]
    return records


def _usable(lengths: pa.Table, config: TrainConfig, split: str) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which rows belong to a split, and which of them this stage can use."""
    in_split = _is(lengths["split"], split)
    fits = _numbers(lengths, "tokens") <= config.pack_length
    return in_split, in_split & _is(lengths["status"], schema.OK) & fits


def kinds_of(lengths: pa.Table) -> tuple[list[Kind], Numbers]:
    """All sources with all families, and the number of each row's."""
    sources, source = _names(lengths["source"])
    families, family = _names(lengths["family"])
    return [Kind(one, other) for one in sources for other in families], source * np.int32(len(families)) + family


def _count(kinds: list[Kind], codes: Numbers) -> dict[Kind, int]:
    counts = np.bincount(codes, minlength=len(kinds)).tolist()
    return {kind: count for kind, count in zip(kinds, counts, strict=True) if count}


def _is(column: pa.ChunkedArray, name: str) -> npt.NDArray[np.bool_]:
    names, codes = _names(column)
    found: npt.NDArray[np.bool_] = codes == (names.index(name) if name in names else -1)
    return found


def _names(column: pa.ChunkedArray) -> tuple[list[str], Numbers]:
    """The names in a dictionary column, and the number of each row's."""
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # an empty one
        return [], np.zeros(0, np.int32)
    return whole.dictionary.to_pylist(), whole.indices.to_numpy()


def _numbers(lengths: pa.Table, name: str) -> Numbers:
    return lengths[name].to_numpy()  # type: ignore[no-any-return]
