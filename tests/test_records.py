"""From a dataset's files to conversations: every record ends as a row, wherever and however it lies."""

from __future__ import annotations

import base64
import csv
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

from tinyvlm.chat import Message, Picture
from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_input import open_prepare
from tinyvlm.data.sources import Dialogue, FileSource, Outline, text_of
from tinyvlm.errors import DataError
from tinyvlm.images import PictureConfig
from tinyvlm.stage_run import StageRun, run_local

SIZE = 32


class Asked(FileSource):
    """Records of {question, answer, image: bytes, base64 or a name}."""

    name = "asked"
    required = ("question", "answer")

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        same = f"{record.get('question')}/{record.get('answer')}"
        return Outline(together=str(record.get("image")), same=same, about={"file": Path(file).name})

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        image = record.get("image")
        if isinstance(image, str) and len(image) > 100:
            image = base64.b64decode(image)
        asked: tuple[Any, ...] = (text_of(record.get("question")),)
        messages = (
            Message("user", (Picture(0), *asked) if image else asked),
            Message("assistant", (text_of(record.get("answer")),)),
        )
        return [Dialogue("vqa" if image else "text", "train", messages, (image,) if image else (), dict(about))]


def jpeg(number: int, size: tuple[int, int] = (50, 40)) -> bytes:
    buffer = io.BytesIO()
    picture(number).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def records(number: int = 6) -> list[dict[str, Any]]:
    return [
        {"question": f"what is {n}?", "answer": f"number {n}", "image": base64.b64encode(jpeg(n % 3)).decode()}
        for n in range(number)
    ]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def prepare(
    places: Sequence[Path], root: Path, config: PrepareConfig | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    config = config or PrepareConfig(name="asked", count_tokens=False)
    stage = Prepare(config, Asked(), picture=PictureConfig(size=SIZE, tower_size=SIZE))
    run = StageRun(stage, open_prepare(stage, places, root), root)
    manifest = run_local(run)
    rows = [row for name in manifest.files for row in pq.read_table(run.folder / "data" / name).to_pylist()]
    return run.folder, sorted(rows, key=lambda row: row["key"])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_conversations(tmp_path: Path, suffix: str) -> None:
    _, wanted = prepare([write(tmp_path / "all.json", records())], tmp_path / "wanted")
    _, rows = prepare([write(tmp_path / f"x{suffix}", records())], tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * 6
    for row in [*wanted, *rows]:
        row.pop("meta")
    assert rows == wanted
    with Image.open(io.BytesIO(rows[0]["images"][0]["bytes"])) as image:
        assert image.size == (SIZE, SIZE)


def test_bytes_in_parquet_stay_there_until_a_worker_reads_them(tmp_path: Path) -> None:
    rows = [{**row, "image": jpeg(n % 3)} for n, row in enumerate(records())]
    _, wanted = prepare([write(tmp_path / "all.json", records())], tmp_path / "wanted")
    _, found = prepare([write(tmp_path / "x.parquet", rows)], tmp_path / "out")
    assert [row["images"] for row in found] == [row["images"] for row in wanted]
    listed = next((tmp_path / "out").glob("records-*/data/*.parquet"))
    assert pq.read_table(listed)["record"].null_count == 6


def test_pictures_are_found_by_name_and_missing_ones_cost_their_rows(tmp_path: Path) -> None:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    (tmp_path / "photos" / "deep" / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "secret.jpg").write_bytes(jpeg(2))
    names = ["coco/deep/a.jpg", "coco/deep/b.jpg", "coco/../secret.jpg", "vg/a.jpg"]
    rows = [{"question": name, "answer": "yes", "image": name} for name in names]
    config = PrepareConfig(name="asked", count_tokens=False, images={"coco": str(tmp_path / "photos")})
    _, found = prepare([write(tmp_path / "x.json", rows)], tmp_path / "out", config)
    assert [row["status"] for row in found] == ["ok", "no_picture", "no_picture", "no_picture"]
    assert "b.jpg" in found[1]["detail"]


def test_bad_records_are_rows_with_their_reason(tmp_path: Path) -> None:
    text = json.dumps(records(1)[0])
    bad = [
        '{"question": "torn',
        "[1, 2]",
        json.dumps({"question": "", "answer": "x"}),
        json.dumps({"question": "x", "answer": None}),
        json.dumps({"question": "x", "answer": float("nan")}),
        json.dumps({"question": "z", "answer": "fine", "image": "A" * 200}),
        text,
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([text, *bad]))
    _, rows = prepare([tmp_path / "x.jsonl"], tmp_path / "out")
    assert [row["status"] for row in rows] == [
        "ok", "bad_record", "bad_record", "bad_text", "bad_text", "bad_text", "not_image", "duplicate"
    ]  # fmt: skip


def test_a_wrong_column_fails_at_once_and_may_be_renamed(tmp_path: Path) -> None:
    rows = [{"q": row["question"], "answer": row["answer"]} for row in records(2)]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"no field 'question'; it has q, answer"):
        prepare([path], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest.json"))
    config = PrepareConfig(name="asked", count_tokens=False, columns={"question": "q"})
    assert [row["status"] for row in prepare([path], tmp_path / "out", config)[1]] == ["ok", "ok"]


def test_known_files_are_not_told_again(tmp_path: Path) -> None:
    known, both = write(tmp_path / "known.json", records(4)), write(tmp_path / "both.json", records(6))
    config = PrepareConfig(name="asked", count_tokens=False, known=(str(known),))
    _, rows = prepare([both], tmp_path / "out", config)
    assert [row["status"] for row in rows] == ["duplicate"] * 4 + ["ok"] * 2


def test_equal_pictures_lie_together_and_are_stored_once(tmp_path: Path) -> None:
    rows = [
        {"question": f"{n}?", "answer": f"{n}", "image": base64.b64encode(jpeg(n % 4)).decode()} for n in range(400)
    ]
    config = PrepareConfig(name="asked", count_tokens=False, rows_per_part=100)
    folder, found = prepare([write(tmp_path / "x.jsonl", rows)], tmp_path / "out", config)
    paths = sorted(folder.glob("data/*.parquet"))
    parts = [{row[0]["sha256"] for row in pq.read_table(path)["images"].to_pylist()} for path in paths]
    assert sum(map(len, parts)) == 4
    stored = sum(_bytes_of(pq.read_metadata(path), "images.list.element.bytes") for path in paths)
    assert stored < 20 * len(found[0]["images"][0]["bytes"])


def _bytes_of(metadata: Any, column: str) -> int:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(metadata.num_columns)]
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema == column)


