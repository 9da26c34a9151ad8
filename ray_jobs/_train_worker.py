"""What each Ray Train worker runs.  Apart from the driver's code, so that a worker imports no more than it needs.

SIGTERM to this worker, or its node is about to be taken ─▶ checkpoint; Ray starts the workers again, elsewhere
stop file from the driver                                ─▶ checkpoint; the run ends
an error that is a sentence                              ─▶ error.json; the run ends, for it would fail again
"""

from __future__ import annotations

import json
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyvlm.errors import Interrupted, TinyVLMError
from tinyvlm.folders import write_atomic
from tinyvlm.train.run import TrainingRun

ERROR_FILE = "error.json"
"""Where a worker leaves the reason why it gave up."""
STOP_FILE = "stop"
"""Its presence asks the workers to stop."""
LOOK_EVERY_S = 0.5
"""At most so often worker 0 looks for it: a shared disk may be slow to answer."""

_terminated = threading.Event()


def take_sigterm() -> None:
    """Have the first SIGTERM ask for a checkpoint; a second one ends this process at once.  In the main thread."""

    def notice(number: int, frame: Any) -> None:
        _terminated.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, notice)


def work(settings: dict[str, Any]) -> None:
    """Train.  A worker is given everything, and finds nothing but the folder."""
    training: TrainingRun = settings["training"]
    try:
        import ray.train.torch

        from tinyvlm.train.host import prepare_host

        prepare_host(settings["num_threads"])
        from tinyvlm.train.collective import Group
        from tinyvlm.train.evaluate import evaluate_finished
        from tinyvlm.train.worker import carry_out

        group, device = Group(), str(ray.train.torch.get_device())
        wants_to_stop = _wants_to_stop(training.folder / STOP_FILE if group.rank == 0 else None)
        carry_out(training, group, settings["lease_number"], device, _report, wants_to_stop)
        if group.rank == 0:
            evaluate_finished(training, device)
    except TinyVLMError as error:
        if isinstance(error, Interrupted) and not (training.folder / STOP_FILE).exists():
            raise RuntimeError(str(error)) from error  # one of many workers has to go: Ray goes on with others
        content = {"error": str(error), "kind": type(error).__name__, "traceback": traceback.format_exc()}
        write_atomic(training.folder / ERROR_FILE, json.dumps(content))
        raise


def _wants_to_stop(stop_file: Path | None) -> Callable[[], bool]:
    """Whether this worker would stop after the step; asked often."""
    looked = 0.0

    def ask() -> bool:
        nonlocal looked
        if _terminated.is_set() or _is_preempted():
            return True
        if stop_file is None or time.monotonic() - looked < LOOK_EVERY_S:
            return False
        looked = time.monotonic()
        return stop_file.exists()

    return ask


def _is_preempted() -> bool:
    """A node of these workers is about to be taken away.

    `ray.train.get_preemption_info` says the same, but is a meeting of all workers at each call; here they agree anyway.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _report(step: int, loss: float) -> None:
    """Every worker tells Ray the same, at the same steps: a report is a meeting of all workers."""
    import ray.train

    ray.train.report({"step": step, "held_out_loss": loss})
