"""What Ray Train's controller does besides: it ends a run that would only fail again, and lets workers take SIGTERM."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from ray_jobs._train_worker import ERROR_FILE, take_sigterm
from tinyvlm.train import checkpoint
from tinyvlm.train.run import WARNINGS_FILE

MAX_FAILURES = 3
"""So many times workers may be lost without a new checkpoint in between; with one, it begins anew."""


class EndHopelessRuns(UserCallback):  # type: ignore[misc, unused-ignore]
    """Raising in the controller ends the run, where returning has it start the workers again.

    Args:
        folder: of the run.
        checkpoints: where they lie.
    """

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self._folder, self._checkpoints = folder, checkpoints
        self._failures, self._newest = 0, ""

    def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
        """Called when workers have failed."""
        if (self._folder / ERROR_FILE).is_file():
            raise RuntimeError("a worker left its reason in error.json")
        kept = checkpoint.complete(self._checkpoints)
        newest = kept[-1].name if kept else ""
        self._failures = self._failures + 1 if newest == self._newest else 1
        self._newest = newest
        reasons = {rank: _last_line(error) for rank, error in sorted(worker_exceptions.items())}
        if self._failures > MAX_FAILURES:
            raise RuntimeError(next(iter(reasons.values())))
        said = "; ".join(f"worker {rank} was lost ({reason})" for rank, reason in reasons.items())
        with contextlib.suppress(OSError), (self._folder / WARNINGS_FILE).open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\t{said}; going on from {newest or 'the start'}\n")


class TakeSigterm(WorkerGroupCallback):  # type: ignore[misc, unused-ignore]
    """Python takes signals in the main thread, and training runs in another one: only from here can it be reached."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called when all workers are there, before they train."""
        worker_group.execute(take_sigterm)


def _last_line(error: BaseException) -> str:
    """What a failure says at its end, where a traceback has the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__
