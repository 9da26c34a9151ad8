"""Mixtures: which conversations an epoch takes, exactly how many, and what is said of the others."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tinyvlm import config, recipes
from tinyvlm.data.mixture import Kind, MixtureConfig, Quota, Walk, entry_of, quotas, remarks
from tinyvlm.errors import ConfigError, DataError

THERE = {
    Kind("captions", "caption"): 1000,
    Kind("m3it/coco", "caption"): 600,
    Kind("m3it/vqa-v2", "vqa"): 301,
    Kind("m3it/viquae", "knowledge_vqa"): 7,
    Kind("alpaca", "text"): 50,
}


def taken(mixture: MixtureConfig) -> dict[str, int]:
    return {"/".join(quota.kind): quota.samples for quota in quotas(THERE, THERE, mixture) if quota.samples}


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        (Kind("m3it/coco", "caption"), "m3it/coco"),
        (Kind("m3it/textcap", "caption"), "m3it/caption"),
        (Kind("m3it/vqa-v2", "vqa"), "m3it"),
        (Kind("captions", "caption"), "caption"),
        (Kind("m3it", "text"), "m3it"),
        (Kind("m3itx/coco", "caption"), "caption"),
        (Kind("alpaca", "text"), ""),
    ],
)
def test_the_most_specific_entry_counts(kind: Kind, entry: str) -> None:
    names = ["caption", "m3it", "m3it/caption", "m3it/coco"]
    assert entry_of(kind, names) == entry_of(kind, names[::-1]) == entry


def test_a_source_means_all_that_is_below_it() -> None:
    assert taken(MixtureConfig(weights={"m3it": 1.0})) == {
        "m3it/coco/caption": 600,
        "m3it/vqa-v2/vqa": 301,
        "m3it/viquae/knowledge_vqa": 7,
    }


def test_weights_are_times_an_epoch_and_budgets_are_samples() -> None:
    mixture = MixtureConfig(weights={"caption": 0.5, "m3it/coco": 2.0}, budgets={"m3it/vqa": 40, "alpaca": 120})
    assert taken(mixture) == {
        "captions/caption": 500,
        "m3it/coco/caption": 1200,
        "m3it/vqa-v2/vqa": 40,
        "alpaca/text": 120,
    }


@pytest.mark.parametrize("samples", [1, 10, 999, 5000])
def test_a_total_is_met_exactly_and_shared_by_weight(samples: int) -> None:
    counts = taken(MixtureConfig(weights={"m3it": 1.0, "captions": 3.0}, samples=samples))
    assert sum(counts.values()) == samples
    if samples == 5000:
        assert counts["captions/caption"] == round(5000 * 3000 / 3908)
        assert counts["m3it/coco/caption"] == pytest.approx(5000 * 600 / 3908, abs=1)


def test_a_total_leaves_budgets_as_they_are() -> None:
    counts = taken(MixtureConfig(weights={"captions": 1.0}, budgets={"alpaca": 33}, samples=700))
    assert counts == {"captions/caption": 667, "alpaca/text": 33}


def test_what_is_seen_often_or_never_is_said() -> None:
    mixture = MixtureConfig(weights={"captions": 1.0, "m3it/vqa": 0.0, "m3it/coco": 0.2}, budgets={"alpaca": 120})
    said = "\n".join(remarks(quotas(THERE, THERE, mixture)))
    assert "upsampled: alpaca/text is seen 2.4 times an epoch (50 conversations, 120 samples)" in said
    assert "left out: no entry of the mixture names m3it/viquae/knowledge_vqa (7 conversations)" in said
    assert "not seen: m3it/vqa takes nothing of m3it/vqa-v2/vqa" in said
    assert "captions" not in said
    assert "coco" not in said


def test_a_name_that_fits_nothing_tells_what_is_there() -> None:
    with pytest.raises(ConfigError, match=r"'captoins'.*did you mean 'captions'\?.*m3it/coco/caption \(600\)"):
        quotas(THERE, THERE, MixtureConfig(weights={"captoins": 1.0}))
    with pytest.raises(ConfigError, match=r"'llava'.*ray_jobs\.prepare"):
        quotas(THERE, THERE, MixtureConfig(weights={"captions": 1.0}, budgets={"llava": 10}))
    with pytest.raises(ConfigError, match="'m3it/text'"):
        quotas(THERE, THERE, MixtureConfig(weights={"m3it/text": 0.0, "captions": 1.0}))


def test_a_budget_of_nothing_usable_is_refused() -> None:
    usable = {kind: number for kind, number in THERE.items() if kind.source != "alpaca"}
    with pytest.raises(DataError, match="alpaca"):
        quotas(THERE, usable, MixtureConfig(budgets={"alpaca": 10}, weights={}))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weights": {}}, "at least one above 0"),
        ({"weights": {"vqa": 0.0}}, "at least one above 0"),
        ({"weights": {"vqa": -1.0, "text": 1.0}}, "at least one above 0"),
        ({"weights": {"vqa": 1.0}, "budgets": {"vqa": 5}}, "a weight and a budget"),
        ({"weights": {"m3it//vqa": 1.0}}, "m3it//vqa"),
        ({"weights": {"vqa": 1.0}, "budgets": {"text": 50}, "samples": 40}, "make the numbers fit"),
        ({"weights": {}, "budgets": {"text": 50}, "samples": 60}, "make the numbers fit"),
        ({"weights": {"vqa": 1.0}, "budgets": {"text": 50}, "samples": 50}, "make the numbers fit"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        MixtureConfig(**change)


def walk(samples: int, *, rows: int = 120, group_size: int = 10, seed: int = 0) -> Walk:
    groups = (np.arange(rows) // group_size).astype(np.int32)
    return Walk(np.zeros(rows, np.int32), groups, [Quota(Kind("a", "vqa"), "a", rows, samples)], seed)


@pytest.mark.parametrize("samples", [1, 7, 30, 75, 120, 121, 300])
def test_epochs_together_see_all_equally_often(samples: int) -> None:
    walked = walk(samples)
    seen: Counter[int] = Counter({row: 0 for row in range(120)})
    for epoch in range(8):
        rows, times = walked.epoch(epoch)
        assert len(rows) == samples
        assert set(Counter(rows.tolist()).values()) <= {samples // 120, -(-samples // 120)}
        assert len(set(zip(rows.tolist(), times.tolist(), strict=True))) == samples
        seen.update(rows.tolist())
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_part_is_whole_row_groups() -> None:
    first, second = (set(walk(35).epoch(epoch)[0].tolist()) for epoch in range(2))
    for rows in (first, second):
        assert len({row // 10 for row in rows}) <= 5, "three whole groups, and at most two in part"
    assert not first & second, "the next epoch goes on where this one stopped"


def test_another_source_changes_nothing_about_this_one() -> None:
    groups = (np.arange(240) // 10).astype(np.int32)
    codes = (np.arange(240) // 120).astype(np.int32)
    both = Walk(codes, groups, [Quota(Kind(name, "vqa"), name, 120, 35) for name in "ab"], 0)
    assert set(both.epoch(0)[0].tolist()) & set(range(120)) == set(walk(35).epoch(0)[0].tolist())
    assert set(walk(35, seed=1).epoch(0)[0].tolist()) != set(walk(35).epoch(0)[0].tolist())


def test_mixtures_can_be_set_from_the_command_line() -> None:
    made = recipes.load("tiny", ["sft.mixture.weights.caption=0.5", 'instruct.mixture.weights={"m3it": 1}'])
    assert made.sft.mixture.weights["caption"] == 0.5
    assert made.sft.mixture.weights["vqa"] == recipes.tiny().sft.mixture.weights["vqa"]
    assert made.instruct.mixture == MixtureConfig(weights={"m3it": 1.0})
    assert config.from_dict(recipes.Recipe, config.to_dict(made)) == made
    other = dataclasses.replace(made.sft, mixture=MixtureConfig(weights={"vqa": 1.0}))
    assert config.fingerprint(other) != config.fingerprint(made.sft)
