"""Conversations of one's own: every way in which people write them down becomes the same rows, or a reason."""

from __future__ import annotations

import base64
import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import photo, prepared, said, write_lines

from tinyvlm.data.prepare import PrepareConfig
from tinyvlm.data.sources.catalogue import SOURCES, SourceName, source_class
from tinyvlm.errors import DataError

CONFIG = PrepareConfig(source="messages", count_tokens=False, validation_share=0)
PHOTO, OTHER = photo(1), photo(2)
PACKED = base64.b64encode(PHOTO).decode()
DATA = f"data:image/jpeg;base64,{PACKED}"
ANSWER = {"role": "assistant", "content": "A bus."}
WANTED = [("user", [0, "What is it?"]), ("assistant", ["A bus."])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a dataset lies with its pictures, `photos/a.jpg` and `photos/b.jpg`."""
    place = tmp_path / "mine"
    (place / "photos").mkdir(parents=True)
    (place / "photos" / "a.jpg").write_bytes(PHOTO)
    (place / "photos" / "b.jpg").write_bytes(OTHER)
    return place


def asked(*parts: Any, **more: Any) -> dict[str, Any]:
    """A record of one question with these parts, and its answer."""
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **more}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


QUESTION = words("What is it?")
SHAPES: dict[str, Mapping[str, Any]] = {
    "OpenAI, data": asked({"type": "image_url", "image_url": {"url": DATA, "detail": "low"}}, QUESTION),
    "OpenAI, path": asked({"type": "image_url", "image_url": {"url": "photos/a.jpg"}}, QUESTION),
    "image_url is text": asked({"type": "image_url", "image_url": "./photos/../photos/a.jpg"}, QUESTION),
    "responses": asked(
        {"type": "input_image", "image_url": DATA}, {"type": "input_text", "text": "What is it?"}
    ),
    "Anthropic": asked(
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": PACKED}}, QUESTION
    ),
    "transformers, path": asked({"type": "image", "path": "photos/a.jpg"}, QUESTION),
    "transformers, url": asked({"type": "image", "url": "photos\\a.jpg"}, QUESTION),
    "transformers, base64": asked({"type": "image", "base64": PACKED}, QUESTION),
    "Qwen": asked({"type": "image", "image": "photos/a.jpg"}, QUESTION),
    "image is base64": asked({"type": "image", "image": PACKED}, QUESTION),
    "no type": asked({"image": "photos/a.jpg"}, {"text": "What is it?"}),
    "TRL": asked({"type": "image"}, QUESTION, images=["photos/a.jpg"]),
    "TRL, index": asked({"type": "image", "text": None, "index": 0}, {**QUESTION, "index": None}, images=[DATA]),
    "TRL, no place": asked(QUESTION, images=["photos/a.jpg"]),
    "LLaMA-Factory": {
        "messages": [{"role": "user", "content": "<image>What is it?"}, ANSWER], "images": ["photos/a.jpg"]
    },
    "one image": {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, ANSWER], "image": "photos/a.jpg"},
    "datasets' struct": asked({"type": "image"}, QUESTION, images=[{"bytes": PACKED, "path": "a.jpg"}]),
    "ShareGPT's words": {
        "messages": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}],
        "image": "photos/a.jpg",
    },
    "empty system": {
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "What is it?"}, ANSWER],
        "image": PACKED,
    },
    "names and weights": {
        "messages": [{"role": "user", "name": "ann", "content": "What is it?"}, {**ANSWER, "weight": 1}],
        "images": ["photos/a.jpg"], "tools": [],
    },
}  # fmt: skip


def test_all_shapes_say_the_same(tmp_path: Path, folder: Path) -> None:
    config = PrepareConfig(source="messages", count_tokens=False, validation_share=0)
    rows = [
        prepared([write_lines(folder / f"{n}.jsonl", [record])], tmp_path / str(n), config)[0]
        for n, record in enumerate(SHAPES.values())
    ]
    for shape, row in zip(SHAPES, rows, strict=True):
        assert (shape, row["status"], row["detail"]) == (shape, "ok", None)
        assert (shape, said(row)) == (shape, WANTED)
        assert row["family"] == "instruction"
        assert row["images"] == rows[0]["images"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, folder: Path, suffix: str) -> None:
    records = [
        {
            "messages": [{"role": "user", "content": f"<image> {n}?"}, {"role": "assistant", "content": f"{n}!"}],
            "images": [f"photos/{'ab'[n % 2]}.jpg"],
        }
        for n in range(6)
    ]
    path = folder / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8-sig")
    elif suffix == ".jsonl":
        write_lines(path, records)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["messages", "images"])
            writer.writerows([json.dumps(row["messages"]), json.dumps(row["images"])] for row in records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    rows = prepared([path], tmp_path / "out", CONFIG)
    assert [said(row) for row in rows] == [[("user", [0, f" {n}?"]), ("assistant", [f"{n}!"])] for n in range(6)]
    assert len({row["images"][0]["sha256"] for row in rows}) == 2


def test_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    """HuggingFaceH4's and TRL's sets: parts with all fields, pictures as struct<bytes, path>, dates beside them."""
    part = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
    message = pa.struct([("content", pa.list_(part)), ("role", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("messages", pa.list_(message)), ("images", pa.list_(image)), ("at", pa.timestamp("ms"))])

    def turns(*images: int) -> list[dict[str, Any]]:
        shown = [{"index": index, "type": "image"} for index in images]
        question = [{"text": "Which?", "type": "text"}, *shown]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": [words("Both.")]}]

    both = [{"bytes": PHOTO, "path": None}, {"bytes": OTHER, "path": "x.jpg"}]
    now = datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None)
    records = [
        {"messages": turns(1, 0), "images": both, "at": now},
        {"messages": turns(0), "images": both, "at": now},
        {"messages": turns(0, 7), "images": both, "at": now},
        {"messages": turns(), "images": [], "at": now},
        {"messages": turns(0), "images": [{"bytes": None, "path": None}], "at": now},
    ]
    pq.write_table(pa.Table.from_pylist(records, schema=schema), tmp_path / "train-00000.parquet")
    rows = prepared([tmp_path], tmp_path / "out", CONFIG)
    assert [row["status"] for row in rows] == ["ok", "bad_count", "bad_count", "ok", "no_picture"]
    assert said(rows[0]) == [("user", ["Which?", 0, 1]), ("assistant", ["Both."])]
    first, second = (image["sha256"] for image in rows[0]["images"])
    assert (
        prepared([write_lines(tmp_path / "x.jsonl", [asked(QUESTION, image=DATA)])], tmp_path / "one", CONFIG)[0][
            "images"
        ][0]["sha256"]
        == second
        != first
    )
    assert rows[3]["family"] == "text"


def test_marks_stand_where_they_stand(tmp_path: Path, folder: Path) -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "First\n<image>\nthen <image> here."},
        {"role": "assistant", "content": "In SVG an <image> is an element."},
        {"role": "user", "content": "And?<image>"},
        {"role": "assistant", "content": "Seen."},
    ]
    images = ["photos/a.jpg", "photos/b.jpg", "photos/a.jpg"]
    plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<image>"}]
    path = write_lines(folder / "x.jsonl", [{"messages": turns, "images": images}, {"messages": plain}])
    row, text = prepared([path], tmp_path / "out", CONFIG)
    assert said(row) == [
        ("system", ["Be brief."]),
        ("user", ["First", 0, "then ", 1, " here."]),
        ("assistant", ["In SVG an <image> is an element."]),
        ("user", ["And?", 2]),
        ("assistant", ["Seen."]),
    ]
    assert row["family"] == "multi_turn"
    hashes = [image["sha256"] for image in row["images"]]
    assert hashes[0] == hashes[2] != hashes[1]
    assert (text["status"], text["family"], said(text)[1]) == ("ok", "text", ("assistant", ["<image>"]))


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


BAD: list[tuple[Mapping[str, Any], str, str]] = [
    ({"messages": [user("<image>?"), ANSWER]}, "bad_count", "1 pictures, and 0 came"),
    ({"messages": [user("<image>?"), ANSWER], "images": [DATA, DATA]}, "bad_count", "1 pictures, and 2 came"),
    (asked({"type": "image"}, {"type": "image"}, images=[DATA]), "bad_count", "2 pictures, and 1 came"),
    (asked({"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}}), "no_picture", "x.org/a.jpg is a link"),
    (asked({"type": "image", "path": "s3://bucket/a.jpg"}), "no_picture", "is a link"),
    (asked({"type": "input_image", "file_id": "file-123"}), "no_picture", "file-123"),
    (asked({"type": "image", "path": "photos/c.jpg"}), "no_picture", "photos/c.jpg is not in"),
    (asked({"type": "image", "path": "../secret.jpg"}), "no_picture", "leads out of"),
    (asked({"type": "image", "path": "photos/../../secret.jpg"}), "no_picture", "leads out of"),
    (asked({"type": "image", "path": "/etc/passwd"}), "no_picture", "/etc/passwd is not in"),
    (asked({"type": "image", "path": "photos"}), "unreadable", "photos is no file"),
    (asked({"type": "image", "path": "photos/pipe.jpg"}), "unreadable", "pipe.jpg is no file"),
    (asked({"type": "image", "path": "a\0b.jpg"}), "unreadable", "a"),
    (asked({"type": "image", "path": "\ud800.jpg"}), "no_picture", ".jpg"),
    (asked({"type": "image", "path": "x" * 10_000}), "unreadable", "xxx"),
    (asked({"type": "image", "image": "data:image/png;base64,AAA"}), "not_image", ""),
    (asked({"type": "image", "image": "data:nonsense"}), "not_image", "comma"),
    (asked({"type": "image", "image": 7}), "bad_record", "a picture is int"),
    (asked({"type": "image", "image": {}}), "no_picture", "none of bytes"),
    (asked({"type": "image_url", "image_url": {"url": ""}}), "no_picture", "none of bytes"),
    (asked({"type": "video", "video": "a.mp4"}, QUESTION), "bad_record", "a part of type video"),
    (asked("What is it?"), "bad_record", "a part that is str"),
    ({"messages": [user({"text": "x"}), ANSWER]}, "bad_record", "turn 0 is dict"),
    ({"messages": [user("x"), {**ANSWER, "weight": 0}]}, "bad_record", "weight 0"),
    ({"messages": [user("x"), {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "bad_record", "tool_calls"),
    ({"messages": [user("x"), {"role": "tool", "content": "1"}, ANSWER]}, "bad_record", "turn 1 is a tool's"),
    ({"messages": [user("x"), {"role": "assistant", "content": [{"type": "image", "image": DATA}]}]},
     "bad_turns", "a picture in a message of assistant"),
    ({"messages": [user("x"), {"role": "narrator", "content": "y"}]}, "bad_turns", "'narrator'; wanted: system"),
    ({"messages": [user("x"), {"content": "y"}]}, "bad_turns", "turn 1 has no role"),
    ({"messages": [user("x"), {"role": 5, "content": "y"}]}, "bad_turns", "'5'"),
    ({"messages": [ANSWER, user("x")]}, "bad_turns", "turn 0 is assistant's"),
    ({"messages": [user("x")]}, "bad_turns", "last word"),
    ({"messages": [user("x"), user("y"), ANSWER]}, "bad_turns", "turn 1 is user's"),
    ({"messages": [user("x"), {"role": "assistant", "content": None}]}, "bad_text", "message 1"),
    ({"messages": [user("x"), {"role": "assistant", "content": float("nan")}]}, "bad_text", "message 1"),
    ({"messages": [user("x"), {"role": "assistant"}]}, "bad_text", "message 1"),
    ({"messages": [user(""), ANSWER]}, "bad_text", "message 0"),
    ({"messages": []}, "bad_record", "no turns"),
    ({"messages": None}, "bad_record", "NoneType"),
    ({"messages": {"role": "user"}}, "bad_record", "dict"),
    ({"messages": ["hello"]}, "bad_record", "turn 0 is str"),
    ({"messages": "hello"}, "bad_record", "no JSON"),
    ({"other": 1}, "bad_record", "NoneType"),
]  # fmt: skip


def test_bad_records_are_rows_with_their_reason(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(PHOTO)
    os.mkfifo(folder / "photos" / "pipe.jpg")
    good = asked({"type": "image", "path": "photos/a.jpg"}, QUESTION)
    path = write_lines(folder / "x.jsonl", [good, *(record for record, *_ in BAD)])
    rows = prepared([path], tmp_path / "out", CONFIG)
    assert (rows[0]["status"], len(rows)) == ("ok", 1 + len(BAD))
    told = json.loads(next((tmp_path / "out").glob("prepare-*/stats.json")).read_text())["sections"]["set_aside"]
    detail_of = {str(row["key"]): row["detail"] for row in rows}
    assert {reason["status"] for reason in told["commonest_reasons"]} == {status for _, status, _ in BAD}
    assert all(detail_of[reason["key"]] == reason["detail"] for reason in told["commonest_reasons"])
    for (record, status, detail), row in zip(BAD, rows[1:], strict=True):
        about = str(record)[:300]
        assert (about, row["status"]) == (about, status)
        assert detail in row["detail"], about
        assert len(row["detail"]) <= 200


def test_nonsense_costs_its_own_row(tmp_path: Path, folder: Path) -> None:
    deep = '{"a":' * 600 + "1" + "}" * 600
    too_deep = "[" * 100_000 + "]" * 100_000
    long = asked(words("x" * 10_000_000))
    half = {"messages": [user("half \ud83d of <image>"), ANSWER], "images": ["photos/a.jpg"], "id": "\ud83d"}
    fifty = {"messages": [user("<image>" * 50 + "?"), ANSWER], "images": ["photos/a.jpg", "photos/b.jpg"] * 25}
    lines = [
        json.dumps(asked(QUESTION)),
        f'{{"messages": {deep}}}',
        f'{{"messages": {too_deep}}}',
        f'{{"messages": [{{"role": "user", "content": [{deep}]}}]}}',
        json.dumps(long),
        json.dumps(half),
        json.dumps(fifty),
        '{"messages": [{"role": "user", "con',
        json.dumps({"messages": [{"role": "x" * 10_000_000}]}),
        json.dumps(asked({"type": "image", "image": "/9j/" + "A" * 10_000_000})),
        json.dumps(asked({"type": "image", "image": "z" * 1_000_000})),
        json.dumps({"messages": json.dumps(asked(QUESTION, image=DATA)["messages"]), "image": DATA}),
    ]
    (folder / "x.jsonl").write_text("\n".join(lines))
    rows = prepared([folder / "x.jsonl"], tmp_path / "out", CONFIG)
    assert [row["status"] for row in rows] == [
        "ok", "bad_record", "bad_record", "bad_record", "ok", "ok", "ok", "bad_record", "bad_turns", "corrupt",
        "unreadable", "ok",
    ]  # fmt: skip
    assert said(rows[5])[0] == ("user", ["half ? of ", 0])
    assert len(rows[6]["images"]) == 50


def test_folders_of_prepare_images_come_before_the_records_own(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(OTHER)
    names = ["coco/a.jpg", "photos/a.jpg", str(tmp_path / "elsewhere" / "a.jpg"), f"file://{folder}/photos/a.jpg"]
    path = write_lines(folder / "x.jsonl", [asked(QUESTION, image=name) for name in names])
    config = PrepareConfig(
        source="messages", count_tokens=False, images={"coco": str(tmp_path / "elsewhere")}, validation_share=0
    )
    rows = prepared([path], tmp_path / "out", config)
    assert [row["status"] for row in rows] == ["ok", "ok", "no_picture", "ok"]
    coco, own, _, whole = (row["images"] for row in rows)
    assert coco != own == whole


def test_the_same_conversation_is_used_once_and_pictures_lie_together(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    (other / "photos").mkdir(parents=True)
    (other / "photos" / "a.jpg").write_bytes(OTHER)
    one = SHAPES["transformers, path"]
    write_lines(folder / "x.jsonl", [one, SHAPES["LLaMA-Factory"], {**one, "id": 7}, asked(QUESTION, image=DATA)])
    write_lines(other / "x.jsonl", [one])
    rows = prepared([folder / "x.jsonl", other / "x.jsonl"], tmp_path / "out", CONFIG)
    # A name in another folder is another picture; one by value is not compared with those in files.
    assert [row["status"] for row in rows] == ["ok", "duplicate", "duplicate", "ok", "ok"]
    assert rows[0]["images"] == rows[3]["images"] != rows[4]["images"]


@pytest.mark.parametrize(("names", "splits"), [
    (["train.jsonl", "test.jsonl"], ["test", "train"]),
    (["data-train.jsonl", "data-val-00.jsonl"], ["train", "test"]),
    (["my-test.jsonl"], ["train"]),
    (["latest.jsonl", "train.jsonl"], ["train", "train"]),
])  # fmt: skip
def test_files_called_test_beside_one_called_train_are_not_trained_on(
    tmp_path: Path, folder: Path, names: Sequence[str], splits: Sequence[str]
) -> None:
    for name in names:
        write_lines(folder / name, [asked(words(name), image="photos/a.jpg")])
    assert [row["split"] for row in prepared([folder], tmp_path / "out", CONFIG)] == splits


def test_sharegpt(tmp_path: Path, folder: Path) -> None:
    records: list[dict[str, Any]] = [
        {
            "id": "a1", "image": "photos/a.jpg", "system": "Be brief.", "model": "",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."},
                {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."},
            ],
        },
        {"id": 2, "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        {"conversations": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Hello"}]},
        {"conversations": [{"from": "human", "value": "1+1"}, {"from": "function_call", "value": "add"}]},
    ]  # fmt: skip
    path = write_lines(folder / "x.jsonl", records)
    config = PrepareConfig(source="sharegpt", count_tokens=False, validation_share=0)
    rows = prepared([path], tmp_path / "out", config)
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "bad_turns", "bad_record"]
    assert said(rows[0])[:2] == [("system", ["Be brief."]), ("user", [0, "What?"])]
    assert json.loads(rows[0]["meta"]) == {"id": "a1", "file": "x.jsonl"}
    assert json.loads(rows[1]["meta"])["id"] == "2"
    assert {row["source"] for row in rows} == {"sharegpt"}


@pytest.mark.parametrize(("source", "record", "hint"), [
    ("messages", {"conversations": [], "image": "a.jpg"}, "'messages'; it has conversations, image. .*sharegpt"),
    ("sharegpt", {"messages": [], "id": 1}, "'conversations'; it has messages, id. .*=messages"),
    ("messages", {"chat": [], "pics": []}, "it has chat, pics. Is prepare.source the right one"),
    ("messages", {f"\ud800{n}": 1 for n in range(30)}, "and 18 more"),
])  # fmt: skip
def test_a_wrong_file_is_told_which_source_would_fit(
    tmp_path: Path, source: SourceName, record: Mapping[str, Any], hint: str
) -> None:
    config = PrepareConfig(source=source, count_tokens=False)
    with pytest.raises(DataError, match=hint):
        prepared([write_lines(tmp_path / "x.jsonl", [record])], tmp_path / "out", config)
    assert not list((tmp_path / "out").glob("*/manifest.json"))


def test_a_field_of_another_name(tmp_path: Path, folder: Path) -> None:
    record = {"chat": asked(QUESTION)["messages"], "pics": ["photos/a.jpg"]}
    config = PrepareConfig(source="messages", count_tokens=False, columns={"messages": "chat", "images": "pics"})
    assert said(prepared([write_lines(folder / "x.jsonl", [record])], tmp_path / "out", config)[0]) == WANTED


def test_auto_takes_what_the_first_record_looks_like(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    auto = PrepareConfig(source="auto", count_tokens=False, validation_share=0)
    write_lines(folder / "x.jsonl", [SHAPES["TRL"]])
    automatic = prepared([folder], tmp_path / "out", auto)
    assert "has messages, images, so prepare.source=messages" in caplog.text
    assert automatic == prepared([folder], tmp_path / "named", CONFIG)
    (folder / "x.jsonl").unlink()
    assert prepared([folder], tmp_path / "pictures", auto)[0]["source"] == "folder"
    write_lines(tmp_path / "y.jsonl", [{"q": 1, "a": 2}])
    with pytest.raises(DataError, match=r"y.jsonl has q, a; .* messages \(messages\)"):
        prepared([tmp_path / "y.jsonl"], tmp_path / "none", auto)


def test_pictures_lie_beside_their_file_in_an_object_store_too(tmp_path: Path, bucket: Path) -> None:
    (bucket / "mine" / "photos" / "a.jpg").write_bytes(PHOTO)
    records = [asked(QUESTION, image=name) for name in ("photos/a.jpg", "photos/b.jpg", "photos", "../a.jpg")]
    (bucket / "mine" / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = prepared([bucket / "mine" / "x.jsonl"], tmp_path / "out", CONFIG)
    assert [row["status"] for row in rows] == ["ok", "no_picture", "unreadable", "no_picture"]
    assert said(rows[0]) == WANTED


def test_json_lines_called_json_with_a_very_long_first_line(tmp_path: Path) -> None:
    record = asked(words("x" * (5 << 20)))
    rows = prepared([write_lines(tmp_path / "x.json", [record, asked(QUESTION)])], tmp_path / "out", CONFIG)
    assert [row["status"] for row in rows] == ["ok", "ok"]


def test_every_source_of_the_catalogue_is_there() -> None:
    made: Callable[[str], Any] = source_class
    assert {name: made(name).name for name in SOURCES} == {name: name for name in SOURCES}
    assert set(SourceName.__args__) == {"auto", *SOURCES}  # type: ignore[attr-defined]
