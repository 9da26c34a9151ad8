"""What a training stage is fed: which sources and families, and how often.

    (source, family) of every conversation ──the entry that fits best──▶ so many samples an epoch      quotas
    a fixed shuffle of its row groups, walked round and round ──▶ the next so many rows, each epoch    Walk

An entry is a family (`vqa`), a source (`alpaca`; `m3it` means all of `m3it/…`) or a family of a source (`m3it/vqa`).  A
conversation belongs to one entry only, the most specific that fits it: `m3it/coco` before `m3it/caption` before `m3it`
before `caption`.

Where less than everything is wanted, whole row groups are taken and the last one in part, so that little is read in
vain; the next epoch goes on where this one stopped.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyvlm.errors import ConfigError, DataError
from tinyvlm.schema import FAMILIES

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How often each entry's conversations are seen."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"caption": 1.0})
    """Entry → times an epoch: 2 is twice, 0.25 another quarter each epoch, 0 never."""
    budgets: Mapping[str, int] = field(default_factory=dict)
    """Entry → samples an epoch, exactly."""
    samples: int = 0
    """Samples an epoch in all, exactly: weights then say how to share what budgets leave.  0: no such limit."""

    def __post_init__(self) -> None:
        names = [*self.weights, *self.budgets]
        if len(set(names)) < len(names):
            twice = ", ".join(sorted(set(self.weights) & set(self.budgets)))
            raise ConfigError(f"mixture gives {twice} a weight and a budget; choose one of the two.")
        numbers = [*self.weights.values(), *self.budgets.values()]
        if not numbers or min(numbers) < 0 or not any(numbers):
            raise ConfigError(
                "mixture wants weights or budgets of sources or families, at least one above 0, "
                f"but got {dict(self.weights)!r} and {dict(self.budgets)!r}."
            )
        for name in names:
            if not all(name.split("/")):
                raise ConfigError(f"mixture names {name!r}; an entry is a source, a family, or source/family.")
        rest = self.samples - sum(self.budgets.values())
        if self.samples < 0 or (self.samples and (rest < 0 or (rest > 0) != any(self.weights.values()))):
            raise ConfigError(
                f"mixture.samples is {self.samples}, of which budgets take {sum(self.budgets.values())} and weights "
                f"share the rest, but they are {dict(self.weights)!r}; make the numbers fit."
            )

    def __str__(self) -> str:
        parts = [f"{name} ×{weight:g}" for name, weight in self.weights.items()]
        parts += [f"{number:,} of {name}" for name, number in self.budgets.items()]
        return ", ".join(parts) + (f"; {self.samples:,} samples an epoch" if self.samples else "")


class Kind(NamedTuple):
    """What a mixture tells apart."""

    source: str
    family: str


class Quota(NamedTuple):
    """What an epoch takes of one kind."""

    kind: Kind
    entry: str
    """The entry that it belongs to; "" when none names it."""
    usable: int
    """Conversations there are."""
    samples: int
    """How many samples an epoch has of them."""


def entry_of(kind: Kind, names: Sequence[str]) -> str:
    """The most specific of the entries that fit; "" when none does."""
    return max((name for name in names if _fits(name, kind)), key=_specificity, default="")


def _parse(name: str) -> tuple[str, str]:
    """Source and family that an entry asks for; "" asks for any."""
    source, _, last = name.rpartition("/")
    return (source, last) if last in FAMILIES else (name, "")


def _fits(name: str, kind: Kind) -> bool:
    source, family = _parse(name)
    return (not source or f"{kind.source}/".startswith(f"{source}/")) and family in ("", kind.family)


def _specificity(name: str) -> tuple[int, bool]:
    source, family = _parse(name)
    return len(source.split("/")) if source else 0, bool(family)


def quotas(present: Mapping[Kind, int], usable: Mapping[Kind, int], config: MixtureConfig) -> list[Quota]:
    """How many samples an epoch takes of each kind, those that no entry names included.

    Args:
        present: conversations of each kind for training, whatever their status.
        usable: those of them that can be used.

    Raises:
        ConfigError: an entry fits nothing that is there.
        DataError: a budget's entry has nothing usable.
    """
    names = [*config.weights, *config.budgets]
    for name in names:
        if not any(_fits(name, kind) for kind in present):
            raise ConfigError(_fits_nothing(name, present))
    members: dict[str, list[Kind]] = {name: [] for name in ["", *names]}
    for kind in sorted(present):
        members[entry_of(kind, names)].append(kind)
    sizes = {name: sum(usable.get(kind, 0) for kind in kinds) for name, kinds in members.items()}
    wanted = _samples_of_entries(sizes, config)
    made = []
    for name, kinds in members.items():
        counts = [usable.get(kind, 0) for kind in kinds]
        shares = _apportion(wanted.get(name, 0), counts)
        made += [Quota(*item) for item in zip(kinds, [name] * len(kinds), counts, shares, strict=True)]
    return sorted(made)


def _samples_of_entries(sizes: Mapping[str, int], config: MixtureConfig) -> dict[str, int]:
    for name, number in config.budgets.items():
        if number and not sizes[name]:
            raise DataError(f"mixture.budgets wants {number} samples of {name}, which has no usable conversation left.")
    wanted = dict(config.budgets)
    if config.samples:
        shares = [weight * sizes[name] for name, weight in config.weights.items()]
        total = config.samples - sum(config.budgets.values())
        if total and not any(shares):
            raise DataError(f"mixture.samples wants {total} samples of {config}, which have no usable conversation.")
        return wanted | dict(zip(config.weights, _apportion(total, shares), strict=True))
    return wanted | {name: round(weight * sizes[name]) for name, weight in config.weights.items()}


def _apportion(total: int, sizes: Sequence[float]) -> list[int]:
    """`total` in whole numbers in proportion to `sizes`, by the largest remainders (Hamilton's method)."""
    if not total or not any(sizes):
        return [0] * len(sizes)
    exact = np.array(sizes, np.float64) * (total / sum(sizes))
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]
    shares[largest] += 1
    return [int(share) for share in shares]


