"""Carry out a training stage with Ray Train: the same folder comes out as from `tinyvlm.train.run.run_local`.

    driver: lease, follower ──TorchTrainer──▶ workers (_train_worker.py) ──▶ driver: close the folder
            ├─▶ progress line, Ray's metrics, trackers
            └─▶ evaluations of checkpoints, as tasks (_evaluator.py)

Ray places the workers, joins them into a process group and starts them again when one is lost; with `--workers MIN-MAX`
on as many as the cluster has at the time.  It holds no position and no checkpoint: started again, workers go on from
the newest checkpoint in the folder.  What a worker raises on purpose is left in `error.json` and ends the run at once,
without another attempt.  SIGTERM to the driver (`ray job stop`) has the workers keep a checkpoint first.
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
from ray_jobs._train_worker import ERROR_FILE, STOP_FILE, work
from ray_jobs._training_metrics import TrainingMetrics
from ray_jobs._training_progress import TrainingProgress
from tinyvlm import config, errors
from tinyvlm.errors import StageError, TinyVLMError
from tinyvlm.folders import Manifest
from tinyvlm.lease import Lease
from tinyvlm.train import checkpoint
from tinyvlm.train.follow import shown
from tinyvlm.train.run import TrainingRun, open_run
from tinyvlm.train.stopping import sigterm_noticed

WORKERS = 2
"""Of a cluster without GPUs, unless --workers says otherwise; with GPUs, one for each."""
EACH = StageResources(num_cpus=1.0, num_gpus=1.0, gpu_optional=True)
START_TIMEOUT_S = 30
"""Longest that Ray waits for all workers to be there before it tries again, with fewer where that is allowed."""
RESIZE_EVERY_S = 60.0
"""An elastic run looks so often whether the cluster has room for more workers; taking them costs a restart."""
COLLECTIVE_TIMEOUT_S = 600
"""Longest that a worker waits for the others; must cover the slowest one's saving and evaluating."""

log = logging.getLogger(__name__)


def run(stage: str, job: Job) -> None:
    """What the entry points call."""
    recipe = config.to_dict(job.recipe)
    training = open_run(stage, getattr(job.recipe, stage), recipe, job.inputs, job.output)
    if job.dry_run:
        show_plan(stage, job, plan(training, job.workers, job.min_workers))
        return
    was_finished = training.is_finished
    manifest = run_training(training, job.workers, job.min_workers)
    if was_finished:
        log.info("%s is finished already, nothing to do: %s", stage, training.folder)
    else:
        numbers = manifest.extra["metrics"]
        log.info(
            "%s finished: %d steps in %.1f s, loss %s, held-out loss %s",
            *(stage, numbers["steps"], manifest.seconds, numbers["last_loss"], numbers["held_out_loss"]),
        )
        log.info("%s: %s", stage, training.folder)


def plan(training: TrainingRun, workers: int | None, min_workers: int | None = None) -> dict[str, Any]:
    """What `run_training` would do, as JSON types; touches nothing."""
    return {
        "plan": {
            "folder": str(training.folder),
            "finished": training.is_finished,
            "reads": {"prepare": list(training.prepare), "init": training.init or "built from recipe.model"},
        },
        "resources": {
            "workers": f"{min_workers}-{workers}" if min_workers else workers or f"one a GPU, else {WORKERS}",
            "each": EACH.demand,
        },
    }


def run_training(training: TrainingRun, workers: int | None, min_workers: int | None = None) -> Manifest:
    """Do what is left of a training stage, on the cluster that `_cluster.connected` finds.

    Args:
        workers: None for one a GPU, or `WORKERS`.
        min_workers: go on with fewer than `workers`, down to so many, while the cluster has no more.

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
        now = min_workers or workers
        size = _cluster.pool_size(ray, training.stage, now, now or most, resources)
        _cluster.require_shared(ray, Path(training.root))
        with Lease.take(training.folder) as lease:
            for name in (ERROR_FILE, STOP_FILE):
                (training.folder / name).unlink(missing_ok=True)
            sizes = (size, workers if min_workers and workers else size)
            num_threads = _cluster.threads_per_worker(ray, sizes[1], resources)
            many = f"{sizes[0]} to {sizes[1]}" if sizes[0] < sizes[1] else f"{size}"
            log.info("%s: %s workers of %s", training.stage, many, resources)
            evaluate = starter(ray, training, _spare(ray, sizes[1], resources))
            _fit(training, _trainer(ray, training, lease.number, sizes, resources, num_threads), evaluate)
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
    # Ray has put a handler of its own in place when it was connected, so ours comes after.
    with (
        TrainingProgress(training.stage, training.folder, metrics) as progress,
        shown(training, evaluate, progress.take) as follower,
        sigterm_noticed() as asked,
    ):
        thread.start()
        while thread.is_alive():
            thread.join(0.25)
            follower.tick()
            progress.tick()
            if asked.is_set() and not (training.folder / STOP_FILE).exists():
                log.info("%s: asked to stop; the workers finish their step and keep a checkpoint", training.stage)
                (training.folder / STOP_FILE).touch()
        if failures:
            raise _in_words(training, failures[0])


def _trainer(
    ray: Any,
    training: TrainingRun,
    lease_number: int,
    sizes: tuple[int, int],
    resources: StageResources,
    num_threads: int,
) -> Any:
    # Read by Ray when the trainer starts: how often its controller looks at the workers (2 s), a watcher for nodes that
    # are about to be taken away (a process of its own), and how long it waits for workers before it tries with fewer.
    has_many_nodes = sum(node["Alive"] for node in ray.nodes()) > 1
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1" if has_many_nodes else "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    import ray.train
    import ray.train.torch

    from ray_jobs._train_callbacks import EndHopelessRuns, TakeSigterm

    checkpoints = checkpoint.root_of(training.folder, training.config.checkpoints_at)

    return ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"training": training, "lease_number": lease_number, "num_threads": num_threads},
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=sizes if sizes[0] < sizes[1] else sizes[0],
            use_gpu=bool(resources.num_gpus),
            resources_per_worker=resources.demand,
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
        ),
        run_config=ray.train.RunConfig(
            # A name that was used before would make Ray continue that run by its own lights.
            name=f"{training.folder.name}-{lease_number}",
            storage_path=str(training.folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            callbacks=[EndHopelessRuns(training.folder, checkpoints), TakeSigterm()],
        ),
    )


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
        f"{training.stage} lost its workers again and again without getting on ({lines[-1] if lines else failure!r}); "
        f"checkpoints stay, and the same command continues (the whole story: {training.folder / 'error.txt'})."
    )
