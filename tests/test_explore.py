"""The explore stage: labels are CLIP's own choice, bad pictures shift nothing, label files are checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from given_folders import preprocess_folder, preprocessed
from tiny_model import PICTURE, picture, save_parts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerFast

from tinyvlm.data.clip import read_pixels
from tinyvlm.data.explore import Explore, ExploreConfig
from tinyvlm.errors import ConfigError
from tinyvlm.images import normalise, to_jpeg
from tinyvlm.labels import load_labels
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local

LABELS = {
    "shapes": {"circle": "a round circle", "square": "a square"},
    "things": {"cat": "a cat", "house": "a red house"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExploreConfig:
    """A random CLIP with a word tokenizer, and a small label file."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("explore")
    save_parts(folder)
    words = ["<s>", "</s>", "<pad>", "<unk>", "a", "round", "circle", "square", "cat", "red", "house", "of", "photo"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>").save_pretrained(folder / "clip")
    (folder / "labels.json").write_text(json.dumps({"version": 3, "categories": LABELS}))
    return ExploreConfig(
        model=str(folder / "clip"),
        labels=str(folder / "labels.json"),
        dtype="float32",
        batch_size=2,
        low_confidence=0.9,
    )


def images(*seeds: int) -> list[bytes]:
    return [to_jpeg(picture(seed), 95) for seed in seeds]


def test_labels_are_what_clip_itself_chooses(config: ExploreConfig) -> None:
    stored = images(1, 2, 3, 4, 5)
    out = Explore(config, PICTURE)(preprocessed(stored)).to_pydict()
    texts = [f"a photo of {text}" for group in LABELS.values() for text in group.values()]
    names = [name for group in LABELS.values() for name in group]
    model, tokenizer = CLIPModel.from_pretrained(config.model), AutoTokenizer.from_pretrained(config.model)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        pixel_values = normalise(read_pixels(stored, PICTURE)[0])
        wanted = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixel_values
        ).logits_per_image.softmax(-1)
    assert out["label"] == [names[index] for index in wanted.argmax(-1)]
    assert out["category"] == ["shapes" if name in LABELS["shapes"] else "things" for name in out["label"]]
    np.testing.assert_allclose(out["confidence"], wanted.max(-1).values, rtol=1e-4)


def test_an_unreadable_picture_shifts_no_other_label(config: ExploreConfig) -> None:
    good = Explore(config, PICTURE)(preprocessed(images(1, 2, 3)))
    mixed = Explore(config, PICTURE)(preprocessed([*images(1), b"no picture", *images(2, 3)]))
    assert mixed["status"].to_pylist() == ["ok", "not_image", "ok", "ok"]
    assert mixed["label"].to_pylist()[1] is None
    assert [mixed["label"].to_pylist()[index] for index in (0, 2, 3)] == good["label"].to_pylist()


def test_as_a_stage_with_statistics(config: ExploreConfig, tmp_path: Path) -> None:
    root = preprocess_folder(preprocessed(images(*range(9))), tmp_path)
    run = StageRun(Explore(config, PICTURE), open_input(Explore(config, PICTURE), [root]), root)
    assert run_local(run).statuses == {"ok": 9}
    told = json.loads((run.folder / "stats.json").read_text())
    assert sum(told["categories"].values()) == 9
    assert told["labels_offered"] == 4
    assert 0 <= told["low_confidence_share"] <= 1
    assert len(told["pictures"]["items"]) == 9
    assert all(item["jpeg_base64"] for item in told["pictures"]["items"])


def test_the_label_files_bytes_are_part_of_the_fingerprint(config: ExploreConfig, tmp_path: Path) -> None:
    other = tmp_path / "labels.json"
    other.write_text(json.dumps({"version": 3, "categories": {"shapes": {"circle": "a disc"}}}))
    assert load_labels(config.labels).fingerprint != load_labels(str(other)).fingerprint
    stage = Explore(dataclasses.replace(config, labels=str(other)), PICTURE)
    assert stage.settings["label_file"] == load_labels(str(other)).fingerprint


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("not json", "cannot be used"),
        ('{"version": 1}', "categories"),
        ('{"version": 1, "categories": {}}', "no labels"),
        ('{"version": 1, "categories": {"a": {"x": "an x"}, "b": {"x": "an x"}}}', "occurs twice"),
        ('{"version": 1, "categories": {"a": {"x": ""}}}', "no description"),
    ],
)
def test_bad_label_files_say_what_is_wrong(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        load_labels(str(tmp_path / "labels.json"))


def test_unknown_names_and_templates_are_refused() -> None:
    with pytest.raises(ConfigError, match="neither a file nor one of base, toy"):
        load_labels("nowhere")
    with pytest.raises(ConfigError, match="may use"):
        ExploreConfig(template="a photo of {thing}")


def test_packaged_labels_are_many_and_described() -> None:
    base = load_labels("base").labels
    per_category = {
        category: sum(label.category == category for label in base) for category in {x.category for x in base}
    }
    assert len(per_category) >= 15
    assert min(per_category.values()) >= 50
    assert len({label.description for label in base}) == len(base)
    assert "red circle" in {label.name for label in load_labels("toy").labels}
