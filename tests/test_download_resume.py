"""A download that is killed and repeated: nothing lost, nothing asked for twice but what was in flight."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from aiohttp import web
from PIL import Image

from tinyvlm import images, schema
from tinyvlm.data import downloader
from tinyvlm.data.download import Download, DownloadConfig
from tinyvlm.data.fetch import Answer, FetchConfig, Fetcher
from tinyvlm.data.links import LinksConfig, open_links
from tinyvlm.errors import NetworkError, StageError
from tinyvlm.folders import scan
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.journal import Journal, Outlook
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.toy.web_server import running

ROWS = 600
LINKS = LinksConfig(url_column="url", caption_column="caption", rows_per_part=200)


class Web:
    """Pictures and failures, and a count of what was asked for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.app = web.Application()
        self.app.router.add_get("/{name}", self.answer)
        self.bodies = [images.to_jpeg(Image.new("RGB", (64, 48), (n, 99, 0)), 90) for n in range(0, 250, 10)]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked[name] += 1
        await asyncio.sleep(0.03)
        number = int(name.split(".")[0])
        if number % 7 == 0:
            return web.Response(status=404)
        return web.Response(body=self.bodies[number % len(self.bodies)], content_type="image/jpeg")


def write_list(path: Path, base_url: str) -> Path:
    rows = [{"url": f"{base_url}/{number % (ROWS - 50)}.jpg", "caption": f"c{number}"} for number in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def download(root: Path, links: Path) -> StageRun:
    fetch = FetchConfig(allow_hosts=("127.0.0.1",), concurrency=16, concurrency_per_host=16, rate_per_host=0)
    stage = Download(DownloadConfig(fetch=fetch, parts_at_once=3), PictureConfig(size=32, tower_size=32), LimitConfig())
    return StageRun(stage, open_links(links, LINKS, root), root)


def rows_of(run: StageRun) -> pa.Table:
    table = pa.concat_tables(scan(run.folder, schema.DOWNLOADED.names)).sort_by("key")
    return table.drop_columns(sorted(schema.measured_columns(schema.DOWNLOADED)))


def main(root: str, links: str) -> None:
    """What a test kills."""
    downloader.KEEP_ROWS, downloader.KEEP_S = 8, 0.2
    run_local(download(Path(root), Path(links)))


def test_killed_and_repeated_equals_straight_and_asks_for_little_twice(tmp_path: Path, python: list[str]) -> None:
    site = Web()
    with running(site.app) as base_url:
        links = write_list(tmp_path / "links.jsonl", base_url)
        straight = download(tmp_path / "straight", links)
        run_local(straight)
        assert set(site.asked.values()) == {1}, "copies of a link are asked for once"
        site.asked.clear()
        (tmp_path / "killed").mkdir()
        code = f"import test_download_resume as t; t.main({str(tmp_path / 'killed')!r}, {str(links)!r})"
        kills = 0
        while True:
            asked = site.asked.total()
            process = subprocess.Popen([*python, "-c", code])
            while process.poll() is None and site.asked.total() < asked + 150:
                time.sleep(0.01)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert process.returncode == 0
    assert kills >= 3
    repeated = download(tmp_path / "killed", links)
    assert repeated.is_finished
    assert rows_of(repeated).equals(rows_of(straight))
    assert not list((repeated.folder / "data").glob(".*")), "journals are gone"
    again = site.asked.total() - len(site.asked)
    # In flight: 16 at a time; waiting to be kept: 8 in each of 3 parts, and what came in the meantime.
    assert again <= kills * 120, f"{again} links were asked for twice in {kills} kills"
    assert max(site.asked.values()) <= kills + 1


def test_copies_share_an_outcome_and_say_so(tmp_path: Path) -> None:
    site = Web()
    with running(site.app) as base_url:
        run = download(tmp_path, write_list(tmp_path / "links.jsonl", base_url))
        run_local(run)
    rows = {row["key"]: row for row in rows_of(run).to_pylist()}
    assert len(rows) == ROWS
    for number in range(50):
        leader, copy = rows[number], rows[number + ROWS - 50]
        assert (leader["duplicate_of"], copy["duplicate_of"]) == (None, number)
        assert {name: copy[name] for name in ("status", "image", "sha256", "phash", "http_status")} == {
            name: leader[name] for name in ("status", "image", "sha256", "phash", "http_status")
        }
        assert copy["caption"] == f"c{number + ROWS - 50}"


def test_there_are_never_more_unsaved_links_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloader, "MAX_UNSAVED", 40)
    monkeypatch.setattr(downloader, "KEEP_S", 0.1)
    site, most, kept = Web(), 0, 0
    append = Journal.append

    def count(self: Journal, rows: pa.Table) -> None:
        nonlocal most, kept
        most = max(most, site.asked.total() - kept)
        append(self, rows)
        kept += rows.num_rows

    monkeypatch.setattr(Journal, "append", count)
    with running(site.app) as base_url:
        run_local(download(tmp_path, write_list(tmp_path / "links.jsonl", base_url)))
    assert kept == ROWS - 50
    assert 20 <= most <= 40


