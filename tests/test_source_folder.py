"""Pictures with captions beside them, and the link list's captions: one conversation each, or a reason."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from given_folders import preprocess_folder, preprocessed
from prepared import photo, prepared, said
from tiny_model import picture

from tinyvlm import schema
from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_input import open_prepare, reading
from tinyvlm.data.sources import CAPTION_PROMPTS
from tinyvlm.data.sources.captions import Captions
from tinyvlm.data.sources.folder import Folder
from tinyvlm.errors import DataError
from tinyvlm.images import PictureConfig, to_jpeg
from tinyvlm.stage_run import StageRun, run_local

CONFIG = PrepareConfig(source="folder", count_tokens=False, validation_share=0)
CAPTIONS = ["a red bus", "Zwei Katzen", "a dog"]


def answers(rows: list[dict[str, Any]]) -> list[str]:
    told = []
    for row in rows:
        assert (row["status"], row["family"], row["split"]) == ("ok", "caption", "train"), row["detail"]
        (asker, (shown, prompt)), (answerer, (caption,)) = said(row)
        assert (asker, shown, answerer) == ("user", 0, "assistant")
        assert prompt in CAPTION_PROMPTS
        told.append(str(caption))
    return told


def as_files(place: Path) -> Path:
    place.mkdir()
    for n, caption in enumerate(CAPTIONS):
        (place / f"{n}.jpg").write_bytes(photo(n))
        if n < 2:
            (place / f"{n}{('.txt', '.caption')[n]}").write_text(caption)
        else:
            (place / f"{n}.json").write_text(json.dumps({"caption": caption, "by": "me"}))
    return place


def as_metadata(place: Path) -> Path:
    place.mkdir()
    for n in range(3):
        (place / f"{n}.jpg").write_bytes(photo(n))
    lines = [json.dumps({"file_name": f"{n}.jpg", "text": caption}) for n, caption in enumerate(CAPTIONS)]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


def as_tar(place: Path) -> Path:
    place.mkdir()
    with tarfile.open(place / "00000.tar", "w") as tar:
        for n, caption in enumerate(CAPTIONS):
            for name, data in ((f"{n}.jpg", photo(n)), (f"{n}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return place / "00000.tar"


def as_parquet(place: Path) -> Path:
    place.mkdir()
    rows = [{"image": {"bytes": photo(n), "path": None}, "caption": text} for n, text in enumerate(CAPTIONS)]
    pq.write_table(pa.Table.from_pylist(rows), place / "a.parquet")
    return place


def test_every_kind_of_place_says_the_same(tmp_path: Path) -> None:
    made = [way(tmp_path / way.__name__) for way in (as_files, as_metadata, as_tar, as_parquet)]
    told = [prepared([place], tmp_path / "out" / str(n), CONFIG) for n, place in enumerate(made)]
    for rows in told:
        assert answers(rows) == CAPTIONS
        assert [(row["images"], row["messages"]) for row in rows] == [(r["images"], r["messages"]) for r in told[0]]
    assert len({row["images"][0]["sha256"] for row in told[0]}) == 3


def test_what_has_no_caption_or_no_picture_is_a_row_with_its_reason(tmp_path: Path) -> None:
    place = as_files(tmp_path / "mine")
    (place / "3.jpg").write_bytes(photo(3))
    (place / "4.jpg").write_bytes(b"no picture")
    (place / "4.txt").write_text("nothing")
    (place / "5.jpg").write_bytes(photo(5)[:200])
    (place / "5.txt").write_text("torn")
    (place / "6.jpg").write_bytes(photo(6))
    (place / "6.txt").write_text(" \n")
    (place / "7.jpg").write_bytes(b"")
    (place / "7.txt").write_text("empty")
    rows = prepared([place], tmp_path / "out", CONFIG)
    assert answers(rows[:3]) == CAPTIONS
    assert [row["status"] for row in rows[3:]] == ["bad_text", "not_image", "corrupt", "bad_text", "not_image"]
    assert "no caption beside it" in rows[3]["detail"]


def test_a_torn_tar_gives_what_is_whole(tmp_path: Path) -> None:
    whole = as_tar(tmp_path / "tars")
    torn = tmp_path / "torn.tar"
    with tarfile.open(whole) as tar:
        torn.write_bytes(whole.read_bytes()[: tar.getmember("2.jpg").offset_data + 10])
    rows = prepared([torn], tmp_path / "out", CONFIG)
    assert answers(rows[:-1]) == CAPTIONS[:2]
    assert (rows[-1]["status"], "cut off" in rows[-1]["detail"]) == ("corrupt", True)


def test_a_caption_of_another_name_and_a_limit(tmp_path: Path) -> None:
    rows = [{"image": photo(n), "caption": "no", "said": text} for n, text in enumerate(CAPTIONS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from tinyvlm.data.pictures import PicturesConfig

    config = PrepareConfig(source="folder", count_tokens=False, limit=2, validation_share=0)
    stage = Prepare(
        config, picture=PictureConfig(size=32, tower_size=32), pictures=PicturesConfig(caption_column="said")
    )
    root = tmp_path / "out"
    run = StageRun(stage, open_prepare(stage, [tmp_path / "a.parquet"], root), root)
    manifest = run_local(run)
    table = pa.concat_tables([pq.read_table(run.folder / "data" / name) for name in manifest.files])
    assert answers(sorted(table.to_pylist(), key=lambda row: int(row["key"]))) == CAPTIONS[:2]


def test_evaluation_pictures_are_kept_out_here_too(tmp_path: Path) -> None:
    place = as_files(tmp_path / "mine")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.jpg").write_bytes(photo(1))
    config = PrepareConfig(source="folder", count_tokens=False, evaluation=(str(tmp_path / "test"),))
    assert prepared([place], tmp_path / "out", config)[1]["status"] == "contaminated.same"


def test_a_place_without_pictures_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"holds no pictures \(1 \.docx\)"):
        prepared([tmp_path / "mine"], tmp_path / "out", CONFIG)


@pytest.mark.parametrize("reader", [Captions, Folder])
def test_prompts_are_drawn_evenly_by_a_hash_of_the_row(reader: type[Captions]) -> None:
    def prompts(seed: int, keys: range) -> list[str]:
        source = reader(PrepareConfig(seed=seed))
        rows = pa.Table.from_pylist(
            [{"key": key, "status": "ok", "caption": "a bus", "meta": "{}", "image": JPEG} for key in keys],
            schema=schema.encoded(1, 2),
        )
        stage = Prepare(PrepareConfig(seed=seed, count_tokens=False), source)
        return [str(said(row)[0][1][1]) for row in sorted(stage(rows).to_pylist(), key=lambda row: int(row["key"]))]

    drawn = prompts(0, range(10_000))
    counts = Counter(drawn)
    assert set(counts) == set(CAPTION_PROMPTS)
    # χ² over 19 degrees of freedom passes 43.8 once in a thousand draws (the hash's is one draw, always the same).
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 43.8
    assert prompts(0, range(5_000, 5_050)) == drawn[5_000:5_050]
    assert prompts(1, range(50)) != drawn[:50]


JPEG = to_jpeg(picture(1), 90)


def test_captions_of_preprocessed_pictures(tmp_path: Path) -> None:
    """A folder that was not encoded serves as well, and CapsFusion's captions arrive as they are."""
    rows = preprocessed([JPEG + bytes([n]) for n in range(6)]).to_pylist()
    captions = ["The VW T-ROC, with its wheels.", "  spaced  ", "", None, "nan", "two\nlines"]
    table = pa.Table.from_pylist(
        [{**row, "caption": text} for row, text in zip(rows, captions, strict=True)], schema=schema.PREPROCESSED
    )
    root = preprocess_folder(table, tmp_path)
    stage = reading(Prepare(PrepareConfig(count_tokens=False, validation_share=0)), [root])
    run = StageRun(stage, open_prepare(stage, [root], root), root)
    manifest = run_local(run)
    found = pa.concat_tables([pq.read_table(run.folder / "data" / name) for name in manifest.files]).to_pylist()
    found.sort(key=lambda row: int(row["key"]))
    assert [row["status"] for row in found] == ["ok", "ok", "bad_text", "bad_text", "ok", "ok"]
    assert answers([found[0], found[1], found[5]]) == [captions[0], "spaced", "two\nlines"]
    assert found[0]["images"][0]["bytes"] == rows[0]["image"]
