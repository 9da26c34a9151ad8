"""CSV out and in again: every conversation comes back as it was, with its pictures byte for byte."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from given_folders import given_folder
from prepared import write_lines
from test_prepare import CONFIG as EASY_VQA
from test_prepare import all_pictures, encoded, world
from test_records import jpeg
from test_source_folder import as_files
from test_source_llava import pictures, talk
from test_source_m3it import lay, packed
from test_source_m3it import row as m3it_row
from test_source_vqa_v2 import official
from tiny_model import picture

from tinyvlm import cli, schema
from tinyvlm.chat import Message, Picture
from tinyvlm.data.export import COLUMNS, export
from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_input import chosen, open_prepare
from tinyvlm.data.sources import Dialogue, FileSource, PictureSource
from tinyvlm.data.sources.catalogue import SOURCES
from tinyvlm.data.sources.easy_vqa import EasyVQA
from tinyvlm.errors import DataError
from tinyvlm.images import PictureConfig, to_jpeg
from tinyvlm.stage_run import StageRun, run_local

SIZE = 32
ODD = (
    "=1+1",
    "+A1,\"quoted\", and 'so'",
    "line\nline\r\nline\rline\x0bline\u2028line\x85line",
    "NUL \x00 and \x1f",
    "🐈‍⬛ größer 猫 \ufeff",
    "  spaces at both ends ",
    '\\n \\\\ \\"',
    "nan",
    "x" * 40_000,
)
"""Words that tables like to break."""


class Odd(FileSource):
    """All shapes that a conversation may have, usable or not."""

    name = "odd"

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        n = int(record["n"])
        words = ODD[n % len(ODD)]
        one, two = jpeg(n % 5), jpeg(n % 5 + 1)
        plain = (Message("user", (Picture(0), words)), Message("assistant", (words,)))
        text = (Message("user", (words,)), Message("assistant", (words, "", words)))
        return [
            Dialogue("vqa", "test", plain, (one,), {"answer": words, "n": [1.5, None, True, {"a": n}]}, subset="a/b"),
            Dialogue("caption", "train", plain, (two,)),
            Dialogue("text", "train", (Message("system", (words,)), *text), subset="=2,"),
            Dialogue("reasoning", "validation", (Message("user", (words, Picture(0), words, Picture(1))), text[1]),
                     (one, two)),
            Dialogue("multi_turn", "train", (*plain, *text), (one,)),
            Dialogue("vqa", "train", plain, (b"no picture",)),
            Dialogue("vqa", "train", plain[:1], (one,)),
            Dialogue("vqa", "train", plain, (one, two)),
            Dialogue("vqa", "train", (), (), status="bad_record", detail=words[:500]),
        ]  # fmt: skip


def odd(root: Path) -> Path:
    (root / "odd.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(2 * len(ODD))))
    (root / "test").mkdir()
    (root / "test" / "a.jpg").write_bytes(jpeg(3))
    config = PrepareConfig(
        name="odd", count_tokens=False, rows_per_part=7, validation_share=0.3, evaluation=(str(root / "test"),)
    )
    return prepared(config, [root / "odd.jsonl"], root, Odd())


def finished() -> pa.Table:
    """Rows as `encode` writes them, with pictures of this test's size, all different."""
    rows = encoded(all_pictures()).to_pylist()
    for n, row in enumerate(rows):
        image = to_jpeg(picture(n % 7).resize((SIZE, SIZE)), 90) + bytes([n])
        row |= {"image": image, "sha256": hashlib.sha256(b"as sent %d" % n).hexdigest(), "phash": 2**64 - 1 - n}
    return pa.Table.from_pylist(rows, schema=schema.encoded(1, 2))


def captions(root: Path) -> Path:
    given_folder("encode", finished(), root)
    config = PrepareConfig(source="captions", count_tokens=False, validation_share=0.2)
    return prepared(config, [root], root)


def easy_vqa(root: Path) -> Path:
    given_folder("encode", finished(), root)
    return prepared(
        PrepareConfig(**{**vars(EASY_VQA), "count_tokens": False}), [root], root, EasyVQA(EASY_VQA, world())
    )


def m3it(root: Path) -> Path:
    for name in ("vqa/gqa", "generation/vist"):
        rows = [m3it_row(n, image_base64_str=[packed(n), packed(n + 1)][: 1 + n % 2]) for n in range(9)]
        lay(root / "data" / name / "train.jsonl", [*rows, m3it_row(0, outputs=None), "torn"])
    return prepared(PrepareConfig(source="m3it", count_tokens=False, validation_share=0.3), [root / "data"], root)


