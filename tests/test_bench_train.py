"""The bench of training with a model of a few thousand weights: both sides do the same steps, all numbers are there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tinyvlm.bench import training_sides, training_work
from tinyvlm.bench.train import as_text
from tinyvlm.bench.training_work import Task, make_plan, steps_of

SIZE = {
    "vision": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112},
    "language": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256},
    "connector_width": 48,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(training_work.SIZES, "small", SIZE)


TASK = Task(side="ours", samples=8, steps=4, batch=4, warm_up=1, rate=1e-3)


@pytest.mark.parametrize("hot", ["no-tower", "all"])
def test_a_padded_trainer_has_the_losses_of_the_loop(hot: str) -> None:
    ours, padded = (
        training_sides.measure(dataclasses.replace(TASK, side=side, hot=hot)) for side in ("ours", "padded")
    )
    assert ours["losses"] == pytest.approx(padded["losses"], abs=1e-4)
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["gflop_per_sample"] == padded["gflop_per_sample"]


def test_a_table_has_all_numbers() -> None:
    matrix = training_sides.measure(dataclasses.replace(TASK, side="matrix"))
    rows = []
    for side in ("padded", "ours"):
        row = training_sides.measure(dataclasses.replace(TASK, side=side, with_parts=side == "ours"))
        rows.append({"case": "mixed", **row, "share_of_matrix_rate": row["tflops"] / matrix["tflops"]})
    text = as_text({"device": matrix["device"], "matrix_tflops": matrix["tflops"], "rows": rows})
    assert "| mixed | ours |" in text
    assert "vision forward" in text
    assert "backward" in text


def test_features_that_are_given_cost_no_tower() -> None:
    cached = training_sides.measure(dataclasses.replace(TASK, is_cached=True, lengths="130", steps=3))
    assert cached["gflop_per_sample"]["vision"] == 0


def test_every_step_has_equally_many_samples_and_every_pack_fits() -> None:
    task = dataclasses.replace(TASK, samples=16)
    plan = make_plan(task)
    assert [len(step) for step in steps_of(plan)] == [16] * 4
    packs = [pack for step in range(plan.num_steps) for pack in plan.packs(step)]
    assert max(sum(item.tokens for item in pack) for pack in packs) <= task.pack_length
    assert len({item.key for pack in packs for item in pack}) == 64
