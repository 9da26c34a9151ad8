"""Takedown lists: what they mean, that new runs keep to them, and that nothing is left of it in folders that exist."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from given_folders import given_folder, preprocessed
from PIL import Image
from prepared import photo

from ray_jobs import _cli, download
from tinyvlm import cli, images, schema, storage
from tinyvlm.data.download import Download, DownloadConfig
from tinyvlm.data.fetch import FetchConfig
from tinyvlm.data.links import LinksConfig, open_links
from tinyvlm.data.pictures import PicturesConfig, open_pictures
from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_input import open_prepare
from tinyvlm.data.preprocess import Preprocess, PreprocessConfig
from tinyvlm.errors import DataError
from tinyvlm.folders import Manifest, find_folder, part_paths, scan
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.journal import Journal
from tinyvlm.lease import Lease
from tinyvlm.removal import take_down
from tinyvlm.stage import Stage, open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.takedown import Takedown, link_key, read_list
from tinyvlm.toy.web_server import running
from tinyvlm.upkeep import verify

PICTURE, LIMITS = PictureConfig(size=32, tower_size=32), LimitConfig()
NUM_LINKS = 20


def listed(tmp_path: Path, *lines: str, name: str = "list.txt") -> Takedown:
    path = tmp_path / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return read_list(path)


# --- what a list says


def test_a_list_of_lines(tmp_path: Path) -> None:
    found = listed(
        tmp_path,
        "# asked for on Monday",
        "https://a.test/1.jpg   # by its author",
        "",
        "HTTP://A.test:80/%7Eann/2.jpg?x=1&y=2#part",
        "host:Example.org.",
        "host:*.b.test",
        "AB" * 32,
    )
    assert found.links == {"a.test/1.jpg", "a.test/~ann/2.jpg?x=1&y=2"}
    assert found.hosts == {"example.org", "b.test"}
    assert found.digests == {"ab" * 32}


@pytest.mark.parametrize("name", ["list.csv", "bare.csv", "list.parquet", "hosts.parquet"])
def test_a_list_in_a_table(tmp_path: Path, name: str) -> None:
    path, links = tmp_path / name, ["http://a.test/1,5.jpg", None, "host:b.test"]
    if name == "list.csv":
        path.write_text('# ours\nwho,url,sha256\nann,"http://a.test/1,5.jpg",\nbob,host:b.test,' + "0" * 64 + "\n")
    elif name == "bare.csv":
        path.write_text("http://a.test/1,5.jpg\nhost:b.test\n" + "0" * 64 + "\n")
    elif name == "list.parquet":
        pq.write_table(pa.table({"said": ["x"] * 3, "link": links, "sha256": ["0" * 64, None, ""]}), path)
    else:
        pq.write_table(pa.table({"host": ["b.test", "B.test", None], "url": ["http://a.test/1,5.jpg"] * 3}), path)
    digests = set() if name == "hosts.parquet" else {"0" * 64}
    assert read_list(path) == Takedown(frozenset({"a.test/1,5.jpg"}), frozenset({"b.test"}), frozenset(digests))


@pytest.mark.parametrize(
    "line",
    ["ftp://a.test/1", "a.test/1.jpg", "0" * 63, "host:", "host:http://a.test", "http://a.test/1 http://a.test/2"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"list\.txt, line 3: .*sha256 of 64") as caught:
        listed(tmp_path, "# fine", "http://a.test/fine", line)
    assert line in str(caught.value)


def test_other_bad_lists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names nothing"):
        listed(tmp_path, "# nothing")
    (tmp_path / "wrong.csv").write_text("who,what\nann,http://a.test/1\n")
    with pytest.raises(DataError, match="it has who, what"):
        read_list(tmp_path / "wrong.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_list(tmp_path / "no.txt")
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot be read"):
        read_list(tmp_path / "bad.parquet")


def test_links_are_recognised_however_they_are_written(tmp_path: Path) -> None:
    takedown = listed(
        tmp_path, "https://Bücher.test/ä b.jpg".replace(" ", "%20"), "http://a.test:8080/x?q=1", "host:c.test"
    )
    for link in (
        "http://bücher.test/%C3%A4%20b.jpg",
        "  //xn--bcher-kva.test/./%c3%a4%20b.jpg#top ",
        "http://ann:secret@A.TEST.:8080/x?q=1",
        "https://c.test",
        "https://img.C.test:444/9",
        "http://[::1]/",
    ):
        assert takedown.lists_link(link) == ("::1" not in link), link
    for other in (
        None,
        "",
        "no link",
        "http://a.test/x?q=1",
        "http://a.test:8080/x",
        "http://notc.test/",
        "http://test/",
    ):
        assert not takedown.lists_link(other), other
    assert link_key("http://[::1]:8080/a") == "[::1]:8080/a"
    assert listed(tmp_path, "host:[::1]").lists_link("http://[::1]:8080/a")


def test_a_list_that_is_kept_says_the_same(tmp_path: Path) -> None:
    one = listed(tmp_path, "https://a.test/1,5.jpg?x=%20", "host:b.test", "0" * 64)
    two = listed(tmp_path, "https://[::1]:81/2.jpg")
    for takedown in (one, two, one):
        takedown.add_to(tmp_path / "root")
    assert Takedown.of(tmp_path / "root") == one | two
    assert len(list((tmp_path / "root" / "takedown").iterdir())) == 2
    assert not Takedown.of(tmp_path / "other")


# --- a small line: links, download, preprocess, and two toy stages after it


class Labels(Stage):
    """As `explore`: rows that are known by their keys alone; its report shows the pictures."""

    name, reads, settings = "labels", ("preprocess",), "labels"
    writes = pa.schema([*list(schema.EXPLORED)[:4]])

    def __call__(self, rows: pa.Table) -> pa.Table:
        labels = [f"label of {caption}" for caption in rows["caption"].to_pylist()]
        columns = {"key": rows["key"], "status": rows["status"], "detail": rows["detail"], "label": labels}
        return pa.table(columns, schema=self.writes)

    def statistics(self, folder: Path) -> dict[str, Any]:
        shown = pa.concat_tables(scan(folder, ("label",), only_ok=True))["label"].to_pylist()
        return {"examples": [{"said": text} for text in shown]}


class Talks(Stage):
    """As `prepare`: two conversations about each picture, the second one about the next picture too."""

    name, reads, settings, fan_out = "talks", ("preprocess",), "talks", True
    writes = schema.CONVERSATIONS

    def __call__(self, rows: pa.Table) -> pa.Table:
        given = rows.to_pylist()
        made = [self._talk(given, place, number) for place in range(len(given)) for number in range(2)]
        return pa.Table.from_pylist(made, schema=self.writes)

    def _talk(self, given: list[dict[str, Any]], place: int, number: int) -> dict[str, Any]:
        shown = [given[place], given[(place + 1) % len(given)]][: number + 1]
        parts = [{"text": None, "image": index} for index in range(len(shown))]
        messages = [
            {"role": "user", "parts": parts},
            {"role": "assistant", "parts": [{"text": " ".join(row["caption"] for row in shown), "image": None}]},
        ]
        return {
            **{"key": 2 * given[place]["key"] + number, "source_key": given[place]["key"], "status": "ok"},
            **{"source": "talks", "family": "caption", "split": "train", "messages": messages, "meta": "{}"},
            "images": [{"bytes": row["image"], "sha256": row["sha256"]} for row in shown],
        }


class Site:
    """Pictures, each its own; some addresses redirect to others.  Remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.redirects: dict[int, str] = {}
        self.app = web.Application()
        self.app.router.add_get("/{name}", self.answer)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked[request.path] += 1
        number = int(request.match_info["name"].split(".")[0])
        if number in self.redirects:
            raise web.HTTPFound(self.redirects[number])
        return web.Response(body=body(number), content_type="image/jpeg")


