"""The plan: which samples are seen in which step, whoever carries it out, and what that reads."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_up_lengths import as_lengths
from made_up_lengths import lengths as made_up

from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.errors import CheckpointError, ConfigError, DataError
from tinyvlm.train import plan
from tinyvlm.train.reading import GroupSize, reading
from tinyvlm.train.settings import Rates, TrainConfig

CONFIG = TrainConfig(
    mixture=MixtureConfig(weights={"vqa": 1.0, "caption": 1.0}),
    packs_per_step=4,
    pack_length=128,
    samples_per_pack=0,
    lanes=2,
)
BIG = {
    ("captions", "caption"): 8_000,
    ("m3it/vqa-v2", "vqa"): 5_000,
    ("llava", "multi_turn"): 3_000,
    ("alpaca", "text"): 2_000,
}
ALL = MixtureConfig(weights={"captions": 1.0, "m3it": 1.0, "llava": 1.0, "alpaca": 1.0})


def lengths(number: int = 400, *, parts: int = 2, group_size: int = 20) -> pa.Table:
    """Conversations of random lengths, in row groups of a fixed size; some held out, too long, or unusable."""
    random = np.random.default_rng(0)
    per_part = number // parts
    place = np.arange(number)
    return as_lengths(
        {
            "key": place * 7,
            "part": place // per_part,
            "group": place % per_part // group_size,
            "row": place % per_part % group_size,
            "source": ["test"] * number,
            "family": np.where(place % 2 == 0, "vqa", "caption").tolist(),
            "split": np.where(place % 20 == 0, "validation", "train").tolist(),
            "status": np.where(place % 50 == 1, "bad_text", "ok").tolist(),
            "tokens": random.integers(10, 60, number) + np.where(place % 40 == 2, 120, 0),
            "pictures": np.ones(number, np.int32),
            "supervised": np.full(number, 5),
        }
    )


def keys(packs: list[plan.Pack]) -> list[int]:
    return [item.key for pack in packs for item in pack]


def all_packs(made: plan.Plan) -> list[plan.Pack]:
    return [pack for step in range(made.num_steps) for pack in made.packs(step)]


def test_every_usable_conversation_is_seen_once_an_epoch() -> None:
    table = lengths()
    made = plan.build(table, dataclasses.replace(CONFIG, epochs=3))
    usable = [
        row["key"]
        for row in table.to_pylist()
        if row["split"] == "train" and row["status"] == "ok" and row["tokens"] <= CONFIG.pack_length
    ]
    assert Counter(keys(all_packs(made))) == Counter(usable * 3)


def test_what_is_left_out_is_counted() -> None:
    counts = plan.count_statuses(lengths(), CONFIG)
    assert counts["too_long"] == 10
    assert counts["bad_text"] == 8
    assert sum(counts.values()) == 380


def test_weights_are_how_often_a_family_is_seen() -> None:
    config = dataclasses.replace(CONFIG, mixture=MixtureConfig(weights={"vqa": 2.0, "caption": 0.5}), epochs=2)
    made = plan.build(lengths(), config)
    number: dict[str, Counter[int]] = {family: Counter() for family in ("vqa", "caption")}
    for key in made.items["key"].tolist():
        number["vqa" if key // 7 % 2 == 0 else "caption"][key] += 1
    assert set(number["vqa"].values()) == {4}
    assert set(number["caption"].values()) == {1}, "the second epoch takes the other half"
    assert len(number["caption"]) == 192


@pytest.mark.parametrize("samples_per_pack", [0, 1])
def test_budgets_are_met_exactly_and_written_down(samples_per_pack: int) -> None:
    budgets = {"captions": 3_001, "m3it": 1_999, "alpaca": 4_500}
    config = dataclasses.replace(
        CONFIG, mixture=MixtureConfig(weights={}, budgets=budgets), pack_length=1024, samples_per_pack=samples_per_pack
    )
    table = made_up(BIG)
    made = plan.build(table, config)
    source = {
        (row["part"], row["group"], row["row"]): row["source"].split("/")[0]
        for row in table.select(["part", "group", "row", "source"]).to_pylist()
    }
    seen = Counter(source[item.part, item.group, item.row] for pack in all_packs(made) for item in pack)
    assert seen == budgets
    told = {kind["source"]: kind for kind in made.mixture}
    assert {name: told[name]["samples"] for name in ("captions", "m3it/vqa-v2", "alpaca")} == dict(
        zip(("captions", "m3it/vqa-v2", "alpaca"), budgets.values(), strict=True)
    )
    assert told["alpaca"]["seen"] == 2_000
    assert told["llava"] == {
        **{"source": "llava", "family": "multi_turn", "entry": "none: left out", "usable": 3_000},
        **{"an_epoch": 0, "samples": 0, "seen": 0},
    }
    assert any(said.startswith("upsampled: alpaca/text is seen 2.25 times") for said in made.remarks)


def test_the_plan_follows_from_lengths_and_settings_alone() -> None:
    table = lengths()
    assert plan.build(table, CONFIG).fingerprint == plan.build(table, CONFIG).fingerprint
    others = [dataclasses.replace(CONFIG, seed=1), dataclasses.replace(CONFIG, packs_per_step=3)]
    assert len({plan.build(table, config).fingerprint for config in (CONFIG, *others)}) == 3
    speed_only = dataclasses.replace(CONFIG, packs_per_batch=1, cache_mib=1, checkpoint_every_steps=3)
    assert plan.build(table, speed_only).fingerprint == plan.build(table, CONFIG).fingerprint


def test_another_process_makes_the_same_plan() -> None:
    code = (
        "import test_plan as t; from tinyvlm.train import plan; import dataclasses\n"
        "c = dataclasses.replace(t.CONFIG, mixture=t.ALL, pack_length=1024, packs_per_step=16)\n"
        "print(plan.build(t.made_up(t.BIG), c).fingerprint)"
    )
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {places!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    config = dataclasses.replace(CONFIG, mixture=ALL, pack_length=1024, packs_per_step=16)
    assert answer.stdout.strip() == plan.build(made_up(BIG), config).fingerprint


@pytest.mark.parametrize("samples_per_pack", [0, 1])
@pytest.mark.parametrize("world", range(1, 8))
def test_workers_share_a_step_out(world: int, samples_per_pack: int) -> None:
    made = plan.build(lengths(), dataclasses.replace(CONFIG, samples_per_pack=samples_per_pack))
    for step in range(made.num_steps):
        shares = [made.packs(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "empty packs fill up"
        assert len(shares[0]) == -(-len(made.packs(step)) // world), "but no more than needed"
        assert [pack for share in shares for pack in share if pack] == made.packs(step)


@pytest.mark.parametrize("pack_length", [1024, 2048, 4096])
def test_packs_are_full_with_the_limit_of_pictures_on(pack_length: int) -> None:
    config = dataclasses.replace(CONFIG, mixture=ALL, pack_length=pack_length, packs_per_step=16, lanes=4)
    made = plan.build(made_up(BIG, group_size=500), config)
    packs = all_packs(made)
    assert max(sum(item.tokens for item in pack) for pack in packs) <= pack_length
    most = max(sum(item.pictures for item in pack) for pack in packs)
    average = made.items["pictures"].sum() / made.items["tokens"].sum() * pack_length
    assert most <= made.shape.pictures_per_pack <= 1.5 * average + 1
    assert made.summary()["fill"] >= 0.97
    assert {len(made.packs(step)) for step in range(made.num_steps - 1)} == {16}


def test_a_conversation_with_more_pictures_than_a_pack_may_hold_is_told() -> None:
    kept = plan.build(lengths(), dataclasses.replace(CONFIG, pictures_per_pack=1))
    assert max(map(len, all_packs(kept))) == 1
    table = lengths()
    many = table.set_column(table.schema.get_field_index("pictures"), plan.LENGTHS.field("pictures"), table["row"])
    with pytest.raises(ConfigError, match="a conversation has 19 pictures"):
        plan.build(many, dataclasses.replace(CONFIG, pictures_per_pack=3))


def test_padded_samples_go_with_others_of_their_length_in_steps_of_all_lengths() -> None:
    config = dataclasses.replace(CONFIG, mixture=ALL, pack_length=1024, samples_per_pack=1, packs_per_step=64, lanes=4)
    table = made_up(BIG, group_size=200)
    made = plan.build(table, config)
    assert set(map(len, all_packs(made))) == {1}
    spread = [np.std(made.items["tokens"][slice(*made.samples(step))]) for step in range(made.num_steps - 1)]
    mixed = plan.build(table, dataclasses.replace(config, steps_of_one_length=1))
    assert np.median(spread) < 0.3 * np.std(made.items["tokens"])
    assert made.summary()["fill"] > mixed.summary()["fill"] > 0.8
    assert sorted(made.items["key"].tolist()) == sorted(mixed.items["key"].tolist())
    means = [made.items["tokens"][slice(*made.samples(step))].mean() for step in range(made.num_steps - 1)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3, "long and short steps come in no order"


# What is read.


def sizes(table: pa.Table) -> dict[tuple[int, int], GroupSize]:
    places = zip(table["part"].to_pylist(), table["group"].to_pylist(), strict=True)
    return {place: GroupSize(rows, 50 * rows) for place, rows in Counter(places).items()}


@pytest.mark.parametrize("samples_per_pack", [0, 1])
@pytest.mark.parametrize("mixture", [ALL, MixtureConfig(weights={"captions": 0.5, "m3it": 2.0, "llava": 0.3})])
def test_row_groups_are_read_about_once_by_any_number_of_workers(mixture: MixtureConfig, samples_per_pack: int) -> None:
    table = made_up({kind: 4 * number for kind, number in BIG.items()}, group_size=100)
    config = TrainConfig(
        mixture=mixture, packs_per_step=32, pack_length=1024, samples_per_pack=samples_per_pack, epochs=2
    )
    made = plan.build(table, config)
    for world in (1, 2, 3, 8):
        told = reading(made, sizes(table), world)
        assert 0.8 <= told.ratio <= 1.3, told
        assert told.window_groups <= 2 * config.window_groups * (config.lanes // world + 2)
        assert told.window_bytes <= told.window_groups * 100 * 50


def test_reading_counts_what_comes_again_and_what_is_not_used() -> None:
    table = made_up({("a", "vqa"): 10_000}, group_size=100)
    config = TrainConfig(mixture=MixtureConfig(weights={"a": 0.1}), packs_per_step=2, pack_length=1024, lanes=1)
    told = reading(plan.build(table, config), sizes(table), 1)
    assert (told.groups_read, told.ratio) == (10, 1.0)
    scattered = {place: GroupSize(1_000, 5_000) for place in sizes(table)}
    assert reading(plan.build(table, config), scattered, 1).ratio == 10.0


# The file, steps, and what is refused.


def test_a_saved_plan_is_the_same_plan(tmp_path: Path) -> None:
    made = plan.build(lengths(), CONFIG)
    made.save(tmp_path / "plan.parquet")
    again = plan.Plan.load(tmp_path / "plan.parquet")
    assert again.fingerprint == made.fingerprint
    assert all_packs(again) == all_packs(made)
    assert (again.shape, again.mixture, again.remarks) == (made.shape, made.mixture, made.remarks)
    json.dumps(again.summary())
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
    with pytest.raises(ConfigError, match=r"'text'.*test/caption"):
        plan.build(lengths(), dataclasses.replace(CONFIG, mixture=MixtureConfig(weights={"text": 1.0})))
    with pytest.raises(DataError, match="vqa ×1, caption ×1 with at most 8 tokens"):
        plan.build(lengths(), dataclasses.replace(CONFIG, pack_length=8))


def test_held_out_conversations_are_never_trained_on() -> None:
    table = lengths()
    held_out = plan.build_validation(table, dataclasses.replace(CONFIG, max_validation=12))
    assert len(held_out.items) == 12
    assert not set(held_out.items["key"].tolist()) & set(plan.build(table, CONFIG).items["key"].tolist())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lanes": 0}, "lanes"),
        ({"pictures_per_pack": -1}, "pictures_per_pack"),
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