def test_a_failure_in_one_part_lets_go_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Web()
    append = Journal.append

    def full_disk(self: Journal, rows: pa.Table) -> None:
        if "part-00001" in self.folder.name:
            raise OSError(28, "No space left on device")
        append(self, rows)

    monkeypatch.setattr(Journal, "append", full_disk)
    threads = threading.active_count()
    with running(site.app) as base_url:
        links = write_list(tmp_path / "links.jsonl", base_url)
        with pytest.raises(StageError, match="No space left"):
            run_local(download(tmp_path, links))
        monkeypatch.setattr(Journal, "append", append)
        run = download(tmp_path, links)
        run_local(run)
    assert rows_of(run).num_rows == ROWS
    assert threading.active_count() <= threads + 1, "event loops and decoders are ended"


def test_a_journal_survives_damage_and_repeats(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", pa.schema([pa.field("key", pa.int64(), False), pa.field("value", pa.string())]))
    assert journal.read().num_rows == 0
    journal.append(pa.table({"key": [1, 2], "value": ["a", "b"]}, schema=journal.schema))
    journal.append(pa.table({"key": [2, 3], "value": ["b", "c"]}, schema=journal.schema))
    (tmp_path / "j" / "zzz.arrow").write_bytes(b"ARROW1 half")
    (tmp_path / "j" / ".half.tmp").write_bytes(b"")
    assert journal.read().sort_by("key").to_pydict() == {"key": [1, 2, 3], "value": ["a", "b", "c"]}
    journal.remove()
    assert journal.read().num_rows == 0
    journal.remove()
    assert not os.listdir(tmp_path)


def test_journals_tell_how_far_their_parts_are(tmp_path: Path) -> None:
    columns = pa.schema([pa.field("key", pa.int64(), False), pa.field("status", pa.string())])
    outlook = Outlook(tmp_path)
    assert outlook() == {}
    first, second = (Journal(tmp_path / f".part-0000{n}.parquet.journal", columns) for n in (3, 7))
    first.append(pa.table({"key": [1, 2], "status": ["ok", "throttled"]}, schema=columns))
    second.append(pa.table({"key": [3], "status": ["ok"]}, schema=columns))
    assert outlook() == {3: {"ok": 1, "throttled": 1}, 7: {"ok": 1}}
    first.append(pa.table({"key": [4], "status": ["ok"]}, schema=columns))
    second.remove()
    assert outlook() == {3: {"ok": 2, "throttled": 1}}


def test_what_a_broken_network_said_of_links_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloader, "KEEP_ROWS", 8)
    site = Web()
    answered, broken = 0, True
    fetch = Fetcher.fetch

    async def breaking(self: Fetcher, url: str) -> Answer:
        nonlocal answered
        if broken and int(url.split("/")[-1].removesuffix(".jpg")) % 3 == 0:
            return Answer("dead.dns", "no such host", final_url=url, attempts=1)
        answer = await fetch(self, url)
        answered += 1
        if broken and answered > 90:
            raise NetworkError("no host answers; is there a network?")
        return answer

    monkeypatch.setattr(Fetcher, "fetch", breaking)
    with running(site.app) as base_url:
        links = write_list(tmp_path / "links.jsonl", base_url)
        with pytest.raises(NetworkError, match="is there a network"):
            run_local(download(tmp_path, links))
        before, broken = site.asked.total(), False
        run = download(tmp_path, links)
        run_local(run)
    assert "dead.dns" not in rows_of(run)["status"].to_pylist()
    assert site.asked.total() - len(site.asked) < before, "what had been answered before is kept"
