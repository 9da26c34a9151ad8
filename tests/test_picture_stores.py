"""Pictures in an object store are found and read as on a disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from prepared import photo, prepared
from test_source_folder import CONFIG, as_files, as_metadata, as_parquet, as_tar

from tinyvlm.data.pictures import PicturesConfig, open_pictures, stores
from tinyvlm.data.pictures.bodies import read_bodies
from tinyvlm.data.prepare import PrepareConfig
from tinyvlm.errors import DataError
from tinyvlm.folders import read_rows
from tinyvlm.storage import address


def put(folder: Path, place: Path) -> Path:
    """Copy a folder's files into a bucket."""
    for file in folder.rglob("*"):
        if file.is_file():
            (place / str(file.relative_to(folder))).write_bytes(file.read_bytes())
    return place


def told(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["key"], row["status"], row["messages"], row["images"], row["split"]) for row in rows]


@pytest.mark.parametrize("way", [as_files, as_metadata, as_parquet])
def test_a_prefix_says_what_the_folder_says(tmp_path: Path, bucket: Path, way: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(stores, "_AT_ONCE", 2)
    folder = way(tmp_path / "mine")
    deep = folder / "b c" / "d"
    deep.mkdir(parents=True)
    (folder / ".hidden").mkdir()
    if way is not as_parquet:
        (deep / "ü 1.PNG").write_bytes(photo(4, "PNG"))
        (deep / "ü 1.TXT").write_text("deep")
        (folder / ".hidden" / "x.jpg").write_bytes(photo(5))
        (folder / "no words.jpg").write_bytes(photo(6))
        (folder / "torn.jpg").write_bytes(photo(7)[:100])
        (folder / "torn.txt").write_text("torn")
    here = prepared([folder], tmp_path / "one", CONFIG)
    there = prepared([put(folder, bucket / "mine")], tmp_path / "two", CONFIG)
    assert told(there) == told(here)
    assert len(there) == (3 if way is as_parquet else 6)


def test_evaluation_pictures_may_lie_in_a_store(tmp_path: Path, bucket: Path) -> None:
    (bucket / "test" / "x.jpg").write_bytes(photo(1))
    config = PrepareConfig(source="folder", count_tokens=False, evaluation=(str(bucket / "test"),))
    rows = prepared([as_files(tmp_path / "mine")], tmp_path / "out", config)
    assert [row["status"] for row in rows] == ["ok", "contaminated.same", "ok"]


def test_a_picture_that_is_gone_or_other_costs_its_row(tmp_path: Path, bucket: Path) -> None:
    place = put(as_files(tmp_path / "mine"), bucket / "mine")
    source = open_pictures([str(place)], PicturesConfig(), tmp_path / "out")
    (part,) = source.parts
    rows = read_rows(part.path, part.offset, part.num_rows)
    (place / "0.jpg").unlink()
    (place / "1.jpg").write_bytes(b"other")
    bodies = list(read_bodies(rows, 1_000_000))
    assert [body.status for body in bodies] == ["unreadable", "unreadable", "ok"]
    assert bodies[2].data == photo(2)
    assert next(iter(read_bodies(rows.slice(2), 10))).status == "too_large"


def test_a_folder_that_has_changed_is_listed_anew(tmp_path: Path, bucket: Path) -> None:
    place = put(as_files(tmp_path / "mine"), bucket / "mine")
    listed = [open_pictures([str(place)], PicturesConfig(), tmp_path / "out").fingerprint for _ in range(2)]
    (place / "0.txt").write_bytes(b"a RED bus")  # as long as before
    listed.append(open_pictures([str(place)], PicturesConfig(), tmp_path / "out").fingerprint)
    assert listed[0] == listed[1] != listed[2]


def test_what_cannot_be_read_there_is_told(tmp_path: Path, bucket: Path) -> None:
    put(as_tar(tmp_path / "tars").parent, bucket / "tars")
    for place in (bucket / "tars", bucket / "tars" / "00000.tar"):
        with pytest.raises(DataError, match="tars want to lie on a disk"):
            prepared([place], tmp_path / "out", CONFIG)
    with pytest.raises(DataError, match=r"There are no pictures under .*it is empty"):
        prepared([bucket / "nothing"], tmp_path / "out", CONFIG)
    with pytest.raises(DataError, match="There are no pictures under"):
        prepared([address(f"s3://no-such-bucket-{os.getpid()}/x/")], tmp_path / "out", CONFIG)
    place = put(as_files(tmp_path / "mine"), bucket / "mine")
    with pytest.raises(DataError, match="lies inside the folder of pictures"):
        open_pictures([str(place)], PicturesConfig(), place / "out")
