"""Downloading from a local web full of trouble: every link ends as a row that says what became of it."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import ipaddress
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from PIL import Image

from tinyvlm import images, schema
from tinyvlm.data import addresses
from tinyvlm.data.addresses import FetchError, check_url, is_public
from tinyvlm.data.download import Download, DownloadConfig
from tinyvlm.data.fetch import Answer, FetchConfig, Fetcher, _retry_after_s
from tinyvlm.data.links import LinksConfig, open_links
from tinyvlm.folders import scan
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.toy.links import DEAD, KINDS, LIVE, write_links
from tinyvlm.toy.web_server import build_app, running

LIMITS = LimitConfig(max_bytes=300_000)
PICTURE = PictureConfig(size=32, tower_size=32)
FETCH = FetchConfig(
    allow_hosts=("127.0.0.1",),
    # Long enough for a very busy machine; the few links that never answer take this twice.
    read_timeout_s=3.0,
    total_timeout_s=3.5,
    max_attempts=2,
    backoff_s=0.05,
    concurrency_per_host=64,
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


def fetch(url: str, config: FetchConfig = FETCH) -> Answer:
    async def run() -> Answer:
        async with Fetcher(config, LIMITS, {}) as fetcher:
            return await fetcher.fetch(url)

    return asyncio.run(run())


def serving(**answers: Callable[[web.Request], web.StreamResponse]) -> web.Application:
    """A web of named pages; each answer may be a plain function."""
    app = web.Application()
    for name, answer in answers.items():

        async def handler(request: web.Request, answer: Any = answer) -> web.StreamResponse:
            response: web.StreamResponse = answer(request)
            return response

        app.router.add_get(f"/{name}", handler)
    return app


def png(request: Any = None) -> web.Response:
    return web.Response(body=images.to_jpeg(Image.new("RGB", (16, 16), "red"), 95), content_type="image/jpeg")


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


def test_retry_after_is_honoured_and_too_long_a_wait_is_declined() -> None:
    asked: list[float] = []

    def busy(request: web.Request) -> web.Response:
        asked.append(time.monotonic())
        return png() if len(asked) > 1 else web.Response(status=429, headers={"Retry-After": "1"})

    def closed(request: web.Request) -> web.Response:
        return web.Response(status=503, headers={"Retry-After": "3600"})

    with running(serving(busy=busy, closed=closed)) as base_url:
        answer = fetch(f"{base_url}/busy")
        assert (answer.status, answer.attempts, answer.http_status) == ("ok", 2, 200)
        assert asked[1] - asked[0] >= 1
        answer = fetch(f"{base_url}/closed")
        assert (answer.status, answer.attempts, answer.http_status) == ("throttled", 1, 503)
    assert _retry_after_s("120") == 120
    assert _retry_after_s("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert _retry_after_s("soon") is None


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 100.100.100.200 0.0.0.0 255.255.255.255
    224.0.0.1 240.0.0.1 168.63.129.16 ::1 :: fe80::1 fc00::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1 64:ff9b::7f00:1
    2002:7f00:1::""".split(),
)
def test_addresses_that_are_not_the_web(address: str) -> None:
    assert not is_public(address)
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(FetchError, match="private_address"):
        check_url(f"http://{host}/x.jpg", ())
    check_url(f"http://{host}:8080/x.jpg", (str(ipaddress.ip_address(address)),))


def test_addresses_that_are_the_web() -> None:
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "   ",
        "not a url",
        "ftp://host/x.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "http://",
        "http:///x.jpg",
        "http://host:99999/x",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://[::1/",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    assert fetch(url).status == "bad_url"


def test_missing_links_are_bad_links() -> None:
    assert [row["status"] for row in download(None, "http://a b/")] == ["bad_url", "bad_url"]