def llava(root: Path) -> Path:
    names = ("coco/1.jpg", "coco/2.jpg")
    talks = [
        talk("<image>\nWhat colour?", "Red.", "And the roof?", "White.", image=names[0]),
        talk("Is <image> like <image>?", "No.", image=list(names)),
        talk("Hello!", "Hi."),
        talk("Hello!", "Hi."),
        talk("<image>", "Gone.", image="coco/3.jpg"),
    ]
    (root / "llava_v1_5_mix665k.json").write_text(json.dumps(talks))
    places = {"": str(pictures(root / "p", *names))}
    config = PrepareConfig(source="llava", count_tokens=False, images=places)
    return prepared(config, [root / "llava_v1_5_mix665k.json"], root)


def llavar(root: Path) -> Path:
    (root / "x.json").write_text(json.dumps([talk("<image>\nRead.", "STOP", image="GCC_train_100000012.jpg")]))
    places = {"": str(pictures(root / "p", "GCC_train_100000012.jpg"))}
    return prepared(PrepareConfig(source="llavar", count_tokens=False, images=places), [root / "x.json"], root)


def messages(root: Path) -> Path:
    (root / "a.jpg").write_bytes(jpeg(1))
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>What is it?"}
    answered = {"role": "assistant", "content": "A bus."}
    rows = [
        {"messages": [system, asked, answered], "images": ["a.jpg"]},
        {"messages": [asked, answered], "images": ["b.jpg"]},
        {"messages": [asked], "images": ["a.jpg"]},
    ]
    return prepared(PrepareConfig(source="messages", count_tokens=False), [write_lines(root / "x.jsonl", rows)], root)


def sharegpt(root: Path) -> Path:
    path = write_lines(root / "x.jsonl", [talk("Hello!", "Hi.", "And?", "No."), talk("Hello!")])
    return prepared(PrepareConfig(source="sharegpt", count_tokens=False), [path], root)


def folder(root: Path) -> Path:
    as_files(root / "photos")
    return prepared(PrepareConfig(source="folder", count_tokens=False), [root / "photos"], root)


def alpaca(root: Path) -> Path:
    rows = [{"instruction": "Add.", "input": "7, 8", "output": "15"}, {"instruction": "x", "input": "", "output": ""}]
    (root / "x.json").write_text(json.dumps(rows))
    return prepared(PrepareConfig(source="alpaca", count_tokens=False), [root / "x.json"], root)


def vqa_v2(root: Path) -> Path:
    config = PrepareConfig(
        source="vqa_v2",
        count_tokens=False,
        validation_share=0.3,
        images={"": str(root / "pictures")},
        questions_per_conversation=3,
    )
    return prepared(config, official(root), root)


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "odd": odd, "alpaca": alpaca, "captions": captions, "easy_vqa": easy_vqa, "folder": folder, "llava": llava,
    "llavar": llavar, "m3it": m3it, "messages": messages, "sharegpt": sharegpt, "vqa_v2": vqa_v2,
}  # fmt: skip
"""Name of a source → makes a finished folder of its conversations."""


def prepared(
    config: PrepareConfig, places: Sequence[Path], root: Path, source: PictureSource | FileSource | None = None
) -> Path:
    stage = Prepare(config, source, picture=PictureConfig(size=SIZE, tower_size=SIZE))
    run = StageRun(stage, open_prepare(stage, places, root), root)
    run_local(run)
    return run.folder


def rows_of(folder: Path, *, without: Sequence[str] = ("key", "source_key")) -> list[dict[str, Any]]:
    rows = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("data/*.parquet"))])
    assert rows.schema.equals(schema.CONVERSATIONS)
    return sorted(rows.drop_columns(list(without)).to_pylist(), key=repr)


def read_back(table: Path, root: Path, name: str = "csv") -> Path:
    return prepared(PrepareConfig(source="csv", name=name, count_tokens=False, validation_share=0.5), [table], root)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_sources_csv_reads_back_as_the_same_conversations(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path)
    out = tmp_path / "out" / "all.csv"
    done = export(folder, out, all_rows=True)
    again = rows_of(read_back(out, tmp_path / "back", name))
    assert again == rows_of(folder)
    assert len(again) == done.num_rows > 0
    stored = {image["bytes"] for row in again for image in row["images"]} - {None}
    files = list((tmp_path / "out").glob("all.pictures/*"))
    assert {file.read_bytes() for file in files} == stored
    assert len(files) == len(stored) == done.num_pictures


