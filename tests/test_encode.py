"""The encode stage: features equal the model's own, placeholders are set apart, bad rows shift nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from given_folders import preprocess_folder, preprocessed
from PIL import Image
from tiny_model import NUM_IMAGE_TOKENS, PICTURE, picture, save_parts
from transformers import CLIPVisionConfig, CLIPVisionModel

from tinyvlm import schema
from tinyvlm.bench.encode import LAYOUTS, flops_of_picture
from tinyvlm.cli import main
from tinyvlm.data import towers
from tinyvlm.data.clip import Tower
from tinyvlm.data.encode import Encode, EncodeConfig
from tinyvlm.data.feature_store import read_features, unpack
from tinyvlm.data.placeholder import DESIGNS, reference_pictures
from tinyvlm.data.prefetch import prefetch
from tinyvlm.errors import CheckpointError, ConfigError, DataError, StageError
from tinyvlm.folders import Input, Manifest, part_paths, read_rows
from tinyvlm.images import PictureConfig, normalise, to_jpeg
from tinyvlm.model import build
from tinyvlm.removal import take_down
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.takedown import Takedown

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
    # A placeholder keeps its features: another threshold may take it in again.
    assert [features is None for features in out["features"].to_pylist()] == [False, False, True, False]
    assert out["reference"].to_pylist()[1:3] == ["torn_page", None]
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


# Another threshold without encoding


def _run(stage: Encode, root: Path, output: Path) -> StageRun:
    run = StageRun(stage, open_input(stage, [root]), output)
    run_local(run)
    return run


def _contents(run: StageRun) -> dict[str, str]:
    return {name: entry["content"] for name, entry in Manifest.read(run.folder).files.items()}


def test_another_threshold_takes_everything_else_from_the_finished_folder(
    config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [stored(picture(seed)) for seed in range(5)] + [b"broken", stored(reference_pictures(["no_image"])[0])]
    root = preprocess_folder(preprocessed(images), tmp_path, num_parts=3)
    strict = dataclasses.replace(config, placeholder_threshold=0.9999)
    lax = dataclasses.replace(config, placeholder_threshold=0.5, batch_size=7)
    first = _run(Encode(strict, PICTURE), root, tmp_path / "out")
    afresh = _run(Encode(dataclasses.replace(lax, batch_size=3), PICTURE), root, tmp_path / "other")

    stage = Encode(lax, PICTURE)
    source = open_input(stage, [root])
    stage.earlier = stage.find_earlier(tmp_path / "out", source)
    assert stage.earlier == first.folder
    with monkeypatch.context() as patch:
        patch.setattr(Encode, "tower", property(lambda self: pytest.fail("the tower was asked")))
        again = _run(stage, root, tmp_path / "out")
    assert again.folder != first.folder
    assert Manifest.read(again.folder).statuses == Manifest.read(afresh.folder).statuses
    assert Manifest.read(again.folder).statuses["placeholder.clip"] > 1
    assert _contents(again) == _contents(afresh)

    for other in (
        dataclasses.replace(lax, references=("no_image",)),
        dataclasses.replace(lax, plain_levels=0),
        dataclasses.replace(lax, feature_storage="int8"),
    ):
        assert Encode(other, PICTURE).find_earlier(tmp_path / "out", source) is None
    assert stage.find_earlier(tmp_path / "out", dataclasses.replace(source, fingerprint="another")) is None


def test_another_threshold_after_a_takedown_encodes_nothing_again_and_brings_nothing_back(
    config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [stored(picture(seed)) for seed in range(6)]
    root = preprocess_folder(preprocessed(images), tmp_path, num_parts=2)
    strict = dataclasses.replace(config, placeholder_threshold=2.0)
    first = _run(Encode(strict, PICTURE), root, root)
    take_down(Takedown(links=frozenset(["x/0", "x/4"])), [root])
    assert Manifest.read(first.folder).statuses == {"ok": 4, "optout.takedown": 2}
    stage = Encode(dataclasses.replace(config, placeholder_threshold=1.5), PICTURE)
    stage.earlier = stage.find_earlier(root, open_input(stage, [root]))
    assert stage.earlier == first.folder
    monkeypatch.setattr(Encode, "tower", property(lambda self: pytest.fail("the tower was asked")))
    assert _run(Encode(strict, PICTURE), root, root).folder == first.folder
    rows = read_rows(str(part_paths(_run(stage, root, root).folder)[0]), 0, 10)
    assert rows["key"].to_pylist() == [1, 2]
    assert rows["image"].null_count == rows["features"].null_count == 0


def test_the_threshold_is_measured_once_for_all_workers(config: EncodeConfig, parts: Path, tmp_path: Path) -> None:
    images = [stored(picture(seed)) for seed in range(6)]
    root = preprocess_folder(preprocessed(images), tmp_path)
    measured = dataclasses.replace(config, placeholder_threshold=None, calibration_pictures=20)
    alone = _run(Encode(measured, PICTURE), root, tmp_path / "alone")

    stage = Encode(measured, PICTURE)
    stage.folder = StageRun(stage, open_input(stage, [root]), tmp_path / "shared").folder
    run = StageRun(stage, open_input(stage, [root]), tmp_path / "shared")
    workers = [pickle.loads(pickle.dumps(run)) for _ in run.source.parts]
    jobs = list(zip(workers, run.source.parts, strict=True))
    run.carry_out(lambda todo, number: [worker.work(part, number) for worker, part in reversed(jobs)])
    assert _contents(run) == _contents(alone)
    told = [run.stage.statistics(run.folder), alone.stage.statistics(alone.folder)]
    assert told[0]["placeholder_threshold"] == told[1]["placeholder_threshold"]
    assert told[0]["calibration_sets"] == told[1]["calibration_sets"]
    assert told[0]["calibration_sets"][0]["set"] == "drawn placeholders"
    assert told[0]["calibration_sets"][2]["pictures"] == 6
    used, best = told[0]["calibration"]
    assert {**used, "threshold": ""} == {**best, "threshold": ""}
    assert 0 < best["precision"] <= 1

    other = tmp_path / "weights"
    save_parts(other, seed=1)
    changed = Encode(dataclasses.replace(measured, vision=str(other / "clip")), PICTURE)
    changed.folder = run.folder
    with pytest.raises(StageError, match="weights changed"):
        _ = changed.threshold


# Storage


@pytest.mark.parametrize(("storage", "largest_error"), [("int8", 0.02), ("fp8", 0.06)])
def test_eight_bits_are_read_back_with_a_known_error(
    config: EncodeConfig, tmp_path: Path, storage: str, largest_error: float
) -> None:
    images = [stored(picture(seed)) for seed in range(5)] + [b"broken"]
    root = preprocess_folder(preprocessed(images), tmp_path)
    plain = Encode(dataclasses.replace(config, dtype="float32"), PICTURE)
    small = Encode(dataclasses.replace(config, feature_storage=storage), PICTURE)  # type: ignore[arg-type]
    runs = [_run(stage, root, tmp_path / "out") for stage in (plain, small)]
    paths = [run.folder / "data" / "part-00000.parquet" for run in runs]
    exact, kept = (unpack(pq.read_table(path)) for path in paths)
    assert kept.shape == exact.shape == (3, NUM_IMAGE_TOKENS, WIDTH)
    rows = pq.read_table(paths[1])
    # Plain pyarrow and numpy, without this project.
    values = rows["features"].combine_chunks().to_numpy_ndarray()
    bits = torch.from_numpy(values.copy())
    floats = bits.view(torch.float8_e4m3fn).float() if storage == "fp8" else bits.float()
    scale = np.array(rows["feature_scale"].to_pylist(), np.float32)[..., None]
    np.testing.assert_array_equal(kept, floats.numpy() * scale)
    error = np.linalg.norm((kept - exact).reshape(3, -1), axis=1) / np.linalg.norm(exact.reshape(3, -1), axis=1)
    np.testing.assert_allclose(rows["feature_error"].to_numpy(), error, rtol=0.05)
    assert 0 < error.max() < largest_error
    told = runs[1].stage.statistics(runs[1].folder)["feature_storage_error"]
    assert 0 < told["relative L2, mean"] <= told["relative L2, worst"] < largest_error
    assert 0.998 < told["cosine, worst"] <= told["cosine, mean"] < 1
    assert values.nbytes == 3 * NUM_IMAGE_TOKENS * WIDTH
    with pytest.raises(DataError, match="no features"):
        unpack(pq.read_table(runs[1].folder / "data" / "part-00001.parquet"))


def test_zeros_and_every_pattern_of_eight_bits_are_read_as_torch_reads_them() -> None:
    from tinyvlm.data.feature_store import pack, unpack_values

    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    wanted = patterns.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(unpack_values(patterns.numpy(), None), wanted)
    for storage in ("int8", "fp8", "float16"):
        values, scale = pack(torch.zeros(1, 2, 3), storage)  # type: ignore[arg-type]
        assert not unpack_values(values.numpy(), None if scale is None else scale.numpy()).any()
    huge, _ = pack(torch.full((1, 1, 1), 1e6), "float16")
    assert huge.isfinite().all()


def test_features_of_other_weights_are_refused(config: EncodeConfig, parts: Path, tmp_path: Path) -> None:
    images = [stored(picture(seed)) for seed in range(4)] + [b"broken"]
    root = preprocess_folder(preprocessed(images), tmp_path)
    run = _run(Encode(config, PICTURE), root, tmp_path)
    # The tower inside a whole model, which training holds, has the same fingerprint.
    model, _ = build(save_parts(parts), PICTURE)
    encoder = towers.encoder_fingerprint(model.vision.state_dict(), PICTURE, NUM_IMAGE_TOKENS)
    pairs = list(read_features(run.folder, encoder))
    assert np.concatenate([keys for keys, _ in pairs]).tolist() == [0, 1, 2, 3]
    assert sum(len(features) for _, features in pairs) == 4
    half = Tower(dataclasses.replace(config, dtype="bfloat16"), PICTURE)
    assert half.fingerprint == encoder
    assert Tower(config, dataclasses.replace(PICTURE, crop_ratio=0.5)).fingerprint != encoder
    with torch.no_grad():
        model.vision.embeddings.class_embedding[0] += 1e-3
    other = towers.encoder_fingerprint(model.vision.state_dict(), PICTURE, NUM_IMAGE_TOKENS)
    with pytest.raises(DataError, match="other weights"):
        list(read_features(run.folder, other))


# The tower


def large(layers: int = 1) -> CLIPVisionModel:
    """ViT-L/14 at 336 px with random weights and fewer layers."""
    torch.manual_seed(0)
    layout = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=layers,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModel(layout).eval()
    with torch.no_grad():
        model.embeddings.position_embedding.weight.normal_()
    return model


@pytest.mark.parametrize("side", [336, 448])
def test_large_tower_equals_transformers_at_its_own_size_and_with_interpolated_positions(side: int) -> None:
    config = EncodeConfig(dtype="float32", batch_size=2, interpolate_positions=side != 336, references=("no_image",))
    size = PictureConfig(tower_size=side)
    seen = [np.asarray(picture(seed, side, side)) for seed in range(3)]
    with torch.inference_mode():
        hidden = large()(normalise(np.stack(seen)), interpolate_pos_encoding=True).last_hidden_state
    tower = Tower(config, size, large())
    found = tower(np.stack(seen))
    block = side // 14 // 8
    blocks = hidden[:, 1:].reshape(3, 8, block, 8, block, 1024).mean(dim=(2, 4)).reshape(3, 64, 1024)
    np.testing.assert_allclose(found.features.astype(np.float32), blocks.numpy(), rtol=2e-3, atol=2e-3)
    unit = torch.nn.functional.normalize(hidden[:, 0], dim=-1)
    np.testing.assert_allclose(found.similarity, (unit @ tower.references.T)[:, 0].numpy(), atol=1e-5)


def test_a_size_between_patches_says_which_one_fits(config: EncodeConfig) -> None:
    stretched = dataclasses.replace(config, interpolate_positions=True)
    for check in (Encode(stretched, dataclasses.replace(PICTURE, tower_size=47)).check,):
        with pytest.raises(ConfigError, match=r"set picture.tower_size=48"):
            check()
    rows = preprocessed([stored(picture(1))])
    wide = Encode(stretched, dataclasses.replace(PICTURE, tower_size=48))
    wide.check()
    assert wide(rows)["status"].to_pylist() == ["ok"]
    assert wide.tower.fingerprint != Encode(config, PICTURE).tower.fingerprint


def test_lower_precisions_stay_near(config: EncodeConfig) -> None:
    rows = preprocessed([stored(picture(seed)) for seed in range(4)])
    exact = unpack(Encode(config, PICTURE)(rows))
    for dtype in ("bfloat16", "float16"):
        near = unpack(Encode(dataclasses.replace(config, dtype=dtype), PICTURE)(rows))  # type: ignore[arg-type]
        assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.02


def test_a_split_into_parts_changes_no_bit(config: EncodeConfig) -> None:
    rows = preprocessed([stored(picture(seed)) for seed in range(9)])
    whole = Encode(config, PICTURE)(rows)
    parts = [Encode(config, PICTURE)(rows.slice(start, 3)) for start in (0, 3, 6)]
    assert whole.equals(pa.concat_tables(parts).combine_chunks())


def test_batches_of_other_sizes_agree_to_the_stated_tolerance(config: EncodeConfig) -> None:
    pixels = np.stack([np.asarray(picture(seed, 32, 32)) for seed in range(12)])
    tower = Tower(dataclasses.replace(config, feature_storage="float16"), PICTURE)
    with torch.inference_mode():
        whole = tower._run(torch.from_numpy(pixels))
        singles = torch.cat([tower._run(torch.from_numpy(pixels[i : i + 1])) for i in range(12)])
    assert float((whole - singles).norm() / whole.norm()) < 1e-5


def test_prefetch_keeps_order_stays_bounded_and_raises_in_place() -> None:
    begun: list[int] = []

    def make(item: int) -> int:
        begun.append(item)
        if item == 7:
            raise ValueError("seven")
        return item * item

    results = prefetch(make, iter(range(100)), num_threads=2, depth=3)
    got = [next(results) for _ in range(3)]
    assert got == [0, 1, 4]
    assert max(begun) <= 5 + 1
    with pytest.raises(ValueError, match="seven"):
        got.extend(results)
    assert got == [item * item for item in range(7)]
    assert max(begun) < 15


def test_an_error_in_a_decoding_thread_is_the_stages_error(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encode, "_sign", lambda self, row, pixels: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Encode(config, PICTURE)(preprocessed([stored(picture(1))] * 5))


def test_weights_that_change_under_way_are_noticed(config: EncodeConfig, tmp_path: Path) -> None:
    root = preprocess_folder(preprocessed([stored(picture(seed)) for seed in range(4)]), tmp_path)
    clip = tmp_path / "parts"
    save_parts(clip)
    stage = Encode(dataclasses.replace(config, vision=str(clip / "clip")), PICTURE)
    run = StageRun(stage, open_input(stage, [root]), tmp_path / "out")

    def execute(todo, number):  # type: ignore[no-untyped-def]
        yield pickle.loads(pickle.dumps(run)).work(todo[0], number)
        save_parts(clip, seed=1)
        yield pickle.loads(pickle.dumps(run)).work(todo[1], number)

    with pytest.raises(StageError, match="several encoders"):
        run.carry_out(execute)


def test_parts_in_threads_share_one_tower(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part may be written while the next is encoded; two threads then ask the same stage."""
    made: list[Tower] = []
    first = Tower.__init__
    monkeypatch.setattr(Tower, "__init__", lambda self, *given: (made.append(self), first(self, *given))[1])
    rows = preprocessed([stored(picture(seed)) for seed in range(8)])
    stage = Encode(config, PICTURE)
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(stage, (rows.slice(0, 4), rows.slice(4))))
    assert len(made) == 1
    assert both[0].equals(Encode(config, PICTURE)(rows.slice(0, 4)))


