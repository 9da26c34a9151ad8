"""A ledger of what entered the model, kept outside of the trainer: the proof that a resumed run saw what it should.

    {folder}/ledger/attempt-000001.rank-00000-of-00002.jsonl       one file for each start of the run and each worker
        {"plan": …, "first_step": 0, "updates": 0, "skipped": 0}     updates: as the optimizer itself has counted them
        {"step": 0, "packs": ["5f0c…", …]}                          on the medium before the step begins

    all files ──judge──▶ step → the packs of its last attempt, and what is wrong with them

A pack's digest is made of the tensors that are handed to the model (`Batch.digests`), not of what the plan says.
Steps count from 0.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tinyvlm.errors import DataError
from tinyvlm.train.batch import Batch
from tinyvlm.train.collective import Collective

_NAME = re.compile(r"attempt-(\d+)\.rank-(\d+)-of-(\d+)\.jsonl")


class Ledger:
    """One worker's file of one attempt.

    Args:
        folder: of the run; all workers see the same.
    """

    def __init__(self, folder: Path, collective: Collective, device: str = "cpu") -> None:
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
        latest = max((number for number, *_ in _files(folder)), default=0)
        number = torch.tensor([latest + 1], device=device)
        collective.broadcast(number)  # another worker may have looked when worker 0 had its file already
        name = f"attempt-{int(number):06d}.rank-{collective.rank:05d}-of-{collective.world:05d}.jsonl"
        self.path = folder / "ledger" / name
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def start(self, plan: str, first_step: int, updates: int, skipped: int) -> None:
        """Note where this attempt begins."""
        self._write({"plan": plan, "first_step": first_step, "updates": updates, "skipped": skipped})

    def step(self, step: int, batches: Sequence[Batch]) -> None:
        """Note what is about to enter the model; on the medium when this returns.

        Raises:
            DataError: it cannot be written.
        """
        self._write({"step": step, "packs": [digest for batch in batches if batch.packs for digest in batch.digests]})

    def close(self) -> None:
        """No more will come."""
        os.close(self._file)

    def _write(self, line: Mapping[str, Any]) -> None:
        content = json.dumps(line).encode() + b"\n"
        try:
            while content:  # a disk that is nearly full takes a part
                content = content[os.write(self._file, content) :]
            os.fsync(self._file)
        except OSError as error:
            said = f"The ledger {self.path} cannot be written ({error.strerror}); free some space, or set ledger=false."
            raise DataError(said) from None


def _files(folder: Path) -> list[tuple[int, int, int, Path]]:
    """(attempt, rank, world, path) of each file, in this order."""
    found = [(match, path) for path in (folder / "ledger").glob("*.jsonl") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), int(match[2]), int(match[3]), path) for match, path in found)


@dataclass
class Attempt:
    """What all workers together noted from one start of the run to its end."""

    number: int
    world: int
    heads: list[dict[str, Any]] = field(default_factory=list)
    """The first line of each worker that came so far."""
    steps: dict[int, list[str]] = field(default_factory=dict)
    """Step → digests of its packs, from all workers, sorted."""
    ranks: dict[int, int] = field(default_factory=dict)
    """Step → how many workers noted it."""

    @property
    def first_step(self) -> int:
        return int(self.heads[0]["first_step"])

    def is_whole(self, step: int) -> bool:
        """Every worker noted it: only then can the step have been done."""
        return self.ranks.get(step) == self.world


@dataclass(frozen=True)
class Verdict:
    """What a ledger says."""

    steps: dict[int, list[str]]
    """Step → digests of the packs that count, sorted: of the last attempt at it."""
    attempts: list[Attempt]
    faults: list[str]
    """Sentences; none if every step was done once, with the same packs in each attempt at it."""


def judge(folder: Path, num_steps: int | None = None) -> Verdict:
    """Merge the ledgers of a run's workers and attempts.

    Args:
        num_steps: of a run that is said to be finished; one that is not may lack steps at its end.
    """
    attempts = [attempt for attempt in _read(folder) if attempt.heads]
    steps: dict[int, list[str]] = {}
    faults: list[str] = []
    plans = {head["plan"] for attempt in attempts for head in attempt.heads}
    if len(plans) > 1:
        faults.append(f"The attempts followed {len(plans)} plans.")
    for attempt in attempts:
        faults += _check(attempt, steps)
        steps = {step: packs for step, packs in steps.items() if step < attempt.first_step}
        steps |= {step: packs for step, packs in attempt.steps.items() if attempt.is_whole(step)}
    last = num_steps if num_steps is not None else max(steps, default=-1) + 1
    missing = sorted(set(range(last)) - set(steps))
    if missing:
        faults.append(f"{len(missing)} steps were never done, the first of them {missing[0]}.")
    if num_steps is not None and (beyond := [step for step in steps if step >= num_steps]):
        faults.append(f"Step {beyond[0]} was done, but the plan has {num_steps} only.")
    return Verdict(dict(sorted(steps.items())), attempts, faults)


def _check(attempt: Attempt, before: Mapping[int, list[str]]) -> list[str]:
    """What is wrong with one attempt, after what counted until then."""
    who, head, faults = f"Attempt {attempt.number}", attempt.heads[0], []
    if any(other != head for other in attempt.heads):
        faults.append(f"{who}: its workers do not begin at the same place.")
    if head["updates"] + head["skipped"] != head["first_step"]:
        faults.append(
            f"{who} begins with step {head['first_step']}, but its optimizer has made {head['updates']} updates "
            f"and {head['skipped']} steps were skipped."
        )
    if gap := sorted(set(range(head["first_step"])) - set(before)):
        faults.append(f"{who} begins with step {head['first_step']}, but step {gap[0]} was not done before.")
    noted = sorted(attempt.steps)
    if noted != list(range(head["first_step"], head["first_step"] + len(noted))):
        faults.append(f"{who}: its steps do not follow one another.")
    for step, packs in attempt.steps.items():
        known = before.get(step)
        if known is not None and (set(packs) - set(known) or (attempt.is_whole(step) and packs != known)):
            faults.append(f"{who}: step {step} has other packs than the attempt before.")
    return faults


def _read(folder: Path) -> list[Attempt]:
    found: dict[int, Attempt] = {}
    for number, _, world, path in _files(folder):
        attempt = found.setdefault(number, Attempt(number, world))
        for text in path.read_bytes().split(b"\n")[:-1]:  # a line without an end was cut off
            line = json.loads(text)
            if "first_step" in line:
                attempt.heads.append(line)
                continue
            step = line["step"]
            attempt.steps[step] = sorted([*attempt.steps.get(step, []), *line["packs"]])
            attempt.ranks[step] = attempt.ranks.get(step, 0) + 1
    return list(found.values())
