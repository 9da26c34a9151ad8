"""The loop: the same result on any number of workers, and after any interruption; frozen weights stay as they are."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import PICTURE, save_parts, tiny_model
from training_data import prepare_folder, rows

from tinyvlm import chat, config
from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.errors import CheckpointError, ConfigError, DataError, StageError
from tinyvlm.folders import Manifest
from tinyvlm.model import load
from tinyvlm.train import checkpoint, metrics, plan, worker
from tinyvlm.train.collective import Alone, Collective
from tinyvlm.train.data import Conversations, data_files, measure
from tinyvlm.train.freeze import FreezePolicy, hash_tensors
from tinyvlm.train.loop import Hooks, Trainer, Work
from tinyvlm.train.optim import rate_factor
from tinyvlm.train.reading import Window
from tinyvlm.train.run import TrainingRun, open_run, run_local
from tinyvlm.train.settings import Rates, TrainConfig
from tinyvlm.train.shown import ShowConfig
from tinyvlm.upkeep import verify

torch.set_num_threads(1)

CONFIG = TrainConfig(
    mixture=MixtureConfig(weights={"vqa": 1.0, "multi_turn": 1.0, "text": 1.0}),
    rates=Rates(vision=1e-3, connector=1e-3, language=1e-3),
    packs_per_step=3,
    pack_length=256,
    samples_per_pack=0,
    epochs=5,
    steps=20,
    warmup_steps=3,
    precision="fp32",
    checkpoint_every_steps=0,
    eval_every_steps=0,
    packs_per_batch=2,
    show=ShowConfig(trackers=()),
)


class Together:
    """Workers that are threads of this process: what `torch.distributed` does, without starting processes."""

    def __init__(self, rank: int, world: int, shared: dict[str, Any]) -> None:
        self.rank, self.world, self._shared = rank, world, shared

    def sum(self, tensor: torch.Tensor) -> None:
        self._shared["given"][self.rank] = tensor.clone()
        self.barrier()
        tensor.copy_(torch.stack(self._shared["given"]).sum(dim=0))
        self.barrier()

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._shared["given"][self.rank] = tensor.detach().clone()
        self.barrier()
        tensor.copy_(self._shared["given"][0])
        self.barrier()

    def barrier(self) -> None:
        self._shared["barrier"].wait(timeout=60)


def together(world: int, do: Callable[[Collective], None]) -> None:
    shared: dict[str, Any] = {"given": [None] * world, "barrier": threading.Barrier(world)}

    def do_or_let_go(rank: int) -> None:
        try:
            do(Together(rank, world, shared))
        except BaseException:
            shared["barrier"].abort()
            raise

    threads = [threading.Thread(target=do_or_let_go, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


class Bench:
    """A model, data and a plan, as often as they are wanted."""

    def __init__(self, folder: Path, made: list[dict[str, Any]] | None = None) -> None:
        self.files = data_files([prepare_folder(folder, made or rows())])
        self.model, self.processor = tiny_model(folder)
        self.lengths = measure(dict(enumerate(self.files)), self.processor)

    def trainer(
        self, settings: TrainConfig = CONFIG, collective: Collective | None = None, hooks: Hooks | None = None
    ) -> Trainer:
        work = Work(
            plan=plan.build(self.lengths, settings),
            validation=plan.build_validation(self.lengths, settings),
            source=Conversations(self.files, self.processor, window=Window(16), cache_bytes=1 << 24),
            config=settings,
            pad_token_id=self.processor.pad_id,
            new_token_ids=self.processor.tokenizer.convert_tokens_to_ids(list(chat.IMAGE_TOKENS)),
            hooks=hooks or Hooks(),
        )
        return Trainer(copy.deepcopy(self.model), work, collective or Alone())

    def losses(self, settings: TrainConfig = CONFIG, world: int = 1) -> list[float]:
        """Of each step, and the held-out loss at the end."""
        records: list[float] = []

        def do(collective: Collective) -> None:
            is_first = collective.rank == 0
            hooks = Hooks(
                on_step=lambda record: records.append(record.loss),
                on_held_out=lambda step, loss, seconds: records.append(loss),
            )
            self.trainer(settings, collective, hooks if is_first else None).run()

        together(world, do) if world > 1 else do(Alone())
        return records


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


GENTLE = dataclasses.replace(CONFIG, rates=Rates(vision=1e-4, connector=1e-4, language=1e-4), steps=8)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_gives_the_same_losses(bench: Bench, world: int) -> None:
    assert bench.losses(GENTLE, world) == pytest.approx(bench.losses(GENTLE), abs=1e-5)


def test_how_packs_are_batched_makes_no_difference(bench: Bench) -> None:
    one_by_one = dataclasses.replace(GENTLE, packs_per_batch=1)
    assert bench.losses(one_by_one) == pytest.approx(
        bench.losses(dataclasses.replace(GENTLE, packs_per_batch=3)), abs=1e-5
    )


def test_it_learns(bench: Bench) -> None:
    losses = bench.losses(dataclasses.replace(CONFIG, rates=Rates(vision=3e-3, connector=3e-3, language=3e-3)))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_ten_steps_and_ten_more_are_twenty(bench: Bench, optimizer: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(CONFIG, optimizer=optimizer, weight_decay=0.01, checkpoint_every_steps=10)
    straight = bench.trainer(settings)
    straight.run()

    def save(step: int, state: checkpoint.State) -> None:
        checkpoint.save(tmp_path, step, state, keep=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.trainer(settings, hooks=Hooks(save=save)).run()
    resumed = bench.trainer(settings)
    state = checkpoint.load_newest(tmp_path, resumed.work.plan.fingerprint, pytest.fail)
    assert state is not None
    assert state["steps_done"] == 10
    resumed.run(state)
    assert hash_tensors(list(resumed.parameters.items())) == hash_tensors(list(straight.parameters.items()))


def test_a_text_only_step_hangs_nobody(tmp_path: Path) -> None:
    made = rows(30)
    for row in made[::2]:
        row["images"], row["family"] = [], "text"
        for message in row["messages"]:
            message["parts"] = [part for part in message["parts"] if part["image"] is None]
    bench = Bench(tmp_path, made)
    settings = dataclasses.replace(GENTLE, mixture=MixtureConfig(weights={"text": 1.0}), packs_per_step=1, steps=2)
    assert bench.losses(settings, world=2) == pytest.approx(bench.losses(settings), abs=1e-5)


@pytest.mark.parametrize("frozen", ["vision", "connector", "language"])
def test_a_frozen_module_comes_out_bit_identical(bench: Bench, frozen: str) -> None:
    settings = dataclasses.replace(CONFIG, rates=dataclasses.replace(CONFIG.rates, **{frozen: 0.0}), steps=4)
    trainer = bench.trainer(settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run()
    assert list(trainer.policy.finish()) == [frozen]
    changed = {
        name.split(".")[0] for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"vision", "connector", "language"} - {frozen}


def test_remembered_features_of_a_frozen_tower_change_nothing(bench: Bench) -> None:
    settings = dataclasses.replace(GENTLE, rates=Rates(vision=0.0, connector=1e-4, language=1e-4))
    remembering = dataclasses.replace(settings, feature_cache_mib=8)
    assert bench.losses(remembering) == pytest.approx(bench.losses(settings), abs=1e-5)
    trainer = bench.trainer(remembering)
    trainer.run()
    calls: list[int] = []
    trainer.model.encode_pictures = lambda pixels: calls.append(len(pixels))
    trainer.held_out_loss()
    assert not calls, "all held-out pictures were seen by the evaluation at the end of the run"


def test_a_frozen_weight_that_changed_is_noticed(bench: Bench) -> None:
    model = copy.deepcopy(bench.model)
    policy = FreezePolicy(model, Rates(vision=0.0, connector=1e-3), [])
    with torch.no_grad():
        next(model.vision.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(CheckpointError, match="vision"):
        policy.finish()


def test_new_tokens_learn_while_the_language_model_is_frozen(bench: Bench) -> None:
    rates = Rates(vision=0.0, connector=1e-3, new_tokens=1e-2)
    trainer = bench.trainer(dataclasses.replace(CONFIG, rates=rates, steps=4))
    embedding = trainer.model.get_input_embeddings().weight
    before = embedding.detach().clone()
    trainer.run()
    assert torch.equal(embedding, before), "not before the end of the stage"
    loss = trainer.held_out_loss()
    trainer.policy.finish()
    moved = (embedding != before).any(dim=1).nonzero().flatten().tolist()
    ids = bench.processor.tokenizer.convert_tokens_to_ids(list(chat.IMAGE_TOKENS))
    assert set(moved) <= set(ids)
    assert {ids[0], ids[1]} <= set(moved), "<IMAGE> and <IMAGE_END> stand in every prompt with a picture"
    assert trainer.held_out_loss() == pytest.approx(loss, abs=1e-3)
    assert trainer.policy.counts()["new_tokens"]["hot"] == 3 * embedding.shape[1]


def test_a_loss_that_is_no_number_stops_the_run(bench: Bench) -> None:
    trainer = bench.trainer(dataclasses.replace(CONFIG, steps=3))
    with torch.no_grad():
        trainer.model.connector.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"Step 1 has a loss of nan .*keys \d+"):
        trainer.run()


def test_without_bitsandbytes_the_8_bit_optimizer_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        bench.trainer(dataclasses.replace(CONFIG, optimizer="adamw8bit"))


@pytest.mark.parametrize(
    ("schedule", "half", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_learning_rates_warm_up_and_fall(schedule: Any, half: float, end: float) -> None:
    settings = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=10)
    factors = [rate_factor(settings, step, 1010) for step in range(1010)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == pytest.approx(1.0)
    assert max(factors) == pytest.approx(1.0)
    assert factors[510] == pytest.approx(half, abs=0.01)
    assert factors[-1] == pytest.approx(end, abs=0.01)


def test_numbers_of_repeated_steps_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for steps in ((1, 2, 3), (2, 3, 4)):
        file = metrics.MetricsFile(path, workers=1)
        for step in steps:
            made = {"samples": 10, "tokens": 100, "supervised": 5, "pictures": 1, "seconds": 0.5, "data_wait_s": 0.1}
            file.step(metrics.StepRecord(step=step, loss=1 / step, gradient_norm=1.0, rates={}, **made))
        file.close()
        with path.open("a") as cut_off:
            cut_off.write('{"step": 9, "lo')
    numbers = metrics.read(path).summary()
    assert (numbers["steps"], numbers["attempts"], numbers["samples_seen"]) == (4, 2, 40)
    assert numbers["last_loss"] == 0.25


# The stage folder.


RATES = {
    "pretrain": Rates(vision=0.0, connector=1e-3, new_tokens=1e-3),
    "sft": Rates(vision=1e-3, connector=1e-3, language=1e-3),
    "instruct": Rates(vision=0.0, connector=1e-3, language=1e-3),
}


def stage(root: Path, name: str, **changes: Any) -> TrainingRun:
    if not (root / "parts").is_dir():
        save_parts(root / "parts")
        prepare_folder(root, rows())
    parts = {"vision": str(root / "parts" / "clip"), "language": str(root / "parts" / "llm")}
    recipe = {
        "model": {**parts, "num_image_tokens": 4, "connector_width": 48},
        "picture": config.to_dict(PICTURE),
    }
    settings = dataclasses.replace(CONFIG, **{"rates": RATES[name], "steps": 6, "checkpoint_every_steps": 2, **changes})
    return open_run(name, settings, recipe, [root], root)


def test_three_stages_one_after_another(tmp_path: Path) -> None:
    for name in RATES:
        run = stage(tmp_path, name)
        manifest = run_local(run)
        assert verify(run.folder) == []
        assert manifest.rows_in == sum(manifest.statuses.values())
        assert set(manifest.extra["frozen"]) == {
            part for part in ("vision", "language") if not getattr(RATES[name], part)
        }
        assert json.loads((run.folder / "stats.json").read_text())["held_out_loss"] > 0
        assert "<svg" in (run.folder / "report.html").read_text()
        assert f"after the stage `{name}`" in (run.folder / "model" / "README.md").read_text()
        load(run.folder / "model")
    again = stage(tmp_path, "instruct")
    stamp = (again.folder / "manifest.json").stat().st_mtime_ns
    assert run_local(again) == manifest
    assert (again.folder / "manifest.json").stat().st_mtime_ns == stamp, "finished means nothing to do"
    assert stage(tmp_path, "instruct", seed=1).folder != again.folder
    assert stage(tmp_path, "instruct", packs_per_batch=1).folder == again.folder


def test_a_stage_reads_the_folders_of_all_sources(tmp_path: Path) -> None:
    """Their keys are the same; one of them is seen twice an epoch, one is left out, and the run's record says so."""
    for number, source in enumerate(("a", "b", "c")):
        made = [{**row, "source": source} for row in rows(20 + 10 * number)]
        prepare_folder(tmp_path, made, source=source)
    save_parts(tmp_path / "parts")
    weights = MixtureConfig(weights={"a": 1.0, "b": 2.0})
    run = stage(tmp_path, "pretrain", mixture=weights, epochs=1, packs_per_step=2)
    assert [Path(folder).name[:8] for folder in run.prepare] == ["prepare-"] * 3
    run_local(run)
    told = json.loads((run.folder / "plan.json").read_text())
    statistics = json.loads((run.folder / "stats.json").read_text())
    assert statistics["sections"]["data"]["mixture"] == told["mixture"]
    assert sum(kind["samples"] for kind in told["mixture"]) == told["samples"]
    assert all(kind["samples"] == 0 for kind in told["mixture"] if kind["source"] == "c")
    assert any("upsampled: b/" in said for said in told["remarks"])
    assert any("left out: no entry of the mixture names c/" in said for said in told["remarks"])
    assert told["reading"][0]["workers"] == 1
    assert "a ×1, b ×2" in (run.folder / "model" / "README.md").read_text()

    again = stage(tmp_path, "sft")
    measured = sorted((run.folder / "lengths").rglob("*.parquet"))
    before = {path.name: path.stat().st_mtime_ns for path in measured}
    assert len(measured) == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "measure", lambda *_: pytest.fail("the stage before has measured them"))
        run_local(again)
    assert {path.name: path.stat().st_mtime_ns for path in measured} == before


