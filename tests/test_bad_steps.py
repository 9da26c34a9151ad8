"""What goes wrong in the middle of a run: a loss that is no number, a picture that rotted, a wish to stop."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from test_loop import CONFIG, Bench, stage, together

from tinyvlm.errors import DataError, Interrupted
from tinyvlm.lease import Lease
from tinyvlm.model import load
from tinyvlm.train import bad_steps, checkpoint, ledger, loop, metrics, worker
from tinyvlm.train.bad_steps import BadStep
from tinyvlm.train.batch import Batch
from tinyvlm.train.collective import Alone, Collective
from tinyvlm.train.kinds import Tally
from tinyvlm.train.loop import Hooks, Trainer
from tinyvlm.train.plan import Plan
from tinyvlm.train.run import TrainingRun, run_local
from tinyvlm.train.worker import carry_out

BAD = 18
"""The conversation whose loss is no number."""


@pytest.fixture
def bad_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One conversation of the training split makes the loss of its batch infinite, on whichever worker it is."""
    honest = Trainer._loss

    def broken(self: Trainer, batch: Batch, tally: Tally) -> tuple[torch.Tensor, int]:
        loss, supervised = honest(self, batch, tally)
        is_bad = any(item.key == BAD for pack in batch.packs for item in pack)
        return loss * (math.inf if is_bad else 1.0), supervised

    monkeypatch.setattr(Trainer, "_loss", broken)


def bad_steps_of(trainer: Trainer) -> list[int]:
    plan = trainer.work.plan
    return [s for s in range(plan.num_steps) if any(item.key == BAD for pack in plan.packs(s) for item in pack)]


SLOW = dataclasses.replace(CONFIG, epochs=2, steps=0, packs_per_batch=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.usefixtures("bad_conversation")
@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_step_ends_the_run_and_what_was_before_is_kept(bench: Bench, world: int) -> None:
    said: list[str] = []
    saved: list[int] = []

    def do(collective: Collective) -> None:
        hooks = Hooks(save=lambda step, state: saved.append(step) if collective.rank == 0 else None)
        with pytest.raises(DataError) as caught:
            bench.trainer(SLOW, collective, hooks).run()
        said.append(str(caught.value))

    together(world, do)
    first = bad_steps_of(bench.trainer(SLOW))[0]
    assert len(said) == world
    assert len(set(said)) == 1, "all workers say the same"
    assert said[0].startswith(f"Step {first + 1} has a loss of ")
    assert f"{BAD}" in said[0].split("keys ")[1].split(")")[0].split(", ")
    assert saved == ([first] if first else [])


@pytest.mark.usefixtures("bad_conversation")
@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_step_is_skipped_if_the_settings_say_so(bench: Bench, world: int) -> None:
    settings = dataclasses.replace(SLOW, on_bad_loss="skip")
    weights: dict[tuple[int, int], torch.Tensor] = {}
    trainers: list[Trainer] = []

    def do(collective: Collective) -> None:
        trainer = bench.trainer(settings, collective)
        name = next(iter(trainer.parameters))
        note = lambda step, _: weights.update({(collective.rank, step): trainer.parameters[name].detach().clone()})  # noqa: E731
        trainer.work = dataclasses.replace(trainer.work, hooks=Hooks(entering=note))
        trainer.run()
        trainers.append(trainer)

    together(world, do)
    wanted = bad_steps_of(trainers[0])
    steps = trainers[0].work.plan.num_steps
    assert len(wanted) == 2
    assert all(trainer.skipped == 2 and trainer._updates() == steps - 2 for trainer in trainers)
    for rank in range(world):
        same = [step for step in range(steps - 1) if torch.equal(weights[rank, step], weights[rank, step + 1])]
        assert same == [step for step in wanted if step < steps - 1], "only bad steps leave the weights as they are"


def test_skipping_has_an_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED_IN_A_ROW", 2)
    trainer = bench.trainer(dataclasses.replace(SLOW, on_bad_loss="skip"))
    with torch.no_grad():
        trainer.model.connector.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="Step 3 has a loss of nan"):
        trainer.run()


