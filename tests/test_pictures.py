"""Pictures that are already there: wherever they lie, the same rows come out; what is damaged is told."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs import _cli
from ray_jobs import preprocess as job
from tinyvlm import images, schema
from tinyvlm.data.pictures import PicturesConfig, open_pictures, stage_given
from tinyvlm.data.pictures.tars import members
from tinyvlm.data.preprocess import Preprocess, PreprocessConfig
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.folders import Manifest, scan
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.upkeep import verify

PICTURE = PictureConfig(size=32, tower_size=24)
LIMITS = LimitConfig(max_bytes=100_000, max_pixels=20_000)
SIZES = [(40, 40), (100, 60), (100, 59), (30, 90), (9, 200), (64, 64), (50, 70)]


def png(width: int, height: int) -> bytes:
    rng = np.random.default_rng(width * 1000 + height)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


BODIES = [png(*size) for size in SIZES]
CAPTIONS = [f"a picture of {width} by {height}" for width, height in SIZES]


def write_folder(root: Path) -> Path:
    for index, (body, caption) in enumerate(zip(BODIES, CAPTIONS, strict=True)):
        folder = root / f"{index // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(body)
        (folder / f"{index}.txt").write_text(f"{caption}\n")
    return root


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def samples(first: int = 0, last: int | None = None) -> list[tuple[str, bytes]]:
    """Members of a WebDataset tar."""
    rows = list(enumerate(zip(BODIES, CAPTIONS, strict=True)))[first:last]
    return [(f"{n:05d}{s}", b) for n, (body, text) in rows for s, b in ((".png", body), (".txt", text.encode()))]


def write_table(path: Path, **columns: Any) -> Path:
    columns = columns or {
        "image": [{"bytes": body, "path": f"{index}.png"} for index, body in enumerate(BODIES)],
        "text": CAPTIONS,
        "size": [list(size) for size in SIZES],
    }
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def stage(picture: PictureConfig = PICTURE) -> Preprocess:
    return Preprocess(PreprocessConfig(picture=picture, limits=LIMITS))


def listed(root: Path, *places: object, **options: Any) -> list[dict[str, Any]]:
    source = open_pictures([str(place) for place in places], PicturesConfig(**options), root)
    rows: list[dict[str, Any]] = pa.concat_tables(
        scan(Path(source.folders["pictures"]), schema.PICTURES.names)
    ).to_pylist()
    return rows


def prepared(root: Path, *places: object, **options: Any) -> StageRun:
    return StageRun(stage(), open_pictures([str(place) for place in places], PicturesConfig(**options), root), root)


def rows_of(run: StageRun) -> list[dict[str, Any]]:
    run_local(run)
    rows: list[dict[str, Any]] = pa.concat_tables(scan(run.folder, schema.PREPROCESSED.names)).to_pylist()
    return rows


def left_out(root: Path) -> dict[str, int]:
    (path,) = root.glob("pictures-*/stats.json")
    found: dict[str, int] = json.loads(path.read_text())["left_out"]
    return found


def refused(root: Path, *places: object, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        listed(root, *places, **options)
    assert "\n" not in str(caught.value)
    assert not list(root.glob("*pictures-*"))
    return str(caught.value)


def write_shards(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    return [write_tar(root / f"shard-{n:02d}.tar", samples(3 * n, 3 * n + 3)) for n in range(3)][-1]


PLACES: dict[str, Callable[[Path], list[object]]] = {
    "folder": lambda root: [write_folder(root / "photos")],
    "tar": lambda root: [write_tar(root / "all.tar", samples())],
    "tars": lambda root: [write_shards(root).parent / "shard-{00..02}.tar"],
    "folder of tars": lambda root: [write_shards(root / "nested").parent],
    "table": lambda root: [write_table(root / "train-00000.parquet")],
    "bytes": lambda root: [write_table(root / "00000.parquet", jpg=BODIES, caption=CAPTIONS)],
    "several": lambda root: [
        write_tar(root / "first.tar", samples(0, 4)),
        write_table(root / "rest.parquet", jpg=BODIES[4:], caption=CAPTIONS[4:]),
    ],
}


@pytest.mark.parametrize("kind", PLACES)
def test_every_kind_of_place_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = rows_of(prepared(tmp_path / "out", *PLACES[kind](tmp_path), rows_per_part=2))
    assert [row["key"] for row in rows] == list(range(7))
    assert len({row["url"] for row in rows}) == 7
    for row, body, caption, size in zip(rows, BODIES, CAPTIONS, SIZES, strict=True):
        finished = images.finish(body, PICTURE, LIMITS)
        assert (row["status"], row["caption"], row["fit"]) == ("ok", caption, finished.fit)
        assert (row["original_width"], row["original_height"]) == size
        assert row["image"] == finished.jpeg
        assert row["phash"] == finished.phash
        assert row["final_url"] == row["url"]
        assert row["url"].startswith("file:///")


def test_any_cut_into_parts_and_any_order_of_work_gives_the_same_rows(tmp_path: Path) -> None:
    place = write_tar(tmp_path / "all.tar", samples())
    whole = rows_of(prepared(tmp_path / "whole", place))
    for rows_per_part in (1, 3, 100):
        run = prepared(tmp_path / f"{rows_per_part}", place, rows_per_part=rows_per_part)
        run.carry_out(lambda parts, lease, run=run: [run.for_worker(1).work(part, lease) for part in reversed(parts)])
        assert rows_of(run) == whole


def test_a_killed_run_continues_and_a_finished_one_does_nothing(tmp_path: Path) -> None:
    place, root = write_folder(tmp_path / "photos"), tmp_path / "out"
    run = prepared(root, place, rows_per_part=2)
    run.work(run.source.parts[1])
    (run.folder / "data" / ".part-00000.parquet.dead.tmp").write_bytes(b"half")
    again = prepared(root, place, rows_per_part=2)
    assert [part.index for part in again.todo()[0]] == [0, 2, 3]
    rows = rows_of(again)
    assert rows == rows_of(prepared(tmp_path / "other", place, rows_per_part=2))
    assert verify(again.folder) == []
    before = {path: path.stat().st_mtime_ns for path in root.rglob("part-*")}
    assert prepared(root, place, rows_per_part=2).is_finished
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("part-*")}


def test_the_listing_is_a_stage_folder_made_once(tmp_path: Path) -> None:
    place, root = write_folder(tmp_path / "photos"), tmp_path / "out"
    first = open_pictures([str(place)], PicturesConfig(), root)
    folder = Path(first.folders["pictures"])
    assert open_pictures([str(place)], PicturesConfig(), root) == first
    assert open_input(stage().reading("pictures"), [root]) == first
    assert verify(folder) == []
    assert Manifest.read(folder).statuses == {"ok": 7}
    assert not any("image" in name for name in schema.PICTURES.names)
    assert stage_given([root]) == stage_given([folder]) == "pictures"
    (place / "0" / "1.txt").write_text("another caption")
    assert open_pictures([str(place)], PicturesConfig(), root).fingerprint != first.fingerprint


def test_bad_files_are_rows(tmp_path: Path) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    bodies = {
        "a_good.png": png(40, 40),
        "b_half.png": png(40, 40)[:200],
        "c_page.jpg": b"<html>",
        "d_empty.jpg": b"",
        "e_bomb.png": png(160, 150),
        "f_dot.png": png(2, 2),
        "g_large.png": bytes(100_001),
        "h_gone.png": png(40, 40),
        "i_changed.png": png(40, 40),
    }
    for name, body in bodies.items():
        (place / name).write_bytes(body)
    run = prepared(tmp_path / "out", place)
    (place / "h_gone.png").unlink()
    (place / "i_changed.png").write_bytes(png(30, 30))
    rows = rows_of(run)
    assert [row["status"] for row in rows] == [
        *("ok", "corrupt", "not_image", "not_image", "bomb", "too_small", "too_large", "unreadable", "unreadable")
    ]
    assert all(row["detail"] for row in rows[1:])
    assert [row["image"] is None for row in rows] == [False] + [True] * 8
    assert {row["status"] for row in rows} <= set(schema.STATUSES)


def test_pixels_follow_the_picture_rules(tmp_path: Path) -> None:
    """EXIF is applied, thin pictures keep at least a line, and the threshold itself is cropped."""
    place = tmp_path / "photos"
    place.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    turned = np.zeros((20, 60, 3), np.uint8)
    turned[:, :30] = 255
    Image.fromarray(turned).save(place / "a.jpg", exif=exif)
    Image.new("RGB", (4000, 4), "white").save(place / "b.png")
    Image.new("RGB", (4, 4000), "white").save(place / "c.png")
    Image.new("RGB", (60, 100), "white").save(place / "d.png")
    Image.new("RGB", (59, 100), "white").save(place / "e.png")
    rows = rows_of(prepared(tmp_path / "out", place))
    assert [row["fit"] for row in rows] == ["pad", "pad", "pad", "crop", "pad"]
    assert (rows[0]["original_width"], rows[0]["original_height"]) == (20, 60)
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"])).convert("L")).astype(int) for row in rows]
    assert all(square.shape == (32, 32) for square in pixels)
    assert pixels[0][4, 16] > 200  # white lies above after the turn
    assert pixels[0][28, 16] < 50
    assert pixels[1][15:17].mean() > 20  # one line of white in the middle …
    assert pixels[1][:12].max() < 60  # … and black around it
    assert np.abs(pixels[1].T - pixels[2]).mean() < 5
    assert pixels[3].min() > 240
    assert pixels[4][:, 0].max() < 60 < 200 < pixels[4][:, 16].min()


def test_which_files_of_a_folder_count(tmp_path: Path) -> None:
    place, outside = tmp_path / "photos", tmp_path / "secret"
    for folder in (place / "Deep" / "er", place / "__MACOSX", place / ".git", outside):
        folder.mkdir(parents=True)
    body = png(40, 40)
    wanted = [b"UPPER.JPG", b"Deep/er/a.jPeG", b"caf\xe9.png", b"with space & #%.png", "日本.webp".encode()]
    for name in wanted:
        Path(os.fsdecode(os.path.join(os.fsencode(place), name))).write_bytes(body)
    for name in (".hidden.png", "__MACOSX/x.png", ".git/x.png", "notes.pdf", "noname", "photo.heic"):
        (place / name).write_bytes(body)
    (outside / "key.png").write_bytes(body)
    (place / "escape.png").symlink_to(outside / "key.png")
    (place / "nowhere.png").symlink_to(place / "absent.png")
    (place / "inside.png").symlink_to(place / "UPPER.JPG")
    (place / "circle").symlink_to(place)
    (place / "secret").symlink_to(outside)
    os.mkfifo(place / "pipe.png")
    rows = rows_of(prepared(tmp_path / "out", place))
    names = [
        *("Deep/er/a.jPeG", "UPPER.JPG", "caf%E9.png", "inside.png"),
        *("with%20space%20%26%20%23%25.png", "%E6%97%A5%E6%9C%AC.webp"),
    ]
    assert [row["url"] for row in rows] == [f"file://{place}/{name}" for name in names]
    assert {row["status"] for row in rows} == {"ok"}
    assert left_out(tmp_path / "out") == {
        "hidden": 3,
        "links that lead out of the folder, or nowhere": 3,
        "links to folders": 1,
        "pipes, sockets, devices": 1,
        ".pdf": 1,
        ".heic": 1,
        "no suffix": 1,
    }


def test_words_beside_pictures(tmp_path: Path) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    for name in "abcdefg":
        (place / f"{name}.png").write_bytes(BODIES[0])
    (place / "a.txt").write_text("  text first \n")
    (place / "a.json").write_text('{"caption": "not this", "n": 1}')
    (place / "b.json").write_text('{"text": "from json", "size": [1, 2]}')
    (place / "c.TXT").write_bytes(b"caf\xe9")
    (place / "d.json").write_text("{no json")
    (place / "e.caption").write_text("\ufeffwith a mark")
    (place / "f.json").write_text('{"caption": ["one", "two \\ud800"]}')
    (place / "g.txt").symlink_to("/etc/hostname")
    rows = listed(tmp_path / "out", place)
    assert [row["caption"] for row in rows] == [
        *("text first", "from json", "caf\N{REPLACEMENT CHARACTER}", None, "with a mark", "one", None)
    ]
    assert json.loads(rows[0]["meta"]) == {"n": 1}
    assert json.loads(rows[1]["meta"]) == {"size": [1, 2]}
    assert json.loads(rows[5]["meta"]) == {"caption": ["one", "two ?"]}
    own = listed(tmp_path / "own", place, caption_column="size")
    assert own[1]["caption"] is None


def test_metadata_of_an_image_folder(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "photos")
    with (place / "metadata.csv").open("w", newline="") as file:
        rows = [["file_name", "text", "n"], ["0/0.png", "line one\nline two", 7], ["2/6.png", "six", 8]]
        csv.writer(file).writerows([*rows, ["../secret.png", "x", 9], ["absent.png", "y", 10]])
    (place / "1" / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "three"}\n\n')
    found = listed(tmp_path / "out", place)
    assert [row["caption"] for row in found] == ["line one\nline two", *CAPTIONS[1:3], "three", *CAPTIONS[4:6], "six"]
    assert json.loads(found[0]["meta"]) == {"n": "7"}
    assert left_out(tmp_path / "out") == {"names in metadata without a picture": 2}
    (place / "metadata.csv").write_text("name,text\n0.png,a\n")
    assert "'file_name'" in refused(tmp_path / "bad", place)
    (place / "metadata.csv").unlink()
    (place / "1" / "metadata.jsonl").write_text("{half")
    assert "metadata.jsonl cannot be read" in refused(tmp_path / "bad", place)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, form: int) -> None:
    rng = np.random.default_rng(form)
    names = [f"d{n % 3}/{n}.png" for n in range(40)] + ["a/" * 40 + "deep.png", "ä/ö.png", "caf\udce9.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long" * 60 + ".png", "l/" * 300 + "x.png"]
    path = write_tar(tmp_path / "a.tar", [(name, rng.bytes(int(rng.integers(0, 2000)))) for name in names], form)
    with tarfile.open(path, errors="surrogateescape") as archive:
        known = [(os.fsencode(info.name), info.offset_data, info.size) for info in archive]
    counted: Counter[str] = Counter()
    with path.open("rb") as file:
        assert [(m.name, m.offset, m.length) for m in members(file, path.stat().st_size, counted)] == known
    assert not counted


def test_which_members_of_a_tar_count(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:

        def add(name: str, body: bytes = b"", **fields: Any) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(body))

        add("dir", type=tarfile.DIRTYPE)
        add("../../etc/evil.PNG", BODIES[0])
        add("/absolute.png", BODIES[1])
        add("./s1.left.png", BODIES[2])
        add("./s1.right.png", BODIES[3])
        add("./s1.json", b'{"caption": "both", "n": 1}')
        add("./s1.right.txt", b"the right one")
        add("./s1.cls", b"7")
        add("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.png", type=tarfile.LNKTYPE, linkname="s1.left.png")
        add("device.png", type=tarfile.CHRTYPE)
        add("pipe.png", type=tarfile.FIFOTYPE)
        add("._s1.png", b"mac")
        add("__MACOSX/s1.png", b"mac")
        add("alone.txt", b"whose?")
    rows = rows_of(prepared(tmp_path / "out", path))
    assert [row["url"].partition("#")[2] for row in rows] == [
        *("../../etc/evil.PNG", "/absolute.png", "./s1.left.png", "./s1.right.png")
    ]
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert [row["caption"] for row in rows] == [None, None, "both", "the right one"]
    assert not (tmp_path.parent / "etc").exists()
    assert left_out(tmp_path / "out") == {
        "links, devices, sparse files": 4,
        "hidden": 2,
        ".cls": 1,
        "texts that stand apart from their picture": 1,
    }


def test_torn_tars_give_what_is_whole_and_a_row_that_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples())
    data = whole.read_bytes()
    with tarfile.open(whole) as archive:
        third = archive.getmembers()[4]
    damaged = bytearray(data)
    damaged[third.offset + 5] ^= 255
    tears = {
        "in_picture": (data[: third.offset_data + 100], "00002.png"),
        "in_header": (data[: third.offset + 100], "end mark"),
        "at_border": (data[: third.offset], "end mark"),
        "bad_header": (bytes(damaged), f"byte {third.offset}"),
    }
    for name, (content, said) in tears.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        rows = rows_of(prepared(tmp_path / name, path))
        assert [row["status"] for row in rows] == ["ok", "ok", "corrupt"], name
        assert [row["caption"] for row in rows] == [*CAPTIONS[:2], None]
        assert said in rows[2]["detail"]
        assert rows[2]["url"] == f"file://{path}"
        (stats,) = (tmp_path / name).glob("pictures-*/stats.json")
        assert json.loads(stats.read_text())["damaged"] == [f"{path}: {rows[2]['detail']}"]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 4
    (tmp_path / "junk.tar").write_bytes(b"<html>" * 500)
    assert [row["status"] for row in listed(tmp_path / "both", whole, tmp_path / "junk.tar")] == ["ok"] * 7 + [
        "corrupt"
    ]


def test_tars_behind_each_other_and_a_member_too_large_to_read(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{n}.tar", samples(n, n + 1)).read_bytes() for n in range(2)]
    (tmp_path / "cat.tar").write_bytes(b"".join(parts))
    assert [row["caption"] for row in listed(tmp_path / "cat", tmp_path / "cat.tar")] == CAPTIONS[:2]
    info = tarfile.TarInfo("huge.png")
    info.size = 20 << 30
    with (tmp_path / "huge.tar").open("wb") as file:  # a sparse file: it takes no room
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(info.size + 512)
        file.seek(0, os.SEEK_END)
        file.write(parts[0])
    assert [row["status"] for row in rows_of(prepared(tmp_path / "huge", tmp_path / "huge.tar"))] == ["too_large", "ok"]


def test_a_container_that_changes_after_listing_stops_the_run(tmp_path: Path) -> None:
    for name, write in (("a.tar", lambda p: write_tar(p, samples())), ("a.parquet", write_table)):
        run = prepared(tmp_path / "out", write(tmp_path / name))
        os.utime(tmp_path / name, ns=(1, 1))
        with pytest.raises(DataError, match="changed since it was listed"):
            run_local(run)
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=r"cannot be opened"):
            run_local(run)


def test_columns_of_a_table(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.parquet")
    rows = listed(tmp_path / "a", path, meta_columns=("size",), limit=5)
    assert [json.loads(row["meta"]) for row in rows] == [{"size": list(size)} for size in SIZES[:5]]
    assert [(row["column"], row["offset"]) for row in rows] == [("image.bytes", n) for n in range(5)]
    other = write_table(tmp_path / "o.parquet", thumb=BODIES, raw=BODIES, words=[[c, "more"] for c in CAPTIONS])
    rows = rows_of(prepared(tmp_path / "b", other, image_column="raw", caption_column="words", rows_per_part=2))
    assert [row["caption"] for row in rows] == CAPTIONS
    nothing = write_table(tmp_path / "n.parquet", image=[None, {"bytes": None, "path": "x"}, {"bytes": BODIES[0]}])
    rows = rows_of(prepared(tmp_path / "c", nothing))
    assert [row["status"] for row in rows] == ["not_image", "not_image", "ok"]
    assert "'alt'" in refused(tmp_path / "d", path, caption_column="alt")
    assert "'image'" in refused(tmp_path / "d", other, image_column="image")
    assert "wants text" in refused(tmp_path / "d", path, caption_column="size")
    assert "wants bytes" in refused(tmp_path / "d", path, image_column="text")
    links = write_table(tmp_path / "l.parquet", image_url=["http://a"], capsfusion=["b"])
    assert "no column of pictures" in refused(tmp_path / "d", links)
    (tmp_path / "half.parquet").write_bytes(path.read_bytes()[:500])
    assert "half.parquet cannot be read" in refused(tmp_path / "d", tmp_path / "half.parquet")


def test_what_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    assert "it is empty" in refused(out, empty)
    (empty / "a.pdf").touch()
    (empty / "link.png").symlink_to(write_tar(tmp_path / "away.tar", samples()))
    assert "1 .pdf, 1 links that lead out" in refused(out, empty)
    assert "nothing at" in refused(out, tmp_path / "absent")
    write_tar(tmp_path / "s-0.tar", samples())
    assert "s-1.tar" in refused(out, tmp_path / "s-{0..1}.tar")
    assert "wants to rise" in refused(out, tmp_path / "s-{9..1}.tar")
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "s-0.tar", "a.png")
    assert "unpack" in refused(out, tmp_path / "z.tar.gz")
    (tmp_path / "z.tar.gz").rename(tmp_path / "z.tar")
    assert "gzip" in refused(out, tmp_path / "z.tar")
    (tmp_path / "void.tar").touch()
    assert "an empty file" in refused(out, tmp_path / "void.tar")
    (tmp_path / "junk.tar").write_bytes(b"<html>" * 500)
    assert "not a tar" in refused(out, tmp_path / "junk.tar")
    write_tar(tmp_path / "words.tar", [("a.txt", b"x")])
    assert "no pictures" in refused(out, tmp_path / "words.tar")
    (tmp_path / "links.csv").touch()
    assert "neither .tar nor .parquet" in refused(out, tmp_path / "links.csv")
    mixed = write_folder(tmp_path / "mixed")
    assert "lies inside" in refused(mixed / "out", mixed)
    write_tar(mixed / "a.tar", samples())
    assert "both 1 tars and 7 picture files" in refused(out, mixed)
    with pytest.raises(ConfigError, match="rows_per_part"):
        PicturesConfig(rows_per_part=0)


def test_the_command_finds_out_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "shard-0.tar", samples(0, 4))
    write_tar(tmp_path / "shard-1.tar", samples(4))

    def plan(*places: str) -> dict[str, Any]:
        inputs = [word for place in places for word in ("--input", place)]
        asked = ["--recipe", "tiny", *inputs, "--output", "out", "--dry-run", "--set", "pictures.rows_per_part=2"]
        job.run(_cli.parse("preprocess", asked))
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["plan"]
        return found

    first = plan("shard-{0..1}.tar")
    assert (first["parts"], first["rows"], first["finished"]) == (4, 7, False)
    assert plan("shard-0.tar", "shard-1.tar")["rows"] == 7
    assert not (tmp_path / "out").exists()
    open_pictures(["shard-0.tar"], PicturesConfig(rows_per_part=2), tmp_path / "out")
    assert plan("out")["rows"] == 4
    (tmp_path / "line" / "latest").mkdir(parents=True)
    (tmp_path / "line" / "latest" / "links.json").write_text("{}")
    with pytest.raises(DataError, match=r"ray_jobs\.download"):
        plan("line")
