"""Carry out a training stage with Ray Train: the same folder comes out as from `tinyvlm.train.run.run_local`.

    driver: lease, follower ──TorchTrainer──▶ workers (_train_worker.py) ──▶ driver: close the folder
            ├─▶ progress line, Ray's metrics, trackers
            └─▶ evaluations of checkpoints, as tasks (_evaluator.py)

Ray places the workers, joins them into a process group and starts them again when one is lost.  It holds no position
and no checkpoint: started again, workers go on from the newest checkpoint in the folder.  What a worker raises on
purpose is left in `error.json` and ends the run at once, without another attempt.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_jobs import _cluster
from ray_jobs._cli import Job, show_plan
from ray_jobs._cluster import StageResources
from ray_jobs._evaluator import EvaluationTask, starter
from ray_jobs._train_worker import ERROR_FILE, work
from ray_jobs._training_metrics import TrainingMetrics
from ray_jobs._training_progress import TrainingProgress
from tinyvlm import config, errors
from tinyvlm.errors import StageError, TinyVLMError
from tinyvlm.folders import Manifest
from tinyvlm.lease import Lease
from tinyvlm.train.follow import shown
from tinyvlm.train.run import TrainingRun, open_run

WORKERS = 2
"""Of a cluster without GPUs, unless --workers says otherwise; with GPUs, one for each."""
EACH = StageResources(num_cpus=1.0, num_gpus=1.0, gpu_optional=True)
MAX_FAILURES = 3
"""Lost workers (killed, out of memory, a node gone) that one command makes up for."""
COLLECTIVE_TIMEOUT_S = 600
"""Longest that a worker waits for the others; must cover the slowest one's saving and evaluating."""

log = logging.getLogger(__name__)


def run(stage: str, job: Job) -> None:
    """What the entry points call."""
    recipe = config.to_dict(job.recipe)
    training = open_run(stage, getattr(job.recipe, stage), recipe, job.inputs, job.output)
    if job.dry_run:
        show_plan(stage, job, plan(training, job.workers))
        return
    was_finished = training.is_finished
    manifest = run_training(training, job.workers)
    if was_finished:
        log.info("%s is finished already, nothing to do: %s", stage, training.folder)
    else:
        numbers = manifest.extra["metrics"]
        log.info(
            "%s finished: %d steps in %.1f s, loss %s, held-out loss %s",
            *(stage, numbers["steps"], manifest.seconds, numbers["last_loss"], numbers["held_out_loss"]),
        )
        log.info("%s: %s", stage, training.folder)


def plan(training: TrainingRun, workers: int | None) -> dict[str, Any]:
    """What `run_training` would do, as JSON types; touches nothing."""
    return {
        "plan": {
            "folder": str(training.folder),
            "finished": training.is_finished,
            "reads": {"prepare": list(training.prepare), "init": training.init or "built from recipe.model"},
        },
        "resources": {"workers": workers or f"one a GPU, else {WORKERS}", "each": EACH.demand},
    }


def run_training(training: TrainingRun, workers: int | None) -> Manifest:
    """Do what is left of a training stage, on the cluster that `_cluster.connected` finds.

    Raises:
        TinyVLMError: one sentence; checkpoints stay, and the same command continues.
    """
    if training.is_finished:  # before Ray is imported: saying so should be quick
        return training.finished_manifest()
    started = time.perf_counter()
    if training.is_trained:
        with Lease.take(training.folder):
            return training.finish(time.perf_counter() - started)
    with _cluster.connected() as ray:
        resources = _cluster.without_missing_gpu(ray, training.stage, EACH)
        most = 4096 if resources.num_gpus else WORKERS
        size = _cluster.pool_size(ray, training.stage, workers, workers or most, resources)
        _cluster.require_shared(ray, Path(training.root))
        with Lease.take(training.folder) as lease:
            (training.folder / ERROR_FILE).unlink(missing_ok=True)
            num_threads = _cluster.threads_per_worker(ray, size, resources)
            log.info("%s: %d workers of %s", training.stage, size, resources)
            evaluate = starter(ray, training, _spare(ray, size, resources))
            trainer = _trainer(training, lease.number, size, resources, num_threads)
            _fit(training, trainer, evaluate)
            return training.finish(time.perf_counter() - started)


def _spare(ray: Any, size: int, resources: StageResources) -> StageResources:
    """What an evaluation asks for: a GPU where the workers leave one, else a CPU."""
    spare = ray.cluster_resources().get("GPU", 0.0) - size * resources.num_gpus
    return StageResources(num_cpus=EACH.num_cpus, num_gpus=1.0 if spare >= 1 else 0.0)


def _fit(training: TrainingRun, trainer: Any, evaluate: Callable[[], EvaluationTask]) -> None:
    """Run the trainer in a thread of its own, for Ray takes Ctrl-C away from the main thread if it may."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    metrics = TrainingMetrics(training.stage)
    with (
        TrainingProgress(training.stage, training.folder, metrics) as progress,
        shown(training, evaluate, progress.take) as follower,
    ):
        thread.start()
        while thread.is_alive():
            thread.join(0.25)
            follower.tick()
            progress.tick()
        if failures:
            raise _in_words(training, failures[0])


def _trainer(training: TrainingRun, lease_number: int, size: int, resources: StageResources, num_threads: int) -> Any:
    # Read by Ray when the trainer starts: how often its controller looks at the workers (2 s), and a watcher for
    # preempted nodes, which is a process of its own.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray.train
    import ray.train.torch

    return ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"training": training, "lease_number": lease_number, "num_threads": num_threads},
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=size, use_gpu=bool(resources.num_gpus), resources_per_worker=resources.demand
        ),
        run_config=ray.train.RunConfig(
            # A name that was used before would make Ray continue that run by its own lights.
            name=f"{training.folder.name}-{lease_number}",
            storage_path=str(training.folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[_stop_on_error_file(training.folder / ERROR_FILE)],
        ),
    )


def _stop_on_error_file(path: Path) -> Any:
    from ray.train import UserCallback

    class StopOnErrorFile(UserCallback):
        """A worker that failed on purpose would fail again: raising in the controller ends the run."""

        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            if path.is_file():
                raise RuntimeError("a worker left its reason in error.json")

    return StopOnErrorFile()


def _in_words(training: TrainingRun, failure: BaseException) -> TinyVLMError:
    """The worker's own error as the same class here, else what Ray says."""
    path = training.folder / ERROR_FILE
    if path.is_file():
        content = json.loads(path.read_text())
        kind = getattr(errors, content["kind"], StageError)
        return kind(content["error"]) if issubclass(kind, TinyVLMError) else StageError(content["error"])
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    (training.folder / "error.txt").write_text("".join(traceback.format_exception(failure)))
    return StageError(
        f"{training.stage} lost its workers more than {MAX_FAILURES} times ({lines[-1] if lines else failure!r}); "
        f"checkpoints stay, and the same command continues (the whole story: {training.folder / 'error.txt'})."
    )
