"""Downloading from a local web full of trouble: every link ends as a row that says what became of it."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_web import picture, serving

from tinyvlm import images, schema
from tinyvlm.data import downloader
from tinyvlm.data.download import Download, DownloadConfig
from tinyvlm.data.fetch import FetchConfig
from tinyvlm.data.links import LinksConfig, open_links
from tinyvlm.folders import scan
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.toy.links import DEAD, KINDS, LIVE, write_links
from tinyvlm.toy.web_server import build_app, running

LIMITS = LimitConfig(max_bytes=300_000)
PICTURE = PictureConfig(size=32, tower_size=32)
FETCH = FetchConfig(
    allow_hosts=("127.0.0.1", "localhost"),
    # Long enough for a very busy machine; the few links that never answer take this twice.
    read_timeout_s=3.0,
    total_timeout_s=3.5,
    max_attempts=2,
    backoff_s=0.05,
    concurrency_per_host=64,
    rate_per_host=0,
)
LINKS = LinksConfig(caption_column="caption", key_column="key", meta_columns=("kind", "split", "image_id"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, number in (("train", 32), ("test", 8)):
        (folder / split).mkdir()
        for image_id in range(number):
            pixels = rng.integers(0, 256, (20 + image_id, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{image_id}.png")
    return folder


@pytest.fixture(scope="module")
def links(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The toy list in miniature, and the toy web that answers it."""
    path = tmp_path_factory.mktemp("links") / "links.parquet"
    with running(build_app(pictures)) as base_url:
        write_links(path, base_url, folder=pictures)
        yield path


def table(*urls: str | None) -> pa.Table:
    keys = [7 + 3 * index for index in range(len(urls))]
    rows = {"key": keys, "url": urls, "caption": [f"c{key}" for key in keys], "meta": ["{}"] * len(urls)}
    return pa.table(rows, schema=schema.LINKS)


def download(*urls: str | None, store: Any = "original", fetch: FetchConfig = FETCH) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Download(DownloadConfig(store=store, fetch=fetch), PICTURE, LIMITS)(
        table(*urls)
    ).to_pylist()
    return rows


def test_every_kind_of_link_ends_as_it_should(links: Path, pictures: Path, tmp_path: Path) -> None:
    stage = Download(DownloadConfig(store="original", fetch=FETCH), PICTURE, LIMITS)
    run = StageRun(stage, open_links(links, LINKS, tmp_path), tmp_path)
    manifest = run_local(run)
    rows = pa.concat_tables(scan(run.folder, schema.DOWNLOADED.names)).to_pylist()
    assert manifest.rows_in == manifest.rows_out == len(rows)
    seen = set()
    for row in rows:
        meta = json.loads(row["meta"])
        seen.add(meta["kind"])
        assert row["status"] == KINDS[meta["kind"]].status, row
        assert (row["image"] is not None) == (row["status"] == "ok")
        assert (row["detail"] is None) == (row["status"] == "ok")
        if meta["kind"] in LIVE:
            sent = (pictures / meta["split"] / f"{meta['image_id']}.png").read_bytes()
            assert row["image"] == sent
            assert row["sha256"] == hashlib.sha256(sent).hexdigest()
            assert (row["format"], row["width"], row["height"]) == ("PNG", 30, 20 + meta["image_id"])
            assert row["http_status"] == 200
            assert row["attempts"] == (2 if meta["kind"].startswith("busy") else 1)
            assert "/pictures/" in row["final_url"] or meta["kind"].startswith("busy")
        if meta["kind"] in ("silent", "drip", "reset", "broken"):
            assert row["attempts"] == 2, "transient failures are tried again"
        elif meta["kind"] in DEAD:
            assert row["attempts"] == 1, "permanent failures are not"
    assert seen == set(KINDS)

    statistics = json.loads((run.folder / "stats.json").read_text())
    assert statistics["downloaded"] + statistics["failed"] == len(rows)
    assert statistics["image_bytes"] > sum(len(row["image"] or b"") for row in rows)
    assert statistics["http_statuses"]["404"] == sum(row["http_status"] == 404 for row in rows)
    assert sum(statistics["sections"]["time_on_the_network"]["charts"][0]["counts"]) == len(rows)