def test_every_source_has_its_folder_above() -> None:
    assert set(SOURCES) - {"csv"} == set(FOLDERS) - {"odd"}


def test_the_made_up_folder_has_every_kind_of_row(tmp_path: Path) -> None:
    """Otherwise the test above would be less than it looks."""
    rows = rows_of(odd(tmp_path))
    assert {row["status"] for row in rows} == {
        *("ok", "bad_record", "bad_turns", "bad_count", "not_image"),
        *("contaminated.same",),
    }
    assert {row["split"] for row in rows} == set(schema.SPLITS)
    assert {len(row["images"]) for row in rows if row["status"] == "ok"} == {0, 1, 2}


def test_a_second_trip_gives_the_same_table(tmp_path: Path) -> None:
    export(odd(tmp_path), tmp_path / "one" / "x.csv", all_rows=True)
    export(read_back(tmp_path / "one" / "x.csv", tmp_path / "back", "odd"), tmp_path / "two" / "x.csv", all_rows=True)
    assert chosen(PrepareConfig(source="auto"), [tmp_path / "one" / "x.csv"]).source == "csv"
    one, two = (read_csv(tmp_path / name / "x.csv") for name in ("one", "two"))
    for row in [*one, *two]:
        del row["key"], row["source_key"]
    assert sorted(one, key=repr) == sorted(two, key=repr)


def read_csv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_usable_rows_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = odd(tmp_path)
    assert cli.main(["data", "export", str(folder), str(tmp_path / "x.csv")]) == 0
    said = capsys.readouterr().out
    rows = read_csv(tmp_path / "x.csv")
    usable = [row for row in rows_of(folder) if row["status"] == "ok"]
    assert len(rows) == len(usable)
    assert f"{len(rows)} conversations" in said
    assert f"left out: {2 * len(ODD)} (bad_record)" in said
    assert tuple(rows[0]) == COLUMNS["conversations"]
    for row in rows:
        for name in json.loads(row["images"]):
            assert (tmp_path / name).is_file()
    assert sorted(row["messages"] for row in rows)[0].startswith('[{"role":')
    assert cli.main(["data", "export", str(tmp_path / "nothing"), str(tmp_path / "y.csv")]) == 2
    assert not (tmp_path / "y.csv").exists()


def test_the_published_table(tmp_path: Path) -> None:
    folder = odd(tmp_path)
    done = export(folder, tmp_path / "x.csv", layout="published")
    wanted = sorted(
        (row["messages"][0]["parts"][-1]["text"], "".join(part["text"] for part in row["messages"][1]["parts"]))
        for row in rows_of(folder)
        if row["status"] == "ok" and len(row["messages"]) == 2 and len(row["images"]) == 1
    )
    rows = read_csv(tmp_path / "x.csv")
    assert sorted((row["instruction"], row["outputs"]) for row in rows) == wanted
    assert len(wanted) == done.num_rows
    assert done.left_out["several pictures"] > 0
    assert done.left_out["not one question and one answer"] > 0
    back = rows_of(read_back(tmp_path / "x.csv", tmp_path / "back"))
    assert [row["status"] for row in back] == ["ok"] * len(wanted)
    stored = {image["bytes"] for row in rows_of(folder) for image in row["images"]}
    assert {row["images"][0]["bytes"] for row in back} <= stored
    assert {row["messages"][0]["parts"][1]["text"] for row in back} == {asked.strip() for asked, _ in wanted}
    with pytest.raises(DataError, match="no place in published"):
        export(folder, tmp_path / "x.csv", layout="published", all_rows=True)