@pytest.mark.usefixtures("bad_conversation")
def test_a_bad_step_can_be_played_again(tmp_path: Path) -> None:
    """The folder has the tensors; the ledger stays exact over a resume with a skipped step in it."""
    run = stage(tmp_path, "pretrain", steps=0, epochs=2, packs_per_batch=1, on_bad_loss="skip", ledger=True)
    run_local(run)
    numbers = metrics.read(run.folder / "metrics.jsonl")
    skipped = [line["skipped"] for line in numbers.skipped]
    assert numbers.summary()["skipped"] == len(skipped) == 2
    verdict = ledger.judge(run.folder, len(numbers.steps) + 2)
    assert verdict.faults == []
    folders = sorted((run.folder / "bad-steps").iterdir())
    assert [folder.name for folder in folders] == [f"step-{step:08d}" for step in skipped]
    about = json.loads((folders[0] / "rank-00000.json").read_text())
    assert BAD in [item["key"] for item in about["suspects"]]
    assert about["step"] == skipped[0]
    model, _ = load(run.folder / "model")
    played = list(bad_steps.replay(model, folders[0]))
    assert BAD in [key for pack in played for key in pack.keys]
    assert all(0 < pack.loss < 20 for pack in played), "the fault was the test's, not the data's"


@pytest.mark.usefixtures("bad_conversation")
def test_a_skipped_step_is_known_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"steps": 0, "epochs": 2, "packs_per_batch": 1, "on_bad_loss": "skip", "ledger": True}
    run_local(straight := stage(tmp_path / "straight", "pretrain", **changes))
    run = stage(tmp_path / "broken", "pretrain", **{**changes, "checkpoint_every_steps": 1})
    skipped = [line["skipped"] for line in metrics.read(straight.folder / "metrics.jsonl").skipped]
    write = metrics.MetricsFile.step

    def stop(self: metrics.MetricsFile, record: metrics.StepRecord) -> None:
        write(self, record)
        if record.step == skipped[0] + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker.metrics.MetricsFile, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_local(run)
    run_local(run)
    verdict = ledger.judge(run.folder)
    assert verdict.faults == []
    assert verdict.attempts[-1].heads[0]["skipped"] == 1
    assert verdict.steps == ledger.judge(straight.folder).steps
    weights = [each.folder / "model" / "model.safetensors" for each in (straight, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def rotten(root: Path, **changes: Any) -> TrainingRun:
    """A run over data in which one picture can no longer be decoded."""
    run = stage(root, "pretrain", steps=0, epochs=1, ledger=True, **changes)
    for path in Path(next(iter(run.prepare))).glob("data/*.parquet"):
        table = pq.read_table(path)
        made = table.to_pylist()
        for row in made:
            if row["key"] == BAD:
                row["images"][0]["bytes"] = row["images"][0]["bytes"][:200]
        pq.write_table(type(table).from_pylist(made, schema=table.schema), path, row_group_size=8)
    return run


def test_a_picture_that_rotted_stops_the_run_or_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=rf"conversation {BAD} in .*part-0000\d.parquet cannot be decoded.*=skip"):
        run_local(rotten(tmp_path / "stops"))
    run = rotten(tmp_path / "goes on", on_bad_picture="skip")
    with caplog.at_level(logging.WARNING):
        run_local(run)
    assert f"conversation {BAD}" in caplog.text
    run_local(whole := stage(tmp_path / "whole", "pretrain", steps=0, epochs=1, ledger=True))
    seen, all_of_them = (ledger.judge(each.folder) for each in (run, whole))
    assert seen.faults == []
    other = [step for step in all_of_them.steps if seen.steps[step] != all_of_them.steps[step]]
    assert len(other) == 1
    assert len(set(all_of_them.steps[other[0]]) - set(seen.steps[other[0]])) == 1, "one pack lacks one conversation"


def test_a_row_group_that_rotted_is_a_sentence(tmp_path: Path) -> None:
    run = stage(tmp_path, "pretrain", steps=0, epochs=1)
    for path in Path(next(iter(run.prepare))).glob("data/*.parquet"):
        file = pq.ParquetFile(path)
        column = next(
            file.metadata.row_group(0).column(index)
            for index in range(file.metadata.row_group(0).num_columns)
            if file.metadata.row_group(0).column(index).path_in_schema.endswith("bytes")
        )
        content = bytearray(path.read_bytes())
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + 40] = bytes(40)
        path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"Row group \d+ of .* cannot be read .*; run `prepare` again"):
        run_local(run)


