"""Placeholders: the cheap signs find them and spare real pictures, and the measured threshold tells them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from given_folders import preprocess_folder, preprocessed
from PIL import Image, ImageDraw, ImageFilter
from tiny_model import picture

from tinyvlm import recipes, schema
from tinyvlm.data import calibrate, repeats
from tinyvlm.data.calibrate import choose_threshold, precision_recall
from tinyvlm.data.encode import Encode, EncodeConfig
from tinyvlm.data.placeholder import DESIGNS, is_plain, reference_pictures, spread, without_padding
from tinyvlm.data.repeats import find_repeats
from tinyvlm.errors import ConfigError
from tinyvlm.folders import scan
from tinyvlm.images import LimitConfig, PictureConfig, decode, perceptual_hash, square, to_jpeg
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.toy.web_server import DESIGNS as WEB_DESIGNS
from tinyvlm.toy.web_server import SIZES, placeholder_bytes

SIDE = 64
OFF = {"repeated_links": 0, "similar_links": 0, "redirect_links": 0}


def folder(root: Path, rows: Sequence[dict[str, Any]], num_parts: int = 2) -> Path:
    """A finished folder of the stage `preprocess` with these rows."""
    plain = preprocessed([row["image"] for row in rows]).to_pylist()
    table = pa.Table.from_pylist([{**a, **b} for a, b in zip(plain, rows, strict=True)], schema=schema.PREPROCESSED)
    stage = Encode(EncodeConfig(), PictureConfig())
    return Path(open_input(stage, [preprocess_folder(table, root, num_parts)]).folders["preprocess"])


def row(image: Image.Image, **others: Any) -> dict[str, Any]:
    return {"image": to_jpeg(image, 95), "phash": perceptual_hash(image), **others}


def numbered(number: int) -> Image.Image:
    """A placeholder that says which picture is missing, so that no two are the same bytes."""
    card = reference_pictures(["icon_and_words"])[0].copy()
    ImageDraw.Draw(card).text((224, 400), f"ref. {number:07d}", fill=(120, 120, 120), anchor="mm")
    return card


def shape(seed: int, size: int = 4) -> Image.Image:
    """A small thing on a pale plain ground."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(215, 256, 3)
    image = Image.new("RGB", (SIDE, SIDE), tuple(map(int, ground)))
    x, y = rng.integers(0, SIDE - size, 2)
    ImageDraw.Draw(image).ellipse((x, y, x + size, y + size), fill=tuple(map(int, rng.integers(0, 180, 3))))
    return image


