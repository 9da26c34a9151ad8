"""Recipes say what the published table says, and what the words beside them promise."""

from __future__ import annotations

from tinyvlm import recipes
from tinyvlm.train.settings import Rates


def test_base_is_the_published_table() -> None:
    base = recipes.base()
    pretrain, sft, instruct = base.pretrain, base.sft, base.instruct
    assert [list(stage.mixture.weights) for stage in (pretrain, sft, instruct)] == [
        ["captions"],
        ["m3it"],
        ["llava", "llavar", "alpaca"],
    ]
    assert (pretrain.mixture.samples, sft.mixture.samples) == (3_750_000, 1_020_000)
    assert pretrain.rates == Rates(vision=2e-5, connector=2e-5, language=0.0)
    assert sft.rates == Rates(vision=1e-5, connector=1e-5, language=1e-5)
    assert [stage.packs_per_step for stage in (pretrain, sft)] == [8 * 8 * 2, 4 * 8 * 2]
    assert [stage.packs_per_batch for stage in (pretrain, sft)] == [8, 4]
    assert [stage.optimizer for stage in (pretrain, sft, instruct)] == ["adamw", "adamw8bit", "adamw"]
    for stage in (pretrain, sft, instruct):
        assert (stage.schedule, stage.weight_decay, stage.precision) == ("cosine", 0.0, "bf16")
        assert (stage.samples_per_pack, stage.gradient_checkpointing, stage.ema_decay, stage.lora.rank) == (
            1,
            False,
            0,
            0,
        )
    assert (base.model.num_image_tokens, base.picture.size) == (64, 448)


def test_cached_reads_features_of_a_frozen_tower_in_every_stage() -> None:
    for stage in (recipes.cached().pretrain, recipes.cached().sft, recipes.cached().instruct):
        assert (stage.features, stage.rates.vision) == ("stored", 0.0)


def test_tuned_warms_the_connector_and_the_new_tokens_up_and_packs() -> None:
    tuned = recipes.tuned()
    assert tuned.pretrain.rates == Rates(vision=0.0, connector=1e-3, language=0.0, new_tokens=1e-3)
    assert tuned.sft.rates.vision < tuned.sft.rates.connector
    assert {stage.samples_per_pack for stage in (tuned.pretrain, tuned.sft, tuned.instruct)} == {0}
