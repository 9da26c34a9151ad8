"""Training over a real local Ray: the same as in one process, also when a worker is killed; errors in a sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_model import PICTURE, save_parts
from training_data import prepare_folder, rows

from tinyvlm import config
from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.errors import DataError, Interrupted
from tinyvlm.train import evaluations, ledger, metrics
from tinyvlm.train.run import TrainingRun, open_run, run_local
from tinyvlm.train.settings import Rates, TrainConfig
from tinyvlm.train.shown import ShowConfig

if TYPE_CHECKING:
    from ray_jobs._evaluator import EvaluationTask

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CONFIG = TrainConfig(
    mixture=MixtureConfig(weights={"vqa": 1.0, "multi_turn": 1.0, "text": 1.0}),
    rates=Rates(vision=1e-4, connector=1e-4, language=1e-4),
    packs_per_step=3,
    pack_length=256,
    samples_per_pack=0,
    epochs=40,
    steps=8,
    warmup_steps=2,
    precision="fp32",
    checkpoint_every_steps=2,
    eval_every_steps=4,
    show=ShowConfig(trackers=()),
)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local Ray for all tests of this file; `run_training` finds and uses it."""
    from ray_jobs import _cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with _cluster.connected():
            yield


def stage(root: Path, made: list[dict[str, Any]] | None = None, **changes: Any) -> TrainingRun:
    parts = save_parts(root / "parts")
    prepare_folder(root, made or rows())
    recipe = {"model": config.to_dict(parts), "picture": config.to_dict(PICTURE)}
    return open_run("pretrain", dataclasses.replace(CONFIG, **changes), recipe, [root], root)


def losses(run: TrainingRun) -> list[float]:
    numbers = metrics.read(run.folder / "metrics.jsonl")
    return [line["loss"] for line in numbers.steps] + [line["held_out_loss"] for line in numbers.held_out]


def test_two_ray_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    from ray_jobs import _run_training

    alone, together = stage(tmp_path / "alone"), stage(tmp_path / "together")
    run_local(alone)
    manifest = _run_training.run_training(together, 2)
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert manifest.extra["metrics"]["steps"] == 8
    progress = json.loads((together.folder / "progress.json").read_text())
    assert (progress["state"], progress["step"], progress["steps"]) == ("done", 8, 8)
    started = time.perf_counter()
    assert _run_training.run_training(together, 2) == manifest
    assert time.perf_counter() - started < 1, "finished is told at once"


def test_a_killed_worker_is_a_pause(tmp_path: Path) -> None:
    from ray_jobs import _run_training

    run = stage(tmp_path, steps=60)
    killed = threading.Event()

    def kill_when_under_way() -> None:
        path = run.folder / "metrics.jsonl"
        while not killed.is_set():
            lines = metrics.read(path)
            if len(lines.steps) >= 5:
                os.kill(lines.attempts[-1]["pid"], signal.SIGKILL)
                killed.set()
            time.sleep(0.01)

    thread = threading.Thread(target=kill_when_under_way, daemon=True)
    thread.start()
    _run_training.run_training(run, 2)
    assert killed.is_set()
    numbers = metrics.read(run.folder / "metrics.jsonl")
    assert len(numbers.attempts) == 2
    assert [line["step"] for line in numbers.steps] == list(range(1, 61))
    run_local(straight := stage(tmp_path / "straight", steps=60))
    assert losses(run)[:20] == pytest.approx(losses(straight)[:20], abs=1e-4)


CAPTIONS = MixtureConfig(weights={"caption": 1.0, "multi_turn": 1.0})


def captions() -> list[dict[str, Any]]:
    """Rows whose single turns are captions."""
    return [{**row, "family": "caption" if row["family"] == "vqa" else row["family"]} for row in rows()]


def test_an_evaluation_is_a_task_of_its_own(tmp_path: Path) -> None:
    import ray

    from ray_jobs._cluster import StageResources
    from ray_jobs._evaluator import starter

    def over(job: EvaluationTask) -> str:
        deadline = time.monotonic() + 100
        while job.is_running() and time.monotonic() < deadline:
            time.sleep(0.1)
        return job.failure()

    show = ShowConfig(trackers=(), max_new_tokens=8)
    run = stage(tmp_path, captions(), mixture=CAPTIONS, show=show, steps=4)
    run_local(run)
    for path in evaluations.paths(run.folder):
        path.unlink()
    start = starter(ray, run, StageResources(num_cpus=1.0))
    assert over(start()) == ""
    (told,) = evaluations.read(run.folder)
    assert (told["step"], len(told["bleu"])) == (2, 4)
    shutil.rmtree(run.folder / "checkpoints")
    assert "CheckpointError" in over(start())
    waiting = starter(ray, run, StageResources(num_cpus=1000.0))()
    assert waiting.is_running()
    waiting.stop()