def snow(seed: int) -> Image.Image:
    """A snow field under a bright sky: nearly white, with soft shades."""
    rng = np.random.default_rng(seed)
    height = np.linspace(252, 236, 256)[:, None] + rng.normal(0, 2, (256, 256)) + 6 * np.sin(np.arange(256) / 40)
    grey = Image.fromarray(height.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return grey.convert("RGB")


# The same bytes, the same address, nearly the same picture


def test_the_same_bytes_behind_many_links(tmp_path: Path) -> None:
    # Picture 0 stands behind four links; picture 1 four times behind one link; picture 2 behind two.
    shown = [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 3]
    rows = [row(picture(seed), sha256=f"{seed:064x}", **({"url": "http://x/1"} if seed == 1 else {})) for seed in shown]
    found = find_repeats(folder(tmp_path, rows, 3), **{**OFF, "repeated_links": 3})
    assert found.hashes == {f"{0:064x}"}
    assert found.targets == set()
    assert len(found.look_hashes) == 0


def test_an_address_that_many_links_are_redirected_to(tmp_path: Path) -> None:
    def links() -> list[dict[str, Any]]:
        many = [row(picture(1), url=f"http://a/{n}", final_url="http://a/gone.png") for n in range(5)]
        one = [row(picture(2), url="http://b/1", final_url="http://b/moved.png") for _ in range(5)]
        direct = [row(picture(3), url=f"http://c/{n}", final_url=f"http://c/{n}") for n in range(5)]
        home = [row(picture(4), url="http://d/x.png", final_url="http://d/x.png") for _ in range(5)]
        return [*many, *one, *direct, *home, row(picture(5), url="http://e/", final_url=None)]

    found = find_repeats(folder(tmp_path, links()), **{**OFF, "redirect_links": 5})
    assert found.targets == {"http://a/gone.png"}
    assert found.is_target("http://a/3", "http://a/gone.png")
    assert not found.is_target("http://a/gone.png", "http://a/gone.png")  # the address itself, asked for by name
    assert not found.is_target("http://e/", None)
    nothing = find_repeats(folder(tmp_path, links()), **OFF)
    assert (nothing.hashes, nothing.targets, len(nothing.look_hashes)) == (set(), set(), 0)


def test_nearly_the_same_picture_behind_many_links(tmp_path: Path) -> None:
    cards = [row(numbered(n * 7919)) for n in range(24)]
    photos = [row(picture(seed, 448, 448)) for seed in range(40)]
    found = find_repeats(folder(tmp_path, [*cards, *photos], 5), **{**OFF, "similar_links": 16})
    assert len(found.look_hashes) >= 1

    def caught(rows: Sequence[dict[str, Any]]) -> list[bool]:
        pixels = [np.asarray(decode(one["image"], LimitConfig()).resize((336, 336))) for one in rows]
        return [found.is_look(one["phash"], shown) for one, shown in zip(rows, pixels, strict=True)]

    assert all(caught(cards))
    assert all(caught([row(numbered(1234567))]))
    assert not any(caught(photos))
    assert not found.is_look(None, np.zeros((64, 64, 3), np.uint8))


def test_unlike_pictures_that_share_a_hash_are_spared(tmp_path: Path) -> None:
    """On plain grounds few bits say anything: fifty drawings and forty placeholders share one hash here."""
    drawings = [{**row(shape(seed, size=20)), "phash": 0} for seed in range(50)]
    cards = [{**row(numbered(n)), "phash": 0} for n in range(40)]
    found = find_repeats(folder(tmp_path, [*drawings, *cards], 4), **{**OFF, "similar_links": 12})
    pixels = [np.asarray(decode(one["image"], LimitConfig()).resize((64, 64))) for one in [*drawings, *cards]]
    caught = [found.is_look(0, shown) for shown in pixels]
    assert not any(caught[:50])
    assert all(caught[50:])


def test_a_small_table_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = np.random.default_rng(0).integers(0, 60, 200)
    rows = [
        row(shape(int(s)), sha256=f"{s:064x}", url=f"http://x/{n}", final_url=f"http://y/{s % 40}")
        for n, s in enumerate(shown)
    ]
    source = folder(tmp_path, rows, 4)
    wanted = {f"{s:064x}" for s, count in zip(*np.unique(shown, return_counts=True), strict=True) if count >= 4}
    roomy = find_repeats(source, repeated_links=4, similar_links=0, redirect_links=5)
    monkeypatch.setattr(repeats, "SKETCH_BITS", 3)
    tight = find_repeats(source, repeated_links=4, similar_links=0, redirect_links=5)
    assert tight.hashes == roomy.hashes == wanted
    assert tight.targets == roomy.targets != set()


# One colour


def test_plain_pictures_are_told_from_small_things_and_snow() -> None:
    for color in ((255, 255, 255), (0, 0, 0), (200, 30, 90)):
        stored = decode(to_jpeg(Image.new("RGB", (336, 336), color), 95), LimitConfig())
        assert spread(np.asarray(stored)) <= 2
    for seed in range(20):
        assert spread(np.asarray(decode(to_jpeg(shape(seed), 95), LimitConfig()))) > 20
        assert spread(np.asarray(decode(to_jpeg(snow(seed), 95), LimitConfig()))) > 6
        assert not is_plain(np.asarray(snow(seed)), 4)
    assert all(spread(np.asarray(image)) > 10 for image in reference_pictures(tuple(DESIGNS)))


def test_the_short_way_to_plain_gives_the_same_answer() -> None:
    rng = np.random.default_rng(0)
    for side in (64, 336):
        for noise in (0.0, 0.5, 1.0, 1.2, 1.4, 2.0, 5.0):
            for ground in (0, 128, 250):
                field = np.full((side, side, 3), ground, np.float64) + rng.normal(0, noise, (side, side, 3))
                for extent in (0, 1, 2, 5, side // 3):
                    field[:extent, :extent] = 90
                    pixels = field.clip(0, 255).astype(np.uint8)
                    assert is_plain(pixels, 4) == (spread(pixels) <= 4)


def test_padding_is_not_taken_for_something_to_see() -> None:
    for size in ((300, 100), (100, 301), (448, 30)):
        image, fit = square(Image.new("RGB", size, (240, 240, 240)), PictureConfig())
        assert fit == "pad"
        pixels = np.asarray(decode(to_jpeg(image, 95), LimitConfig()).resize((336, 336), Image.Resampling.BICUBIC))
        assert spread(pixels) > 100
        assert spread(without_padding(pixels, *size)) <= 4


# The stage


@pytest.fixture(scope="module")
def tiny() -> tuple[EncodeConfig, PictureConfig]:
    recipe = recipes.load("tiny")
    return dataclasses.replace(
        recipe.encode, placeholder_threshold=2, repeated_links=3, redirect_links=3
    ), recipe.picture


def test_each_sign_has_its_status_and_can_be_turned_off(
    tiny: tuple[EncodeConfig, PictureConfig], tmp_path: Path
) -> None:
    config, size = tiny
    plain, _ = square(Image.new("RGB", (90, 30), (240, 240, 240)), size)
    rows = [
        *(row(shape(n), sha256="a" * 64) for n in (0, 0, 0)),
        *(row(shape(n), final_url="http://x/gone") for n in range(1, 4)),
        *(row(numbered(n).resize((SIDE, SIDE))) for n in range(14)),
        row(plain, fit="pad", original_width=90, original_height=30),
        *(row(shape(n)) for n in range(10, 16)),
        row(reference_pictures(["no_image"])[0].resize((SIDE, SIDE))),
    ]
    kinds = ("repeated",) * 3 + ("redirect",) * 3 + ("similar",) * 14 + ("plain",)
    folder(tmp_path, rows, 3)

    def statuses(changed: EncodeConfig) -> list[str]:
        stage = Encode(changed, size)
        run = StageRun(stage, open_input(stage, [tmp_path]), tmp_path)
        manifest = run_local(run)
        out = pa.concat_tables(scan(run.folder, ("key", "status", "features"))).sort_by("key")
        assert out["features"].null_count == 0
        assert sum(manifest.statuses.values()) == len(rows)
        found: list[str] = out["status"].to_pylist()
        return found

    wanted = [*(f"placeholder.{kind}" for kind in kinds), *["ok"] * 7]
    assert statuses(config) == wanted
    for kind, off in (
        ("repeated", {"repeated_links": 0}),
        ("redirect", {"redirect_links": 0}),
        ("similar", {"similar_links": 0}),
        ("plain", {"plain_levels": 0.0}),
    ):
        left = ["ok" if status == f"placeholder.{kind}" else status for status in wanted]
        assert statuses(dataclasses.replace(config, **off)) == left  # type: ignore[arg-type]
    measured = dataclasses.replace(config, placeholder_threshold=None, calibration_pictures=60)
    assert statuses(measured) == [*wanted[:-1], "placeholder.clip"]


@pytest.mark.parametrize(
    "name", ["repeated_links", "similar_links", "redirect_links", "plain_levels", "decode_threads"]
)
def test_settings_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"encode.{name}"):
        EncodeConfig(**{name: -1})  # type: ignore[arg-type]


# The measured threshold


def test_the_threshold_has_the_best_f_measure() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        cards, photos = rng.normal(0.7, 0.15, 40), rng.normal(0.35, 0.12, 80)
        chosen = choose_threshold(cards, photos)

        def score(threshold: float, cards: Any = cards, photos: Any = photos) -> float:
            precision, recall = precision_recall(cards, photos, threshold)
            weighted = calibrate.BETA**2 * precision + recall
            return (1 + calibrate.BETA**2) * precision * recall / weighted if weighted else 0.0

        assert score(chosen) >= max(score(threshold) for threshold in np.linspace(-1, 1, 4001)) - 1e-9


def test_sets_that_do_not_touch_are_parted_in_the_middle() -> None:
    assert choose_threshold(np.array([0.8, 0.9]), np.array([0.1, 0.4])) == pytest.approx(0.6)
    assert precision_recall(np.array([0.8, 0.9]), np.array([0.1, 0.4]), 0.6) == (1, 1)


def test_drawn_cards_are_repeatable_and_none_is_a_reference() -> None:
    size = PictureConfig(size=64, tower_size=64)
    once, again = (calibrate.drawn_placeholders(60, size) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(once, again, strict=True))
    assert len({image.tobytes() for image in once}) == 60
    references = np.stack(
        [np.asarray(image.resize((64, 64)), np.int16) for image in reference_pictures(tuple(DESIGNS))]
    )
    for image in once:
        assert image.size == (64, 64)
        assert np.abs(references - np.asarray(image, np.int16)).mean(axis=(1, 2, 3)).min() > 1


def test_the_packaged_tower_tells_unseen_cards_with_words_from_drawings(
    tiny: tuple[EncodeConfig, PictureConfig],
) -> None:
    """The web server's designs are in neither the references nor the labelled set."""
    config, size = tiny
    stage = Encode(dataclasses.replace(config, placeholder_threshold=None, calibration_pictures=200), size)
    found = stage.calibration
    assert found == Encode(stage.config, size).calibration
    assert found.precision > 0.9
    assert found.recall > 0.6
    with_words = [0, 1, 2, 4, 5, 7]
    web = [square(decode(placeholder_bytes(n, s), LimitConfig()), size)[0] for n in with_words for s in SIZES]
    assert len(WEB_DESIGNS) == 8
    assert (stage.tower.similarity(web) >= found.threshold).mean() > 0.6
    drawings = [shape(seed, size=int(12 + seed % 20)) for seed in range(200)]
    assert (stage.tower.similarity(drawings) >= found.threshold).mean() < 0.02


def test_a_threshold_that_drops_too_much_is_warned_of(tiny: tuple[EncodeConfig, PictureConfig], tmp_path: Path) -> None:
    config, size = tiny
    folder(tmp_path, [row(shape(seed, 20)) for seed in range(30)])
    for threshold, warned in ((0.0, True), (2, False)):
        stage = Encode(dataclasses.replace(config, placeholder_threshold=threshold), size)
        run = StageRun(stage, open_input(stage, [tmp_path]), tmp_path)
        run_local(run)
        assert any("implausibly many" in text for text in stage.statistics(run.folder)["warnings"]) is warned
