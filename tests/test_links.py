"""Lists of links: the demo's own, and reading anybody's."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tinyvlm import schema
from tinyvlm.data.download import Download, DownloadConfig
from tinyvlm.data.links import LinksConfig, find_files, open_links
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.folders import Manifest, read_rows
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun
from tinyvlm.toy import web_server
from tinyvlm.toy.links import DEAD, KINDS, LIVE, find_pictures, write_links
from tinyvlm.upkeep import verify

CONFIG = LinksConfig(url_column="link", caption_column="text", meta_columns=("size",), rows_per_part=4)
ROWS: list[dict[str, Any]] = [{"link": f"http://a/{n}", "text": f"line one\nof {n}", "size": n * n} for n in range(10)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for split, number in (("train", 800), ("test", 200)):
        (folder / split).mkdir()
        Image.new("RGB", (8, 8), "red").save(folder / split / "0.png")
        for image_id in range(1, number):
            (folder / split / f"{image_id}.png").hardlink_to(folder / split / "0.png")
    return folder


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".parquet":
        # Shuffled columns and some that nobody asked for, in row groups that fit no part.
        table = pa.Table.from_pylist([{"other": 1.5, **row} for row in rows])
        pq.write_table(table, path, row_group_size=3)
    elif path.suffix == ".csv":
        quoted = "".join(f'"{row["text"]}",{row["size"]},x,{row["link"]}\n' for row in rows)
        path.write_text("text,size,other,link\n" + quoted)
    else:
        path.write_text("".join(json.dumps({"other": None, **row}) + "\n" for row in rows))
    return path


def test_a_caption_that_is_not_a_number_is_none(tmp_path: Path) -> None:
    """As pandas writes a column of captions that are all missing, or are numbers."""
    table = pa.table({"link": ["http://a/1", "http://a/2"], "text": [float("nan"), 7.0], "size": [1, 2]})
    pq.write_table(table, tmp_path / "links.parquet")
    assert rows_of(tmp_path / "links.parquet", CONFIG, tmp_path / "out")["caption"].to_pylist() == [None, "7"]


def rows_of(path: Path, config: LinksConfig, root: Path) -> pa.Table:
    source = open_links(path, config, root)
    rows = pa.concat_tables([read_rows(part.path, part.offset, part.num_rows) for part in source.parts])
    return rows.sort_by("key")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    source = open_links(write(tmp_path / f"links{suffix}"), CONFIG, tmp_path / "out")
    assert [part.num_rows for part in source.parts] == [4, 4, 2]
    rows = rows_of(tmp_path / f"links{suffix}", CONFIG, tmp_path / "out")
    assert rows.schema.equals(schema.LINKS)
    assert rows.to_pylist() == [
        {"key": n, "url": row["link"], "caption": row["text"], "meta": json.dumps({"size": row["size"]})}
        for n, row in enumerate(ROWS)
    ]


def test_a_folder_of_files_is_one_list(tmp_path: Path) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    write(folder / "b.csv", ROWS[3:])
    write(folder / "a.parquet", ROWS[:3])
    (folder / "_SUCCESS").touch()
    rows = rows_of(folder, CONFIG, tmp_path / "out").to_pylist()
    assert [row["key"] for row in rows] == list(range(10))
    assert [row["url"] for row in rows] == [row["link"] for row in ROWS]


def test_limit_and_keys_of_the_list(tmp_path: Path) -> None:
    path = write(tmp_path / "links.parquet")
    limited = LinksConfig(url_column="link", caption_column="text", key_column="size", limit=5, rows_per_part=3)
    rows = rows_of(path, limited, tmp_path)
    assert rows["key"].to_pylist() == [0, 1, 4, 9, 16]
    assert rows["meta"].to_pylist() == ["{}"] * 5
    assert [part.num_rows for part in open_links(path, limited, tmp_path).parts] == [3, 2]


def test_the_folder_is_made_once_and_known_to_other_stages(tmp_path: Path) -> None:
    path = write(tmp_path / "links.parquet")
    first = open_links(path, CONFIG, tmp_path / "out")
    folder = Path(first.folders["links"])
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert open_links(path, CONFIG, tmp_path / "out") == first
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert verify(folder) == []
    assert Manifest.read(folder).rows_out == 10
    download = Download(DownloadConfig(), PictureConfig(), LimitConfig())
    assert open_input(download, [tmp_path / "out"]) == first
    write(path, [*ROWS[:9], {**ROWS[9], "link": "http://b/9"}])
    second = open_links(path, CONFIG, tmp_path / "out")
    assert second.fingerprint != first.fingerprint
    one, two = (StageRun(download, source, tmp_path / "out").folder for source in (first, second))
    assert one != two


def test_an_unfinished_folder_is_made_again(tmp_path: Path) -> None:
    path = write(tmp_path / "links.parquet")
    folder = Path(open_links(path, CONFIG, tmp_path / "out").folders["links"])
    (folder / "manifest.json").unlink()
    (folder / "data" / "part-00001.parquet").write_bytes(b"half")
    assert rows_of(path, CONFIG, tmp_path / "out").num_rows == 10
    assert verify(folder) == []


def test_bad_lists_are_named_in_one_sentence(tmp_path: Path) -> None:
    def refused(path: Path, config: LinksConfig = CONFIG) -> str:
        with pytest.raises(DataError) as caught:
            open_links(path, config, tmp_path / "out")
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = write(tmp_path / "links.parquet")
    assert "'image_url'" in refused(path, LinksConfig())
    assert "other, link, text, size" in refused(path, LinksConfig())
    assert "no list of links" in refused(tmp_path / "absent.parquet")
    (tmp_path / "links.txt").write_text("http://a/1")
    assert "links.txt" in refused(tmp_path / "links.txt")
    (tmp_path / "empty").mkdir()
    assert "has none" in refused(tmp_path / "empty")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    assert "bad.parquet" in refused(tmp_path / "bad.parquet")
    (tmp_path / "bad.csv").write_text("text,size,link\na,1,b\nc\n")
    assert "bad.csv" in refused(tmp_path / "bad.csv")
    (tmp_path / "nothing.csv").write_text("")
    assert "nothing.csv" in refused(tmp_path / "nothing.csv")
    (tmp_path / "header.csv").write_text("text,size,link\n")
    assert "has no rows" in refused(tmp_path / "header.csv")
    keyed = LinksConfig(url_column="link", caption_column="text", key_column="size", rows_per_part=4)
    assert "more than once" in refused(write(tmp_path / "twice.csv", [*ROWS, ROWS[2]]), keyed)
    textual = LinksConfig(url_column="link", caption_column="text", key_column="text")
    assert "whole numbers" in refused(path, textual)


def test_looking_at_a_list_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "links.parquet")
    assert find_files(path, CONFIG) == [path]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="rows_per_part"):
        LinksConfig(rows_per_part=0)


def test_the_toy_list_has_each_picture_once_and_a_third_of_trouble(pictures: Path, tmp_path: Path) -> None:
    counts = write_links(tmp_path / "links.parquet", "http://127.0.0.1:9", folder=pictures)
    rows = pq.read_table(tmp_path / "links.parquet").to_pylist()
    assert sum(counts.values()) == len(rows)
    assert [row["key"] for row in rows] == list(range(len(rows)))
    live = [(row["split"], row["image_id"]) for row in rows if row["kind"] in LIVE]
    assert sorted(live) == sorted((split, i) for split, by_id in find_pictures(pictures).items() for i in by_id)
    assert len({row["image_url"] for row in rows}) == len(rows)
    assert sum(counts[kind] for kind in DEAD) / len(rows) == pytest.approx(1 / 3, abs=0.005)
    assert counts["placeholder"] / len(rows) == pytest.approx(0.03, abs=0.005)
    assert (counts["not_found"] + counts["gone"]) / len(rows) == pytest.approx(0.12, abs=0.005)
    assert {row["split"] for row in rows if row["kind"] not in LIVE} == {None}
    places = [row["key"] for row in rows if row["kind"] in DEAD]
    assert sum(places) / len(places) == pytest.approx(len(rows) / 2, rel=0.1)
    assert all(kind.status in schema.STATUSES for kind in KINDS.values())


def test_the_toy_list_depends_on_the_seed_alone(pictures: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_links(tmp_path / f"{name}.parquet", "http://127.0.0.1:9", seed=seed, num_pictures=50, folder=pictures)
    a, b, c = (pq.read_table(tmp_path / f"{name}.parquet") for name in "abc")
    assert a.equals(b)
    assert not a.equals(c)
    assert set(a["kind"].to_pylist()) == set(KINDS)
    assert sum(kind in LIVE for kind in a["kind"].to_pylist()) == 50
    assert a["split"].to_pylist().count("test") == 10


def test_placeholder_designs_are_distinct_and_repeatable() -> None:
    drawn = {
        (design, size): web_server.placeholder_bytes(design, size)
        for design in range(len(web_server.DESIGNS))
        for size in web_server.SIZES
    }
    assert len(set(drawn.values())) == len(drawn) == 40
    web_server.placeholder_bytes.cache_clear()
    chosen = random.Random(0).choice(list(drawn))
    assert web_server.placeholder_bytes(*chosen) == drawn[chosen]


def test_a_port_in_use_ends_in_a_sentence(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as caught:
            web_server.main(["--port", port, "--folder", str(pictures)])
    assert caught.value.code == 2
    assert port in capsys.readouterr().err


def test_a_folder_without_pictures_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        web_server.main(["--folder", str(tmp_path)])
    assert caught.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err