def test_private_hosts_are_refused_before_and_after_redirects(monkeypatch: pytest.MonkeyPatch) -> None:
    port = 0

    def away(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": request.query["to"]})

    looked_up: list[str] = []

    def getaddrinfo(host: str) -> list[tuple[int, str]]:
        looked_up.append(host)
        return [(int(socket.AF_INET), "127.0.0.1")]

    monkeypatch.setattr(addresses, "_getaddrinfo", getaddrinfo)
    with running(serving(away=away, picture=png)) as base_url:
        port = int(base_url.rsplit(":", 1)[1])
        closed = FetchConfig()
        assert fetch(f"{base_url}/picture", closed).status == "private_address"
        assert fetch(f"http://inside.test:{port}/picture", closed).status == "private_address"
        for inside in (f"http://inside.test:{port}/picture", "http://169.254.169.254/latest", "http://[::1]/"):
            answer = fetch(f"{base_url}/away?to={inside}")
            assert (answer.status, answer.final_url) == ("private_address", inside)
        assert fetch(f"{base_url}/away?to=file:///etc/passwd").status == "bad_url"
        assert fetch(f"{base_url}/away?to=/picture").status == "ok"
        # The name's checked address is connected to; a second lookup, which could say otherwise, does not happen.
        looked_up.clear()
        named = FetchConfig(allow_hosts=("inside.test",), concurrency=1)
        rows = download(*[f"http://inside.test:{port}/picture"] * 3, fetch=named)
        assert [row["status"] for row in rows] == ["ok"] * 3
        assert looked_up == ["inside.test"]


def test_dead_names_are_looked_up_once_and_invalid_ones_never(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []

    def getaddrinfo(host: str) -> list[tuple[int, str]]:
        looked_up.append(host)
        if host == "flaky.test":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(addresses, "_getaddrinfo", getaddrinfo)
    rows = download("http://gone.test/1", "http://gone.test/2", "http://x.invalid/1", "http://flaky.test/1")
    assert [(row["status"], row["attempts"]) for row in rows] == [("dead.dns", 1)] * 3 + [("broken.dns", 2)]
    assert sorted(looked_up) == ["flaky.test", "flaky.test", "gone.test"]


def test_owners_may_opt_out() -> None:
    def tagged(*lines: str, **more: str) -> Callable[[web.Request], web.Response]:
        def answer(request: web.Request) -> web.Response:
            response = png()
            for line in lines:
                response.headers.add("X-Robots-Tag", line)
            response.headers.update(more)
            return response

        return answer

    pages = {
        "noai": tagged("noai"),
        "second": tagged("nofollow", "nofollow, NoImageAI"),
        "index": tagged("noindex"),
        "all": tagged("none"),
        "us": tagged("tinyvlm: noai"),
        "reserved": tagged(**{"tdm-reservation": "1"}),
        "other": tagged("googlebot: noindex"),
        "harmless": tagged("nofollow, max-snippet:-1"),
    }
    with running(serving(**pages)) as base_url:
        statuses = {name: fetch(f"{base_url}/{name}").status for name in pages}
        assert statuses == {name: "optout.header" for name in pages} | {
            "reserved": "optout.tdm",
            "other": "ok",
            "harmless": "ok",
        }
        heedless = FetchConfig(allow_hosts=("127.0.0.1",), respect_opt_outs=False)
        assert fetch(f"{base_url}/noai", heedless).status == "ok"


def test_size_limits_hold_for_announced_and_packed_bodies() -> None:
    sent: list[int] = []

    def packed(body: bytes, encoding: str) -> Callable[[web.Request], web.Response]:
        return lambda request: web.Response(
            body=body, headers={"Content-Encoding": encoding, "Content-Type": "image/jpeg"}
        )

    picture = png().body
    assert isinstance(picture, bytes)
    pages = {
        "large": lambda request: web.Response(body=picture + bytes(400_000), content_type="image/jpeg"),
        "gzip": packed(gzip.compress(picture), "gzip"),
        "bomb": packed(gzip.compress(bytes(50_000_000)), "gzip"),
        "broken": packed(b"\x1f\x8b nothing", "gzip"),
        "strange": packed(picture, "br"),
    }
    with running(serving(**pages)) as base_url:
        answers = {name: fetch(f"{base_url}/{name}") for name in pages}
    assert {name: answer.status for name, answer in answers.items()} == {
        "large": "too_large",
        "gzip": "ok",
        "bomb": "too_large",
        "broken": "corrupt",
        "strange": "not_image",
    }
    assert answers["gzip"].body == picture
    assert not sent


def test_we_say_who_we_are() -> None:
    heard: list[Any] = []

    def picture(request: web.Request) -> web.Response:
        heard.append(request.headers)
        return png()

    with running(serving(picture=picture)) as base_url:
        fetch(f"{base_url}/picture")
    assert heard[0]["User-Agent"].startswith("TinyVLM/")
    assert "Cookie" not in heard[0]


def test_redirects_are_limited() -> None:
    def on(request: web.Request) -> web.Response:
        left = int(request.query["left"])
        return web.Response(status=302, headers={"Location": f"/on?left={left - 1}"}) if left else png()

    def nowhere(request: web.Request) -> web.Response:
        return web.Response(status=302)

    with running(serving(on=on, nowhere=nowhere)) as base_url:
        assert fetch(f"{base_url}/on?left=5").status == "ok"
        assert fetch(f"{base_url}/on?left=6").status == "dead.redirects"
        assert fetch(f"{base_url}/nowhere").status == "dead.http"


def test_a_host_is_asked_by_few_at_a_time_and_a_slow_one_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, most, now, order = threading.Lock(), 0, 0, []

    async def slow(request: web.Request) -> web.Response:
        nonlocal most, now
        with lock:
            now, order_now = now + 1, order.append("slow")
            most = max(most, now)
        try:
            await asyncio.sleep(0.15)
        finally:
            now -= 1
        return order_now or png()

    async def quick(request: web.Request) -> web.Response:
        order.append("quick")
        return png()

    app = web.Application()
    app.router.add_get("/slow/{n}", slow)
    app.router.add_get("/quick/{n}", quick)
    monkeypatch.setattr(addresses, "_getaddrinfo", lambda host: [(int(socket.AF_INET), "127.0.0.1")])
    with running(app) as base_url:
        port = base_url.rsplit(":", 1)[1]
        config = FetchConfig(allow_hosts=("127.0.0.1", "quick.test"), concurrency=4, concurrency_per_host=2)
        urls = [f"{base_url}/slow/{n}" for n in range(12)] + [f"http://quick.test:{port}/quick/{n}" for n in range(12)]
        rows = download(*urls, fetch=config)
    assert [row["status"] for row in rows] == ["ok"] * 24
    assert most == 2
    last_quick = max(index for index, name in enumerate(order) if name == "quick")
    assert order[:last_quick].count("slow") < 12, "quick links waited for all slow ones"


def test_a_bug_costs_a_row_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(serving(picture=png)) as base_url:
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
