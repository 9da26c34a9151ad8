"""Carry out a stage over Ray Data: the same folder comes out as from `tinyvlm.stage_run.run_local`.

    parts ──from_items──▶ a fixed pool of PartWorkers: read · map · check · write ──▶ one small answer a part ─▶ driver

Only descriptions of parts and counts of rows travel through Ray; rows go from folder to folder.  A worker that is
killed is replaced and its part done again; what a part raises comes back as an answer, and the run ends in a sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import re
import sys
import traceback
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_jobs import _cluster
from ray_jobs._cluster import StageResources
from ray_jobs._metrics import StageMetrics
from ray_jobs._progress import Progress, many
from tinyvlm import errors, storage
from tinyvlm.errors import StageError, TinyVLMError
from tinyvlm.folders import Manifest, Part, PartResult, write_atomic
from tinyvlm.journal import Outlook
from tinyvlm.stage_run import StageRun

__all__ = ["PartWorker", "StageResources", "plan", "run_stage"]

MAX_ATTEMPTS = 3
"""A part whose worker died so often (out of memory, a crash in C code) ends the run: Ray alone would try for ever."""

ERROR_FILE = "error.txt"

log = logging.getLogger(__name__)


def run_stage(run: StageRun, workers: int | None, resources: StageResources) -> Manifest:
    """Do what is left of a stage, on the cluster that `_cluster.connected` finds.

    Raises:
        TinyVLMError: one sentence; nothing is written if it is known beforehand, and done parts stay if not.
    """
    if run.is_finished:  # before Ray is imported: saying so should be quick
        return run.carry_out(_nothing)
    run.check()
    if not run.todo()[0]:
        return run.carry_out(_nothing)
    with _cluster.connected() as ray:
        resources = _cluster.without_missing_gpu(ray, run.stage.name, resources)
        size = _cluster.pool_size(ray, run.stage.name, workers, len(run.todo()[0]), resources)
        _cluster.require_shared(ray, run.root)
        pool = _Pool(ray, run, size, resources, _cluster.threads_per_worker(ray, size, resources))
        manifest = run.carry_out(pool.execute)
    storage.remove(run.folder / ERROR_FILE)
    return manifest


def plan(run: StageRun, workers: int | None, resources: StageResources) -> dict[str, Any]:
    """What `run_stage` would do, as JSON types; touches nothing."""
    todo, done = run.todo()
    return {
        "plan": {
            "folder": str(run.folder),
            "finished": run.is_finished,
            "parts": len(run.source.parts),
            "parts_done": len(done),
            "rows": sum(part.num_rows for part in run.source.parts),
            "rows_to_do": sum(part.num_rows for part in todo),
            "reads": dict(run.source.folders),
        },
        "resources": {"workers": workers or "as many as fit", "each": dataclasses.asdict(resources)},
    }


class PartWorker:
    """One actor of the pool.  The run comes pickled, so that thread counts are set before it imports torch."""

    def __init__(self, payload: bytes, lease_number: int, num_threads: int) -> None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(num_threads)
        self.lease_number, self.num_threads = lease_number, num_threads
        try:
            self.run: StageRun | dict[str, Any] = pickle.loads(payload)
        except Exception as error:  # said as an answer: raised here it would come as sixty lines of Ray's
            said = f"The workers cannot load the stage ({type(error).__name__}: {error}); "
            remedy = "submit the job with --working-dir, or install tinyvlm on every node."
            self.run = _failure(StageError(said + remedy))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        run = self.run
        parts = [Part(**json.loads(text)) for text in batch["part"]]
        answers = [run if isinstance(run, dict) else self._answer(run, part) for part in parts]
        return {"answer": [json.dumps(answer) for answer in answers]}

    def _answer(self, run: StageRun, part: Part) -> dict[str, Any]:
        torch: Any = sys.modules.get("torch")
        if hasattr(torch, "set_num_threads"):  # another thread may be importing it at this moment
            torch.set_num_threads(self.num_threads)  # a library may have set its own count since
        try:
            attempts = _count_attempt(run, part)
            if attempts > MAX_ATTEMPTS:
                raise StageError(
                    f"{run.stage.name} lost {MAX_ATTEMPTS} workers in part {part.index} ({part.path}): each was "
                    "killed or crashed, often for want of memory; try fewer --workers or look at that part."
                )
            result = run.work(part, self.lease_number)
            for number in range(attempts):
                storage.remove(_attempt_file(run, part, number))
            return dataclasses.asdict(result)
        except TinyVLMError as error:
            return _failure(error)
        except Exception as error:  # said as an answer, as above: a full disk, for example
            return _failure(
                StageError(f"{run.stage.name} failed in part {part.index} ({type(error).__name__}: {error}).")
            )


@dataclasses.dataclass(frozen=True)
class _Pool:
    """A fixed pool of workers on a cluster."""

    ray: Any
    run: StageRun
    size: int
    resources: StageResources
    num_threads: int

    def execute(self, parts: list[Part], lease_number: int) -> Iterator[PartResult]:
        """Results in the order in which parts end."""
        name, folder = self.run.stage.name, self.run.folder
        log.info("%s: %s to do by %s of %s", name, many(len(parts), "part"), many(self.size, "worker"), self.resources)
        progress = Progress(
            *(name, folder, self.run.source.parts, self.run.todo()[1]),
            poll=Outlook(folder / "data"),
            metrics=StageMetrics(name),
        )
        with progress, contextlib.closing(self._answers(parts, lease_number)) as answers:
            try:
                for answer in answers:
                    if "error" in answer:
                        _keep(folder, answer["traceback"])
                        raise _revive(answer)
                    result = PartResult(**answer)
                    progress.add(result)
                    yield result
            except self.ray.exceptions.RayError as error:
                _keep(folder, traceback.format_exc())
                raise StageError(
                    f"{name} lost its workers ({_last_line(error)}); parts that are done stay, and the same command "
                    f"continues (the whole story: {folder / ERROR_FILE})."
                ) from error

    def _answers(self, parts: list[Part], lease_number: int) -> Generator[dict[str, Any], None, None]:
        import ray.data

        quieten(ray.data)
        payload = self.ray.cloudpickle.dumps(self.run.for_worker(self.size))
        # Ray fills one worker before it thinks of the next, and ends those for whom nothing is left.
        at_once = min(self.run.stage.parts_at_once, -(-len(parts) // self.size))
        items = [{"part": json.dumps(dataclasses.asdict(part))} for part in parts]
        answers = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            PartWorker,
            fn_constructor_args=(payload, lease_number, self.num_threads),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(
                size=self.size,
                max_tasks_in_flight_per_actor=max(2, at_once),
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=at_once > 1,
            ),
            num_cpus=self.resources.num_cpus,
            num_gpus=self.resources.num_gpus or None,
            memory=self.resources.memory or None,
        )
        for row in answers.iter_rows():
            yield json.loads(row["answer"])


def quieten(data: Any) -> None:
    """No progress bars, plans and traces in the log: the stage has lines of its own.  Takes the module `ray.data`.

    Ray Data's own log file stays as it is: it is the place to look when something hangs.
    """
    data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)


def _nothing(parts: list[Part], lease_number: int) -> Iterable[PartResult]:
    return ()


def _attempt_file(run: StageRun, part: Part, number: int) -> Path:
    # Named like a leftover, so that each new run counts from zero.
    return run.folder / "data" / f".{part.file_name}.attempt{number}.tmp"


def _count_attempt(run: StageRun, part: Part) -> int:
    """How often a worker has begun this part in this run, this time included."""
    for number in range(MAX_ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            storage.touch(_attempt_file(run, part, number))
            return number + 1
    return MAX_ATTEMPTS + 1


def _failure(error: TinyVLMError) -> dict[str, Any]:
    return {"error": str(error), "kind": type(error).__name__, "traceback": traceback.format_exc()}


def _revive(answer: Mapping[str, str]) -> TinyVLMError:
    """The worker's error as the same class here."""
    kind = getattr(errors, answer["kind"], StageError)
    error = kind(answer["error"]) if isinstance(kind, type) and issubclass(kind, TinyVLMError) else None
    return error or StageError(answer["error"])


def _keep(folder: Path, story: str) -> None:
    """Leave the whole story in the folder; where that is full, the sentence alone must do."""
    with contextlib.suppress(OSError):
        write_atomic(folder / ERROR_FILE, story)


def _last_line(error: BaseException) -> str:
    """What went wrong in one line: the last that names an error, for Ray puts advice behind it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return ([type(error).__name__, *lines, *named])[-1]
