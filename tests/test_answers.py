"""The evaluate stage: what is asked, what is kept, and what the kept answers come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from given_folders import given_folder
from PIL import Image
from tiny_model import ask, picture, tiny_model, tiny_processor

from tinyvlm import schema
from tinyvlm.chat import Message
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.sources import Dialogue, SourceRow
from tinyvlm.errors import ConfigError
from tinyvlm.eval.answers import Evaluate, EvaluateConfig
from tinyvlm.eval.report import evaluation_statistics
from tinyvlm.eval.vqa import BlindGuesser, is_right
from tinyvlm.generation import Completion, Engine, Sampling
from tinyvlm.images import to_jpeg
from tinyvlm.model import Sample
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local

HUES = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


class Talk:
    """A source about plain pictures: what color, whether red, and a caption; two of five pictures are for training."""

    name, reads = "talk", "encode"

    def num_questions(self) -> dict[str, dict[int, int]]:
        return {"train": {0: 2, 1: 2}, "test": {2: 2, 3: 2, 4: 2, 5: 2}}

    def dialogues(self, row: SourceRow) -> list[Dialogue]:
        color, split = row.meta["color"], "train" if row.key < 2 else "test"
        turns = [("what color is it?", color), ("is it red?", "yes" if color == "red" else "no")]
        made = []
        for number, (question, answer) in enumerate(turns):
            meta = {"questions": [2 * row.key + number], "answer_types": ["color" if number == 0 else "yes/no"]}
            meta |= {"set": split, "image_id": row.key, "forms": [question]}
            messages = (*ask(question), Message("assistant", (answer,)))
            made.append(Dialogue("vqa", split, messages, meta=meta))  # type: ignore[arg-type]
        references = [f"a {color} picture.", f"this is a {color} picture."]
        messages = (*ask("Describe this image."), Message("assistant", (references[0],)))
        made.append(Dialogue("caption", split, messages, meta={"references": references}))  # type: ignore[arg-type]
        return made


class Seer:
    """An engine that sees colors and cannot read: it answers by the length of the prompt."""

    context_length = 100

    def __init__(self) -> None:
        self.processor = tiny_processor()
        self.asked: list[Sample] = []

    def generate(self, samples: list[Sample], sampling: Sampling) -> list[Completion]:
        self.asked += samples
        texts = [self._answer(sample) for sample in samples]
        return [Completion(text, (1, 2), "stop", len(s.input_ids), 4) for text, s in zip(texts, samples, strict=True)]

    def _answer(self, sample: Sample) -> str:
        color = list(HUES)[int(sample.pixels.mean(axis=(0, 1, 2)).argmax())]
        prompt = self.processor.decode(sample.input_ids)
        if "Describe" in prompt:
            return f"this is a {color} picture."
        return f" {color.capitalize()}. " if "what color" in prompt else "yes" if color == "red" else "no"


def pictures(colors: list[str]) -> pa.Table:
    """Encode's rows, one plain picture each."""
    rows = [
        {
            "key": key,
            "status": "ok",
            "meta": json.dumps({"color": color}),
            "image": to_jpeg(Image.new("RGB", (48, 48), tuple(value + key for value in HUES[color])), 95),
        }
        for key, color in enumerate(colors)
    ]
    return pa.Table.from_pylist(rows, schema=schema.encoded(1, 2))


def conversations(colors: list[str]) -> pa.Table:
    return Prepare(PrepareConfig(), Talk())(pictures(colors))


def evaluate(rows: pa.Table, config: EvaluateConfig | None = None, engine: Any = None) -> list[dict[str, Any]]:
    stage = Evaluate(config or EvaluateConfig(), engine or Seer())
    answers: list[dict[str, Any]] = stage(stage.select(rows)).to_pylist()
    return answers


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


COLORS = ["red", "blue", "red", "green", "blue"]


def test_each_question_is_asked_with_its_own_and_with_another_picture() -> None:
    answers = evaluate(conversations(COLORS))
    assert len(answers) == 3 * (2 * 2 + 1)
    assert len({row["key"] for row in answers}) == len(answers)
    assert {row["split"] for row in answers} == {"test"}
    by_question: dict[int, dict[str, Any]] = {}
    for row in answers:
        by_question.setdefault(row["source_key"], {})[row["condition"]] = row
    for pair in by_question.values():
        if pair["as_is"]["family"] == "caption":
            assert set(pair) == {"as_is"}
            assert pair["as_is"]["correct"] is None
        else:
            assert pair["as_is"]["correct"] is True
            assert pair["as_is"]["image_sha256"] != pair["shuffled"]["image_sha256"]
            assert pair["as_is"]["prompt"] == pair["shuffled"]["prompt"]
    assert {row["correct"] for row in answers if row["condition"] == "shuffled" and row["truth"] in HUES} == {False}


def test_the_model_is_never_shown_the_truth() -> None:
    seer = Seer()
    evaluate(conversations(COLORS), engine=seer)
    for sample in seer.asked:
        assert seer.processor.decode(sample.input_ids, skip_special_tokens=False).endswith(
            "assistant<|end_header_id|>\n\n"
        )
        assert not sample.supervised.any()