def test_a_part_has_no_more_bytes_than_a_worker_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row, "rest": "x" * 20_000} for row in records(60)]
    path = write(tmp_path / "x.jsonl", rows)
    _, wanted = prepare([path], tmp_path / "one")
    monkeypatch.setattr("tinyvlm.data.records.MAX_PART_BYTES", 100_000)
    _, found = prepare([path], tmp_path / "two")
    assert found == wanted
    parts = [pq.read_table(part) for part in sorted((tmp_path / "two").glob("records-*/data/*.parquet"))]
    assert all(part.num_rows <= 4 for part in parts)
    assert sum(part.num_rows for part in parts) == 60


def test_evaluation_pictures_are_kept_out(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.jpg").write_bytes(jpeg(1))
    with Image.open(io.BytesIO(jpeg(2))) as image:
        image.resize((100, 80)).save(tmp_path / "test" / "b.png")
    rows = records(3)
    config = PrepareConfig(name="asked", count_tokens=False, evaluation=(str(tmp_path / "test"),))
    _, found = prepare([write(tmp_path / "x.json", rows)], tmp_path / "out", config)
    assert [row["status"] for row in found] == ["ok", "contaminated.same", "contaminated.similar"]
    assert found[1]["images"][0]["bytes"] is None


def test_the_held_out_split_goes_by_picture(tmp_path: Path) -> None:
    rows = [
        {"question": f"{n}?", "answer": f"{n}", "image": base64.b64encode(jpeg(n % 40)).decode()} for n in range(200)
    ]
    config = PrepareConfig(name="asked", count_tokens=False, validation_share=0.3)
    _, found = prepare([write(tmp_path / "x.json", rows)], tmp_path / "one", config)
    _, again = prepare([write(tmp_path / "y.jsonl", rows[::-1])], tmp_path / "two", config)
    sides: dict[str, set[str]] = {}
    for row in [*found, *again]:
        sides.setdefault(row["images"][0]["sha256"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert 4 <= sum(side == {"validation"} for side in sides.values()) <= 20


def test_splits_and_what_was_set_aside_have_row_groups_of_their_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": f"{n}?", "answer": f"{n}"} for n in range(60)]
    rows.append({"question": "", "answer": "nothing asked"})
    config = PrepareConfig(name="asked", count_tokens=False, validation_share=0.5)
    folder, _ = prepare([write(tmp_path / "x.jsonl", rows)], tmp_path / "out", config)
    (path,) = folder.glob("data/*.parquet")
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(number) for number in range(file.metadata.num_row_groups)]
    kinds = [{(row["status"] == "ok", row["split"]) for row in group.to_pylist()} for group in groups]
    assert kinds == [{(True, "train")}, {(True, "validation")}, {(False, "train")}]
