"""Settings: overrides with types and nearest names, JSON and back, fingerprints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from tinyvlm import config
from tinyvlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    low: int = 0
    high: int = 10

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ConfigError(f"limits.low={self.low} is above limits.high={self.high}; swap them.")


@dataclass(frozen=True, kw_only=True)
class Download:
    timeout_s: float = 10.0
    max_bytes: int = 1000
    follow: bool = True
    agent: str = "tinyvlm"
    token: str | None = None
    store: Literal["original", "finished"] = "original"
    formats: tuple[str, ...] = ("jpeg", "png")
    size: tuple[int, int] = (448, 336)
    seed: int | None = None
    rates: Mapping[str, float] = field(default_factory=lambda: {"vision": 1e-5, "connector": 1e-3})
    cache: Path = Path("cache")
    in_flight: int = config.speed(64)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    download: Download = field(default_factory=Download)
    limits: Limits = field(default_factory=Limits)


RECIPE = Recipe(name="test")


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("download.timeout_s=2", 2.0),
        ("download.timeout_s=1e-3", 0.001),
        ("download.max_bytes=1e6", 1_000_000),
        ("download.follow=false", False),
        ("download.follow=True", True),
        ("download.agent=me/1.0 (a=b)", "me/1.0 (a=b)"),
        ("download.agent=1e5", "1e5"),
        ("download.agent=null", "null"),
        ('download.agent="quoted"', "quoted"),
        ("download.token=None", None),
        ("download.token=12", "12"),
        ("download.seed=7", 7),
        ("download.seed=null", None),
        ("download.store=finished", "finished"),
        ('download.formats=["webp"]', ("webp",)),
        ("download.formats=webp,gif", ("webp", "gif")),
        ("download.formats=webp", ("webp",)),
        ("download.formats=", ()),
        ("download.size=64,48", (64, 48)),
        ('download.rates={"vision": 1}', {"vision": 1.0}),
        ("download.rates.vision=2e-6", {"vision": 2e-6, "connector": 1e-3}),
        ("download.cache=/data/x", Path("/data/x")),
        ("download.limits.high=99", Limits(high=99)),
    ],
)
def test_an_override_has_the_type_of_its_field(assignment: str, value: Any) -> None:
    name = assignment.partition("=")[0].split(".")[1]
    came = getattr(config.override(RECIPE, [assignment]).download, name)
    assert came == value
    assert type(came) is type(value)


@pytest.mark.parametrize(
    ("assignments", "complaint"),
    [
        (["download.timout_s=2"], "There is no setting 'download.timout_s'; did you mean 'download.timeout_s'?"),
        (["downlaod.max_bytes=2"], "did you mean 'download.max_bytes'?"),
        (["max_bytes=2"], "did you mean 'download.max_bytes'?"),
        (["download.rates.visoin=1"], "did you mean 'download.rates.vision'?"),
        (["download.timeout_s.x=1"], "There is no setting 'download.timeout_s.x'"),
        (["zzz=1"], "known settings: name, download.timeout_s"),
        (["download=1"], "download is a group of settings; set one of download.timeout_s"),
        (["download.follow"], "wants name=value"),
        (["download.max_bytes=many"], "download.max_bytes wants int but got 'many' (str)."),
        (["download.max_bytes=1.5"], "download.max_bytes wants int but got 1.5"),
        (["download.max_bytes=true"], "download.max_bytes wants int"),
        (["download.follow=1"], "download.follow wants bool, true or false, but got 1"),
        (["download.timeout_s=NaN"], "download.timeout_s wants a finite number"),
        (["download.timeout_s=1e999"], "download.timeout_s wants a finite number"),
        (["download.timeout_s="], "download.timeout_s wants float"),
        (["download.store=finishd"], "did you mean 'finished'?"),
        (["download.size=1"], "download.size wants 2 values, but got 1"),
        (["download.size=1,x"], "download.size wants int"),
        (["download.seed=x"], "download.seed wants int"),
        (["limits.low=11"], "limits.low=11 is above limits.high=10"),
        (['download.rates={"a": 1}', "download.rates.vision=1"], "as a whole and by part"),
    ],
)
def test_a_wrong_override_is_refused_with_a_remedy(assignments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.override(RECIPE, assignments)
    assert complaint in str(caught.value)


def test_overrides_are_applied_together_and_the_last_of_a_name_counts() -> None:
    both = ["limits.low=20", "limits.high=30"]
    assert config.override(RECIPE, both).limits == Limits(low=20, high=30)
    assert config.override(RECIPE, both[::-1]) == config.override(RECIPE, both)
    assert config.override(RECIPE, ["limits.high=30", "limits.high=31"]).limits.high == 31
    assert config.override(RECIPE, []) is RECIPE


def test_to_json_and_back() -> None:
    recipe = config.override(RECIPE, ["download.formats=gif", "download.token=t", "download.limits.low=3"])
    text = json.dumps(config.to_dict(recipe))
    assert config.from_dict(Recipe, json.loads(text)) == recipe
    assert config.from_dict(Recipe, {"name": "test"}) == RECIPE, "absent names keep their defaults"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({}, "name must be given"),
        ({"name": "x", "dowload": {}}, "did you mean 'download'?"),
        ({"name": "x", "download": {"timeout": 1}}, "did you mean 'download.timeout_s'?"),
        ({"name": "x", "download": 3}, "download wants an object of settings, but got 3"),
        ({"name": 3}, "name wants str but got 3 (int)."),
        ({"name": "x", "download": {"formats": "gif"}}, "download.formats wants"),
        ({"name": "x", "limits": {"low": 11}}, "limits.low=11"),
        ([], "Recipe wants an object"),
    ],
)
def test_wrong_json_is_refused_with_the_place(data: Any, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_dict(Recipe, data)
    assert complaint in str(caught.value)


def test_the_fingerprint_covers_what_changes_the_bytes_and_nothing_else() -> None:
    one = config.fingerprint(RECIPE)
    assert len(one) == 64
    assert config.fingerprint(config.override(RECIPE, ["download.in_flight=1"])) == one, "speed only"
    assert config.fingerprint(config.from_dict(Recipe, config.to_dict(RECIPE))) == one
    assert config.fingerprint(config.override(RECIPE, ["download.timeout_s=10"])) == one
    assert config.fingerprint(replace(RECIPE, download=Download(timeout_s=10))) == one, "10 is 10.0"
    assert config.fingerprint(config.override(RECIPE, ["download.timeout_s=11"])) != one
    assert config.to_dict(RECIPE)["download"]["in_flight"] == 64


def test_names_lists_what_override_accepts() -> None:
    known = config.names(RECIPE)
    assert "download.limits.high" in known
    assert "download" not in known
    for name in known:
        value = json.loads(json.dumps(config.to_dict(RECIPE)))
        for step in name.split("."):
            value = value[step]
        text = value if isinstance(value, str) else json.dumps(value)
        assert config.override(RECIPE, [f"{name}={text}"]) == RECIPE, name