def test_shuffling_can_be_left_out_and_a_lone_picture_cannot_be_shuffled() -> None:
    plain = evaluate(conversations(COLORS), EvaluateConfig(shuffle_pictures=False))
    assert {row["condition"] for row in plain} == {"as_is"}
    lone = [row for row in evaluate(conversations(COLORS[:3])) if row["condition"] == "shuffled"]
    assert {row["status"] for row in lone} == {"no_picture"}
    assert all(row["answer"] is None and row["correct"] is None for row in lone)


def test_what_cannot_be_asked_keeps_its_reason_and_spoils_no_neighbour() -> None:
    rows = conversations(COLORS).to_pylist()
    rows[6]["images"][0]["bytes"] = b"broken"
    rows[9]["messages"][0]["parts"][1]["text"] = "is it red? " * 80
    table = pa.Table.from_pylist(rows, schema=schema.CONVERSATIONS)
    by_key = {(row["source_key"], row["condition"]): row for row in evaluate(table)}
    assert by_key[rows[9]["key"], "as_is"]["status"] == "too_long"
    assert "not_image" in {row["status"] for row in by_key.values()}
    assert by_key[rows[10]["key"], "as_is"]["correct"] is True


def test_answers_are_the_engines_own_alone_or_in_a_batch(tmp_path: Path) -> None:
    model, processor = tiny_model(tmp_path)
    rows = pa.Table.from_pylist(
        [row | {"images": [image]} for row, image in zip(conversations(COLORS).to_pylist(), _varied(), strict=True)],
        schema=schema.CONVERSATIONS,
    )
    config = EvaluateConfig(max_new_tokens=5)
    answers = evaluate(rows, config, Engine(model, processor, batch_size=4))
    alone = evaluate(rows, config, Engine(model, processor, batch_size=1))
    assert [row["answer"] for row in answers] == [row["answer"] for row in alone]
    first = next(row for row in rows.to_pylist() if row["split"] == "test")
    question = messages_of(first["messages"])[:-1]
    sample = processor.encode(question, [first["images"][0]["bytes"]], open_answer=True)
    wanted = Engine(model, processor).generate([sample], Sampling(max_new_tokens=5))[0]
    assert answers[0]["answer"] == wanted.text


def _varied() -> list[dict[str, Any]]:
    """Fifteen pictures, three alike in a row."""
    shown = [to_jpeg(picture(seed), 95) for seed in range(5)]
    return [{"bytes": shown[index // 3], "sha256": f"{index // 3}"} for index in range(15)]


def test_as_a_stage_with_statistics(tmp_path: Path) -> None:
    root = given_folder("encode", pictures(COLORS), tmp_path, num_parts=1)
    stage = Prepare(PrepareConfig(), Talk())
    run_local(StageRun(stage, open_input(stage, [root]), root))
    given_folder("instruct", pictures(COLORS), root, num_parts=1)
    judge = Evaluate(EvaluateConfig(), Seer())  # type: ignore[arg-type]
    run = StageRun(judge, open_input(judge, [root]), root)
    manifest = run_local(run)
    assert manifest.rows_in == 9
    told = json.loads((run.folder / "stats.json").read_text())
    # Six of eight questions were asked, for one of the four test pictures never arrived; all six were right.
    assert told["num_questions"] == 8
    assert told["num_not_asked"] == 2
    assert told["accuracy"] == 0.75
    assert told["accuracy_by_answer_type"] == {"color": 1.0, "yes/no": 1.0}
    assert told["accuracy_shuffled"] < 0.5
    assert [told[f"bleu_{order}"] for order in (1, 2, 3, 4)] == [1.0] * 4
    assert told["published_sentence_bleu"]["bleu_1"] < 1
    assert told["captions_equal_to_a_reference"] == 1.0
    assert {row["question"] for row in told["by_question"]} == {"what color is it?", "is it red?"}
    assert all(item["jpeg_base64"] for item in told["pictures"]["items"])
    assert {"accuracy", "chance", "accuracy_shuffled"} <= set(told)
    assert evaluation_statistics(run.folder, Path(run.source.folders["prepare"]))["accuracy"] == told["accuracy"]


def test_the_blind_guess_knows_words_only() -> None:
    guesser = BlindGuesser([("Is it red?", "no"), ("is it red?", "no."), ("is it red?", "yes"), ("what is it?", "no")])
    assert guesser.guess("is it red? ") == "no"
    assert guesser.guess("never asked") == guesser.commonest == "no"
    assert BlindGuesser([("a", "x"), ("b", "y")]).commonest == BlindGuesser([("b", "y"), ("a", "x")]).commonest


@pytest.mark.parametrize(
    ("answer", "truth", "wanted"),
    [
        (" Yes. ", "yes", True),
        ("RED", "red", True),
        ("yes, it is", "yes", False),
        ("", "no", False),
        ("no..", "no", False),
    ],
)
def test_right_means_equal(answer: str, truth: str, wanted: bool) -> None:
    assert is_right(answer, truth) is wanted


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        EvaluateConfig(max_new_tokens=0)


def test_pixels_do_not_depend_on_the_road(tmp_path: Path) -> None:
    seer = Seer()
    rows = conversations(COLORS)
    evaluate(rows, engine=seer)
    first = next(row for row in rows.to_pylist() if row["split"] == "test")
    np.testing.assert_array_equal(seer.asked[0].pixels, seer.processor.pixels([first["images"][0]["bytes"]]))
