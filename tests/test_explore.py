"""The explore stage: labels are CLIP's own choice, bad pictures shift nothing, the report shows what to judge by."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from given_folders import preprocess_folder, preprocessed
from tiny_model import PICTURE, SIDE, picture, save_parts
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig

from tinyvlm import config as settings_of
from tinyvlm import recipes
from tinyvlm.data import clip, towers
from tinyvlm.data.clip import Labeller, read_pixels
from tinyvlm.data.explore import NUM_EXAMPLES, NUM_SHOWN, NUM_UNSURE, Explore, ExploreConfig, _Survey
from tinyvlm.errors import ConfigError
from tinyvlm.folders import read_rows
from tinyvlm.images import PictureConfig, normalise, to_jpeg
from tinyvlm.labels import load_labels
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.toy.scenes import draw, sample_scene

LABELS = {
    "shapes": {"circle": "a round thing", "square": "a thing with four corners"},
    "things": {"cat": "a furry animal", "house": "a red roof", "road": "grey and long"},
}
NAMES = [name for group in LABELS.values() for name in group]
TEXTS = [f"a photo of {name}: {text}" for group in LABELS.values() for name, text in group.items()]


def save_official(folder: Path) -> None:
    """Random weights of both towers in the layout of openai/clip-vit-large-patch14-336, its oddities included.

    vocab.json and merges.txt; padding with the end token; an `eos_token_id` of 2 that no text holds, which means that
    the highest id marks a text's end.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "i n", "a r", "p h", "o f</w>", "th e</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    save_parts(folder)
    config = CLIPConfig.from_pretrained(folder / "clip")
    text = {**config.text_config.to_dict(), "vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 2}
    config.text_config = CLIPTextConfig(**{**text, "pad_token_id": 1, "hidden_size": 32})
    torch.manual_seed(1)
    CLIPModel(config).save_pretrained(folder / "clip")
    (folder / "clip" / "vocab.json").write_text(json.dumps(vocab))
    (folder / "clip" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "clip" / "tokenizer_config.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExploreConfig:
    """A random CLIP, and a small label file of one's own."""
    folder = tmp_path_factory.mktemp("explore")
    save_official(folder)
    (folder / "labels.json").write_text(json.dumps({"version": 3, "categories": LABELS}))
    return ExploreConfig(
        model=str(folder / "clip"),
        labels=str(folder / "labels.json"),
        dtype="float32",
        batch_size=2,
        top_k=3,
        low_confidence=0.9,
    )


def images(*seeds: int) -> list[bytes]:
    return [to_jpeg(picture(seed), 95) for seed in seeds]


def by_clip(model_folder: str, texts: list[str], stored: list[bytes], picture: PictureConfig) -> torch.Tensor:
    """What `CLIPModel` says itself, both towers in one call: (pictures, texts)."""
    model, tokenizer = (
        CLIPModel.from_pretrained(model_folder).float().eval(),
        AutoTokenizer.from_pretrained(model_folder),
    )
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        scores: torch.Tensor = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=normalise(read_pixels(stored, picture)[0]),
        ).logits_per_image.softmax(-1)
    return scores


def check_against(scores: torch.Tensor, names: list[str], out: dict[str, list[Any]], top_k: int) -> None:
    wanted = scores.topk(top_k)
    assert out["label"] == [names[index] for index in wanted.indices[:, 0]]
    assert [[one["label"] for one in top] for top in out["top"]] == [[names[i] for i in row] for row in wanted.indices]
    np.testing.assert_allclose([[one["confidence"] for one in top] for top in out["top"]], wanted.values, rtol=2e-4)
    assert out["confidence"] == [top[0]["confidence"] for top in out["top"]]


def test_labels_are_what_clip_itself_chooses(config: ExploreConfig) -> None:
    stored = images(1, 2, 3, 4, 5)
    out = Explore(config, PICTURE)(preprocessed(stored)).to_pydict()
    check_against(by_clip(config.model, TEXTS, stored, PICTURE), NAMES, out, top_k=3)
    assert out["category"] == ["shapes" if name in LABELS["shapes"] else "things" for name in out["label"]]


def test_the_packaged_clip_gives_its_own_scores_and_knows_what_is_drawn() -> None:
    """Pictures of one thing get its label, one of 137; what is amiss are rectangles that are nearly square."""
    recipe = recipes.load("tiny", [])
    stage = Explore(dataclasses.replace(recipe.explore, batch_size=16), recipe.picture)
    rng = random.Random(77)
    scenes = [sample_scene(rng, num_things=1, notice=False) for _ in range(200)]
    scenes = [scene for scene in scenes if scene.things[0].kind in ("circle", "rectangle", "triangle")][:60]
    stored = [to_jpeg(draw(scene, recipe.picture.size), 95) for scene in scenes]
    out = stage(preprocessed(stored)).to_pydict()
    names = [label.name for label in stage.labels]
    texts = [stage.config.text_of(label) for label in stage.labels]
    scores = by_clip(towers.place(stage.config.model), texts, stored, recipe.picture)
    check_against(scores, names, out, top_k=5)
    truth = [f"{scene.things[0].color} {scene.things[0].kind}" for scene in scenes]
    assert np.mean([said == true for said, true in zip(out["label"], truth, strict=True)]) > 0.85
    assert np.mean([true in [x["label"] for x in top] for top, true in zip(out["top"], truth, strict=True)]) > 0.97


def test_neither_unreadable_pictures_nor_the_batch_size_move_a_label(config: ExploreConfig) -> None:
    readable = Explore(config, PICTURE)(preprocessed(images(*range(7)))).to_pydict()
    stored = images(*range(7))
    for place, junk in ((0, b"no picture"), (3, stored[0][:80]), (4, b""), (10, b"\xff\xd8\xff\xe0 cut")):
        stored.insert(place, junk)
    for size in (1, 2, 3, 64):
        out = Explore(dataclasses.replace(config, batch_size=size), PICTURE)(preprocessed(stored)).to_pydict()
        good = [index for index, status in enumerate(out["status"]) if status == "ok"]
        assert [out["status"][index] for index in (0, 4)] == ["not_image", "not_image"]
        assert out["status"][3] == "corrupt"
        assert len(good) == 7
        assert [out["label"][index] for index in good] == readable["label"]
        np.testing.assert_allclose([out["confidence"][index] for index in good], readable["confidence"], rtol=1e-5)
        assert all(out[name][0] is None for name in ("label", "category", "confidence", "top"))


def test_texts_are_encoded_once_for_all_pictures_and_in_batches(
    config: ExploreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    whole = CLIPModel.get_text_features

    def counted(self: CLIPModel, input_ids: torch.Tensor, **rest: Any) -> Any:
        encoded.append(len(input_ids))
        return whole(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(CLIPModel, "get_text_features", counted)
    stage = Explore(config, PICTURE)
    once = stage(preprocessed(images(*range(5))))
    stage(preprocessed(images(*range(5, 9))))
    assert encoded == [len(TEXTS)]
    monkeypatch.setattr(clip, "TEXT_BATCH", 2)
    assert Explore(config, PICTURE).labeller.texts.shape[0] == len(TEXTS)
    assert encoded[1:] == [2, 2, 1]
    again = Explore(config, PICTURE)(preprocessed(images(*range(5))))
    assert again["label"].to_pylist() == once["label"].to_pylist()
    np.testing.assert_allclose(again["confidence"].to_numpy(), once["confidence"].to_numpy(), rtol=1e-5)


def test_shares_sum_to_one_and_k_is_no_more_than_there_is(config: ExploreConfig) -> None:
    out = Explore(dataclasses.replace(config, top_k=50), PICTURE)(preprocessed(images(1, 2))).to_pydict()
    for top in out["top"]:
        assert sorted(one["label"] for one in top) == sorted(NAMES)
        shares = [one["confidence"] for one in top]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert shares == sorted(shares, reverse=True)


def test_a_text_too_long_for_the_tower_is_refused_by_name(config: ExploreConfig) -> None:
    with pytest.raises(ConfigError, match="reads 77 tokens of a text, but 'a cat cat"):
        Labeller(config, PICTURE, ["a dog", "a" + " cat" * 80])


def test_as_a_stage_with_statistics(config: ExploreConfig, tmp_path: Path) -> None:
    root = preprocess_folder(preprocessed([*images(*range(9)), b"junk"]), tmp_path)
    run = StageRun(Explore(config, PICTURE), open_input(Explore(config, PICTURE), [root]), root)
    assert run_local(run).statuses == {"ok": 9, "not_image": 1}
    told = json.loads((run.folder / "stats.json").read_text())
    rows = [
        row
        for path in sorted((run.folder / "data").glob("*.parquet"))
        for row in read_rows(str(path), 0, 9).to_pylist()
    ]
    rows = [row for row in rows if row["status"] == "ok"]
    assert told["categories"] == dict(Counter(row["category"] for row in rows).most_common())
    labels = Counter(row["label"] for row in rows)
    assert {line["label"]: line["pictures"] for line in told["commonest_labels"]} == labels
    assert told["mean_confidence"] == pytest.approx(np.mean([row["confidence"] for row in rows]), abs=1e-4)
    assert told["label_file"] == f"{config.labels}, version 3"
    assert (told["labels_offered"], told["labels_seen"]) == (5, len(labels))
    assert told["low_confidence_share"] == np.mean([row["confidence"] < 0.9 for row in rows])
    assert [chart["kind"] for chart in told["charts"]] == ["bar", "bar", "histogram"]
    assert sum(told["charts"][2]["counts"]) == 9
    assert all(item["jpeg_base64"] for item in told["pictures"]["items"])
    assert "version 3" in (run.folder / "report.html").read_text()


def test_the_sheet_shows_each_common_label_and_the_least_sure_however_rows_are_cut() -> None:
    rng = np.random.default_rng(5)
    num, names = 5000, [f"label {index:02d}" for index in range(40)]
    labels = [names[min(39, int(value))] for value in rng.exponential(8, num)]
    columns = {"key": np.arange(num), "label": labels, "confidence": rng.random(num).astype(np.float32)}
    table = pa.table(columns)
    whole, parts = _Survey(0.2), _Survey(0.2)
    whole.add(table)
    for start in range(0, num, 333):
        parts.add(table.slice(start, 333))
    assert whole.labels == parts.labels == Counter(labels)
    assert whole.examples == parts.examples
    assert whole.unsure == parts.unsure
    least = np.argsort(columns["confidence"])[:NUM_UNSURE]
    assert [key for _, key, _ in whole.unsure] == least.tolist()
    for name, _ in whole.common()[:NUM_SHOWN]:
        shown = [key for _, key, _ in whole.examples[name]]
        assert len(shown) == NUM_EXAMPLES
        assert all(labels[key] == name for key in shown)
    # A fair draw: the first rows are not favoured.
    drawn = [key for name, _ in whole.common() for _, key, _ in whole.examples[name]]
    assert 0.35 < np.mean(drawn) / num < 0.65


def test_the_label_files_bytes_are_part_of_the_fingerprint(config: ExploreConfig, tmp_path: Path) -> None:
    other = tmp_path / "labels.json"
    other.write_text(json.dumps({"version": 3, "categories": {"shapes": {"circle": "a disc"}}}))
    assert load_labels(config.labels).fingerprint != load_labels(str(other)).fingerprint
    stage = Explore(dataclasses.replace(config, labels=str(other)), PICTURE)
    assert stage.settings["label_file"] == load_labels(str(other)).fingerprint


def test_only_what_changes_the_rows_changes_the_fingerprint(config: ExploreConfig) -> None:
    def fingerprint(**changes: Any) -> str:
        stage = Explore(dataclasses.replace(config, **changes), PICTURE)
        return settings_of.fingerprint(settings_of.to_dict(stage.settings, with_speed=False))

    assert fingerprint(batch_size=7) == fingerprint()
    assert fingerprint(top_k=2) != fingerprint()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"template": "a photo of {thing}"}, "may use"),
        ({"top_k": 0}, "top_k is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ExploreConfig(**changes)


def test_a_tower_of_another_size_is_refused_before_work(config: ExploreConfig) -> None:
    with pytest.raises(ConfigError, match=f"reads {SIDE} px"):
        Explore(config, PictureConfig(size=48, tower_size=SIDE * 2)).check()
