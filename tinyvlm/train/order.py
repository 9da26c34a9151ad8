"""The order of a plan: rows of an epoch → windows of row groups → packs → steps, in a way that is kind to storage.

    row groups, shuffled ──▶ windows of some with many and with few pictures ──▶ shuffled, then packed ──▶ a long row of
    packs:   [--- lane 0 ---|--- lane 1 ---|--- lane 2 ---|--- lane 3 ---]     cut into stretches of equal length
    step 0:   ^^             ^^             ^^             ^^                  a step takes some packs of each lane,
    step 1:     ^^             ^^             ^^             ^^                lane by lane

A rank works on a stretch of each step, so on lanes of its own: it reads the row groups of these lanes and holds a
window of each.  The number of lanes is a setting, not the number of workers, so the order is the same for all of them;
where lanes do not divide among workers, two of them read the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyvlm.data.mixture import Quota, Walk
from tinyvlm.data.packing import Limits, Packer
from tinyvlm.errors import ConfigError
from tinyvlm.train.settings import TrainConfig

Numbers = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

PICTURES_ABOVE_AVERAGE = 1.5
"""Unless the settings say otherwise, a pack holds at most so many times the pictures of an average one."""


@dataclass(frozen=True)
class Shape:
    """What a plan is cut by."""

    packs_per_step: int
    pack_length: int
    pictures_per_pack: int
    samples_per_pack: int
    lanes: int
    window_groups: int

    def groups_held(self, world: int) -> int:
        """The most row groups that one of `world` workers keeps in memory, to read each about once an epoch.

        Of each of its lanes the window, and the one before while samples of it wait for a pack.
        """
        lanes = -(-self.lanes // world) + (1 if self.lanes % world else 0)
        return 2 * self.window_groups * lanes


class Rows(NamedTuple):
    """Conversations to be put into order."""

    tokens: Numbers
    pictures: Numbers
    groups: Numbers
    """Number of each one's row group."""