def test_a_saved_plan_is_the_one_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of this program might make another plan; an interrupted run goes on with its own."""
    run = stage(tmp_path, "pretrain")
    monkeypatch.setattr(worker.metrics.MetricsFile, "step", _stop_at_step(3))
    with pytest.raises(KeyboardInterrupt):
        run_local(run)
    monkeypatch.undo()
    kept = plan.Plan.load(run.folder / "plan.parquet").fingerprint
    monkeypatch.setattr(worker.plan, "build", lambda *_: pytest.fail("there is a plan"))
    run_local(run)
    assert json.loads((run.folder / "result.json").read_text())["plan"]["fingerprint"] == kept


def test_a_stage_without_the_one_before_says_which(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="'pretrain'"):
        stage(tmp_path, "sft")


@pytest.mark.parametrize("damage", [None, "newest checkpoint", "half-written checkpoint"])
def test_an_interrupted_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None) -> None:
    run_local(straight := stage(tmp_path / "straight", "pretrain"))
    run = stage(tmp_path / "broken", "pretrain")
    monkeypatch.setattr(worker.metrics.MetricsFile, "step", _stop_at_step(5))
    with pytest.raises(KeyboardInterrupt):
        run_local(run)
    monkeypatch.undo()
    assert not run.is_finished
    newest = checkpoint.complete(checkpoint.root_of(run.folder))[-1]
    assert newest.name == "step-00000004"
    if damage == "newest checkpoint":
        next(newest.glob("state-*.pt")).write_bytes(b"nonsense")
    elif damage:
        (newest / "done.json").unlink()
    run_local(run)
    starts = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    after = starts[max(place for place, line in enumerate(starts) if "attempt" in line) + 1]
    assert after["step"] == (3 if damage else 5)
    weights = [stage.folder / "model" / "model.safetensors" for stage in (straight, run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_checkpoint_of_another_plan_is_refused(bench: Bench, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, bench.trainer().state(), keep=2)
    with pytest.raises(CheckpointError, match="another plan"):
        checkpoint.load_newest(tmp_path, "0" * 64, pytest.fail)


def test_only_the_newest_checkpoints_are_kept(bench: Bench, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, bench.trainer().state(), keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_model_named_in_the_settings_is_started_from(tmp_path: Path) -> None:
    run_local(first := stage(tmp_path, "pretrain"))
    named = stage(tmp_path, "instruct", init=str(first.folder / "model"))
    assert named.init == str(first.folder / "model")
    with pytest.raises(StageError, match=r"config\.json"):
        stage(tmp_path, "instruct", init=str(tmp_path / "nowhere"))
    assert Manifest.read(first.folder).stage == "pretrain"


def _stop_at_step(last: int) -> Callable[[metrics.MetricsFile, metrics.StepRecord], None]:
    write = metrics.MetricsFile.step

    def step(self: metrics.MetricsFile, record: metrics.StepRecord) -> None:
        write(self, record)
        if record.step == last:
            raise KeyboardInterrupt

    return step