def test_a_published_table_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(1, (90, 60)))
    (tmp_path.parent / "secret.jpg").write_bytes(jpeg(2))
    rows = [
        ("Look.", "What is it?", "A cat.", "photos/a.jpg"),
        ("Say hello.", "", "Hello.", ""),
        ("Look.", "", "Gone.", "photos/b.jpg"),
        ("Look.", "", "Hidden.", "../secret.jpg"),
        ("Look.", "", "", "photos/a.jpg"),
    ]
    write(tmp_path / "x.csv", ("instruction", "inputs", "outputs", "image_path"), rows)
    config = PrepareConfig(source="csv", count_tokens=False, validation_share=0)
    found = rows_of(prepared(config, [tmp_path / "x.csv"], tmp_path / "out"))
    assert sorted(row["status"] for row in found) == ["bad_text", "no_picture", "no_picture", "ok", "ok"]
    assert {(row["family"], len(row["images"])) for row in found if row["status"] == "ok"} == {
        ("instruction", 1), ("text", 0)
    }  # fmt: skip
    (shown,) = [row for row in found if row["family"] == "instruction" and row["status"] == "ok"]
    parts = [part["image"] if part["text"] is None else part["text"] for part in shown["messages"][0]["parts"]]
    assert parts == [0, "Look.\nWhat is it?"]

    write(tmp_path / "y.csv", ("instruction", "inputs", "outputs", "image"), rows)
    with pytest.raises(DataError, match=r"no field 'image_path'; it has instruction, inputs, outputs, image"):
        prepared(config, [tmp_path / "y.csv"], tmp_path / "out")


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def test_rows_that_somebody_broke_are_rows_with_their_reason(tmp_path: Path) -> None:
    export(odd(tmp_path), tmp_path / "x.csv")
    good = next(row for row in read_csv(tmp_path / "x.csv") if json.loads(row["images"]) and row["split"] == "train")
    changes = [
        {"messages": "[{"},
        {"messages": '[{"role":"user","parts":[{"image":"0"}]}]'},
        {"messages": '[{"role":null,"parts":[]}]'},
        {"messages": "7"},
        {"family": "painting"},
        {"split": ""},
        {"status": "fine"},
        {"images": "[]"},
        {"sha256": "[3]"},
        {"phash": "[-1]"},
        {"meta": "[1]"},
    ]
    rows = [list({**good, **change}.values()) for change in changes]
    rows += [list({**good, "images": '["x.pictures/gone.jpg"]'}.values()), list(good.values()), list(good.values())[:4]]
    write(tmp_path / "y.csv", list(good), rows)
    found = rows_of(read_back(tmp_path / "y.csv", tmp_path / "back"), without=())
    told = [row["status"] for row in sorted(found, key=lambda row: row["key"])]
    assert told == ["bad_record"] * len(changes) + ["no_picture", "ok", "bad_record"]


def test_hashes_are_not_believed_of_another_picture(tmp_path: Path) -> None:
    """What keeps evaluation pictures out of training cannot be fooled by a file that was changed."""
    export(odd(tmp_path), tmp_path / "x.csv")
    row = next(row for row in read_csv(tmp_path / "x.csv") if json.loads(row["images"]))
    name, old = json.loads(row["images"])[0], json.loads(row["sha256"])[0]
    (tmp_path / name).write_bytes(jpeg(3))
    found = rows_of(read_back(tmp_path / "x.csv", tmp_path / "back"))
    hashes = {image["sha256"] for row in found for image in row["images"]}
    assert hashlib.sha256(jpeg(3)).hexdigest() in hashes
    assert old not in hashes


def test_the_published_systems_table_of_vqa(tmp_path: Path) -> None:
    export(vqa_v2(tmp_path), tmp_path / "x.csv", layout="seed-vqa")
    rows = read_csv(tmp_path / "x.csv")
    assert {
        "image_id": "42",
        "prompt": "<sys>You are a useful Visual Assitant</sys><user>Is there a dog?</user>"
        "<assist>Yes, there is a dog.</assist>",
    } in rows


def test_export_streams(tmp_path: Path) -> None:
    """60 MB of pictures, with the rows that show them, pass through a process that is allowed a part of that."""
    noise = [bytes([n % 256, n // 256]) + b"\xff" * 40_000 for n in range(1_500)]
    rows = [
        {
            "key": n, "status": "ok", "source_key": n, "source": "s", "family": "vqa", "split": "train", "meta": "{}",
            "messages": [{"role": "user", "parts": [{"text": "x", "image": None}]}],
            "images": [{"bytes": noise[n], "sha256": str(n), "phash": n}],
        }
        for n in range(1_500)
    ]  # fmt: skip
    given_folder("prepare", pa.Table.from_pylist(rows, schema=schema.CONVERSATIONS), tmp_path, num_parts=30)
    code = (
        "import sys, tracemalloc; from pathlib import Path; import pyarrow; from tinyvlm.data.export import export\n"
        "tracemalloc.start()\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(pyarrow.default_memory_pool().max_memory() + tracemalloc.get_traced_memory()[1])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "x.csv")], capture_output=True, text=True, check=True
    )
    assert len(read_csv(tmp_path / "x.csv")) == 1_500
    assert int(told.stdout) < 50_000_000