class Packs(NamedTuple):
    """Packs one after another."""

    members: Numbers
    """Rows of all packs, pack by pack."""
    sizes: Numbers
    """How many rows each pack has."""

    @property
    def starts(self) -> Ints:
        """(packs + 1): where each pack begins in `members`, and where the last one ends."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes, dtype=np.int64)])

    def take(self, order: Ints) -> Packs:
        """The packs of these numbers, in this order."""
        sizes = self.sizes[order]
        ends = np.cumsum(sizes, dtype=np.int64)
        places = np.arange(sizes.sum(dtype=np.int64)) + np.repeat(self.starts[order] - ends + sizes, sizes)
        return Packs(self.members[places], sizes)

    def first(self, number: int) -> Packs:
        """The first packs."""
        sizes = self.sizes[:number]
        return Packs(self.members[: sizes.sum(dtype=np.int64)], sizes)

    @classmethod
    def join(cls, many: Sequence[Packs]) -> Packs:
        """All of them, one after another."""
        empty = np.zeros(0, np.int32)
        return cls(
            np.concatenate([empty, *(m.members for m in many)]), np.concatenate([empty, *(m.sizes for m in many)])
        )

    @classmethod
    def of(cls, packs: Sequence[Sequence[int]]) -> Packs:
        """From lists of rows."""
        members = np.array([row for pack in packs for row in pack], np.int32)
        return cls(members, np.array([len(pack) for pack in packs], np.int32))


def arrange(
    rows: Rows, codes: Numbers, quotas: Sequence[Quota], config: TrainConfig, epochs: int | None = None
) -> tuple[Packs, Shape]:
    """All packs of a stage in the order of its steps; only the last step may have fewer than the others.

    Args:
        codes: (rows,) the number of each row's quota.
        epochs: instead of those of the settings; then `steps` does not count either.
    """
    num_epochs, most = (config.epochs, config.steps) if epochs is None else (epochs, 0)
    shape = Shape(
        config.packs_per_step,
        config.pack_length,
        _picture_limit(rows, codes, quotas, config),
        config.samples_per_pack,
        min(config.lanes, config.packs_per_step),
        config.window_groups,
    )
    done: list[Packs] = []
    waiting = Packs.of([])
    num_packs = 0
    for made in _epochs(rows, codes, quotas, shape, config.seed, num_epochs):
        packs = Packs.join([waiting, made])
        in_steps = _in_lanes(len(packs.sizes), shape)
        if shape.samples_per_pack == 1:
            _group_by_length(in_steps, rows.tokens[packs.members], shape, config)
        done.append(packs.take(in_steps.reshape(-1)))
        waiting = packs.take(np.arange(in_steps.size, len(packs.sizes)))
        num_packs += in_steps.size
        if most and num_packs >= most * shape.packs_per_step:
            break
    return Packs.join([*done, waiting]), shape


def _epochs(
    rows: Rows, codes: Numbers, quotas: Sequence[Quota], shape: Shape, seed: int, epochs: int
) -> Iterator[Packs]:
    """The packs of each epoch; what would not fill a pack waits for the next one."""
    walk = Walk(codes, rows.groups, quotas, seed)
    packer = Packer(Limits(shape.pack_length, shape.pictures_per_pack, shape.samples_per_pack), [seed, 0, 1])
    for epoch in range(epochs):
        taken, times = walk.epoch(epoch)
        order, sizes = _windows(taken, times, rows, shape, np.random.default_rng([seed, epoch + 1]))
        del taken, times
        if shape.samples_per_pack == 1:
            yield Packs(order, np.ones(len(order), np.int32))
            continue
        made = []
        for window in np.split(order, np.cumsum(sizes)[:-1]):
            made.append(Packs.of(packer.add(window, rows.tokens[window], rows.pictures[window])))
        if epoch == epochs - 1:
            made.append(Packs.of(packer.finish()))
        yield Packs.join(made)


def _windows(
    taken: Numbers, times: Numbers, rows: Rows, shape: Shape, random: np.random.Generator
) -> tuple[Numbers, Ints]:
    """The epoch's rows, shuffled inside windows of row groups, and the number of rows of each window.

    A row group that is wanted twice is visited twice.  A window has row groups with many pictures and with few, so that
    packs can be filled and workers, each with windows of its own, have about equally much to do.
    """
    place = rows.groups[taken].astype(np.int64) * (int(times.max(initial=0)) + 1) + times
    visit = np.unique(place, return_inverse=True)[1].reshape(-1)
    del place
    pictures = np.bincount(visit, rows.pictures[taken])
    tokens = np.bincount(visit, rows.tokens[taken])
    # In steps of a tenth, and by lot inside of them, so that not always the same ones meet.
    density = np.round(10 * np.log2(1 + 1000 * pictures / np.maximum(1, tokens)))
    by_density = np.lexsort((random.random(len(density)), density))
    window = np.empty(len(density), np.int32)
    num_windows = -(-len(density) // shape.window_groups)
    number = random.permutation(num_windows)
    for first in range(0, len(density), max(1, num_windows)):
        some = by_density[first : first + num_windows]
        window[some] = (number if first // num_windows % 2 == 0 else number[::-1])[: len(some)]
    window_of_row = window[visit]
    del visit
    order = np.lexsort((random.random(len(taken), np.float32), window_of_row))
    return taken[order], np.bincount(window_of_row)


def _in_lanes(num_packs: int, shape: Shape) -> Ints:
    """(steps, packs a step): which packs each step takes; those that fill no step are left."""
    steps = num_packs // shape.packs_per_step
    ends = np.arange(shape.lanes + 1) * shape.packs_per_step // shape.lanes
    slot = np.arange(shape.packs_per_step)
    lane = np.searchsorted(ends, slot, side="right") - 1
    width = np.diff(ends)[lane]
    return steps * ends[lane] + slot - ends[lane] + np.arange(steps)[:, None] * width


def _group_by_length(in_steps: Ints, tokens: Numbers, shape: Shape, config: TrainConfig) -> None:
    """Sort the samples of some steps by length, lane by lane, and shuffle the steps: each is of similar lengths then.

    Changes `in_steps`.  Done lane by lane, so that a sample stays where its row group is read.
    """
    random = np.random.default_rng([config.seed, 1, len(in_steps)])
    ends = np.arange(shape.lanes + 1) * shape.packs_per_step // shape.lanes
    for first in range(0, len(in_steps), config.steps_of_one_length):
        some = in_steps[first : first + config.steps_of_one_length]
        steps = random.permutation(len(some))
        for begin, end in itertools.pairwise(ends):
            lane = some[:, begin:end].reshape(-1)
            some[steps, begin:end] = lane[np.argsort(tokens[lane], kind="stable")].reshape(len(some), -1)


def _picture_limit(rows: Rows, codes: Numbers, quotas: Sequence[Quota], config: TrainConfig) -> int:
    """Pictures that a pack may hold.

    What follows from the mixture is a bound that packs of average samples do not meet, and that keeps memory, shapes
    and the shares of workers within known limits.
    """
    most = int(rows.pictures.max(initial=0))
    if config.pictures_per_pack:
        if most > config.pictures_per_pack:
            raise ConfigError(
                f"pictures_per_pack is {config.pictures_per_pack}, but a conversation has {most} pictures; "
                "raise it, or leave that source out of the mixture."
            )
        return config.pictures_per_pack
    tokens = np.bincount(codes, rows.tokens, len(quotas))
    pictures = np.bincount(codes, rows.pictures, len(quotas))
    often = np.array([quota.samples / quota.usable for quota in quotas])
    per_token = float((pictures * often).sum() / max(1.0, (tokens * often).sum()))
    return max(most, int(np.ceil(PICTURES_ABOVE_AVERAGE * config.pack_length * per_token)))
