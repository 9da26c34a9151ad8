"""What may be switched on: it changes time or memory and no result, or exactly what it says."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
from typing import Any

import pytest
import torch
from test_loop import CONFIG, GENTLE, Bench
from training_data import rows

from tinyvlm.errors import ConfigError
from tinyvlm.train.attention import packed_attention
from tinyvlm.train.batch import assemble
from tinyvlm.train.freeze import hash_tensors
from tinyvlm.train.loop import Hooks
from tinyvlm.train.settings import LoraConfig, Rates, TrainConfig

LORA = dataclasses.replace(CONFIG, lora=LoraConfig(rank=4), rates=Rates(vision=0.0, connector=1e-3, language=1e-3))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), rows())


def test_rows_without_a_mask_give_the_losses_and_gradients_of_masked_packs(bench: Bench) -> None:
    assert bench.losses(GENTLE) == pytest.approx(
        bench.losses(dataclasses.replace(GENTLE, attention="masked")), abs=1e-5
    )
    one, other = (_gradients(bench, attention=name) for name in ("packed", "masked"))
    torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


def test_the_model_has_its_own_attention_back_after_training(bench: Bench) -> None:
    trainer = bench.trainer(dataclasses.replace(GENTLE, steps=1))
    before = trainer.model.language.config._attn_implementation
    with packed_attention(trainer.model.language):
        assert trainer.model.language.config._attn_implementation != before
    trainer.run()
    assert trainer.model.language.config._attn_implementation == before


def test_layers_computed_twice_have_the_same_gradients(bench: Bench) -> None:
    calls: list[int] = []
    layer = type(bench.model.language.model.layers[0].mlp)
    forward = layer.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
        once = _gradients(bench), len(calls)
        twice = _gradients(bench, gradient_checkpointing=True), len(calls) - once[1]
    assert twice[1] == 2 * once[1]
    torch.testing.assert_close(twice[0], once[0], atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler on a CPU")
def test_compiled_layers_have_the_same_gradients(bench: Bench) -> None:
    torch.testing.assert_close(_gradients(bench, compile="on"), _gradients(bench), atol=1e-4, rtol=1e-3)


def test_a_batch_filled_up_for_compiled_layers_loses_the_same(bench: Bench) -> None:
    trainer = bench.trainer(GENTLE)
    packs = [pack for pack in trainer.work.plan.packs(0) if pack]
    batch = assemble([trainer.work.source.load(pack, 0) for pack in packs[:2]], trainer.work.pad_token_id)
    with trainer.forward.ready(), torch.no_grad():
        loss, supervised = trainer.forward.loss(batch)
        trainer.forward.is_compiled = True
        filled, row = trainer.forward._in_one_row(batch)
        assert filled.input_ids.shape == (1, GENTLE.packs_per_batch * GENTLE.pack_length)
        assert (sum(row.lengths), len(row.starts) % 64, int(row.starts[-1])) == (512, 0, 512)
        again, as_many = trainer.forward.loss(batch)
    assert len(as_many) == len(supervised)
    assert float(again) == pytest.approx(float(loss), abs=1e-3)


def test_the_average_is_what_its_formula_says_and_what_is_saved(bench: Bench) -> None:
    settings = dataclasses.replace(CONFIG, steps=5, ema_decay=0.7)
    seen: list[torch.Tensor] = []
    trainer = bench.trainer(settings, hooks=Hooks(on_step=lambda record: seen.append(weight.detach().clone())))
    weight = trainer.model.connector.down_proj.weight
    wanted = weight.detach().clone()
    raw = bench.trainer(dataclasses.replace(settings, ema_decay=0.0))
    held_out: list[float] = []
    trainer.run()
    raw.run()
    torch.testing.assert_close(weight, raw.model.connector.down_proj.weight, atol=0, rtol=0)
    held_out += [trainer.held_out_loss(), raw.held_out_loss()]
    assert held_out[0] != held_out[1]
    trainer.finish()
    for value in seen:
        wanted += 0.3 * (value - wanted)
    torch.testing.assert_close(weight.detach(), wanted)
    raw.model.load_state_dict(trainer.model.state_dict())
    assert raw.held_out_loss() == pytest.approx(held_out[0], abs=1e-6)


@pytest.mark.parametrize("settings", [dataclasses.replace(CONFIG, ema_decay=0.9), LORA], ids=["average", "lora"])
def test_a_restart_ends_with_the_same_weights(bench: Bench, settings: TrainConfig) -> None:
    kept: list[Any] = []
    settings = dataclasses.replace(settings, steps=8, checkpoint_every_steps=3)
    straight = bench.trainer(settings, hooks=Hooks(save=lambda step, state: kept.append(copy.deepcopy(state))))
    straight.run()
    resumed = bench.trainer(settings)
    resumed.run(kept[0])
    hashes = []
    for trainer in (straight, resumed):
        trainer.finish()
        hashes.append(hash_tensors(sorted(trainer.model.state_dict().items())))
    assert hashes[0] == hashes[1]


def test_adapters_alone_learn_and_are_merged(bench: Bench) -> None:
    trainer = bench.trainer(dataclasses.replace(LORA, steps=6))
    language = trainer.policy.counts()["language"]
    linear = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)} | {
        n: (32, 64) for n in ("gate", "up", "down")
    }
    assert language["hot"] == 2 * 4 * sum(sum(sides) for sides in linear.values())
    before = bench.model.state_dict()
    trainer.run()
    loss = trainer.held_out_loss()
    assert "language" in trainer.finish(), "the weights beside the adapters were frozen, and their hash is the same"
    after = trainer.model.state_dict()
    assert after.keys() == before.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed >= {"q_proj", "down_proj"}
    assert "embed_tokens" not in changed
    assert trainer.held_out_loss() == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rates": Rates(language=0.0)}, "adapters would not learn"),
        ({"lora": LoraConfig(rank=2, targets=("query",))}, r"'query'; the language model has down_proj"),
        ({"ema_decay": 1.0}, "below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(bench: Bench, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bench.trainer(dataclasses.replace(LORA, **changes))


def test_without_peft_adapters_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"tinyvlm\[lora\]"):
        bench.trainer(LORA)


def _gradients(bench: Bench, **changes: Any) -> torch.Tensor:
    """Of the first step, before they are divided and clipped."""
    trainer = bench.trainer(dataclasses.replace(GENTLE, **changes))
    trainer.model.train()
    with trainer.forward.ready():
        for batch in trainer.batches(0):
            trainer.forward.loss(batch)[0].backward()  # type: ignore[no-untyped-call]
    return torch.cat([parameter.grad.flatten() for parameter in trainer.parameters.values()])  # type: ignore[union-attr]
