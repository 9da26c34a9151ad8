"""What a run shows: the loss of each source, MFU, memory, what follows a run, evaluations beside it, the report."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_loop import CONFIG, GENTLE, Bench, together
from tiny_model import PICTURE, save_parts
from training_data import prepare_folder, rows

from tinyvlm import config
from tinyvlm.errors import ConfigError
from tinyvlm.train import evaluate, evaluations, meter, metrics
from tinyvlm.train.collective import Alone, Collective
from tinyvlm.train.evaluations import Evaluations
from tinyvlm.train.flops import FlopCounter
from tinyvlm.train.follow import Follower, shown, to_trackers
from tinyvlm.train.freeze import hash_tensors
from tinyvlm.train.kinds import Kinds, LossSums
from tinyvlm.train.loop import Hooks
from tinyvlm.train.meter import device_rate, matrix_rate
from tinyvlm.train.metrics import MetricsFile, StepRecord
from tinyvlm.train.report import Account, charts, facts, left_out, statistics
from tinyvlm.train.run import TrainingRun, open_run, run_local
from tinyvlm.train.settings import Rates, TrainConfig
from tinyvlm.train.shown import ShowConfig
from tinyvlm.train.tracking import Tracking, named
from tinyvlm.train.worker import start_model


def mixed_rows(number: int = 60) -> list[dict[str, Any]]:
    """Of two sources; single turns of the second are captions."""
    made = rows(number)
    for row in made:
        row["source"] = "b" if row["key"] % 4 > 1 else "a/x"
        if row["family"] == "vqa" and row["source"] == "b":
            row["family"] = "caption"
    return made


MIXED: TrainConfig = dataclasses.replace(
    GENTLE, mixture=dataclasses.replace(CONFIG.mixture, weights={**CONFIG.mixture.weights, "caption": 1.0})
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("mixed"), mixed_rows())


# The loss of each source.


def told_losses(bench: Bench, settings: TrainConfig, world: int) -> tuple[list[float], list[int], dict[str, LossSums]]:
    """Losses and supervised tokens of all steps, the held-out loss last; and what was told of each split."""
    losses: list[float] = []
    tokens: list[int] = []
    told: dict[str, LossSums] = {}

    def step(record: StepRecord) -> None:
        losses.append(record.loss)
        tokens.append(record.supervised)

    def do(collective: Collective) -> None:
        hooks = Hooks(
            on_step=step,
            on_held_out=lambda step, loss, seconds: losses.append(loss),
            on_sources=lambda step, split, sums: told.__setitem__(split, sums),
        )
        trainer = bench.trainer(settings, collective, hooks if collective.rank == 0 else None)
        trainer.work = dataclasses.replace(trainer.work, kinds=Kinds(bench.lengths))
        trainer = type(trainer)(trainer.model, trainer.work, collective)
        trainer.run()

    together(world, do) if world > 1 else do(Alone())
    return losses, tokens, told


def test_the_losses_of_all_sources_make_the_loss(bench: Bench) -> None:
    settings = dataclasses.replace(MIXED, show=ShowConfig(trackers=(), sources_every_steps=100))
    losses, tokens, told = told_losses(bench, settings, world=1)
    assert sum(told["train"].losses) == pytest.approx(
        sum(loss * count for loss, count in zip(losses, tokens, strict=False)), rel=1e-5
    )
    assert sum(told["train"].tokens) == sum(tokens)
    assert sum(told["held_out"].losses) / sum(told["held_out"].tokens) == pytest.approx(losses[-1], rel=1e-5)
    words = told["train"].told()
    assert set(words["sources"]) == {"a/x", "b"}
    assert {"caption", "multi_turn", "text", "vqa"} == set(words["families"])
    of_plan = {name: 0 for name in words["sources"]}
    kinds, plan = Kinds(bench.lengths), bench.trainer(settings).work.plan
    for pack in (pack for number in range(plan.num_steps) for pack in plan.packs(number)):
        for item in pack:
            of_plan[kinds.names[kinds.of(item)].source] += item.supervised
    assert {name: told["tokens"] for name, told in words["sources"].items()} == of_plan

    twice = told_losses(bench, settings, world=2)[2]
    assert list(twice["train"].tokens) == list(told["train"].tokens)
    assert list(twice["train"].losses) == pytest.approx(list(told["train"].losses), rel=1e-4)


def test_every_item_finds_its_own_kind(bench: Bench) -> None:
    kinds, plan = Kinds(bench.lengths), bench.trainer(MIXED).work.plan
    by_key = {row["key"]: (row["source"], row["family"]) for row in mixed_rows()}
    items = [item for number in range(plan.num_steps) for pack in plan.packs(number) for item in pack]
    assert {tuple(kinds.names[kinds.of(item)]) == by_key[item.key] for item in items} == {True}


def test_a_pack_that_lacks_a_sample_is_of_no_kind(bench: Bench) -> None:
    trainer = bench.trainer(MIXED)
    kinds = Kinds(bench.lengths)
    whole, short = [pack for pack in trainer.work.plan.packs(0) if len(pack) > 1][:2]
    loaded = [list(trainer.work.source.load(pack, 0)) for pack in (whole, short)]
    loaded[1].pop(0)
    numbers = kinds.of_tokens([whole, short], loaded)
    assert (numbers == len(kinds.names)).sum() == sum(int(sample.supervised[1:].sum()) for sample in loaded[1])
    assert (numbers < len(kinds.names)).sum() == sum(item.supervised for item in whole)


# MFU, memory, goodput.


def test_a_step_tells_its_operations_and_their_share_of_the_rate(bench: Bench) -> None:
    records: list[StepRecord] = []
    trainer = bench.trainer(MIXED, hooks=Hooks(on_step=records.append))
    trainer = type(trainer)(trainer.model, dataclasses.replace(trainer.work, peak_flops=1e9), Alone())
    trainer.run()
    counter = FlopCounter(trainer.model.config, MIXED.rates)
    for number, record in enumerate(records):
        items = [item for pack in trainer.work.plan.packs(number) for item in pack]
        needed = counter.step([item.tokens for item in items], record.pictures, record.supervised)
        assert record.flops is not None
        assert sum(record.flops.values()) == pytest.approx(needed.total)
        assert record.mfu == pytest.approx(needed.total / record.seconds / 1e9)
        assert record.memory_bytes > 1e7


def test_remembered_features_cost_the_tower_nothing(bench: Bench) -> None:
    records: list[StepRecord] = []
    settings = dataclasses.replace(
        MIXED, rates=Rates(vision=0.0, connector=1e-4), feature_cache_mib=16, steps=20, epochs=5
    )
    bench.trainer(settings, hooks=Hooks(on_step=records.append)).run()
    first, last = records[0].flops, records[-1].flops
    assert first is not None
    assert last is not None
    assert first["vision"] > 0
    assert (last["vision"], records[-1].pictures > 0) == (0, True)


def test_the_rate_of_a_device_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    meter._rate.cache_clear()
    monkeypatch.setattr(meter, "CPU_SIDE", 128)
    rate = device_rate(torch.device("cpu"))
    assert rate.source == "measured, 128³ fp32"
    assert rate.flops > 1e6
    monkeypatch.setattr(meter, "matrix_rate", lambda *_: pytest.fail("it was measured before"))
    assert device_rate(torch.device("cpu")) == rate
    meter._rate.cache_clear()
    assert matrix_rate(torch.device("cpu"), 64, torch.float32) > 0


def test_energy_is_what_nvml_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([5_000, 7_500, 7_500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counts),
    )
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    energy = meter.Energy(torch.device("cuda"))
    assert energy.since_last() == 2.5
    assert energy.since_last() == 0.0
    assert energy.since_last() is None, "it counts no more"
    assert meter.Energy(torch.device("cpu")).since_last() is None


def step_record(step: int, **changes: Any) -> StepRecord:
    made: dict[str, Any] = {
        **{"step": step, "loss": 1.0 / step, "gradient_norm": 1.0, "rates": {"connector": 1e-3}, "samples": 10},
        **{"tokens": 100, "supervised": 5, "pictures": 1, "seconds": 1.0, "data_wait_s": 0.25, "mfu": 0.5},
        **{"flops": {"vision": 3.0, "language": 1.0}, "memory_bytes": 2**30},
    }
    return StepRecord(**{**made, **changes})


def test_goodput_counts_repeated_steps_and_the_start_as_lost(tmp_path: Path) -> None:
    path, now = tmp_path / "metrics.jsonl", time.time()
    file = MetricsFile(path, 2, {"device": "x"}, started=now - 10)
    for step in (1, 2, 3):
        file.step(step_record(step, time=now - 7 + step))
    file.close()
    file = MetricsFile(path, 2, started=now - 2)
    for step in (2, 3):
        file.step(step_record(step, time=now - 2 + step))
    file.close()
    numbers = metrics.read(path)
    assert [line["goodput"] for line in numbers.steps] == pytest.approx([1 / 4, 2 / (6 + 2), 3 / (6 + 3)], rel=1e-3)
    assert numbers.summary()["goodput"] == pytest.approx(3 / 9, rel=1e-3)
    assert numbers.attempt_seconds == pytest.approx([6, 3], abs=0.01)
    assert numbers.mfu == 0.5
    assert numbers.flops == {"vision": 9.0, "language": 3.0}


# Who follows a run.


def test_a_follower_tells_what_is_whole_and_new_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    evaluations.write(tmp_path, 1, {"bleu": [0.1, 0, 0, 0]})
    heard: list[Any] = []
    follower = Follower(tmp_path, [heard.append])
    follower.look()
    assert heard == [], "an earlier command has told it"
    with path.open("a") as file:
        file.write('{"step": 2}\n{"step": 3, "cut off\n{"step"')
    follower.look()
    assert heard == [{"step": 2}]
    with path.open("a") as file:
        file.write(": 4}\n")
    evaluations.write(tmp_path, 4, {"bleu": [0.2, 0, 0, 0]})
    follower.look()
    follower.look()
    assert [line["step"] for line in heard] == [2, 4, 4]


def test_showing_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    follower = Follower(tmp_path, [], lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    with caplog.at_level(logging.WARNING, "tinyvlm.train.follow"):
        follower.look()
        follower.look()
    assert caplog.text.count("not all of the run is shown") == 1


def test_names_of_numbers_stay(tmp_path: Path) -> None:
    lines: list[tuple[int, Any]] = []

    class Kept:
        def log(self, step: int, numbers: Any) -> None:
            lines.append((step, dict(numbers)))

        def close(self) -> None:
            pass

    tracking = Tracking({"kept": Kept})
    file = MetricsFile(tmp_path / "metrics.jsonl", 1)
    follower = Follower(tmp_path, [to_trackers(tracking)])
    file.step(step_record(1))
    file.sources(1, "train", {"sources": {"m3it/coco": {"loss": 2.0, "tokens": 3}}, "families": {}})
    file.sources(1, "held_out", {"sources": {}, "families": {"caption": {"loss": 4.0, "tokens": 3}}})
    file.held_out(1, 3.0, 0.1)
    evaluations.write(tmp_path, 1, {"bleu": [0.4, 0.3, 0.2, 0.1]})
    follower.look()
    tracking.close()
    names = {name for _, numbers in lines for name in numbers}
    assert names == {
        *("train/loss", "train/gradient_norm", "train/learning_rate/connector", "train/loss/m3it/coco"),
        *("held_out/loss", "held_out/family_loss/caption", *(f"held_out/bleu_{order}" for order in (1, 2, 3, 4))),
        *(f"speed/{name}_per_s" for name in ("tokens", "samples", "supervised", "pictures")),
        *("speed/step_s", "speed/data_wait", "speed/mfu", "speed/goodput"),
        *("memory/process_bytes", "memory/device_bytes"),
    }
    assert lines[0][1]["speed/data_wait"] == 0.25
    assert named({"skipped": 3, "loss": "nan"}) == {}


def test_trackers_are_chosen_and_switched_off() -> None:
    assert ShowConfig(trackers=()).trackers == ()
    with pytest.raises(ConfigError, match="mlflow"):
        ShowConfig(trackers=("mlflow",))
    changed = config.override(TrainConfig(), ["show.trackers=tensorboard", "show.project=mine"])
    assert (changed.show.trackers, changed.show.project) == (("tensorboard",), "mine")
    assert config.fingerprint(changed) == config.fingerprint(TrainConfig()), "it does not change the weights"


# Evaluations beside the training.


class Job:
    def __init__(self) -> None:
        self.running, self.reason, self.stopped = True, "", False

    def is_running(self) -> bool:
        return self.running

    def failure(self) -> str:
        return self.reason

    def stop(self) -> None:
        self.stopped = True


def checkpoint_at(folder: Path, step: int) -> None:
    place = folder / "checkpoints" / f"step-{step:08d}"
    place.mkdir(parents=True)
    (place / "done.json").write_text("{}")


def test_evaluations_take_the_newest_checkpoint_one_at_a_time(tmp_path: Path) -> None:
    jobs: list[Job] = []

    def start() -> Job:
        jobs.append(Job())
        return jobs[-1]

    beside = Evaluations(tmp_path, ShowConfig(bleu_every_steps=20), start)
    checkpoint_at(tmp_path, 10)
    beside.tick()
    assert jobs == [], "not yet due"
    for step in (20, 30):
        checkpoint_at(tmp_path, step)
    beside.tick()
    for step in (40, 50, 60):
        checkpoint_at(tmp_path, step)
        beside.tick()
    assert len(jobs) == 1, "one at a time"
    jobs[0].running = False
    evaluations.write(tmp_path, 50, {"num_captions": 3, "bleu": [0, 0, 0, 0]})  # it took the newest by then
    beside.tick()
    assert len(jobs) == 1, "what was missed is left out"
    checkpoint_at(tmp_path, 70)
    beside.tick()
    assert len(jobs) == 2
    jobs[-1].running, jobs[-1].reason = False, "out of memory"
    beside.tick()
    assert len(jobs) == 2, "the same checkpoint would fail again"
    assert evaluations.read(tmp_path)[-1]["failed"] == "out of memory"
    checkpoint_at(tmp_path, 90)
    beside.tick()
    beside.stop()
    assert jobs[-1].stopped
    again = Evaluations(tmp_path, ShowConfig(bleu_every_steps=20), start)
    (tmp_path / "result.json").write_text("{}")
    again.tick()
    assert len(jobs) == 3, "the finished model is next"


def stage(root: Path, **changes: Any) -> TrainingRun:
    if not (root / "parts").is_dir():
        save_parts(root / "parts")
        prepare_folder(root, mixed_rows(80))
    parts = {"vision": str(root / "parts" / "clip"), "language": str(root / "parts" / "llm")}
    recipe = {"model": {**parts, "num_image_tokens": 4, "connector_width": 48}, "picture": config.to_dict(PICTURE)}
    show = ShowConfig(trackers=(), max_new_tokens=8, watts=100, price_per_hour=3, sample_pictures=4)
    return open_run("pretrain", dataclasses.replace(MIXED, **{"show": show, **changes}), recipe, [root], root)


def test_a_checkpoint_is_the_model_that_was_trained(tmp_path: Path) -> None:
    rates = Rates(vision=0.0, connector=1e-3, new_tokens=1e-2)
    run = stage(tmp_path, rates=rates, checkpoint_every_steps=4, steps=5)
    run_local(run)
    (saved,) = (run.folder / "checkpoints" / "step-00000004").glob("*.pt")
    state = torch.load(saved, weights_only=True)
    step, model, processor = evaluate.newest_model(run)
    assert step == 4
    own = model.state_dict()
    ids = processor.tokenizer.convert_tokens_to_ids(["<IMAGE>"])
    connector = {name: value for name, value in state["weights"].items() if name.startswith("connector.")}
    assert hash_tensors(list(connector.items())) == hash_tensors([(name, own[name]) for name in connector])
    first = dict(start_model(run)[0].named_parameters())
    assert not any(torch.equal(own[name], first[name]) for name in connector)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[ids[0]], state["weights"]["new_tokens.rows"][0])


def test_a_stage_ends_with_its_curves_bleu_and_samples(tmp_path: Path) -> None:
    run = stage(tmp_path, steps=6, eval_every_steps=3)
    manifest = run_local(run)
    told = json.loads((run.folder / "stats.json").read_text())
    (measured,) = evaluations.read(run.folder)
    assert measured["step"] == 6
    assert measured["num_captions"] > 0
    assert [told[f"bleu_{order}"] for order in (1, 2, 3, 4)] == measured["bleu"]
    assert len(told["pictures"]["items"]) == 4
    assert {item["jpeg_base64"] for item in told["pictures"]["items"]} != {""}
    titles = [chart["title"] for chart in told["charts"]]
    assert titles[:4] == ["Loss", "Loss by source, training", "Loss by source, held out", "BLEU of held-out captions"]
    assert {"Learning rate", "Gradient", "Throughput", "Memory"} < set(titles)
    assert [len(series["x"]) for series in told["charts"][0]["series"].values()] == [6, 2]
    words = dict(told["rows"])
    assert "100 W a worker" in words["energy and cost"]
    assert "measured, 1024³ fp32" in words["devices"]
    card = (run.folder / "model" / "README.md").read_text()
    assert "BLEU-4" in card
    assert str(tmp_path) not in card.replace(str(tmp_path / "parts"), "")
    assert manifest.files["model/README.md"]["bytes"] == len(card.encode())
    page = (run.folder / "report.html").read_text()
    assert "✗ Rows are lost" not in page
    assert "left_out" not in told


def test_the_same_questions_are_asked_every_time(tmp_path: Path) -> None:
    run = stage(tmp_path, steps=1)
    run_local(run)
    captions, shown_ones = evaluate.held_out_questions(run, 3, 4)
    assert all(question.family == "caption" for question in captions)
    assert len({question.family for question in shown_ones}) > 1
    assert all(question.pictures for question in shown_ones)
    assert all(question.messages[-1].role == "user" for question in [*captions, *shown_ones])
    again = evaluate.held_out_questions(run, 3, 4)
    assert (captions, shown_ones) == again


def test_a_model_is_not_lost_to_its_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load", lambda folder: 1 / 0)
    run = stage(tmp_path, steps=1)
    run_local(run)
    assert run.is_finished
    account = Account.of(run, json.loads((run.folder / "result.json").read_text()))
    assert left_out(account) == [{"what": "evaluation of step 1", "why": "ZeroDivisionError: division by zero"}]
    assert "ZeroDivisionError" in (run.folder / "report.html").read_text()


def test_a_process_beside_the_training_evaluates(tmp_path: Path) -> None:
    run = stage(tmp_path, steps=3, checkpoint_every_steps=2)
    run_local(run)
    for path in evaluations.paths(run.folder):
        path.unlink()
    (run.folder / "result.json").unlink()
    show = dataclasses.replace(run.config.show, bleu_every_steps=2)
    object.__setattr__(run, "config", dataclasses.replace(run.config, show=show))
    heard: list[Any] = []
    with shown(run, lambda: evaluate.Subprocess(run), heard.append) as follower:
        deadline = time.monotonic() + 100
        while not heard and time.monotonic() < deadline:
            follower.tick()
            time.sleep(0.1)
    log = run.folder / "evaluations" / "log.txt"
    assert heard, log.read_text()
    assert heard[0]["step"] == 2
    assert len(heard[0]["bleu"]) == 4


def test_without_captions_the_report_says_so(tmp_path: Path) -> None:
    run = stage(tmp_path, steps=1, mixture=GENTLE.mixture)
    run_local(run)
    told = json.loads((run.folder / "stats.json").read_text())
    assert told["left_out"] == [{"what": "BLEU", "why": "no held-out captions among the conversations"}]
    account = Account.of(run, json.loads((run.folder / "result.json").read_text()))
    assert "BLEU of held-out captions" not in [chart["title"] for chart in charts(account)]
    assert "captions" not in dict(facts(account))
    assert statistics(account, 1.0)["statuses"] == told["statuses"]
