"""The prepare stage: what is said follows from the questions, every question is accounted for, splits stay apart."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from given_folders import given_folder
from tiny_model import picture

from tinyvlm import schema
from tinyvlm.chat import check_pictures, check_turns
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_tally import Ledger
from tinyvlm.data.sources import CAPTION_PROMPTS
from tinyvlm.data.sources.easy_vqa import COLORS, SHAPES, EasyVQA, Question, read_facts
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.images import to_jpeg
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local

CONFIG = PrepareConfig(source="easy_vqa", validation_share=0.2, singles_per_picture=2, text_only_share=0.5)
NUM_TRAIN, NUM_TEST = 60, 12


def world() -> dict[str, list[tuple[str, str, int]]]:
    """Questions as easy-VQA has them, about a made-up picture for each number; the last one of test is a mystery."""

    def about(image_id: int) -> list[tuple[str, str, int]]:
        color, shape = COLORS[image_id % 8], SHAPES[image_id % 3]
        asked = [
            ("what shape is in the image?", shape),
            ("what color is the shape?", color),
            (f"what is the {color} shape?", shape),
            ("is there a red shape?", "yes" if color == "red" else "no"),
            ("is no circle present?", "no" if shape == "circle" else "yes"),
            ("does the image not contain a triangle?", "no" if shape == "triangle" else "yes"),
            ("is a teal shape present?", "yes" if color == "teal" else "no"),
        ]
        return [(question, answer, image_id) for question, answer in asked[: 5 + image_id % 3]]

    test = [triple for image_id in range(NUM_TEST - 1) for triple in about(image_id)]
    return {
        "train": [triple for image_id in range(NUM_TRAIN) for triple in about(image_id)],
        "test": [*test, ("is there a red shape?", "no", NUM_TEST - 1)],
    }


def encoded(pictures: list[dict[str, Any]]) -> pa.Table:
    """Rows as `encode` writes them, without anything that `prepare` does not read."""
    image = to_jpeg(picture(1), 90)
    rows = [
        {
            "key": key,
            "status": "ok",
            "caption": "a photo",
            "meta": json.dumps(meta),
            "image": image + bytes([key % 256]),
        }
        for key, meta in enumerate(pictures)
    ]
    return pa.Table.from_pylist(rows, schema=schema.encoded(1, 2))


def all_pictures() -> list[dict[str, Any]]:
    train = [{"split": "train", "image_id": image_id} for image_id in range(NUM_TRAIN)]
    return train + [{"split": "test", "image_id": image_id} for image_id in range(NUM_TEST)]


def prepared(config: PrepareConfig = CONFIG, pictures: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Prepare(config, EasyVQA(config, world()))(
        encoded(all_pictures() if pictures is None else pictures)
    ).to_pylist()
    return rows


@pytest.mark.parametrize(
    ("asked", "color", "shape"),
    [
        ([("what color is the circle?", "red")], "red", "circle"),
        ([("what is the teal shape?", "triangle")], "teal", "triangle"),
        ([("is there a red shape?", "yes"), ("is no circle present?", "no")], "red", "circle"),
        ([("is there not a red shape?", "no"), ("is there not a circle?", "yes")], "red", None),
        ([("is there a circle?", "no"), ("does the image not contain a triangle?", "yes")], None, "rectangle"),
        ([(f"is a {color} shape present?", "no") for color in COLORS[1:]], "red", None),
        ([("is there a red shape?", "no")], None, None),
    ],
)
def test_facts_follow_from_the_questions_alone(asked: list[tuple[str, str]], color: str, shape: str) -> None:
    facts = read_facts(Question(number, text, answer) for number, (text, answer) in enumerate(asked))
    assert (facts.color, facts.shape) == (color, shape)


def test_conversations_are_well_formed() -> None:
    rows = prepared()
    assert len({row["key"] for row in rows}) == len(rows)
    assert all(row["key"] // 1000 == row["source_key"] for row in rows)
    assert {(row["family"], row["split"]) for row in rows if row["status"] == "ok"} == {
        *((family, split) for family in ("caption", "vqa", "multi_turn", "text") for split in ("train", "validation")),
        ("vqa", "test"),
        ("caption", "test"),
    }
    for row in rows:
        if row["status"] == "ok":
            messages = messages_of(row["messages"])
            check_turns(messages)
            check_pictures(messages, len(row["images"]))
            assert [message.role for message in messages] == ["user", "assistant"] * (len(messages) // 2)
            assert all(message.text for message in messages)
            assert bool(row["images"]) == (row["family"] != "text")


def test_answers_are_the_sets_own() -> None:
    known = {(question, answer, image) for triples in world().values() for question, answer, image in triples}
    for row in prepared():
        if row["family"] in ("vqa", "multi_turn") and row["status"] == "ok":
            words = [message.text for message in messages_of(row["messages"])]
            image_id = json.loads(row["meta"])["image_id"]
            assert {
                (question, answer, image_id) for question, answer in zip(words[::2], words[1::2], strict=True)
            } <= known
            assert len(words) <= 2 * CONFIG.turns_per_conversation


def test_captions_say_what_the_picture_shows_and_prompts_vary() -> None:
    captions = [row for row in prepared() if row["family"] == "caption" and row["status"] == "ok"]
    prompts = set()
    for row in captions:
        asked, answered = (message.text for message in messages_of(row["messages"]))
        meta = json.loads(row["meta"])
        thing = f"{COLORS[meta['image_id'] % 8]} {SHAPES[meta['image_id'] % 3]}"
        assert thing in answered
        assert asked in CAPTION_PROMPTS
        prompts.add(asked)
        if row["split"] == "test":
            assert answered in meta["references"]
            assert all(thing in reference for reference in meta["references"])
    assert len(prompts) > 10


def test_training_and_held_out_pictures_stay_apart() -> None:
    splits: dict[int, set[str]] = {}
    for row in prepared():
        splits.setdefault(row["source_key"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert all(splits[key] == {"test"} for key in range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))
    assert 0 < sum(found == {"validation"} for found in splits.values()) < NUM_TRAIN / 2
    other_seed = prepared(dataclasses.replace(CONFIG, seed=7))
    assert {row["source_key"] for row in other_seed if row["split"] == "validation"} == {
        key for key, found in splits.items() if found == {"validation"}
    }


def test_the_same_row_always_says_the_same() -> None:
    def words(rows: list[dict[str, Any]]) -> dict[int, Any]:
        return {row["key"]: (row["messages"], row["split"], row["meta"]) for row in rows}

    whole = words(prepared())
    alone = Prepare(CONFIG, EasyVQA(CONFIG, world()))(encoded(all_pictures()).slice(30, 5)).to_pylist()
    assert words(alone).items() <= whole.items()
    assert words(prepared(dataclasses.replace(CONFIG, seed=1))) != whole


def test_what_cannot_be_talked_about_leaves_a_reason() -> None:
    strangers = [
        {"kind": "placeholder"},
        {"split": "train", "image_id": 10**6},
        {"split": "test", "image_id": NUM_TEST - 1},
    ]
    rows = prepared(pictures=strangers)
    by_key = {key: [row for row in rows if row["source_key"] == key] for key in range(3)}
    assert [row["status"] for row in by_key[0] + by_key[1]] == ["bad_text", "bad_text"]
    assert "no questions about picture" in by_key[0][0]["detail"]
    assert Counter((row["family"], row["status"]) for row in by_key[2]) == {
        ("vqa", "ok"): 1,
        ("caption", "bad_text"): 1,
    }
    nothing = PrepareConfig(
        source="easy_vqa", captions_per_picture=0, singles_per_picture=0, turns_per_conversation=0, text_only_share=0
    )
    assert [row["status"] for row in prepared(nothing, all_pictures()[:2])] == ["bad_text"] * 2


def test_every_question_of_the_set_is_accounted_for(tmp_path: Path) -> None:
    arrived = [place for place in all_pictures() if place["image_id"] % 5]
    root = given_folder("encode", encoded(arrived), tmp_path, num_parts=3)
    stage = Prepare(CONFIG, EasyVQA(CONFIG, world()))
    run = StageRun(stage, open_input(stage, [root]), root)
    manifest = run_local(run)
    assert manifest.rows_in == len(arrived)
    told = json.loads((run.folder / "stats.json").read_text())
    for split, questions in world().items():
        account = told["questions"][split]
        assert account["in_source"] == len(questions)
        assert account["prepared"] == sum(image_id % 5 != 0 for _, _, image_id in questions)
        assert account["prepared"] + account["not_drawn"] + account["picture_missing"] == account["in_source"]
    assert sum(sum(splits.values()) for splits in told["conversations"].values()) == manifest.statuses["ok"]
    assert told["pictures"]["items"]
    assert told["sections"]["examples_without_pictures"]["conversations"]


def test_questions_left_out_by_the_settings_are_counted_too() -> None:
    config = dataclasses.replace(CONFIG, turns_per_conversation=0)
    stage = Prepare(config, EasyVQA(config, world()))
    rows = [row for row in stage(encoded(all_pictures())).to_pylist() if row["status"] == "ok"]
    ledger = Ledger(stage.source.num_questions())
    ledger.enter([row["family"] for row in rows], [row["meta"] for row in rows])
    told = ledger.account()["train"]
    assert told["prepared"] == 2 * NUM_TRAIN
    assert told["not_drawn"] == told["in_source"] - told["prepared"]


def test_plain_captions_come_from_the_link_list() -> None:
    rows = encoded([{}] * 40)
    captions = pa.array(["  a quiet lake at dawn "] * 39 + [" "], pa.string())
    rows = rows.set_column(rows.schema.get_field_index("caption"), "caption", captions)
    out = Prepare(PrepareConfig(validation_share=0.3))(rows).to_pylist()
    assert Counter(row["status"] for row in out) == {"ok": 39, "bad_text": 1}
    assert {row["split"] for row in out} == {"train", "validation"}
    assert messages_of(out[0]["messages"])[1].text == "a quiet lake at dawn"


def test_bad_settings_and_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="text_only_share"):
        PrepareConfig(text_only_share=1.5)
    with pytest.raises(ConfigError, match="turns_per_conversation"):
        PrepareConfig(turns_per_conversation=-1)
    far = encoded([{}]).set_column(0, schema.encoded(1, 2).field("key"), pa.array([2**62], pa.int64()))
    with pytest.raises(DataError, match="keys must lie"):
        Prepare(PrepareConfig())(far)