@pytest.mark.parametrize("store", ["original", "finished"])
def test_little_room_for_bodies_changes_nothing(
    links: Path, pictures: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of about two pictures: originals hold their room until they are kept, and all of it comes back."""
    monkeypatch.setattr(downloader, "KEEP_S", 0.02)
    urls = [url for url in pq.read_table(links)["image_url"].to_pylist() if "/pictures/" in url][:40]
    narrow = replace(FETCH, max_bytes_in_flight=5000)
    assert max(len(path.read_bytes()) for path in pictures.rglob("*.png")) > 2500
    stage = Download(DownloadConfig(store=store, fetch=narrow), PICTURE, LIMITS)  # type: ignore[arg-type]
    rows = stage.map_part(table(*urls), None).to_pylist()
    assert stage._running is not None
    budget, deadline = stage._running._fetcher._budget, time.monotonic() + 5
    while budget.held and time.monotonic() < deadline:  # the loop's thread is told a moment later
        time.sleep(0.01)
    assert budget.held == 0
    stage.close()
    wide = download(*urls, store=store)
    measured = schema.measured_columns(schema.DOWNLOADED)
    for row, other in zip(rows, wide, strict=True):
        assert {name: row[name] for name in row if name not in measured} == {
            name: other[name] for name in other if name not in measured
        }


def test_finished_pictures_are_those_of_images_py(links: Path, pictures: Path, tmp_path: Path) -> None:
    urls = pq.read_table(links)["image_url"].to_pylist()
    base_url = next(url.split("/pictures/")[0] for url in urls if "/pictures/" in url)
    names = ["train/3.png", "test/5.png", "train/3.png"]
    rows = download(*(f"{base_url}/pictures/{name}" for name in names), store="finished")
    assert [row["key"] for row in rows] == [7, 10, 13]
    for row, name in zip(rows, names, strict=True):
        sent = (pictures / name).read_bytes()
        assert row["image"] == images.finish(sent, PICTURE, LIMITS).jpeg
        assert row["sha256"] == hashlib.sha256(sent).hexdigest()
        assert row["width"] == 30
    one_by_one = [download(row["url"], store="finished")[0]["image"] for row in rows]
    assert one_by_one == [row["image"] for row in rows]


def test_missing_links_are_bad_links() -> None:
    assert [row["status"] for row in download(None, "http://a b/")] == ["bad_url", "bad_url"]


def test_a_bug_costs_a_row_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(serving(picture=picture)) as base_url:
        monkeypatch.setattr(images, "finish", lambda *_, **__: 1 / 0)
        config = DownloadConfig(fetch=FETCH, decode_processes=0)
        row = Download(config, PICTURE, LIMITS)(table(f"{base_url}/picture")).to_pylist()[0]
    assert row["status"] == "internal_error"
    assert "ZeroDivisionError" in row["detail"]
    assert row["image"] is None


def test_speed_settings_and_the_picture_of_originals_do_not_change_the_folder(links: Path, tmp_path: Path) -> None:
    source = open_links(links, LINKS, tmp_path)

    def folder(store: Any, picture: PictureConfig, **changes: Any) -> Path:
        config = DownloadConfig(store=store, fetch=FetchConfig(**changes))
        return StageRun(Download(config, picture, LIMITS), source, tmp_path).folder

    other = PictureConfig(size=64)
    assert folder("original", PICTURE) == folder("original", other) == folder("original", other, concurrency=3)
    assert folder("finished", PICTURE) != folder("finished", other)
    assert folder("original", PICTURE) != folder("original", PICTURE, max_attempts=9)


def test_the_stage_travels_light() -> None:
    stage = Download(DownloadConfig(), PictureConfig(), LimitConfig())
    assert len(pickle.dumps(stage)) < 4000
    code = "import sys, tinyvlm.data.download; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
