"""The plan: which samples are seen in which step, whoever carries it out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.errors import CheckpointError, ConfigError, DataError
from tinyvlm.train import plan
from tinyvlm.train.settings import Rates, TrainConfig

CONFIG = TrainConfig(
    mixture=MixtureConfig(weights={"vqa": 1.0, "caption": 1.0}),
    packs_per_step=4,
    pack_length=128,
    samples_per_pack=0,
    window_groups=4,
)


def lengths(number: int = 400, *, parts: int = 2, group_size: int = 20) -> pa.Table:
    """Conversations of random lengths, in row groups of a fixed size."""
    random = np.random.default_rng(0)
    per_part = number // parts
    place = np.arange(number)
    return pa.table(
        {
            "key": place * 7,
            "part": place // per_part,
            "group": place % per_part // group_size,
            "row": place % per_part % group_size,
            "family": np.where(place % 2 == 0, "vqa", "caption"),
            "split": np.where(place % 20 == 0, "validation", "train"),
            "status": np.where(place % 50 == 1, "bad_text", "ok"),
            "tokens": random.integers(10, 60, number) + np.where(place % 40 == 2, 120, 0),
            "pictures": np.ones(number, np.int32),
            "supervised": np.full(number, 5),
        }
    ).cast(plan.LENGTHS)


def keys(packs: list[plan.Pack]) -> list[int]:
    return [item.key for pack in packs for item in pack]


def test_every_usable_conversation_is_seen_once_an_epoch() -> None:
    table = lengths()
    made = plan.build(table, dataclasses.replace(CONFIG, epochs=3))
    seen = Counter(key for step in range(made.num_steps) for key in keys(made.packs(step)))
    usable = [
        row["key"]
        for row in table.to_pylist()
        if row["split"] == "train" and row["status"] == "ok" and row["tokens"] <= CONFIG.pack_length
    ]
    assert seen == Counter(usable * 3)


def test_what_is_left_out_is_counted() -> None:
    counts = plan.count_statuses(lengths(), CONFIG)
    assert counts["too_long"] == 10
    assert counts["bad_text"] == 8
    assert sum(counts.values()) == 380


def test_weights_are_how_often_a_family_is_seen() -> None:
    config = dataclasses.replace(CONFIG, mixture=MixtureConfig(weights={"vqa": 2.0, "caption": 0.5}), epochs=2)
    made = plan.build(lengths(), config)
    number = {family: Counter() for family in ("vqa", "caption")}
    for key in made.items[:, 0].tolist():
        number["vqa" if key // 7 % 2 == 0 else "caption"][key] += 1
    assert set(number["vqa"].values()) == {4}
    once = sum(number["caption"].values())
    assert 0.4 < once / (2 * 192) < 0.6
    assert 1 in number["caption"].values(), "each epoch takes another half"


def test_the_plan_follows_from_lengths_and_settings_alone() -> None:
    table = lengths()
    assert plan.build(table, CONFIG).fingerprint == plan.build(table, CONFIG).fingerprint
    others = [dataclasses.replace(CONFIG, seed=1), dataclasses.replace(CONFIG, packs_per_step=3)]
    assert len({plan.build(table, config).fingerprint for config in (CONFIG, *others)}) == 3
    speed_only = dataclasses.replace(CONFIG, packs_per_batch=1, cache_mib=1, checkpoint_every_steps=3)
    assert plan.build(table, speed_only).fingerprint == plan.build(table, CONFIG).fingerprint


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_workers_share_a_step_out(world: int) -> None:
    made = plan.build(lengths(), CONFIG)
    for step in (0, made.num_steps - 1):
        shares = [made.packs(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "empty packs fill up"
        assert sorted(key for share in shares for key in keys(share)) == sorted(keys(made.packs(step)))


def test_packs_keep_their_length_and_are_well_filled() -> None:
    made = plan.build(lengths(2000), CONFIG)
    sizes = [sum(item.tokens for item in pack) for step in range(made.num_steps) for pack in made.packs(step)]
    assert max(sizes) <= CONFIG.pack_length
    assert made.summary(CONFIG.pack_length)["fill"] > 0.93


def test_one_sample_a_pack_is_the_padded_batch() -> None:
    made = plan.build(lengths(), dataclasses.replace(CONFIG, samples_per_pack=1))
    assert {len(pack) for step in range(made.num_steps) for pack in made.packs(step)} == {1}


def test_row_groups_are_read_about_once_an_epoch() -> None:
    config = dataclasses.replace(CONFIG, window_groups=4, pack_length=256)
    made = plan.build(lengths(20_000, group_size=200), config)
    held: list[tuple[int, int]] = []
    reads = 0
    for step in range(made.num_steps):
        for item in (item for pack in made.packs(step) for item in pack):
            place = (item.part, item.group)
            if place in held:
                held.remove(place)
            else:
                reads += 1
            held = [*held, place][-2 * config.window_groups :]
    assert reads / 100 <= 1.3


def test_a_saved_plan_is_the_same_plan(tmp_path: Path) -> None:
    made = plan.build(lengths(), CONFIG)
    made.save(tmp_path / "plan.parquet")
    again = plan.Plan.load(tmp_path / "plan.parquet")
    assert again.fingerprint == made.fingerprint
    assert again.packs(2, 1, 2) == made.packs(2, 1, 2)
    (tmp_path / "plan.parquet").write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match="cannot be read"):
        plan.Plan.load(tmp_path / "plan.parquet")


def test_steps_cut_the_plan_short_and_cannot_make_it_longer() -> None:
    whole = plan.build(lengths(), CONFIG)
    short = plan.build(lengths(), dataclasses.replace(CONFIG, steps=5))
    assert short.num_steps == 5
    assert [short.packs(step) for step in range(5)] == [whole.packs(step) for step in range(5)]
    with pytest.raises(ConfigError, match="raise epochs"):
        plan.build(lengths(), dataclasses.replace(CONFIG, steps=whole.num_steps + 1))


def test_nothing_to_learn_from_is_told_beforehand() -> None:
    with pytest.raises(DataError, match="text"):
        plan.build(lengths(), dataclasses.replace(CONFIG, mixture=MixtureConfig(weights={"text": 1.0})))


def test_held_out_conversations_are_never_trained_on() -> None:
    table = lengths()
    held_out = plan.build_validation(table, dataclasses.replace(CONFIG, max_validation=12))
    assert len(held_out.items) == 12
    assert not set(held_out.items[:, 0].tolist()) & set(plan.build(table, CONFIG).items[:, 0].tolist())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"families": {"captions": 1.0}}, "caption"),
        ({"families": {"vqa": 0.0}}, "above 0"),
        ({"packs_per_step": 0}, "packs_per_step"),
        ({"clip": -1.0}, "clip"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        dataclasses.replace(CONFIG, **change)


def test_rates_must_leave_something_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing would learn"):
        Rates(vision=0.0, connector=0.0)
