"""The encode stage: features equal the model's own, placeholders are set apart, bad rows shift nothing."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from given_folders import preprocess_folder, preprocessed
from PIL import Image
from tiny_model import NUM_IMAGE_TOKENS, PICTURE, picture, save_parts

from tinyvlm import schema
from tinyvlm.data.encode import Encode, EncodeConfig
from tinyvlm.data.placeholder import DESIGNS, reference_pictures
from tinyvlm.errors import CheckpointError, ConfigError
from tinyvlm.folders import Input, Manifest, scan
from tinyvlm.images import normalise, to_jpeg
from tinyvlm.model import build
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local

WIDTH = 32


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    return folder


@pytest.fixture(scope="module")
def config(parts: Path) -> EncodeConfig:
    return EncodeConfig(
        vision=str(parts / "clip"),
        num_image_tokens=NUM_IMAGE_TOKENS,
        feature_width=WIDTH,
        placeholder_threshold=0.999,
        dtype="float32",
        batch_size=3,
    )


def stored(image: Image.Image) -> bytes:
    return to_jpeg(image.resize((PICTURE.size, PICTURE.size)), PICTURE.jpeg_quality)


def test_cached_features_equal_the_models_live_ones(config: EncodeConfig, parts: Path) -> None:
    images = [stored(picture(seed)) for seed in range(7)]
    out = Encode(config, PICTURE)(preprocessed(images))
    model, processor = build(save_parts(parts), PICTURE)
    with torch.inference_mode():
        live = model.encode_pictures(normalise(processor.pixels(images)))
    cached = out["features"].combine_chunks().to_numpy_ndarray()
    assert out["status"].to_pylist() == ["ok"] * 7
    assert cached.dtype == np.float16
    np.testing.assert_allclose(cached, live.numpy(), rtol=2e-3, atol=1e-3)


def test_a_reference_placeholder_is_set_apart_and_similarity_is_kept_on_every_row(config: EncodeConfig) -> None:
    images = [stored(picture(1)), stored(reference_pictures(["torn_page"])[0]), b"broken", stored(picture(2))]
    out = Encode(dataclasses.replace(config, placeholder_threshold=0.9999), PICTURE)(preprocessed(images))
    similarity = out["similarity"].to_pylist()
    assert out.schema.equals(schema.encoded(NUM_IMAGE_TOKENS, WIDTH))
    assert out["status"].to_pylist()[1:3] == ["placeholder.clip", "not_image"]
    assert similarity[1] == pytest.approx(1, abs=1e-3)
    assert similarity[2] is None
    assert [features is None for features in out["features"].to_pylist()] == [
        status != "ok" for status in out["status"].to_pylist()
    ]
    again = Encode(dataclasses.replace(config, placeholder_threshold=2), PICTURE)(preprocessed(images))
    assert again["similarity"].to_pylist() == similarity
    assert again["status"].to_pylist() == ["ok", "ok", "not_image", "ok"]


def test_batch_size_changes_nothing_but_speed(config: EncodeConfig) -> None:
    rows = preprocessed([stored(picture(seed)) for seed in range(5)] + [b""])
    small, large = (Encode(dataclasses.replace(config, batch_size=size), PICTURE)(rows) for size in (1, 64))
    assert small["status"].equals(large["status"])
    np.testing.assert_allclose(small["similarity"].to_numpy()[:5], large["similarity"].to_numpy()[:5], atol=1e-5)
    one, other = Encode(config, PICTURE), Encode(dataclasses.replace(config, batch_size=9), PICTURE)
    assert StageRun(one, _no_input(), Path()).fingerprint == StageRun(other, _no_input(), Path()).fingerprint


def _no_input() -> Input:
    return Input((), "nothing", {}, is_stage=True)


def test_references_may_be_ones_own_files(config: EncodeConfig, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    picture(3, 64, 64).save(own)
    rows = preprocessed([stored(picture(3, 64, 64))])
    before = Encode(config, PICTURE)(rows)["similarity"][0].as_py()
    after = Encode(dataclasses.replace(config, references=(str(own),)), PICTURE)(rows)["similarity"][0].as_py()
    assert after > 0.99
    assert after > before
    with pytest.raises(ConfigError, match="neither a readable picture"):
        Encode(dataclasses.replace(config, references=("/nowhere.png",)), PICTURE)(rows)


def test_settings_that_do_not_fit_the_tower_say_what_to_set(config: EncodeConfig) -> None:
    rows = preprocessed([stored(picture(1))])
    with pytest.raises(ConfigError, match=r"set encode.feature_width=32"):
        Encode(dataclasses.replace(config, feature_width=64), PICTURE)(rows)
    with pytest.raises(ConfigError, match=r"set picture.tower_size=32"):
        Encode(config, dataclasses.replace(PICTURE, tower_size=64))(rows)
    with pytest.raises(ConfigError, match=r"set encode.feature_width=32"):
        Encode(dataclasses.replace(config, feature_width=64), PICTURE).check()
    with pytest.raises(CheckpointError, match=r"encode.vision is '/nowhere'"):
        Encode(dataclasses.replace(config, vision="/nowhere"), PICTURE).check()
    with pytest.raises(CheckpointError, match=r"encode.vision is '/nowhere'"):
        Encode(dataclasses.replace(config, vision="/nowhere"), PICTURE)(rows)


def test_as_a_stage_with_statistics(config: EncodeConfig, tmp_path: Path) -> None:
    images = [stored(picture(seed)) for seed in range(6)] + [stored(reference_pictures(["no_image"])[0])] * 3
    root = preprocess_folder(preprocessed(images), tmp_path)
    stage = Encode(dataclasses.replace(config, placeholder_threshold=0.9999), PICTURE)
    assert isinstance(pickle.loads(pickle.dumps(stage)), Encode)
    run = StageRun(stage, open_input(stage, [root]), root)
    manifest = run_local(run)
    assert manifest.rows_in == manifest.rows_out == 9
    assert manifest.statuses == {"ok": 6, "placeholder.clip": 3}
    assert Manifest.read(run.folder).stage == "encode"
    told = stage.statistics(run.folder)
    assert told["placeholders"] == 3
    assert told["warnings"]
    histogram, sheet = told["charts"][0], told["pictures"]
    assert sum(histogram["counts"]) == 9
    assert [item["caption"].split()[1] for item in sheet["items"]] == ["placeholder.clip"] * 3 + ["ok"] * 6
    pickle.loads(pickle.dumps(stage))  # a loaded tower stays behind


def test_the_same_picture_behind_many_links_is_a_placeholder(config: EncodeConfig, tmp_path: Path) -> None:
    # Picture 0 stands behind four links; picture 1 four times behind one link; picture 2 behind two.
    shown = [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 3]
    rows = preprocessed([stored(picture(seed)) for seed in shown]).to_pydict()
    rows["sha256"] = [f"{seed:064x}" for seed in shown]
    rows["url"] = ["http://x/one" if seed == 1 else url for seed, url in zip(shown, rows["url"], strict=True)]
    root = preprocess_folder(pa.table(rows, schema=schema.PREPROCESSED), tmp_path, num_parts=3)
    stage = Encode(dataclasses.replace(config, placeholder_threshold=2, repeated_links=3), PICTURE)
    run = StageRun(stage, open_input(stage, [root]), root)
    run_local(run)
    out = pa.concat_tables(scan(run.folder, ("key", "status", "similarity"))).sort_by("key").to_pydict()
    assert out["status"] == ["placeholder.repeated" if seed == 0 else "ok" for seed in shown]
    assert None not in out["similarity"]
    with pytest.raises(ConfigError, match="repeated_links"):
        EncodeConfig(repeated_links=1)


def test_references_are_several_distinct_pictures() -> None:
    pictures = [np.asarray(image.resize((32, 32)), dtype=np.int16) for image in reference_pictures(tuple(DESIGNS))]
    assert all(image.size == (448, 448) for image in reference_pictures(tuple(DESIGNS)))
    assert len(pictures) >= 6
    for index, one in enumerate(pictures):
        assert one.std() > 3
        assert all(np.abs(one - other).mean() > 2 for other in pictures[index + 1 :])


def test_jpegs_of_other_sizes_are_brought_to_the_recipes_size(config: EncodeConfig) -> None:
    buffer = io.BytesIO()
    picture(5, 90, 60).save(buffer, "PNG")
    assert Encode(config, PICTURE)(preprocessed([buffer.getvalue()]))["status"].to_pylist() == ["ok"]
