"""LLaVA-Instruct-150K and the 665k mix: every quirk of the files ends as a row that says what became of it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_model import picture

from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_input import open_prepare
from tinyvlm.errors import DataError
from tinyvlm.images import PictureConfig
from tinyvlm.stage_run import StageRun, run_local

SIZE = 32
Row = dict[str, Any]


def image_bytes(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    frames = [picture(number + more).resize((50, 40)) for more in (0, 1)]
    more = {"save_all": True, "append_images": frames[1:]} if kind == "GIF" else {}
    frames[0].save(buffer, kind, **more)
    return buffer.getvalue()


def pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(number))
    return folder


def talk(*values: str, image: Any = None, speakers: Sequence[str] = ("human", "gpt"), **more: Any) -> Row:
    turns = [{"from": speakers[number % len(speakers)], "value": value} for number, value in enumerate(values)]
    return {"id": "1", **({} if image is None else {"image": image}), "conversations": turns, **more}


def prepare(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]], root: Path, **settings: Any
) -> list[Row]:
    """The rows that the whole stage makes of records in one file, or in several by name."""
    files = dict(rows) if isinstance(rows, Mapping) else {"llava_v1_5_mix665k.json": rows}
    root.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (root / name).write_text(json.dumps(list(records)))
    return run([root / name for name in files], root / "out", **settings)


def run(places: Sequence[Path], root: Path, **settings: Any) -> list[Row]:
    config = PrepareConfig(**{"source": "llava", "count_tokens": False, "validation_share": 0.0, **settings})
    stage = Prepare(config, picture=PictureConfig(size=SIZE, tower_size=SIZE))
    done = StageRun(stage, open_prepare(stage, places, root), root)
    manifest = run_local(done)
    stage.close()
    rows = [row for name in manifest.files for row in pq.read_table(done.folder / "data" / name).to_pylist()]
    for row in rows:
        row["meta"] = json.loads(row["meta"])
    return sorted(rows, key=lambda row: int(row["key"]))


def said(row: Row) -> list[tuple[str, str]]:
    """Role and words of each message, pictures as [0], [1], …"""
    return [
        (m["role"], "".join(p["text"] if p["image"] is None else f"[{p['image']}]" for p in m["parts"]))
        for m in row["messages"]
    ]


def statistics(root: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(next(root.glob("records-*/stats.json")).read_text())
    return told


def test_a_talk_is_kept_whole_and_its_picture_stands_where_the_mark_does(tmp_path: Path) -> None:
    places = {"coco": str(pictures(tmp_path / "coco", "train2017/1.jpg"))}
    name = "coco/train2017/1.jpg"
    rows = [
        talk("<image>\nWhat colour?", "Red.", "And the roof?", "White.", "Why?", "Paint.", image=name),
        talk("What colour?\n<image>", "Red.", image=name),
        talk("Is <image> a bus?", "Yes.", image=name),
        talk("Hello!", "Hi.", "<image>\nWhat is this?", "A bus.", image=name),
        talk("What is shown?", "A red bus.", image=name),
    ]
    found = prepare(rows, tmp_path, images=places)
    assert [row["status"] for row in found] == ["ok"] * 5
    assert said(found[0]) == [
        ("user", "[0]What colour?"), ("assistant", "Red."), ("user", "And the roof?"), ("assistant", "White."),
        ("user", "Why?"), ("assistant", "Paint."),
    ]  # fmt: skip
    assert [said(row)[0][1] for row in found[1:3]] == ["What colour?[0]", "Is [0] a bus?"]
    assert [text for _, text in said(found[3])] == ["Hello!", "Hi.", "[0]What is this?", "A bus."]
    assert said(found[4])[0][1] == "[0]What is shown?", "a picture without a mark stands in front"
    assert [row["family"] for row in found] == ["multi_turn", *["instruction"] * 2, "multi_turn", "instruction"]
    assert {row["source"] for row in found} == {"llava/coco"}
    assert found[0]["meta"] == {"id": "1", "image": name}


def test_several_pictures_each_with_its_mark(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "a.jpg", "b.jpg")
    rows = [
        talk("<image> or <image>?", "The first.", image=["a.jpg", "b.jpg"]),
        talk("<image>Who?", "She.", "And here?\n<image>", "He.", image=["a.jpg", "a.jpg"]),
        talk("Which?", "Both.", image=["a.jpg", "b.jpg"]),
        talk("<image>And which?", "Both.", image=["a.jpg", "b.jpg"]),
        talk("<image><image>Which?", "This.", image="a.jpg"),
    ]
    found = prepare(rows, tmp_path, images={"": str(folder)})
    assert [row["status"] for row in found] == ["ok", "ok", "ok", "bad_count", "bad_count"]
    assert [said(row)[0][1] for row in found[:3]] == ["[0] or [1]?", "[0]Who?", "[0][1]Which?"]
    assert said(found[1])[2] == ("user", "And here?[1]")
    assert len(found[0]["images"]) == 2
    assert found[0]["meta"]["image"] == ["a.jpg", "b.jpg"]
    assert found[3]["detail"] == "the text refers to 1 pictures, and 2 came"


def test_sharegpt_rows_of_the_mix_have_no_picture(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "gqa/images/1.jpg")
    rows = [
        talk("<image>\nA bus?", "Yes.", image="gqa/images/1.jpg"),
        talk("Three bullet points, please.", "1. One", id="i6IyJda_0", model=""),
        talk("Show a picture in RSS.", "Write <image>…</image>.", model=""),
        talk("<image>\nWhat is this?", "I see nothing.", model=""),
        talk("<image>\nWhat is this?", "A bus.", image=""),
        talk("Be brief.", "Capital of Peru?", "Lima.", speakers=("system", "user", "assistant")),
        talk("Hi?", "Hi!", speakers=("User", "ChatGPT")),
        talk("Ho?", "Ho!", speakers=("human", "bing")),
        {"conversations": [{"role": "user", "content": "He?"}, {"role": "assistant", "content": "He!"}]},
        talk("Run it.", "{}", speakers=("human", "tool")),
    ]
    found = prepare(rows, tmp_path, images={"": str(folder)})
    assert [row["source"] for row in found] == ["llava/gqa", *["llava/text"] * 9]
    assert [row["family"] for row in found] == ["instruction", *["text"] * 9]
    status = [row["status"] for row in found]
    assert status == [*["ok"] * 3, "bad_count", "bad_count", *["ok"] * 4, "bad_turns"]
    assert found[3]["detail"] == "the text has 1 <image>, and no picture came"
    assert said(found[5]) == [("system", "Be brief."), ("user", "Capital of Peru?"), ("assistant", "Lima.")]
    assert said(found[6]) == [("user", "Hi?"), ("assistant", "Hi!")]
    assert "'tool'" in found[9]["detail"]


def test_turns_that_miss_their_question_or_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "a.jpg")
    rows = [
        talk("Continued.", "Why?", "So.", speakers=("gpt", "human")),
        talk("Why not?", "So.", "Thanks!"),
        talk("Go on.", "Continued?", "Where?", "There.", "Bye.", speakers=("system", "gpt", "human", "gpt", "human")),
        talk("Only asked?"),
        talk("Only said.", speakers=("gpt",)),
        talk("a?", "b?", "c.", speakers=("human", "human", "gpt")),
        talk("What?", "That.", "<image>And here?", image="a.jpg"),
    ]
    found = prepare(rows, tmp_path, images={"": str(folder)})
    assert [row["status"] for row in found] == ["ok"] * 3 + ["bad_turns"] * 4
    assert said(found[0]) == [("user", "Why?"), ("assistant", "So.")]
    assert said(found[1]) == [("user", "Why not?"), ("assistant", "So.")]
    assert said(found[2]) == [("system", "Go on."), ("user", "Where?"), ("assistant", "There.")]
    first, last = "answers_before_the_first_question", "questions_after_the_last_answer"
    assert [row["meta"].get("left_out") for row in found] == [{first: 1}, {last: 1}, {first: 1, last: 1}, *[None] * 4]
    assert statistics(tmp_path / "out")["turns_left_out"] == {first: 2, last: 2}
    assert len(said(found[6])) == 3, "a question with a picture is not dropped"


def test_pictures_are_found_through_the_map_of_folders(tmp_path: Path) -> None:
    names = ["coco/train2017/1.jpg", "gqa/images/2.jpg", "ocr_vqa/images/3.jpg", "textvqa/train_images/4.jpg",
             "vg/VG_100K/5.jpg", "vg/VG_100K_2/6.jpg"]  # fmt: skip
    disk = pictures(tmp_path / "disk", "c/1.jpg", "rest/gqa/images/2.jpg", "o/3.jpg", "t/4.jpg", "vg/VG_100K/5.jpg",
                    "v2/6.jpg")  # fmt: skip
    places = {"coco/train2017": "c", "": "rest", "ocr_vqa/images": "o", "textvqa/train_images": "t", "vg": "vg",
              "vg/VG_100K_2": "v2"}  # fmt: skip
    rows = [talk("<image>\nWhat?", f"{name}.", image=name) for name in names]
    found = prepare(rows, tmp_path, images={prefix: str(disk / place) for prefix, place in places.items()})
    assert [row["status"] for row in found] == ["ok"] * 6
    parts = ["coco", "gqa", "ocr_vqa", "textvqa", "vg", "vg"]
    assert [row["source"] for row in found] == [f"llava/{part}" for part in parts]


def test_pictures_of_ocr_vqa_that_are_missing_corrupt_or_gifs_by_another_name(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "ocr", "images/fine.jpg")
    (folder / "images" / "gif.jpg").write_bytes(image_bytes(3, "GIF"))
    (folder / "images" / "1437717772.jpg").write_bytes(image_bytes(4)[:300])
    (folder / "images" / "page.jpg").write_bytes(b"<html>gone</html>")
    names = ["fine", "gif", "1437717772", "page", "0001047655"]
    rows = [talk("<image>\nWho wrote this book?", f"{n}.", image=f"ocr_vqa/images/{n}.jpg") for n in names]
    found = prepare(rows, tmp_path, images={"ocr_vqa": str(folder)})
    assert [row["status"] for row in found] == ["ok", "ok", "corrupt", "not_image", "no_picture"]
    with Image.open(io.BytesIO(found[1]["images"][0]["bytes"])) as image:
        assert image.format == "JPEG"
    assert found[4]["detail"].startswith("ocr_vqa/images/0001047655.jpg is not in ")
    assert [row["meta"]["image"] for row in found] == [row["image"] for row in rows]


def test_coco_pictures_are_known_by_their_names_of_2014_too(tmp_path: Path) -> None:
    new, one, other = "000000000001.jpg", "COCO_train2014_000000000002.jpg", "COCO_val2014_000000000003.jpg"
    folder = pictures(tmp_path / "p", new, one, other)
    numbers = ["000000000001", "000000000002", "000000000003", "COCO_train2014_000000000001", "000000000004", "2"]
    rows = [talk("<image>\nWhat?", f"{number}.", image=f"{number}.jpg") for number in numbers]
    found = prepare({"detail_23k.json": rows}, tmp_path, images={"": str(folder)})
    assert [row["status"] for row in found] == ["ok"] * 4 + ["no_picture"] * 2
    assert found[0]["images"] == found[3]["images"]
    assert "COCO_train2014_000000000004.jpg" in found[4]["detail"]


def test_the_file_says_which_kind_of_question_it_has(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "1.jpg")
    files = ["conversation_58k", "detail_23k", "complex_reasoning_77k", "llava_instruct_80k"]
    rows = {f"{file}.json": [talk("<image>\nWhat?", f"{file}.", image="1.jpg")] for file in files}
    found = prepare(rows, tmp_path, images={"": str(folder)})
    kinds = ["llava/conversation", "llava/detail", "llava/complex_reasoning", "llava"]
    assert [row["source"] for row in found] == kinds


def test_the_same_talk_in_another_file_is_a_duplicate(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "1.jpg", "coco/train2017/1.jpg")
    rows = {
        "llava_instruct_150k.json": [talk("What?\n<image>", "A bus.", image="1.jpg")],
        "llava_v1_5_mix665k.json": [
            talk("<image>\nWhat?", "A bus.", image="coco/train2017/1.jpg"),
            talk("<image>\nWhat?", "A cat.", image="coco/train2017/1.jpg"),
            talk("<image>\nWhat?", "A bus.", image="coco/train2017/2.jpg"),
        ],
    }
    found = prepare(rows, tmp_path, images={"": str(folder)})
    assert [row["status"] for row in found] == ["ok", "duplicate", "ok", "no_picture"]
    assert found[1]["detail"] == "says the same as record 0"


def test_damaged_records_are_rows_with_their_reason(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "1.jpg")
    rows = [
        talk("<image>\nWhat?", "A bus.", image="1.jpg"),
        talk("<image>\nWhat?", "", image="1.jpg"),
        talk("", "An answer."),
        {"id": "1", "image": "1.jpg", "conversations": "none"},
        {"id": "2", "conversations": []},
        {"id": "3", "conversations": [{"from": "human", "value": float("nan")}, {"from": "gpt", "value": None}]},
        {"id": "4", "conversations": ["What?", "That."]},
        {"id": "5", "conversations": [{"from": "human", "value": 7}, {"from": "gpt", "value": 8.0}]},
        {"id": "6", "image": "1.jpg"},
        talk("Draw one.", "<image>", image="1.jpg"),
    ]
    found = prepare(rows, tmp_path, images={"": str(folder)})
    assert [row["status"] for row in found] == [
        "ok", "bad_text", "bad_text", "bad_record", "bad_turns", "bad_text", "bad_record", "ok", "bad_record",
        "bad_turns",
    ]  # fmt: skip
    assert said(found[7]) == [("user", "7"), ("assistant", "8")]
    assert not any("nan" in text.lower() or "None" in text for row in found for _, text in said(row))


def test_json_lines_and_parquet_with_bytes_give_the_same_rows(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "1.jpg", "2.jpg")
    rows = [talk("<image>\nWhat?", f"Number {n}.", "Sure?", "Yes.", image=f"{n}.jpg") for n in (1, 2)]
    wanted = prepare(rows, tmp_path / "a", images={"": str(folder)})
    lines = tmp_path / "x.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    inside = [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in rows]
    pq.write_table(pa.Table.from_pylist(inside), tmp_path / "x.parquet")
    for place in (lines, tmp_path / "x.parquet"):
        found = run([place], tmp_path / place.suffix[1:], images={"": str(folder)})
        columns = ("key", "status", "messages", "images", "family", "split")
        assert [[row[c] for c in columns] for row in found] == [[row[c] for c in columns] for row in wanted]


def test_a_file_of_another_kind_fails_naming_its_fields(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no field 'conversations'; it has instruction, output"):
        prepare([{"instruction": "a", "output": "b"}], tmp_path)
