"""FSDP2 on two processes gives what one process gives, and hangs nobody."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import two_workers
from test_loop import GENTLE, Bench
from training_data import rows

from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.errors import ConfigError
from tinyvlm.train.settings import LoraConfig, Rates, TrainConfig

NEW_ROWS = {"vision": 0.0, "connector": 1e-4, "language": 0.0, "new_tokens": 1e-3}
TEXT = {"mixture": {"weights": {"text": 1.0}}, "packs_per_step": 1, "steps": 2}
ASKED: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "more batches": {"parallel": "fsdp", "packs_per_batch": 1},
    "restarted": {"parallel": "fsdp", "restart_at": 4},
    "masked": {"parallel": "fsdp", "attention": "masked"},
    "new rows": {"parallel": "fsdp", "rates": NEW_ROWS},
    "adapters, averaged, computed twice": {
        **{"parallel": "fsdp", "restart_at": 4, "gradient_checkpointing": True, "ema_decay": 0.5},
        **{"lora": {"rank": 4}, "rates": {"vision": 0.0, "connector": 1e-4, "language": 1e-3}},
    },
    "text on one worker alone": {"parallel": "fsdp", **TEXT},
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two workers saw; the settings of `ASKED` after one another, for starting them takes longest."""
    folder = tmp_path_factory.mktemp("two")
    return dict(zip(ASKED, two_workers.run(folder, list(ASKED.values())), strict=True))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), rows())


ALONE: dict[str, TrainConfig] = {
    **dict.fromkeys(("ddp", "fsdp", "more batches", "restarted", "masked"), GENTLE),
    "new rows": dataclasses.replace(GENTLE, rates=Rates(**NEW_ROWS)),
    "adapters, averaged, computed twice": dataclasses.replace(
        GENTLE, ema_decay=0.5, lora=LoraConfig(rank=4), rates=Rates(vision=0.0, connector=1e-4, language=1e-3)
    ),
    "text on one worker alone": dataclasses.replace(
        GENTLE, mixture=MixtureConfig(weights={"text": 1.0}), packs_per_step=1, steps=2
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_two_workers_give_the_losses_of_one(bench: Bench, seen: dict[str, dict[str, Any]], name: str) -> None:
    losses = [loss for loss, _ in seen[name]["losses"]] + seen[name]["held_out"]
    assert losses == pytest.approx(bench.losses(ALONE[name]), abs=1e-5)


def test_norms_are_over_all_shards(seen: dict[str, dict[str, Any]]) -> None:
    for (_, one), (_, other) in zip(seen["ddp"]["losses"], seen["fsdp"]["losses"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_restart_ends_with_the_same_weights(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["restarted"]["weights"] == seen["fsdp"]["weights"]


def test_eight_bits_and_shards_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="parallel='ddp', or optimizer='adamw'"):
        TrainConfig(parallel="fsdp", optimizer="adamw8bit")