@pytest.mark.slow
def test_checkpoints_are_evaluated_beside_the_training(tmp_path: Path) -> None:
    from ray_jobs import _run_training

    show = ShowConfig(trackers=("tensorboard",), bleu_every_steps=2, max_new_tokens=8)
    # Long enough for an evaluation, which starts a process, to end before the training.
    run = stage(tmp_path, captions(), mixture=CAPTIONS, show=show, steps=400, epochs=400, eval_every_steps=0)
    _run_training.run_training(run, 2)
    told = evaluations.read(run.folder)
    assert [one for one in told if "failed" in one] == []
    assert told[-1]["step"] == 400, "the finished model"
    assert told[0]["step"] < 400
    assert all(len(one["bleu"]) == 4 for one in told)
    statistics = json.loads((run.folder / "stats.json").read_text())
    (curve,) = [chart for chart in statistics["charts"] if chart["title"] == "BLEU of held-out captions"]
    assert len(curve["series"]["BLEU-4"]["x"]) == len(told)
    (events,) = (run.folder / "tensorboard").glob("events.*")
    assert events.read_bytes().count(b"train/loss") >= 400
    assert b"held_out/bleu_4" in events.read_bytes()


@pytest.mark.slow
def test_what_a_worker_says_ends_the_run_at_once(tmp_path: Path) -> None:
    from ray_jobs import _run_training

    made = rows()
    for row in made[10:]:
        for image in row["images"]:
            image["bytes"] = image["bytes"][:200]
    run = stage(tmp_path, made)
    with pytest.raises(DataError, match=r"A picture of conversation \d+ in .* cannot be decoded"):
        _run_training.run_training(run, 2)
    assert not run.is_finished
    assert len(metrics.read(run.folder / "metrics.jsonl").attempts) == 1, "it would fail again"


def test_a_missing_input_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    command = [sys.executable, "-m", "ray_jobs.sft", "--recipe", "tiny", "--input", "in", "--output", "out"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: sft reads the folder of 'prepare', but found none")
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def when_under_way(run: TrainingRun, steps: int, do: Callable[[dict[str, Any]], None]) -> threading.Event:
    """Have something done, with the newest attempt's first line, once so many steps are in the folder."""
    done = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            lines = metrics.read(run.folder / "metrics.jsonl")
            if len(lines.steps) >= steps:
                do(lines.attempts[-1])
                done.set()
                return
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    return done


@pytest.mark.slow
def test_a_worker_that_is_asked_to_go_keeps_what_it_has(tmp_path: Path) -> None:
    """As a spot instance is: SIGTERM to one worker costs no step, and the run goes on with others."""
    from ray_jobs import _run_training

    run = stage(tmp_path, steps=60, checkpoint_every_steps=0, ledger=True)
    asked = when_under_way(run, 5, lambda attempt: os.kill(attempt["pid"], signal.SIGTERM))
    _run_training.run_training(run, 2)
    assert asked.is_set()
    verdict = ledger.judge(run.folder, 60)
    assert verdict.faults == []
    assert len(verdict.attempts) == 2
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "rates" in line]
    assert steps == list(range(1, 61)), "no step was done twice"


@pytest.mark.slow
def test_a_frozen_worker_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that neither answers nor dies: the others wait for it no longer than the collective time-out."""
    from ray_jobs import _run_training

    monkeypatch.setattr(_run_training, "COLLECTIVE_TIMEOUT_S", 5)
    run = stage(tmp_path, steps=60, ledger=True)
    frozen = when_under_way(run, 5, lambda attempt: os.kill(attempt["pid"], signal.SIGSTOP))
    _run_training.run_training(run, 2)
    assert frozen.is_set()
    verdict = ledger.judge(run.folder, 60)
    assert verdict.faults == []
    assert len(verdict.attempts) == 2


@pytest.mark.slow
def test_a_driver_that_is_asked_to_stop_says_so_and_goes_on_later(tmp_path: Path) -> None:
    """As `ray job stop` asks it."""
    from ray_jobs import _run_training

    run = stage(tmp_path, steps=60, checkpoint_every_steps=0, ledger=True)
    asked = when_under_way(run, 5, lambda attempt: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"Asked to stop: \d+ of 60 steps are done and kept"):
        _run_training.run_training(run, 2)
    assert asked.is_set()
    manifest = _run_training.run_training(run, 1)
    assert manifest.extra["metrics"]["steps"] == 60
    assert ledger.judge(run.folder, 60).faults == []
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "rates" in line] == list(range(1, 61))