def test_being_asked_to_stop_loses_no_step(bench: Bench, tmp_path: Path) -> None:
    """One worker of two is asked; both stop after the same step, with a checkpoint of it."""
    ended: list[str] = []

    def do(collective: Collective) -> None:
        trainer = bench.trainer(dataclasses.replace(SLOW, checkpoint_every_steps=0), collective)
        writer = checkpoint.Writer(tmp_path, checkpoint.Keep())
        wish = lambda: collective.rank == 1 and trainer.steps_done == 2  # noqa: E731
        hooks = Hooks(wants_to_stop=wish)
        if collective.rank == 0:
            hooks = Hooks(wants_to_stop=wish, save=writer.save, settle=writer.finish)
        trainer.work = dataclasses.replace(trainer.work, hooks=hooks)
        with pytest.raises(Interrupted, match="Asked to stop: 3 of"):
            trainer.run()
        ended.append(f"{trainer.steps_done} {[place.name for place in checkpoint.complete(tmp_path)]}")

    together(2, do)
    assert ended == ["3 ['step-00000003']"] * 2


def test_a_conversation_that_was_taken_down_is_left_out_of_the_rest_of_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = stage(tmp_path, "pretrain", steps=0, epochs=1)
    with pytest.raises(Interrupted), Lease.take(run.folder) as lease:
        carry_out(run, Alone(), lease.number, wants_to_stop=lambda: True)
    planned = Plan.load(run.folder / "plan.parquet")
    gone = planned.packs(planned.num_steps - 1)[0][0].key
    for path in Path(next(iter(run.prepare))).glob("data/*.parquet"):
        table = pq.read_table(path)
        made = [row | {"messages": None, "images": None} if row["key"] == gone else row for row in table.to_pylist()]
        pq.write_table(type(table).from_pylist(made, schema=table.schema), path, row_group_size=8)
    with caplog.at_level(logging.WARNING):
        manifest = run_local(run)
    assert f"Conversation {gone} of" in caplog.text
    assert manifest.extra["metrics"]["steps"] == planned.num_steps


def test_a_bad_step_of_stored_features_is_replayed(tmp_path: Path, bench: Bench) -> None:
    trainer = bench.trainer(SLOW)
    batch = trainer.batches(0)[0]
    assert batch.pixels is not None
    with torch.no_grad():
        features = trainer.model.encode_pictures(batch.pixel_values)
    bare = dataclasses.replace(batch, pixels=None, features=features)
    told = []
    for kind, one in (("live", batch), ("stored", bare)):
        bad_steps.keep(tmp_path / kind, BadStep(0, math.inf, 1.0, [one], [math.inf]), rank=0)
        (folder,) = (tmp_path / kind / "bad-steps").iterdir()
        told.append([(each.keys, each.loss) for each in bad_steps.replay(trainer.model, folder)])
    live, stored = told
    assert [keys for keys, _ in live] == [keys for keys, _ in stored]
    assert [loss for _, loss in stored] == pytest.approx([loss for _, loss in live], abs=1e-4)
