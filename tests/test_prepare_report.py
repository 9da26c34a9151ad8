"""The report of prepare: what columns are counted to is what the rows say, and little of a folder is held in memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from training_data import conversation, prepare_folder

from tinyvlm import report, schema
from tinyvlm.data import prepare_tally
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.prepare_report import prepare_statistics
from tinyvlm.data.prepare_tally import Extreme, answers_of, most_common
from tinyvlm.data.tallies import Distinct

KINDS = [("m3it/coco", "caption"), ("m3it/vqa", "vqa"), ("alpaca", "text"), ("llava", "multi_turn")]


def made() -> list[dict[str, Any]]:
    """Rows of four sources; every fifteenth is set aside, some pictures come again."""
    rows = []
    for key in range(300):
        source, family = KINDS[key % 4]
        pictures = {"text": 0, "multi_turn": 2}.get(family, 1)
        row = conversation(key, turns=3 if family == "multi_turn" else 1, pictures=pictures)
        row |= {"source": source, "family": family, "source_key": key // 2, "tokens": 10 + key % 97}
        row["split"] = "test" if key % 50 == 1 else "validation" if key % 20 == 2 else "train"
        row["messages"][1]["parts"] = [{"text": "A dog, ", "image": None}, {"text": "running.", "image": None}]
        for place, image in enumerate(row["images"]):
            image["sha256"] = f"{(key + place) % 60:064x}"
        if key % 15 == 0:
            row |= {"status": "no_picture", "detail": f"coco/train2017/{key:012d}.jpg is not in /data", "tokens": None}
        rows.append(row)
    rows[15] |= {"status": "contaminated.same", "detail": None}
    rows[30] |= {"status": "duplicate", "detail": "says the same as record 2"}
    rows[45] |= {"status": "no_picture", "detail": "ocr/3fe2ab90cc17-00aa.png is not in /ocr"}
    return rows


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = prepare_folder(tmp_path_factory.mktemp("prepared"), made(), parts=5, group_size=16)
    statistics = prepare_statistics(folder, {})
    return json.loads(json.dumps(statistics))  # what stats.json holds


def test_counts_are_those_of_the_rows(told: dict[str, Any]) -> None:
    usable = [row for row in made() if row["status"] == schema.OK]
    for family, splits in told["conversations"].items():
        for split, number in splits.items():
            assert number == sum(row["family"] == family and row["split"] == split for row in usable)
    assert [(row["source"], row["family"]) for row in told["by_source"]] == sorted(KINDS)
    for row in told["by_source"]:
        mine = [one for one in usable if one["source"] == row["source"]]
        splits = Counter(one["split"] for one in mine)
        assert {split: row[split] for split in schema.SPLITS} == {split: splits[split] for split in schema.SPLITS}
        assert row["held_out_share"] == splits["validation"] / (splits["validation"] + splits["train"])
        assert row["set_aside"] == 75 - len(mine)
        assert row["pictures"] == len(mine[0]["images"])
        assert row["turns"] == (3 if row["family"] == "multi_turn" else 1)
        tokens = np.sort([one["tokens"] for one in mine])
        assert row["median_tokens"] == pytest.approx(np.median(tokens), rel=0.03)
        assert row["p95"] == pytest.approx(np.quantile(tokens, 0.95), rel=0.03)
        assert row["longest"] == tokens[-1]
    assert told["pictures_shown"] == sum(len(row["images"]) for row in usable)
    assert told["pictures_distinct"] == len({image["sha256"] for row in usable for image in row["images"]})
    assert told["pictures_stored_bytes"] > 1000 * 60


def test_what_is_set_aside_is_told_by_source_and_by_reason(told: dict[str, Any]) -> None:
    bad = [row for row in made() if row["status"] != schema.OK]
    by_source = {row["source"]: row for row in told["sections"]["set_aside"]["by_source"]}
    for source, row in by_source.items():
        assert row["no_picture"] == sum(one["source"] == source and one["status"] == "no_picture" for one in bad)
        assert row["set_aside_share"] == sum(one["source"] == source for one in bad) / 75
    reasons = told["sections"]["set_aside"]["commonest_reasons"]
    assert sum(row["rows"] for row in reasons) == len(bad)
    missing = [row for row in reasons if row["status"] == "no_picture"]
    assert len(missing) == 5, "names of files in one folder are one reason"
    assert any("ocr/3fe2ab90cc17-00aa.png" in row["detail"] for row in missing)
    for row in reasons:
        example = made()[int(row["key"])]
        assert (example["status"], example["source"]) == (row["status"], row["source"])
        assert (example["detail"] or "") == row["detail"]
    assert told["duplicates"] == 1
    assert told["contaminated"] == 1


def test_that_nobody_looked_for_contamination_is_said(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path, made()[:20])
    assert prepare_statistics(folder, {}, is_decontaminated=False)["contaminated"] == "not looked for"


def test_charts_show_lengths_answers_pictures_and_turns(told: dict[str, Any]) -> None:
    usable = [row for row in made() if row["status"] == schema.OK]
    charts = {chart["title"]: chart for chart in told["charts"]}
    lengths = charts["Tokens of a conversation"]
    wanted = np.histogram([row["tokens"] for row in usable], bins=lengths["edges"])[0]
    assert lengths["counts"] == wanted.tolist()
    assert sum(lengths["counts"]) == len(usable)
    pictures = charts["Pictures in a conversation"]
    assert dict(zip(pictures["labels"], pictures["values"], strict=True)) == {
        str(number): count for number, count in Counter(len(row["images"]) for row in usable).items()
    }
    assert charts["Turns of a conversation"]["labels"] == ["1", "3"]
    answers = Counter(
        message.text
        for row in usable
        if row["split"] != "test"
        for message in messages_of(row["messages"])
        if message.role == "assistant"
    )
    short = charts["Short answers in training"]
    assert Counter(dict(zip(short["labels"], short["values"], strict=True))) == answers
    words = charts["Words of answers"]
    assert words["labels"][:2] == ["dog", "running"], "without commas and dull words"


def test_examples_come_from_everywhere(told: dict[str, Any]) -> None:
    captions = [item["caption"] for item in told["pictures"]["items"]]
    assert [caption.split(":")[0] for caption in captions] == [
        *["llava, multi_turn (1 of 2)"] * 6,
        *["m3it/coco, caption"] * 6,
        *["m3it/vqa, vqa"] * 6,
    ]
    keys = [int(caption.rpartition("#")[2]) for caption in captions]
    assert len({key % 5 for key in keys}) > 2, "of several parts"
    assert max(keys) > 150
    texts = told["sections"]["examples_without_pictures"]["conversations"]
    assert {row["family"] for row in texts} == {"text"}
    extremes = told["sections"]["longest_and_shortest"]
    tokens = sorted(row["tokens"] for row in made() if row["status"] == schema.OK)
    assert [row["tokens"] for row in extremes["longest"]] == tokens[:-5:-1]
    assert [row["tokens"] for row in extremes["shortest"]] == tokens[:4]


def test_the_page_has_it_all(told: dict[str, Any]) -> None:
    page = report.stage_report({"stage": "prepare", **told})
    assert "cannot be drawn" not in page
    for words in ("held out share", "m3it/coco", "commonest reasons", "Turns of a conversation", "running."):
        assert words in page


def test_nothing_usable_makes_a_report_too(tmp_path: Path) -> None:
    rows = [{**row, "status": "bad_text", "tokens": None, "messages": []} for row in made()[:6]]
    told = prepare_statistics(prepare_folder(tmp_path, rows), {"train": {1: 5}})
    assert told["questions"]["train"]["picture_missing"] == 5
    assert told["pictures"]["items"] == []
    assert "longest_and_shortest" not in told["sections"]
    report.stage_report(told)


def test_lengths_that_were_not_counted_are_left_out(tmp_path: Path) -> None:
    told = prepare_statistics(prepare_folder(tmp_path, [{**row, "tokens": None} for row in made()[:40]]), {})
    assert "Tokens of a conversation" not in {chart["title"] for chart in told["charts"]}
    assert "longest" not in told["by_source"][0]


def test_of_many_conversations_some_answers_are_cut_into_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_tally, "SAMPLED_ROWS", 50)
    told = prepare_statistics(prepare_folder(tmp_path, made(), parts=5), {})
    words = next(chart for chart in told["charts"] if chart["title"].startswith("Words of answers"))
    assert "one conversation in 6" in words["title"]
    assert 30 < words["values"][0] < 70


def test_answers_are_joined_as_messages_are() -> None:
    rows = made()[:8]
    rows[1]["messages"].insert(0, {"role": "system", "parts": [{"text": "be kind", "image": None}]})
    column = pa.chunked_array(
        [pa.array([row["messages"] for row in rows], schema.CONVERSATIONS.field("messages").type)]
    )
    wanted = [m.text for row in rows for m in messages_of(row["messages"]) if m.role == "assistant"]
    assert answers_of(column).to_pylist() == wanted
    assert answers_of(column.slice(3, 2)).to_pylist() == [
        m.text for row in rows[3:5] for m in messages_of(row["messages"]) if m.role == "assistant"
    ]


def test_different_texts_are_counted_exactly_and_then_nearly() -> None:
    exact, nearly = Distinct(), Distinct(max_kept=4096)
    for part in range(50):
        texts = pa.chunked_array([pa.array([None, *(str(part * 500 + number) for number in range(1000))])])
        exact.add(texts)
        nearly.add(texts)
    assert (len(exact), exact.is_exact) == (25_500, True)
    assert not nearly.is_exact
    assert len(nearly) == pytest.approx(25_500, rel=4 / 4096**0.5)
    assert len(Distinct()) == 0


def test_extremes_keep_their_places() -> None:
    longest = Extreme(1)
    for part in range(3):
        longest.add(part, np.arange(5), np.array([5, 1, 9, 3, 7]) + part)
    assert [(place.part, place.row) for place in longest.places] == [(2, 2), (1, 2), (0, 2), (2, 4)]


def test_the_most_common_come_first() -> None:
    groups = prepare_tally.Groups(1)
    groups.add(["b", "a", "the", ""], np.zeros(4, np.int64), np.array([2, 2, 9, 9]))
    assert most_common(groups, 5, frozenset({"the"})) == [("a", 2), ("b", 2)]