def test_compiled_batches_are_filled_up(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch that reaches the compiled tower has one size, and the filling does not come out."""
    sizes: list[int] = []

    def watched(forward, dynamic):  # type: ignore[no-untyped-def]
        assert dynamic is False
        return lambda values: (sizes.append(len(values)), forward(values))[1]

    monkeypatch.setattr(torch, "compile", watched)
    rows = preprocessed([stored(picture(seed)) for seed in range(5)])
    filled = Encode(dataclasses.replace(config, compile=True), PICTURE)(rows)
    assert set(sizes) == {config.batch_size}
    assert filled["key"].to_pylist() == [0, 1, 2, 3, 4]
    plain = Encode(config, PICTURE)(rows)
    np.testing.assert_allclose(unpack(filled), unpack(plain), rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(filled["similarity"].to_numpy(), plain["similarity"].to_numpy(), atol=1e-5)


# The benchmark


def test_operations_of_a_picture_are_those_of_the_published_tower() -> None:
    layout = {**LAYOUTS["L/14"], "intermediate_size": 4096}
    # ViT-L/14 takes 81 GMAC at 224 px, 191 at 336, 362 at 448 (timm's tables).
    for side, gmac in ((224, 81.1), (336, 191.1), (448, 362)):
        assert flops_of_picture(layout, side) / 2e9 == pytest.approx(gmac, rel=0.01)


def test_bench_encode_measures_a_small_tower(config: EncodeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["bench", "encode", "--vision", config.vision, "--batch", "4", "--seconds", "0.1", "--dtype", "fp32"]
    assert main([*options, "--size", "48", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["size_px"] == 48
    assert all(rate > 0 for rate in told["pictures_per_s"].values())
    assert 0 < told["share_of_matrix_rate"] < 1
    assert told["share_of_matrix_rate"] == pytest.approx(told["compute_tflops"] / told["matrix_tflops"], rel=0.2)
    assert main(options) == 0
    assert "pictures/s" in capsys.readouterr().out
    assert main([*options, "--random", "B/32"]) == 2


def test_the_review_sheet_shows_different_pictures_that_the_threshold_decides_about(
    config: EncodeConfig, tmp_path: Path
) -> None:
    images = [stored(picture(seed)) for seed in range(4)] + [stored(reference_pictures(["no_image"])[0])] * 3
    rows = preprocessed(images).to_pydict()
    rows["sha256"] = ["0", "1", "2", "3", "card", "card", "card"]
    root = preprocess_folder(pa.table(rows, schema=schema.PREPROCESSED), tmp_path)
    for repeated_links, shown in ((0, ["placeholder.clip", *["ok"] * 4]), (3, ["ok"] * 4)):
        changed = dataclasses.replace(config, placeholder_threshold=0.9999, repeated_links=repeated_links)
        run = _run(Encode(changed, PICTURE), root, tmp_path)
        items = run.stage.statistics(run.folder)["pictures"]["items"]
        assert [item["caption"].split()[1] for item in items] == shown
        similarity = [float(item["caption"].split()[0]) for item in items]
        assert similarity == sorted(similarity, reverse=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["float16", "int8", "fp8"])
def test_a_gpu_gives_what_the_cpu_gives(storage: str) -> None:
    """Pinned copies, batches in flight and lower precision: the same pictures in the same order."""
    config = EncodeConfig(dtype="float32", batch_size=4, references=("no_image",), feature_storage=storage)  # type: ignore[arg-type]
    size = PictureConfig()
    rows = preprocessed([to_jpeg(picture(seed, 448, 448), 95) for seed in range(18)] + [b"broken"])
    ok = rows.slice(0, 18)
    stages = []
    for dtype, device in (("float32", "cpu"), ("float32", "cuda"), ("bfloat16", "cuda")):
        stage = Encode(dataclasses.replace(config, dtype=dtype, placeholder_threshold=2.0), size)  # type: ignore[arg-type]
        stage.tower = Tower(stage.config, size, large(2).to(device))
        stages.append(stage)
    exact, same, near = (unpack(stage(ok)) for stage in stages)
    for found, tolerance in ((same, 1e-3), (near, 2e-2)):
        if storage == "float16":
            apart = np.linalg.norm((found - exact).reshape(18, -1), axis=1) / np.linalg.norm(
                exact.reshape(18, -1), axis=1
            )
            assert apart.max() < tolerance
        assert np.argmax(found.reshape(18, -1) @ exact.reshape(18, -1).T, axis=1).tolist() == list(range(18))
    assert stages[1](rows)["status"].to_pylist() == ["ok"] * 18 + ["not_image"]