def body(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return images.to_jpeg(Image.fromarray(noise), 80)


def digest(number: int) -> str:
    return hashlib.sha256(body(number)).hexdigest()


def word(number: int) -> str:
    return f"caption-{number:03d}."


def fetching(root: Path, links: Path, retry: tuple[str, ...] = ()) -> StageRun:
    fetch = FetchConfig(allow_hosts=("127.0.0.1", "localhost"), rate_per_host=0, max_attempts=1)
    stage = Download(DownloadConfig(fetch=fetch), PICTURE, LIMITS)
    config = LinksConfig(url_column="url", caption_column="caption", rows_per_part=8)
    return StageRun(stage, open_links(links, config, root), root, retry)


def reading(root: Path, stage: Stage, retry: tuple[str, ...] = ()) -> StageRun:
    return StageRun(stage, open_input(stage, [root]), root, retry)


def whole_line(root: Path, links: Path) -> list[StageRun]:
    """Every stage after the other; those that are finished do nothing."""
    runs = [fetching(root, links)]
    run_local(runs[0])
    for stage in (Preprocess(PreprocessConfig(picture=PICTURE, limits=LIMITS)), Labels(), Talks()):
        runs.append(reading(root, stage))
        run_local(runs[-1])
    return runs


def write_links(path: Path, base_url: str) -> Path:
    rows = [{"url": f"{base_url}/{number}.jpg", "caption": word(number)} for number in range(NUM_LINKS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def site(tmp_path: Path) -> Any:
    site = Site()
    with running(site.app) as base_url:
        site.redirects = {18: f"{base_url}/5.jpg", 19: base_url.replace("127.0.0.1", "localhost") + "/3.jpg"}
        site.base_url, site.links = base_url, write_links(tmp_path / "links.jsonl", base_url)  # type: ignore[attr-defined]
        yield site


def statuses(root: Path, stage: str, column: str = "key") -> dict[int, str]:
    rows = pa.concat_tables(scan(find_folder([root], stage, "a test"), [column, "status"])).to_pylist()
    return {row[column]: row["status"] for row in rows}


def everything_said(folder: Path) -> str:
    """Whatever can be read in a folder: rows, journals, reports, notes."""
    said = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        said.append(str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.read_text("latin-1"))
    return "\n".join(said)


def finished_pictures(root: Path) -> dict[int, bytes]:
    rows = pa.concat_tables(scan(find_folder([root], "download", "a test"), ["key", "image"])).to_pylist()
    return {row["key"]: row["image"] for row in rows}


def test_a_new_run_asks_for_nothing_that_is_listed_and_keeps_none_of_it(site: Any, tmp_path: Path) -> None:
    links = [f"{site.base_url.replace('http', 'https')}/5.jpg", "host:localhost", digest(7), digest(3)]
    listed(tmp_path, *links).add_to(tmp_path / "runs")
    runs = whole_line(tmp_path / "runs", site.links)
    gone = {3, 5, 7, 18, 19}
    assert {key for key, status in statuses(runs[0].root, "download").items() if status != "ok"} == gone
    assert Manifest.read(runs[0].folder).statuses == {"ok": 15, schema.TAKEN_DOWN: 5}
    assert "/5.jpg" not in site.asked
    assert site.asked["/3.jpg"] == 1, "by its own link, and not by the redirect to a listed host"
    rows = {row["key"]: row for row in pa.concat_tables(scan(runs[0].folder, schema.DOWNLOADED.names)).to_pylist()}
    assert (rows[5]["attempts"], rows[7]["sha256"]) == (0, digest(7))
    for run in runs:
        said = everything_said(run.folder)
        assert [key for key in range(NUM_LINKS) if word(key) in said] == sorted(set(range(NUM_LINKS)) - gone)
        assert verify(run.folder) == []


def test_folders_that_exist_lose_what_is_listed_and_start_nothing_anew(site: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    runs = whole_line(root, site.links)
    pictures, before = finished_pictures(root), [Manifest.read(run.folder) for run in runs]
    untouched = {path.name: path.read_bytes() for path in part_paths(runs[0].folder)}
    asked = site.asked.copy()
    shown = pa.concat_tables(scan(runs[3].folder, ("key", "source_key", "images"))).to_pylist()
    takedown = listed(tmp_path, f"{site.base_url}/0.jpg", "host:localhost", digest(5))
    gone = {0, 5, 18, 19}  # 18 was redirected to the picture of 5
    of_them = {digest(0), digest(5), digest(3)}  # what 19 was redirected to
    talks = {row["key"] for row in shown if of_them & {image["sha256"] for image in row["images"]}}
    done = {item.folder.name.split("-")[0]: item.num_rows for item in take_down(takedown, [root])}
    assert done["links"] == done["download"] == done["preprocess"] == done["labels"] == 4
    assert {key for key, status in statuses(root, "talks").items() if status == schema.TAKEN_DOWN} == talks
    assert done["talks"] == len(talks) > 2 * len(gone)
    words_of_links = everything_said(find_folder([root], "links", "a test"))
    assert not any(word(key) in words_of_links for key in gone)
    for run, was in zip(runs, before, strict=True):
        now = Manifest.read(run.folder)
        assert verify(run.folder) == []
        assert (now.identity, now.fingerprint, now.rows_out) == (was.identity, was.fingerprint, was.rows_out)
        assert now.statuses[schema.TAKEN_DOWN] == now.extra["taken_down"] == done[now.stage]
        assert sum(now.statuses.values()) == now.rows_out
        assert sorted(path.name for path in (run.folder / "data").iterdir()) == sorted(now.files), "old files are gone"
        said = everything_said(run.folder)
        for key in gone:
            assert word(key) not in said, (now.stage, key)
            assert str(pictures[key]) not in said or key == 19, (now.stage, key)  # its picture is 3's as well
        assert str(pictures[1]) in said or now.stage == "labels"
    for path in part_paths(runs[0].folder):
        keys = storage_keys(str(path))
        assert (path.read_bytes() == untouched.get(path.name)) == (not gone & set(keys)), "other parts are left alone"

    state = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert sum(item.num_rows for item in take_down(takedown, [root])) == 0
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == state, (
        "the second time is a no-op"
    )

    # Every command finds its folder finished, and draws its report anew.
    assert [run.folder for run in whole_line(root, site.links)] == [run.folder for run in runs]
    assert site.asked == asked
    shown = json.loads((runs[2].folder / "stats.json").read_text())
    assert [item["said"] for item in shown["examples"]] == [
        f"label of {word(key)}" for key in statuses(root, "labels") if key not in gone
    ]
    assert not any(word(key) in everything_said(run.folder) for run in runs for key in gone)


def test_a_retry_leaves_what_was_taken_down_alone_until_it_is_named(site: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    runs = whole_line(root, site.links)
    take_down(listed(tmp_path, f"{site.base_url}/1.jpg"), [root])
    asked = site.asked.total()
    run_local(fetching(root, site.links, ("failed", "optout")))
    run_local(fetching(root, site.links, (schema.TAKEN_DOWN,)))
    assert site.asked.total() == asked, "it is listed still"
    assert statuses(root, "download")[1] == schema.TAKEN_DOWN
    assert verify(runs[0].folder) == []

    for path in (root / "takedown").iterdir():
        path.unlink()
    run_local(fetching(root, site.links, (schema.TAKEN_DOWN,)))
    run_local(reading(root, Preprocess(PreprocessConfig(picture=PICTURE, limits=LIMITS)), (schema.TAKEN_DOWN,)))
    assert set(statuses(root, "preprocess").values()) == {"ok"}
    assert finished_pictures(root)[1] is not None


class Moody(Preprocess):
    """Fails on rows that `failing` names."""

    def __init__(self, failing: set[int]) -> None:
        super().__init__(PreprocessConfig(picture=PICTURE, limits=LIMITS))
        self.failing = failing

    def __call__(self, rows: pa.Table) -> pa.Table:
        out = super().__call__(rows).to_pylist()
        for row in out:
            row["status"] = "internal_error" if row["key"] in self.failing else row["status"]
        return pa.Table.from_pylist(out, schema=self.writes)


def test_other_rows_can_be_retried_after_a_takedown(site: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run_local(fetching(root, site.links))
    run_local(reading(root, Moody({2})))
    take_down(listed(tmp_path, f"{site.base_url}/1.jpg"), [root])
    run = reading(root, Moody(set()), ("internal_error",))
    manifest = run_local(run)
    assert manifest.statuses == {"ok": NUM_LINKS - 1, schema.TAKEN_DOWN: 1}
    assert verify(run.folder) == []


def test_a_stage_that_reads_another_root_keeps_to_the_list_of_its_own(site: Any, tmp_path: Path) -> None:
    run_local(fetching(tmp_path / "a", site.links))
    listed(tmp_path, digest(4)).add_to(tmp_path / "b")
    stage = Preprocess(PreprocessConfig(picture=PICTURE, limits=LIMITS))
    run_local(StageRun(stage, open_input(stage, [tmp_path / "a"]), tmp_path / "b"))
    run_local(reading(tmp_path / "b", Labels()))
    assert statuses(tmp_path / "b", "preprocess")[4] == schema.TAKEN_DOWN
    assert 4 not in statuses(tmp_path / "b", "labels")
    assert statuses(tmp_path / "a", "download")[4] == "ok"


def test_pictures_that_are_already_there_are_known_by_their_hash(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(body(number))
        (tmp_path / "photos" / f"{number}.txt").write_text(word(number))
    listed(tmp_path, digest(2)).add_to(tmp_path / "runs")
    stage = Preprocess(PreprocessConfig(picture=PICTURE, limits=LIMITS))
    source = open_pictures([str(tmp_path / "photos")], PicturesConfig(), tmp_path / "runs")
    run = StageRun(stage, source, tmp_path / "runs")
    assert run_local(run).statuses == {"ok": 3, schema.TAKEN_DOWN: 1}
    assert [number for number in range(4) if word(number) in everything_said(run.folder)] == [0, 1, 3]
    # The list of them, which was made before its hash was known, loses its words by the command.
    assert [item.num_rows for item in take_down(listed(tmp_path, digest(2)), [run.root])] == [1, 0]
    assert word(2) not in everything_said(find_folder([run.root], "pictures", "a test"))
    assert run_local(StageRun(stage, open_pictures([str(tmp_path / "photos")], PicturesConfig(), run.root), run.root))


def test_a_run_that_was_interrupted_is_cleared_too(site: Any, tmp_path: Path) -> None:
    """A part that is done and a journal lie there when the list comes; the command that continues closes the folder."""
    root = tmp_path / "runs"
    site.redirects = {}
    run = fetching(root, site.links)
    first, second = run.source.parts[:2]
    with Lease.take(run.folder):
        run.work(first)
    run.stage.close()
    journal = Journal(run.folder / "data" / f".{second.file_name}.journal", schema.DOWNLOADED)
    keys = storage_keys(second.path)
    rows = [
        {"key": key, "status": "ok", "url": f"{site.base_url}/{key}.jpg", "caption": word(key), "image": body(key)}
        for key in keys
    ]
    journal.append(pa.Table.from_pylist(rows, schema=schema.DOWNLOADED))
    all_keys = [*storage_keys(first.path), *keys]
    gone = {all_keys[0], keys[0]}
    takedown = listed(tmp_path, *(f"{site.base_url}/{key}.jpg" for key in gone))
    assert sum(item.num_rows for item in take_down(takedown, [root]) if item.folder == run.folder) == 1
    asked = site.asked.copy()
    assert not any(word(key) in everything_said(run.folder) for key in gone)
    assert len(list((run.folder / "data").glob("*.parquet"))) == 1
    manifest = run_local(fetching(root, site.links))
    assert manifest.statuses == {"ok": NUM_LINKS - 2, schema.TAKEN_DOWN: 2}
    assert not any(site.asked[f"/{key}.jpg"] > asked[f"/{key}.jpg"] for key in all_keys)
    assert verify(run.folder) == []


def storage_keys(path: str) -> list[int]:
    keys: list[int] = pq.read_table(path, columns=["key"])["key"].to_pylist()
    return keys


@pytest.mark.parametrize("by_itself", [True, False])
def test_a_list_that_comes_while_a_stage_works_is_kept_to(site: Any, tmp_path: Path, by_itself: bool) -> None:
    """Whether its rows say themselves that they are meant, or only those that they are made of."""
    root = tmp_path / "runs"
    site.redirects = {}
    run_local(fetching(root, site.links))
    stages: list[Stage] = [Preprocess(PreprocessConfig(picture=PICTURE, limits=LIMITS)), Labels()]
    if not by_itself:
        run_local(reading(root, stages.pop(0)))
    run = reading(root, stages[0])
    gone = [storage_keys(run.source.parts[place].path)[0] for place in (0, -1)]
    takedown = listed(tmp_path, *(f"{site.base_url}/{key}.jpg" for key in gone))
    said: list[str] = []

    def at_each_part(result: Any) -> None:
        said.extend(item.in_use for item in take_down(takedown, [root]) if item.in_use)

    manifest = run_local(run, at_each_part)
    assert any("in use by process" in text for text in said) == by_itself
    assert manifest.statuses["ok"] == manifest.rows_out - manifest.statuses.get(schema.TAKEN_DOWN, 0) == NUM_LINKS - 2
    assert not any(word(key) in everything_said(run.folder) for key in gone)
    assert verify(run.folder) == []
    assert sum(item.num_rows for item in take_down(takedown, [root])) == 0


def test_features_and_pictures_in_a_place_go_and_row_groups_stay(tmp_path: Path) -> None:
    """Training finds a conversation by its row group; features are of an extension type."""
    kind = schema.encoded(4, 8)
    count = 2500
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(count * 32, np.float16)), 32)
    columns: dict[str, Any] = {name: pa.nulls(count, kind.field(name).type) for name in kind.names}
    columns |= {"key": range(count), "status": ["ok"] * count, "sha256": [f"{key:064x}" for key in range(count)]}
    columns |= {"features": pa.ExtensionArray.from_storage(kind.field("features").type, flat)}
    root = given_folder("encode", pa.table(columns, schema=kind), tmp_path / "runs", num_parts=1)
    folder = find_folder([root], "encode", "a test")
    groups = [pq.read_metadata(part_paths(folder)[0]).row_group(n).num_rows for n in range(3)]
    take_down(listed(tmp_path, f"{7:064x}", f"{2400:064x}"), [folder])
    path = part_paths(folder)[0]
    assert [pq.read_metadata(path).row_group(n).num_rows for n in range(3)] == groups
    rows = pq.read_table(path)
    assert rows.schema.equals(kind)
    assert [key for key, some in enumerate(rows["features"].is_null().to_pylist()) if some] == [7, 2400]
    assert (root / "takedown").is_dir(), "the root of a single folder keeps the list"


# --- commands


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = preprocessed([b"a", b"b", b"c"])
    root = given_folder("preprocess", rows, tmp_path / "runs")
    (tmp_path / "list.txt").write_text("http://x/1\n")
    assert cli.main(["takedown", str(tmp_path / "list.txt"), str(root)]) == 0
    said = capsys.readouterr().out
    assert "1 row taken down" in said
    assert "1 rows taken down in 1 folders" in said
    folder = find_folder([root], "preprocess", "a test")
    with Lease.take(folder):
        (tmp_path / "list.txt").write_text("http://x/2\n")
        assert cli.main(["takedown", str(tmp_path / "list.txt"), str(root)]) == 2
    assert "run this again" in capsys.readouterr().err
    assert cli.main(["takedown", str(tmp_path / "list.txt"), str(root)]) == 0
    assert Manifest.read(folder).statuses == {schema.TAKEN_DOWN: 2, "ok": 1}
    assert cli.main(["verify", str(folder)]) == 0
    assert cli.main(["takedown", str(tmp_path / "list.txt"), str(tmp_path / "no")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_a_model_that_was_trained_on_it_is_named(tmp_path: Path) -> None:
    root = given_folder("preprocess", preprocessed([b"a", b"b"]), tmp_path / "runs")
    model = root / f"sft-{'0' * 12}"
    model.mkdir()
    read = {"folders": {"prepare": str(find_folder([root], "preprocess", "a test")), "init": "built"}}
    manifest = Manifest("sft", 1, "0" * 64, {}, read, 2, 2, {"ok": 2}, {}, 0.0, "", "", None)
    (model / "manifest.json").write_text(json.dumps(manifest.__dict__))
    assert [item.trained_on for item in take_down(listed(tmp_path, "http://x/0"), [root])] == [False, True]


def test_the_option_of_a_stage_is_read_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("http://x/1\nnonsense\n")
    words = [
        "--recipe",
        "tiny",
        "--input",
        "x",
        "--output",
        str(tmp_path / "o"),
        "--takedown",
        str(tmp_path / "list.txt"),
    ]
    with pytest.raises(DataError, match="line 2"):
        _cli.parse("download", words, extra=("--takedown",))
    (tmp_path / "list.txt").write_text("http://x/1\n")
    job = _cli.parse("download", words, extra=("--takedown",))
    assert job.takedown == tmp_path / "list.txt"
    assert not (tmp_path / "o").exists()
    assert download.run is not None
    assert storage.sizes(tmp_path / "o") == {}


def test_records_that_hold_the_picture_of_a_taken_conversation_are_cleared_too(tmp_path: Path) -> None:
    pictures = [base64.b64encode(photo(number)).decode() for number in range(3)]
    lines = [
        {"messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{one}"}}]},
            {"role": "assistant", "content": f"number {number}"},
        ]}
        for number, one in enumerate(pictures)
    ]  # fmt: skip
    root = tmp_path / "out"
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = PrepareConfig(source="messages", count_tokens=False)
    stage = Prepare(config, picture=PICTURE, limits=LIMITS)
    run = StageRun(stage, open_prepare(stage, [tmp_path / "own.jsonl"], root), root)
    run_local(run)
    gone = hashlib.sha256(base64.b64decode(pictures[1])).hexdigest()
    done = {item.folder.name.split("-")[0]: item.num_rows for item in take_down(listed(tmp_path, gone), [root])}
    assert done == {"records": 1, "prepare": 1}
    for path in root.rglob("*.parquet"):
        assert pictures[1] not in str(pq.read_table(path).to_pylist())
    left = [row["status"] for table in scan(run.folder, ["status"]) for row in table.to_pylist()]
    assert sorted(left) == ["ok", "ok", "optout.takedown"]
    assert sum(item.num_rows for item in take_down(listed(tmp_path, gone), [root])) == 0