def _fits_nothing(name: str, present: Mapping[Kind, int]) -> str:
    known = sorted({kind.family for kind in present})
    for kind in sorted(present):
        steps = kind.source.split("/")
        known += ["/".join(steps[: end + 1]) for end in range(len(steps))]
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    there = ", ".join(f"{kind.source}/{kind.family} ({number:,})" for kind, number in sorted(present.items()))
    return (
        f"mixture names {name!r}, but the input has no such source or family"
        f"{f'; did you mean {chr(39)}{near[0]}{chr(39)}?' if near else '.'} "
        f"There is: {there or 'nothing for training'}. "
        f"A source that is missing comes from `python -m ray_jobs.prepare`, with prepare.source set to it."
    )


class Walk:
    """Which rows each epoch takes.

    Args:
        codes: (rows,) the number of each row's quota.
        groups: (rows,) the number of each row's row group.
        chosen: the quotas, by number.
    """

    def __init__(self, codes: Numbers, groups: Numbers, chosen: Sequence[Quota], seed: int) -> None:
        self._quotas = chosen
        order = np.argsort(codes, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(codes, minlength=len(chosen)))
        self._rounds = [
            _shuffled(order[end - quota.usable : end], groups, quota.kind, seed)
            for end, quota in zip(ends, chosen, strict=True)
        ]

    def epoch(self, number: int) -> tuple[Numbers, Numbers]:
        """The rows of an epoch, and of each the how manieth time it is seen in it (0 the first)."""
        rows, times = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for quota, once_round in zip(self._quotas, self._rounds, strict=True):
            if quota.samples:
                first = number * quota.samples % quota.usable
                places = np.arange(first, first + quota.samples) % quota.usable
                rows.append(once_round[places])
                times.append((np.arange(quota.samples) // quota.usable).astype(np.int32))
        return np.concatenate(rows), np.concatenate(times)


def _shuffled(rows: Numbers, groups: Numbers, kind: Kind, seed: int) -> Numbers:
    """Rows of one kind, row group by row group in a random order; another kind more or less changes nothing."""
    digest = hashlib.sha256(f"{kind.source}\n{kind.family}".encode()).digest()
    random = np.random.default_rng([seed, int.from_bytes(digest[:8])])
    found, group = np.unique(groups[rows], return_inverse=True)
    return rows[np.lexsort((random.random(len(rows)), random.permutation(len(found))[group.reshape(-1)]))]


def takes(kind: Kind, config: MixtureConfig) -> bool:
    """A mixture wants some of this kind."""
    entry = entry_of(kind, [*config.weights, *config.budgets])
    return bool(entry) and bool(config.weights.get(entry) or config.budgets.get(entry))


def table(chosen: Sequence[Quota], seen: Mapping[Kind, Sequence[int]]) -> list[dict[str, Any]]:
    """Of each kind: its entry, its usable conversations, what an epoch takes, and what a plan shows of it in all.

    Args:
        seen: kind → samples, and how many different conversations they are.
    """
    return [
        {
            "source": quota.kind.source,
            "family": quota.kind.family,
            "entry": quota.entry or "none: left out",
            "usable": quota.usable,
            "an_epoch": quota.samples,
            "samples": seen.get(quota.kind, (0, 0))[0],
            "seen": seen.get(quota.kind, (0, 0))[1],
        }
        for quota in chosen
    ]


def remarks(chosen: Sequence[Quota]) -> list[str]:
    """What a person should know before the work starts: what is seen more than once an epoch, and what not at all."""
    said = []
    for quota in chosen:
        name, there = "/".join(quota.kind), f"{quota.usable:,} conversations"
        if quota.samples > quota.usable:
            times = quota.samples / quota.usable
            said.append(f"upsampled: {name} is seen {times:.3g} times an epoch ({there}, {quota.samples:,} samples)")
        elif not quota.entry:
            said.append(f"left out: no entry of the mixture names {name} ({there})")
        elif not quota.samples:
            said.append(f"not seen: {quota.entry} takes nothing of {name} ({there} usable)")
    return said


def lines(kinds: Sequence[Mapping[str, Any]], said: Sequence[str]) -> list[str]:
    """A plan's mixture (`table`) and its remarks, for a log."""
    counts = [
        f"{kind['source']}/{kind['family']}: {kind['samples']:,} samples of {kind['usable']:,} conversations"
        for kind in kinds
        if kind["samples"]
    ]
    return [*counts, *said]
