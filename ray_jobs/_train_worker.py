"""What each Ray Train worker runs.  Apart from the driver's code, so that a worker imports no more than it needs."""

from __future__ import annotations

import json
import traceback
from typing import Any

from tinyvlm.errors import TinyVLMError
from tinyvlm.folders import write_atomic
from tinyvlm.train.run import TrainingRun

ERROR_FILE = "error.json"
"""Where a worker leaves the reason why it gave up."""


def work(settings: dict[str, Any]) -> None:
    """Train.  A worker is given everything, and finds nothing but the folder."""
    training: TrainingRun = settings["training"]
    try:
        import ray.train.torch

        from tinyvlm.train.host import prepare_host

        prepare_host(settings["num_threads"])
        from tinyvlm.train.collective import Group
        from tinyvlm.train.worker import carry_out

        carry_out(training, Group(), settings["lease_number"], str(ray.train.torch.get_device()), _report)
    except TinyVLMError as error:
        content = {"error": str(error), "kind": type(error).__name__, "traceback": traceback.format_exc()}
        write_atomic(training.folder / ERROR_FILE, json.dumps(content))
        raise


def _report(step: int, loss: float) -> None:
    """Every worker tells Ray the same, at the same steps: a report is a meeting of all workers."""
    import ray.train

    ray.train.report({"step": step, "held_out_loss": loss})
