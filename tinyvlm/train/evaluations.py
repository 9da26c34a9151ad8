"""Evaluations of checkpoints: what is on disk, and when one is due.  What is done is in evaluate.py.

    checkpoints/step-…  ──the newest is far enough past the last evaluated──▶ a process of its own takes the newest
                                                                               │
    evaluations/step-00000500.json   {"step", "bleu": [4], …} or {"step", "failed": why}  ◀──────┘
    evaluations/samples.json         the finished model's answers about held-out pictures

Training never waits for an evaluation: while one is at work, checkpoints come and go; the next one takes the newest.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tinyvlm.folders import write_atomic
from tinyvlm.train.shown import ShowConfig

log = logging.getLogger(__name__)


def paths(folder: Path) -> list[Path]:
    """The evaluations of a run, by their steps."""
    return sorted((folder / "evaluations").glob("step-????????.json"))


def read_one(path: Path) -> Iterator[Mapping[str, Any]]:
    """What an evaluation says; nothing if it cannot be read."""
    try:
        yield json.loads(path.read_text())
    except (OSError, ValueError) as error:
        log.warning("the evaluation %s cannot be read (%s)", path, error)


def read(folder: Path) -> list[Mapping[str, Any]]:
    """All evaluations of a run, by their steps."""
    return [told for path in paths(folder) for told in read_one(path)]


def write(folder: Path, step: int, told: Mapping[str, Any]) -> None:
    """Keep an evaluation after `step` steps."""
    place = folder / "evaluations"
    place.mkdir(parents=True, exist_ok=True)
    write_atomic(place / f"step-{step:08d}.json", json.dumps({"step": step, "time": time.time(), **told}))


class Job(Protocol):
    """An evaluation at work in another process, which writes its result itself."""

    def is_running(self) -> bool:
        """It is not over yet."""

    def failure(self) -> str:
        """Why it failed, once it is over; "" when it did not."""

    def stop(self) -> None:
        """Give it up."""


class Evaluations:
    """Has checkpoints evaluated, one at a time.

    Args:
        folder: of the run.
        start: begins the evaluation of the newest checkpoint.
        checkpoints: where those are, if not in the run's folder.
    """

    def __init__(
        self, folder: Path, config: ShowConfig, start: Callable[[], Job], checkpoints: Path | None = None
    ) -> None:
        self._folder, self._start = folder, start
        self._checkpoints = checkpoints or folder / "checkpoints"
        self._every = config.bleu_every_steps if config.bleu_captions else 0
        self._last = 0
        self._look()
        self._job: Job | None = None

    def tick(self) -> None:
        """Look after the one at work, else start the next if it is due.  Call it often."""
        if not self._every or (self._job is not None and self._job.is_running()):
            return
        if (self._folder / "result.json").is_file():  # the finished model comes next, and not from here
            return self.stop()
        if self._job is not None:
            self._close(self._job)
        from tinyvlm.train import checkpoint  # not before there may be one: it brings torch

        newest = max(checkpoint.complete(self._checkpoints), default=None)
        if newest is not None and (step := _step_of(newest)) >= self._last + self._every:
            self._job, self._last = self._start(), step

    def stop(self) -> None:
        """No more; the one at work is given up, for the finished model is measured anyway."""
        self._every = 0
        if self._job is not None:
            if self._job.is_running():
                self._job.stop()
            else:
                self._close(self._job)
            self._job = None

    def _look(self) -> None:
        self._last = max([self._last, *(int(told["step"]) for told in read(self._folder))])

    def _close(self, job: Job) -> None:
        self._job = None
        reason = job.failure()
        if reason:
            log.warning("the checkpoint of step %d was not evaluated: %s", self._last, reason)
            write(self._folder, self._last, {"failed": reason})
        self._look()
        if not reason and not any(told.get("num_captions") for told in read(self._folder)):
            log.info("no held-out captions: BLEU is not measured")
            self._every = 0


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
