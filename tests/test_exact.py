"""Exact resume: whatever kills a run, and on however many workers it goes on, it sees what an undisturbed run sees.

Judged by the ledger (train/ledger.py), which each worker flushes to the disk before each step.  The judge is tried as
well: a resume that is off by one must not pass.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killed_training import FAILED, FINISHED, KILLED, POINTS, Case, Server
from tiny_model import PICTURE, save_parts
from training_data import prepare_folder, rows

from tinyvlm import config
from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.train import checkpoint, ledger, metrics, plan
from tinyvlm.train.run import TrainingRun, open_run
from tinyvlm.train.settings import Rates, TrainConfig

CONFIG = TrainConfig(
    mixture=MixtureConfig(weights={"vqa": 1.0, "multi_turn": 1.0, "text": 1.0}),
    rates=Rates(vision=1e-4, connector=1e-4, language=1e-4),
    packs_per_step=3,
    pack_length=256,
    samples_per_pack=0,
    epochs=2,
    warmup_steps=2,
    weight_decay=0.01,
    precision="fp32",
    checkpoint_every_steps=2,
    eval_every_steps=4,
    packs_per_batch=2,
    max_validation=4,
    ledger=True,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    save_parts(root / "parts")
    prepare_folder(root, rows(40))
    return root


def run_of(data: Path, root: Path, **changes: Any) -> TrainingRun:
    parts = {"vision": str(data / "parts" / "clip"), "language": str(data / "parts" / "llm")}
    recipe = {"model": {**parts, "num_image_tokens": 4, "connector_width": 48}, "picture": config.to_dict(PICTURE)}
    return open_run("pretrain", dataclasses.replace(CONFIG, **changes), recipe, [data], root)


def finish(server: Server, case: Case) -> None:
    outcome = server.carry_out(case)
    said = "".join(path.read_text()[-1500:] for path in Path(case.run.root).glob("failure-*.txt"))
    assert outcome == FINISHED, said


class Straight:
    """An undisturbed run, of one kind for each number of workers."""

    def __init__(self, server: Server, data: Path, root: Path) -> None:
        self._server, self._data, self._root, self._made = server, data, root, dict[str, TrainingRun]()

    def of(self, world: int, **changes: Any) -> TrainingRun:
        name = f"{world}-{config.fingerprint(changes)[:8]}"
        if name not in self._made:
            (self._root / name).mkdir()
            self._made[name] = run_of(self._data, self._root / name, **changes)
            finish(self._server, Case(self._made[name], world))
        return self._made[name]


@pytest.fixture(scope="module")
def straight(server: Server, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(server, data, tmp_path_factory.mktemp("straight"))


def num_steps(run: TrainingRun) -> int:
    return plan.Plan.load(run.folder / "plan.parquet").num_steps


def losses(run: TrainingRun) -> list[float]:
    numbers = metrics.read(run.folder / "metrics.jsonl")
    return [line["loss"] for line in numbers.steps] + [line["held_out_loss"] for line in numbers.held_out]


def assert_same(run: TrainingRun, wanted: TrainingRun, *, identical: bool) -> ledger.Verdict:
    """The ledger of `run` has no fault and says what that of `wanted` says; losses and weights are equal."""
    verdict, other = ledger.judge(run.folder, num_steps(run)), ledger.judge(wanted.folder, num_steps(wanted))
    assert verdict.faults == other.faults == []
    assert verdict.steps == other.steps
    if identical:
        assert losses(run) == losses(wanted)
        files = [each.folder / "model" / "model.safetensors" for each in (run, wanted)]
        assert files[0].read_bytes() == files[1].read_bytes()
    else:
        assert losses(run) == pytest.approx(losses(wanted), abs=1e-5)
    return verdict


def test_the_plan_has_what_is_wanted_of_it(straight: Straight) -> None:
    """Two epochs, of which the first does not end where a step does; a last step that is smaller than the others."""
    saved = plan.Plan.load(straight.of(1).folder / "plan.parquet")
    assert saved.num_steps >= 6
    assert saved.num_packs % 3
    assert len(ledger.judge(straight.of(1).folder).attempts) == 1


@pytest.mark.parametrize(
    ("optimizer", "world"),
    [("adamw", 1), ("adamw", 2), ("adamw8bit", 1), pytest.param("adamw8bit", 2, marks=pytest.mark.slow)],
)
def test_killed_at_every_step_in_turn(
    server: Server, straight: Straight, data: Path, tmp_path: Path, world: int, optimizer: str
) -> None:
    wanted, run = straight.of(world, optimizer=optimizer), run_of(data, tmp_path, optimizer=optimizer)
    steps = num_steps(wanted)
    for step in range(steps):
        point = ("entering", "updated", "computed")[step % 3]
        assert server.carry_out(Case(run, world, point, step, rank=step % world)) == KILLED
    finish(server, Case(run, world))
    assert len(assert_same(run, wanted, identical=True).attempts) == steps + 1


def test_one_two_and_three_workers_see_and_learn_the_same(straight: Straight) -> None:
    for world in (2, 3):
        assert_same(straight.of(world), straight.of(1), identical=False)


def test_a_run_that_goes_on_with_other_numbers_of_workers(
    server: Server, straight: Straight, data: Path, tmp_path: Path
) -> None:
    run = run_of(data, tmp_path)
    assert server.carry_out(Case(run, 4, "entering", 3, rank=2)) == KILLED
    assert server.carry_out(Case(run, 2, "updated", num_steps(run) - 2, rank=1)) == KILLED
    finish(server, Case(run, 3))
    assert [attempt.world for attempt in assert_same(run, straight.of(1), identical=False).attempts] == [4, 2, 3]


@pytest.mark.parametrize("point", ["copied", "writing", "written", "evaluating"])
def test_killed_while_a_checkpoint_is_in_the_making(
    server: Server, straight: Straight, data: Path, tmp_path: Path, point: str
) -> None:
    run = run_of(data, tmp_path)
    assert server.carry_out(Case(run, 1, point, 3)) == KILLED
    finish(server, Case(run))
    assert_same(run, straight.of(1), identical=True)
    root = checkpoint.root_of(run.folder)
    assert sorted(path.name for path in root.iterdir()) == [path.name for path in checkpoint.complete(root)]


@pytest.mark.parametrize("sabotage", ["step+1", "step-1", "data+1"])
def test_a_resume_that_is_off_by_one_does_not_pass(
    server: Server, straight: Straight, data: Path, tmp_path: Path, sabotage: str
) -> None:
    wanted, run = straight.of(1), run_of(data, tmp_path)
    assert server.carry_out(Case(run, 2, "entering", 5)) == KILLED
    outcome = server.carry_out(Case(run, 2, sabotage=sabotage))
    assert outcome in (FINISHED, FAILED)
    verdict = ledger.judge(run.folder, num_steps(wanted))
    assert verdict.faults, "without another run to compare with"
    if sabotage == "data+1":
        assert verdict.steps != ledger.judge(wanted.folder).steps


def test_a_line_that_was_cut_off_is_no_step(straight: Straight, tmp_path: Path) -> None:
    source = next((straight.of(1).folder / "ledger").iterdir())
    (tmp_path / "ledger").mkdir()
    lines = source.read_bytes().splitlines(keepends=True)
    (tmp_path / "ledger" / source.name).write_bytes(b"".join(lines)[:-3])
    steps = num_steps(straight.of(1))
    assert sorted(ledger.judge(tmp_path).steps) == list(range(steps - 1))
    assert "1 steps were never done" in ledger.judge(tmp_path, steps).faults[0]
    assert json.loads(lines[0])["first_step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_step(server: Server, straight: Straight, data: Path, tmp_path: Path, seed: int) -> None:
    """At a random point of a random step, on a random worker; then at any moment; and on another number of workers."""
    lot = random.Random(seed)
    run, wanted = run_of(data, tmp_path), straight.of(1)
    worlds = []
    for _ in range(2):
        worlds.append(lot.randint(1, 3))
        case = Case(run, worlds[-1], lot.choice(POINTS), lot.randrange(num_steps(wanted)), lot.randrange(worlds[-1]))
        server.carry_out(case)
        worlds.append(lot.randint(1, 3))
        server.carry_out(Case(run, worlds[-1], after_s=lot.uniform(0.3, 4.0)))
    finish(server, Case(run, lot.randint(1, 3)))
    assert_same(run, wanted, identical=False)
