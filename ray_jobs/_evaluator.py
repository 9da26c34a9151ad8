"""Evaluations of checkpoints as Ray tasks, beside the workers that train and with resources of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray_jobs._cluster import StageResources
from tinyvlm.train.run import TrainingRun


def starter(ray: Any, training: TrainingRun, resources: StageResources) -> Callable[[], EvaluationTask]:
    """What begins the evaluation of the newest checkpoint."""
    return lambda: EvaluationTask(ray, training, resources)


class EvaluationTask:
    """One evaluation; where there is no room for it yet, it waits, and training does not."""

    def __init__(self, ray: Any, training: TrainingRun, resources: StageResources) -> None:
        self._ray = ray
        # A process that is used once: it makes itself less important, for good.
        task = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_calls=1, max_retries=0)(
            _evaluate
        )
        self._answer = task.remote(training)

    def is_running(self) -> bool:
        """It is not over yet."""
        return not self._ray.wait([self._answer], timeout=0)[0]

    def failure(self) -> str:
        """Why it failed; "" when it did not."""
        try:
            self._ray.get(self._answer, timeout=0)
        except Exception as error:  # whatever the task raised; the training goes on without it
            cause = getattr(error, "cause", None) or error
            return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:200]}"
        return ""

    def stop(self) -> None:
        """Give it up."""
        self._ray.cancel(self._answer, force=True)


def _evaluate(training: TrainingRun) -> None:
    from tinyvlm.train.evaluate import beside

    beside(training)
