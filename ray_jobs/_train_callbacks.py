"""What Ray Train's controller does besides: it ends a run that would only fail again, and lets workers take SIGTERM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from ray_jobs._train_worker import take_sigterm
from tinyvlm.train import checkpoint

MAX_FAILURES = 3
"""So many times workers may be lost without a new checkpoint in between; with one, it begins anew."""


class EndHopelessRuns(UserCallback):
    """Raising in the controller ends the run, where returning has it start the workers again."""

    def __init__(self, error_file: Path, checkpoints: Path) -> None:
        self._error_file, self._checkpoints = error_file, checkpoints
        self._failures, self._newest = 0, ""

    def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
        """Called when workers have failed."""
        if self._error_file.is_file():
            raise RuntimeError("a worker left its reason in error.json")
        kept = checkpoint.complete(self._checkpoints)
        newest = kept[-1].name if kept else ""
        self._failures = self._failures + 1 if newest == self._newest else 1
        self._newest = newest
        if self._failures > MAX_FAILURES:
            raise RuntimeError(next(iter(worker_exceptions.values())))


class TakeSigterm(WorkerGroupCallback):
    """Python takes signals in the main thread, and training runs in another one: only from here can it be reached."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called when all workers are there, before they train."""
        worker_group.execute(take_sigterm)
