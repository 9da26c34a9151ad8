"""Features that `encode` has stored train as live pictures do, within the stated tolerance; others are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from given_folders import preprocess_folder
from test_loop import GENTLE
from tiny_model import NUM_IMAGE_TOKENS, PICTURE, save_parts
from training_data import prepare_folder, rows

from tinyvlm import config, schema
from tinyvlm.data.encode import Encode, EncodeConfig
from tinyvlm.data.feature_store import FeatureStorage
from tinyvlm.errors import ConfigError, DataError, StageError
from tinyvlm.model import load
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.train import metrics
from tinyvlm.train.run import TrainingRun, open_run
from tinyvlm.train.run import run_local as train
from tinyvlm.train.settings import Rates, TrainConfig
from tinyvlm.train.stored import LOSS_TOLERANCE, open_features

FROZEN = dataclasses.replace(GENTLE, rates=Rates(vision=0.0, connector=1e-3, language=1e-3), checkpoint_every_steps=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of a model, conversations, and the features of their pictures."""
    root = tmp_path_factory.mktemp("root")
    save_parts(root / "parts")
    made = rows()
    prepare_folder(root, made)
    encode(root, pictures(made))
    return root


def pictures(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [image for row in made for image in row["images"]]


def encode(root: Path, images: list[dict[str, Any]], storage: FeatureStorage = "float16") -> None:
    torch.set_num_threads(1)
    unique = list({image["sha256"]: image["bytes"] for image in images}.items())
    table = pa.Table.from_pylist(
        [
            {"key": key, "status": "ok", "url": f"http://x/{key}", "meta": "{}", "image": data, "sha256": digest}
            for key, (digest, data) in enumerate(unique)
        ],
        schema=schema.PREPROCESSED,
    )
    settings = EncodeConfig(
        vision=str(root / "parts" / "clip"),
        num_image_tokens=NUM_IMAGE_TOKENS,
        feature_width=32,
        feature_storage=storage,
        placeholder_threshold=2.0,
        plain_levels=0,
        dtype="float32",
    )
    stage = Encode(settings, PICTURE)
    run_local(StageRun(stage, open_input(stage, [preprocess_folder(table, root)]), root))


def stage(root: Path, settings: TrainConfig) -> TrainingRun:
    parts = {"vision": str(root / "parts" / "clip"), "language": str(root / "parts" / "llm")}
    recipe = {"model": {**parts, "num_image_tokens": 4, "connector_width": 48}, "picture": config.to_dict(PICTURE)}
    return open_run("pretrain", settings, recipe, [root], root)


def losses(run: TrainingRun) -> list[float]:
    train(run)
    numbers = metrics.read(run.folder / "metrics.jsonl")
    return [line["loss"] for line in numbers.steps] + [line["held_out_loss"] for line in numbers.held_out]


def test_stored_features_train_as_live_pictures_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = losses(stage(root, FROZEN))
    stored = stage(root, dataclasses.replace(FROZEN, features="stored"))
    assert stored.fingerprint != stage(root, FROZEN).fingerprint
    assert stored.features
    from tinyvlm.model.modeling import TinyVLMForConditionalGeneration

    def refuse(*_: Any) -> None:
        raise AssertionError("the tower was asked")

    monkeypatch.setattr(TinyVLMForConditionalGeneration, "encode_pictures", refuse)
    assert losses(stored) == pytest.approx(live, rel=LOSS_TOLERANCE)


def test_a_hot_tower_is_refused() -> None:
    with pytest.raises(ConfigError, match="frozen tower"):
        dataclasses.replace(GENTLE, features="stored")


def test_without_an_encode_folder_it_says_so(tmp_path: Path) -> None:
    save_parts(tmp_path / "parts")
    prepare_folder(tmp_path, rows(20))
    with pytest.raises(StageError, match="encode"):
        stage(tmp_path, dataclasses.replace(FROZEN, features="stored"))


def test_features_of_other_weights_and_unknown_pictures_are_refused(root: Path) -> None:
    run = stage(root, dataclasses.replace(FROZEN, features="stored"))
    from tinyvlm.train.worker import start_model

    model, processor = start_model(run)
    found = open_features(run.features, model, processor.picture, NUM_IMAGE_TOKENS, 1 << 20)
    assert len(found) == len({image["sha256"] for image in pictures(rows())})
    with pytest.raises(DataError, match="no features in"):
        found.of(["0" * 64])
    with torch.no_grad():
        model.vision.embeddings.class_embedding[0] += 1e-3
    with pytest.raises(DataError, match="other weights"):
        open_features(run.features, model, processor.picture, NUM_IMAGE_TOKENS, 1 << 20)


def test_a_later_stage_reads_them_for_the_same_frozen_tower(root: Path) -> None:
    run = stage(root, dataclasses.replace(FROZEN, features="stored", steps=2))
    train(run)
    model, processor = load(run.folder / "model")
    assert len(open_features(run.features, model, processor.picture, NUM_IMAGE_TOKENS, 1 << 20))


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_eight_bits_are_near(tmp_path: Path, storage: FeatureStorage) -> None:
    save_parts(tmp_path / "parts")
    made = rows(30)
    prepare_folder(tmp_path, made)
    encode(tmp_path, pictures(made), storage)
    live = losses(stage(tmp_path, dataclasses.replace(FROZEN, steps=3)))
    assert losses(stage(tmp_path, dataclasses.replace(FROZEN, steps=3, features="stored"))) == pytest.approx(
        live, rel=0.02
    )
