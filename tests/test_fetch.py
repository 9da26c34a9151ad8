"""Links against servers that lie, stall, refuse and redirect: what ends as what, and who is asked how often."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from small_web import JPEG, http, on_fast_clock, picture, raw_server, serving

from tinyvlm.data import addresses, places
from tinyvlm.data.addresses import FetchError
from tinyvlm.data.breaker import MIN_HOSTS
from tinyvlm.data.budget import ByteBudget
from tinyvlm.data.fetch import Answer, FetchConfig, Fetcher, _Elsewhere
from tinyvlm.data.responses import retry_after_s
from tinyvlm.errors import ConfigError, NetworkError
from tinyvlm.images import LimitConfig
from tinyvlm.schema import STATUSES
from tinyvlm.toy.web_server import running

LIMITS = LimitConfig(max_bytes=300_000)
FETCH = FetchConfig(
    allow_hosts=("127.0.0.1",),
    connect_timeout_s=2.0,
    read_timeout_s=2.0,
    total_timeout_s=3.0,
    max_attempts=1,
    backoff_s=0.02,
    rate_per_host=0,
    concurrency_per_host=64,
)


def fetch_all(urls: Sequence[str], config: FetchConfig = FETCH, **options: Any) -> list[Answer]:
    async def run() -> list[Answer]:
        async with Fetcher(config, LIMITS, **options) as fetcher:
            return await asyncio.gather(*map(fetcher.fetch, urls))

    answers = asyncio.run(run())
    assert all(answer.status in STATUSES for answer in answers)
    assert all((answer.body is not None) == (answer.status == "ok") == (answer.detail is None) for answer in answers)
    return answers


def fetch(url: str, config: FetchConfig = FETCH) -> Answer:
    return fetch_all([url], config)[0]


def named(monkeypatch: pytest.MonkeyPatch, **found: list[str] | Exception) -> list[str]:
    """Replace the name server; hosts that are not given are 127.0.0.1.  Gives the names that were looked up."""
    looked_up: list[str] = []

    def getaddrinfo(host: str) -> list[tuple[int, str]]:
        looked_up.append(host)
        answer = found.get(host.replace(".", "_"), ["127.0.0.1"])
        if isinstance(answer, Exception):
            raise answer
        return [(int(socket.AF_INET6 if ":" in ip else socket.AF_INET), ip) for ip in answer]

    monkeypatch.setattr(addresses, "_getaddrinfo", getaddrinfo)
    return looked_up


def test_request_lines_are_those_of_a_browser() -> None:
    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(http())

    links = {
        "/a b.jpg": "/a%20b.jpg",
        "/100%.jpg?50%": "/100%.jpg?50%",
        "/a%2Fb%7e.jpg?sign=a+b%20c%3D": "/a%2Fb%7e.jpg?sign=a+b%20c%3D",
        "/größe.jpg": "/gr%C3%B6%C3%9Fe.jpg",
        "/x?a=1&amp;b=2#part": "/x?a=1&b=2",
        "/x|y[1]": "/x|y[1]",
        "  \t": "/",
    }
    with raw_server(talk) as (base_url, heads):
        for link in links:
            answer = fetch(f" {base_url.upper()}{link}")
            assert (answer.status, answer.body) == ("ok", JPEG)
    assert [head.split("\r\n")[0] for head in heads] == [f"GET {target} HTTP/1.1" for target in links.values()]
    lines = heads[0].lower().split("\r\n")
    assert f"host: {base_url.removeprefix('http://')}" in lines
    assert any(line.startswith("user-agent: tinyvlm/") for line in lines)
    assert not any(line.startswith(("cookie", "authorization", "referer")) for line in lines)


def test_nobody_logs_in() -> None:
    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        assert "authorization" not in head.lower()
        writer.write(http(b"", "302 Found", f"Location: http://me:secret@{host}/x") if "/a" in head else http())

    with raw_server(talk) as (base_url, heads):
        host = base_url.removeprefix("http://")
        assert fetch(f"http://user:password@{host}/a").final_url == f"{base_url}/x"
    assert len(heads) == 2


STATUS_LINES = {
    200: "ok",
    203: "ok",
    101: "dead.protocol",
    201: "dead.http",
    202: "dead.http",
    204: "dead.http",
    206: "dead.http",
    300: "dead.http",
    301: "dead.http",  # without a Location
    304: "dead.http",
    305: "dead.http",
    400: "dead.http",
    401: "blocked.401",
    402: "dead.http",
    403: "blocked.403",
    404: "dead.http404",
    408: "timeout.read",
    410: "dead.http404",
    416: "dead.http",
    425: "dead.http",
    429: "throttled",
    451: "blocked.451",
    500: "broken.http5xx",
    501: "broken.http5xx",
    502: "broken.http5xx",
    503: "throttled",
    504: "broken.http5xx",
    522: "broken.http5xx",
    599: "broken.http5xx",
    600: "dead.http",
    999: "dead.http",
}
TRIED_AGAIN = (408, 429, 500, 502, 503, 504, 522)


def test_every_http_status_has_a_meaning() -> None:
    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        code = head.split()[1].removeprefix("/")
        bodiless = code in ("101", "204", "304")
        writer.write(f"HTTP/1.1 {code} X\r\n\r\n".encode() if bodiless else http(JPEG, f"{code} X"))
        if code == "101":
            writer.close()

    with raw_server(talk) as (base_url, _):
        config = replace(FETCH, max_attempts=2, max_wait_s=0.05)
        answers = {code: fetch(f"{base_url}/{code}", config) for code in STATUS_LINES}
    assert {code: answer.status for code, answer in answers.items()} == STATUS_LINES
    assert {code: answer.http_status for code, answer in answers.items()} == {code: code for code in STATUS_LINES}
    assert [code for code, answer in answers.items() if answer.attempts == 2] == list(TRIED_AGAIN)


def test_informational_answers_are_passed_over() -> None:
    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + http())

    async def endless(head: str, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    with raw_server(talk) as (base_url, _):
        assert fetch(base_url).status == "ok"
    with raw_server(endless) as (base_url, _):
        assert fetch(base_url, replace(FETCH, total_timeout_s=0.5)).status == "timeout.total"


def packed(body: bytes, encoding: str) -> bytes:
    return http(body, "200 OK", f"Content-Encoding: {encoding}")


def chunked(*pieces: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(pieces)


SIZE = f"{len(JPEG):x}".encode()
NO_LENGTH = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
RAW_ANSWERS = {
    # name: (what is sent before the server hangs up, statuses of which one is right)
    "whole": (http(), "ok"),
    "until the end": (NO_LENGTH + JPEG, "ok"),
    "chunks": (chunked(SIZE, b"\r\n", JPEG, b"\r\n0\r\n\r\n"), "ok"),
    "fewer bytes than announced": (http().replace(b"Content-Length: ", b"Content-Length: 1"), "broken.reset"),
    "more bytes than announced": (http() + b"HTTP/1.1 200 OK\r\n" + bytes(100), "dead.protocol"),
    "announced as huge": (http().replace(b"Content-Length: ", b"Content-Length: 99999"), "too_large"),
    "announced as negative": (http().replace(b"Content-Length: ", b"Content-Length: -"), "dead.protocol"),
    "announced as words": (http().replace(b"Content-Length: ", b"Content-Length: many"), "dead.protocol"),
    "announced twice": (http(JPEG, "200 OK", "Content-Length: 1"), "dead.protocol"),
    "garbage as chunks": (chunked(b"zz\r\nnothing\r\n"), "dead.protocol"),
    "chunks cut short": (chunked(SIZE, b"\r\n", JPEG[:50]), "broken.reset"),
    "endless chunk size": (chunked(b"f" * 40), "dead.protocol"),
    "too many bytes in chunks": (chunked(b"61a80\r\n", JPEG, bytes(400_000 - len(JPEG)), b"\r\n"), "too_large"),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "dead.protocol"),
    "HTTP/0.9": (JPEG, "dead.protocol"),
    "nothing": (b"", "broken.reset"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", "broken.reset"),
    "a flood of headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, "dead.protocol"),
    "an endless header": (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000, "dead.protocol"),
    "a long header": (http(JPEG, "200 OK", f"Content-Security-Policy: {'x' * 20_000}"), "ok"),
    "an empty body": (http(b""), "not_image"),
    "a page": (http(b"<!doctype html>" * 100), "not_image"),
    "a long page": (http(b"<!doctype html>" * 10_000)[:5000], "not_image"),
    "gzip": (packed(gzip.compress(JPEG), "gzip"), "ok"),
    "deflate": (packed(zlib.compress(JPEG), "deflate"), "ok"),
    "raw deflate": (packed(zlib.compress(JPEG, wbits=-15), "Deflate"), "ok"),
    "gzip bomb": (packed(gzip.compress(bytes(50_000_000)), "gzip"), "too_large"),
    "no gzip": (packed(b"\x1f\x8b nothing", "gzip"), "corrupt"),
    "brotli": (packed(JPEG, "br"), "not_image"),
    "gzip twice": (packed(gzip.compress(gzip.compress(JPEG)), "gzip, gzip"), "not_image"),
}


@pytest.mark.parametrize("name", RAW_ANSWERS)
def test_answers_as_they_come(name: str) -> None:
    sent, status = RAW_ANSWERS[name]

    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        writer.close()

    with raw_server(talk) as (base_url, _):
        answer = fetch(base_url)
    assert answer.status == status, answer.detail
    assert answer.body == (JPEG if status == "ok" else None)


def test_what_follows_an_answer_is_not_taken_for_the_next_one() -> None:
    """A server that sends two answers to one request must not choose what another link on that connection gets."""

    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        other = http(b"\x89PNG\r\n\x1a\n of another link")
        writer.write(http() + other if head.startswith("GET /a") else http())

    async def run(urls: list[str]) -> list[Answer]:
        async with Fetcher(FETCH, LIMITS) as fetcher:
            answers = []
            for url in urls:
                answers.append(await fetcher.fetch(url))
                await asyncio.sleep(0.05)
            return answers

    with raw_server(talk) as (base_url, _):
        answers = asyncio.run(run([f"{base_url}/a", f"{base_url}/b", f"{base_url}/a", f"{base_url}/b"]))
    assert [answer.body for answer in answers] == [JPEG] * 4


def test_slow_answers_have_deadlines() -> None:
    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        if "silent" in head:
            await asyncio.sleep(60)
        for byte in b"HTTP/1.1 200 OK\r\nX: " + bytes(1000) if "headers" in head else http() + bytes(1000):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)

    config = replace(FETCH, read_timeout_s=0.3, total_timeout_s=0.8)
    with raw_server(talk) as (base_url, _):
        answers = fetch_all([f"{base_url}/silent", f"{base_url}/headers", f"{base_url}/body"], config)
    assert [answer.status for answer in answers] == ["timeout.read", "timeout.total", "timeout.total"]
    assert all(answer.milliseconds < 2000 for answer in answers)


def test_redirects_are_limited_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = named(monkeypatch, metadata_test=["169.254.169.254"])

    def on(request: web.Request) -> web.Response:
        left = int(request.query["left"])
        # Each hop at another host: the limit is the link's, not a host's.
        to = f"http://hop{left}.test:{port}/on?left={left - 1}"
        return web.Response(status=302, headers={"Location": to}) if left else picture()

    def away(request: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": request.query["to"]})

    with running(serving(on=on, away=away, picture=picture)) as base_url:
        port = base_url.rsplit(":", 1)[1]
        open_to = replace(FETCH, allow_hosts=("127.0.0.1", *(f"hop{n}.test" for n in range(9))))
        assert fetch(f"{base_url}/on?left=5", open_to).status == "ok"
        assert fetch(f"{base_url}/on?left=6", open_to).status == "dead.redirects"
        ends = {
            f"http://metadata.test:{port}/latest": "private_address",
            "http://169.254.169.254/latest": "private_address",
            "http://[::1]/": "private_address",
            "https://10.0.0.1:8443/": "private_address",
            "file:///etc/passwd": "bad_url",
            "ftp://host.test/x": "bad_url",
            "http://host.test:22/": "bad_url",
            "http://[::1": "bad_url",
            "/picture": "ok",
            "//127.0.0.1:1/": "dead.refused",
            "https://127.0.0.1:1/": "dead.refused",
            f"https://127.0.0.1:{port}/picture": "dead.tls",
            "": "dead.redirects",  # itself
        }
        for to, status in ends.items():
            answer = fetch_all(
                [str(web.URL(f"{base_url}/away").with_query(to=to))] if False else [f"{base_url}/away?to={to}"]
            )[0]
            assert answer.status == status, (to, answer)
    assert "169.254.169.254" not in looked_up


def test_private_hosts_are_refused_and_names_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = named(monkeypatch)
    with running(serving(picture=picture)) as base_url:
        port = base_url.rsplit(":", 1)[1]
        assert fetch(f"{base_url}/picture", FetchConfig()).status == "private_address"
        assert fetch(f"http://inside.test:{port}/picture", FetchConfig()).status == "private_address"
        # The name's checked address is connected to; a second lookup, which could say otherwise, does not happen.
        looked_up.clear()
        config = replace(FETCH, allow_hosts=("inside.test",), concurrency=1)
        answers = fetch_all([f"http://inside.test:{port}/picture"] * 3, config)
        assert [answer.status for answer in answers] == ["ok"] * 3
        assert looked_up == ["inside.test"]


def test_only_checked_addresses_are_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families race (happy eyeballs), the private address among them is not even tried."""
    named(monkeypatch, both_test=["2606:4700::1111", "10.0.0.1", "192.0.2.1", "8.8.8.8"])
    tried: list[str] = []

    async def connect(self: Any, sock: socket.socket, address: Any) -> None:
        tried.append(address[0])
        if address[0] == "8.8.8.8":
            raise ConnectionRefusedError(111, "refused")
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect)
    answer = fetch("http://both.test/x.jpg")
    assert set(tried) == {"2606:4700::1111", "8.8.8.8"}
    assert answer.status in ("broken.network", "dead.refused")


def test_the_connection_deadline_is_for_all_addresses_together(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, silent_test=["8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"])
    tried: set[str] = set()

    async def connect(self: Any, sock: socket.socket, address: Any) -> None:
        tried.add(address[0])
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect)
    answer = fetch("http://silent.test/x.jpg", replace(FETCH, connect_timeout_s=1.2))
    assert answer.status == "timeout.connect"
    assert 1000 < answer.milliseconds < 2000
    assert tried == {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1"}, "one after the other, and not too many"


def test_dead_names_are_looked_up_once_and_invalid_ones_never(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = named(
        monkeypatch,
        gone_test=socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        flaky_test=socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    )
    urls = ["http://gone.test/1", "http://gone.test/2", "http://x.invalid/1", "http://flaky.test/1"]
    answers = fetch_all(urls, replace(FETCH, max_attempts=2))
    assert [(answer.status, answer.attempts) for answer in answers] == [("dead.dns", 1)] * 3 + [("broken.dns", 2)]
    assert sorted(looked_up) == ["flaky.test", "flaky.test", "gone.test"]


def test_a_name_server_that_hangs_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(addresses, "_getaddrinfo", lambda host: release.wait(10))
    config = replace(FETCH, dns_threads=1, dns_timeout_s=0.2)
    answers = fetch_all([f"http://host{n}.test/" for n in range(5)], config)
    release.set()
    assert [answer.status for answer in answers] == ["broken.dns"] * 5
    assert max(answer.milliseconds for answer in answers) < 1000


def test_owners_may_opt_out() -> None:
    def tagged(*lines: str, **more: str) -> Callable[[web.Request], web.Response]:
        def answer(request: web.Request) -> web.Response:
            response = picture()
            for line in lines:
                response.headers.add("X-Robots-Tag", line)
            response.headers.update(more)
            return response

        return answer

    refused = {
        "noai": tagged("noai"),
        "noml": tagged("NoML"),
        "second": tagged("nofollow", "nofollow, NoImageAI"),
        "index": tagged("noindex"),
        "all": tagged("none"),
        "us": tagged("tinyvlm: nofollow, noai"),
        "everybody": tagged("*: noindex"),
        "after_a_value": tagged("max-snippet: 20, noai"),
        "after_a_date": tagged("unavailable_after: Wed, 25 Jun 2030 15:00:00 PST, noimageindex"),
        "after_another": tagged("googlebot: nofollow, tinyvlm: noindex"),
    }
    harmless = {
        "other": tagged("googlebot: noindex, noai"),
        "others": tagged("googlebot: noindex, bingbot: noai"),
        "harmless": tagged("nofollow, max-snippet:-1, max-image-preview:none"),
        "open": tagged(**{"tdm-reservation": "0"}),
    }
    pages = {**refused, **harmless, "reserved": tagged(**{"tdm-reservation": "1"})}
    with running(serving(**pages)) as base_url:
        statuses = {name: fetch(f"{base_url}/{name}").status for name in pages}
        assert statuses == {
            **dict.fromkeys(refused, "optout.header"),
            **dict.fromkeys(harmless, "ok"),
            "reserved": "optout.tdm",
        }
        assert fetch(f"{base_url}/noai", replace(FETCH, respect_opt_outs=False)).status == "ok"


def test_retry_after_is_honoured_by_the_whole_host() -> None:
    asked: list[tuple[float, str]] = []

    def busy(request: web.Request) -> web.Response:
        asked.append((time.monotonic(), request.query["n"]))
        return picture() if len(asked) > 1 else web.Response(status=429, headers={"Retry-After": "1"})

    with running(serving(busy=busy)) as base_url:
        config = replace(FETCH, max_attempts=2, concurrency_per_host=1)
        answers = fetch_all([f"{base_url}/busy?n={n}" for n in range(4)], config)
    assert [(answer.status, answer.http_status) for answer in answers] == [("ok", 200)] * 4
    assert [answer.attempts for answer in answers] == [2, 1, 1, 1]
    assert asked[1][0] - asked[0][0] >= 1, "nobody asks during the pause"
    assert [n for _, n in asked] == ["0", "0", "1", "2", "3"], "who was turned away is the first afterwards"


def test_a_host_that_wants_to_be_left_alone_is() -> None:
    asked = 0

    def closed(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=503, headers={"Retry-After": "3600"})

    with running(serving(closed=closed)) as base_url:
        config = replace(FETCH, max_attempts=3, concurrency_per_host=2)
        answers = fetch_all([f"{base_url}/closed?n={n}" for n in range(20)], config)
    assert [answer.status for answer in answers] == ["throttled"] * 20
    assert asked <= 3
    assert {(answer.attempts, answer.http_status) for answer in answers} <= {(1, 503), (0, None)}
    assert retry_after_s("120") == 120
    assert retry_after_s("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert [retry_after_s(text) for text in ("soon", "-5", "nan", "inf", "1e9", "²", "")] == [None] * 7


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
        return order_now or picture()

    async def quick(request: web.Request) -> web.Response:
        order.append("quick")
        return picture()

    app = web.Application()
    app.router.add_get("/slow/{n}", slow)
    app.router.add_get("/quick/{n}", quick)
    named(monkeypatch)
    with running(app) as base_url:
        port = base_url.rsplit(":", 1)[1]
        config = replace(FETCH, allow_hosts=("127.0.0.1", "quick.test"), concurrency=4, concurrency_per_host=2)
        urls = [f"{base_url}/slow/{n}" for n in range(12)] + [f"http://quick.test:{port}/quick/{n}" for n in range(12)]
        answers = fetch_all(urls, config)
    assert [answer.status for answer in answers] == ["ok"] * 24
    assert most == 2
    last_quick = max(index for index, name in enumerate(order) if name == "quick")
    assert order[:last_quick].count("slow") < 12, "quick links waited for all slow ones"


def test_a_dead_host_is_soon_left_alone() -> None:
    config = replace(FETCH, dead_after=3, concurrency_per_host=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    answers = fetch_all([f"http://127.0.0.1:{port}/{n}" for n in range(10)], config)
    assert [answer.status for answer in answers] == ["dead.refused"] * 3 + ["dead.host"] * 7
    assert [answer.attempts for answer in answers] == [1] * 3 + [0] * 7
    always = fetch_all([f"http://127.0.0.1:{port}/{n}" for n in range(10)], replace(config, dead_after=0))
    assert {answer.status for answer in always} == {"dead.refused"}


def test_a_host_that_answers_now_and_then_is_not_dead() -> None:
    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        if int(head.split()[1].removeprefix("/")) % 3 == 0:
            writer.write(http(b"", "404 Not Found"))
        else:
            writer.close()

    with raw_server(talk) as (base_url, _):
        answers = fetch_all(
            [f"{base_url}/{n}" for n in range(12)], replace(FETCH, dead_after=3, concurrency_per_host=1)
        )
    assert {answer.status for answer in answers} == {"dead.http404", "broken.reset"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 signed by itself, and a server's context with it."""
    folder = tmp_path_factory.mktemp("certificate")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "certificate.pem", "-days", "2", "-subj", "/CN=local"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return folder / "certificate.pem", context


def test_certificates_are_checked_and_more_can_be_trusted(certificate: tuple[Path, ssl.SSLContext]) -> None:
    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(http())

    path, context = certificate
    with raw_server(talk, ssl=context) as (base_url, _):
        answer = fetch(base_url)
        assert (answer.status, answer.attempts) == ("dead.tls", 1)
        assert "certificate" in (answer.detail or "")
        assert fetch(base_url, replace(FETCH, ca_file=str(path))).status == "ok"
    with pytest.raises(ConfigError, match="PEM"):
        Fetcher(replace(FETCH, ca_file="/nowhere.pem"), LIMITS)


@pytest.mark.parametrize(
    ("text", "statuses"),
    [
        ("User-agent: *\nDisallow: /a\n", {"a": "optout.robots", "b": "ok"}),
        ("User-agent: tinyvlm\nAllow: /a$\nDisallow: /\n", {"a": "ok", "b": "optout.robots"}),
        ("User-agent: other\nDisallow: /\n", {"a": "ok", "b": "ok"}),
        (None, {"a": "ok", "b": "ok"}),
        (500, {"a": "broken.http5xx", "b": "broken.http5xx"}),
        (403, {"a": "ok", "b": "ok"}),
        ("x" * 600_000, {"a": "ok", "b": "ok"}),
        ("User-agent: *\nDisallow:\n" + "#\n" * 300_000 + "User-agent: *\nDisallow: /\n", {"a": "ok", "b": "ok"}),
        ("".join(f"user-agent: a{n}\n" for n in range(9000)) + "allow: /\n" * 9000, {"a": "dead.protocol"}),
    ],
)
def test_robots_txt(text: str | int | None, statuses: dict[str, str]) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path != "/robots.txt":
            return picture() if "." not in request.path else web.Response(status=404)
        if isinstance(text, str):
            return web.Response(text=text)
        return web.Response(status=text or 404, text="User-agent: *\nDisallow: /")

    app = web.Application()
    app.router.add_get("/{name:.*}", answer)
    config = replace(FETCH, respect_robots=True)
    with running(app) as base_url:
        urls = [f"{base_url}/{name}" for name in statuses]
        assert dict(zip(statuses, [a.status for a in fetch_all(urls, config)], strict=True)) == statuses
        assert asked.count("/robots.txt") == 1, "once for a site"
        asked.clear()
        assert {a.status for a in fetch_all(urls)} == {"ok"}, "off unless it is asked for"
        assert "/robots.txt" not in asked


def test_tdmrep_json_and_robots_of_redirects(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch)

    async def answer(request: web.Request) -> web.Response:
        pages = {
            "/.well-known/tdmrep.json": '[{"location": "/open/*", "tdm-reservation": 0}, {"location": "/*", '
            '"tdm-reservation": 1}]',
            "/robots.txt": "User-agent: *\nDisallow: /" if request.host.startswith("other.test") else "",
        }
        if request.path in pages and "site.test" in request.host + "site.test" * (request.path == "/robots.txt"):
            return web.Response(text=pages[request.path])
        if request.path == "/away":
            return web.Response(status=302, headers={"Location": f"http://other.test:{request.url.port}/x"})
        return web.Response(status=404) if "json" in request.path else picture()

    app = web.Application()
    app.router.add_get("/{name:.*}", answer)
    with running(app) as base_url:
        port = base_url.rsplit(":", 1)[1]
        hosts = ("site.test", "first.test", "other.test", "unreachable.test")
        config = replace(FETCH, respect_robots=True, allow_hosts=hosts)
        urls = [f"http://site.test:{port}/{name}" for name in ("open/a", "closed/a")]
        urls += [f"http://first.test:{port}/away", f"http://first.test:{port}/a", "http://unreachable.test:1/a"]
        answers = fetch_all(urls, config)
    assert [answer.status for answer in answers] == ["ok", "optout.tdm", "optout.robots", "ok", "dead.refused"]
    assert answers[2].final_url == f"http://other.test:{port}/x"
    assert "robots.txt" in (answers[4].detail or "")


# The network is replaced and the clock runs fast: what a worker does in minutes.


def in_a_network(
    monkeypatch: pytest.MonkeyPatch,
    reply: Callable[[str], tuple[float, str | None]],
    config: FetchConfig,
    num: int,
    **options: Any,
) -> tuple[list[Answer | BaseException], float]:
    """Fetch `num` links of as many hosts; `reply` gives each host's seconds and status (None: a picture)."""

    async def hop(self: Fetcher, target: Any, answer: Answer, take: Any) -> bytes:
        seconds, status = reply(target.host)
        await asyncio.sleep(seconds)
        if status is not None:
            raise FetchError(status, "simulated", transient=status.startswith(("timeout", "broken")))
        answer.http_status = 200
        return JPEG

    async def run() -> list[Answer | BaseException]:
        async with Fetcher(config, LIMITS, **options) as fetcher:
            urls = [f"http://host{n}.test/x.jpg" for n in range(num)]
            return await asyncio.gather(*map(fetcher.fetch, urls), return_exceptions=True)

    monkeypatch.setattr(Fetcher, "_hop", hop)
    return on_fast_clock(run())


@pytest.mark.parametrize(
    ("seconds", "status"),
    [(0.0, "broken.dns"), (10.0, "broken.dns"), (5.0, "timeout.connect"), (0.01, "broken.network"), (0.1, "dead.dns")],
)
def test_a_broken_network_stops_the_run_within_a_minute(
    monkeypatch: pytest.MonkeyPatch, seconds: float, status: str
) -> None:
    answers, took_s = in_a_network(monkeypatch, lambda host: (seconds, status), FetchConfig(), 2000)
    assert took_s < 60
    stopped = [answer for answer in answers if isinstance(answer, NetworkError)]
    assert len(stopped) > len(answers) - 3 * MIN_HOSTS, "all that had not ended were told"
    assert status in str(stopped[0])
    assert not any(isinstance(answer, asyncio.CancelledError) for answer in answers)


def test_ordinary_lists_do_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead_but_one_in(share: int) -> Callable[[str], tuple[float, str | None]]:
        def reply(host: str) -> tuple[float, str | None]:
            number = int(host.removeprefix("host").removesuffix(".test"))
            return (0.1, None) if number % share == 0 else (5.0, "timeout.connect")

        return reply

    config = FetchConfig(max_attempts=1)
    answers, _ = in_a_network(monkeypatch, dead_but_one_in(5), config, 2000)
    assert sum(getattr(answer, "status", "") == "ok" for answer in answers) == 400
    answers, _ = in_a_network(monkeypatch, lambda host: (0.1, "dead.dns"), config, MIN_HOSTS - 1)
    assert {getattr(answer, "status", "") for answer in answers} == {"dead.dns"}
    answers, _ = in_a_network(monkeypatch, lambda host: (0.1, "dead.refused"), config, 2000)
    assert {getattr(answer, "status", "") for answer in answers} == {"dead.refused"}
    always = replace(config, circuit_breaker=False)
    answers, _ = in_a_network(monkeypatch, lambda host: (0.1, "broken.dns"), always, 2000)
    assert {getattr(answer, "status", "") for answer in answers} == {"broken.dns"}


def test_after_a_stop_nothing_is_asked_and_a_callers_cancel_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with Fetcher(FetchConfig(max_attempts=1), LIMITS) as fetcher:

            async def hop(*_: Any) -> bytes:
                await asyncio.sleep(1)
                raise FetchError("broken.dns", "simulated")

            monkeypatch.setattr(fetcher, "_hop", hop)
            cancelled = asyncio.create_task(fetcher.fetch("http://first.test/"))
            await asyncio.sleep(0.5)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            links = [fetcher.fetch(f"http://host{n}.test/") for n in range(400)]
            answers = await asyncio.gather(*links, return_exceptions=True)
            assert any(isinstance(answer, NetworkError) for answer in answers)
            with pytest.raises(NetworkError):
                await fetcher.fetch("http://late.test/")

    on_fast_clock(run())


def test_giant_hosts_are_shared_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hop(self: Fetcher, target: Any, answer: Answer, take: Any) -> bytes:
        answer.http_status = 200
        return JPEG

    async def run(host: str) -> None:
        config = FetchConfig(rate_per_host=20.0)
        async with Fetcher(config, LIMITS, shared_hosts=["giant.test"], num_workers=4) as fetcher:
            await asyncio.gather(*(fetcher.fetch(f"http://{host}/{n}") for n in range(41)))

    monkeypatch.setattr(Fetcher, "_hop", hop)
    assert on_fast_clock(run("giant.test"))[1] == pytest.approx(40 * 4 / 20, abs=0.01)
    assert on_fast_clock(run("small.test"))[1] == pytest.approx(40 / 20, abs=0.01)


def test_hosts_that_redirects_lead_to_are_shared_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hop(self: Fetcher, target: Any, answer: Answer, take: Any) -> Any:
        answer.http_status = 200
        return _Elsewhere(f"http://cdn.test{target.path}") if target.host == "site.test" else JPEG

    async def run(host: str) -> None:
        async with Fetcher(FetchConfig(rate_per_host=20.0), LIMITS, num_workers=4) as fetcher:
            await asyncio.gather(*(fetcher.fetch(f"http://{host}/{n}") for n in range(41)))

    monkeypatch.setattr(Fetcher, "_hop", hop)
    assert on_fast_clock(run("site.test"))[1] == pytest.approx(40 * 4 / 20, abs=0.01)
    assert on_fast_clock(run("cdn.test"))[1] == pytest.approx(40 / 20, abs=0.01), "its own links have all of it"


@pytest.mark.parametrize(("with_length", "at_once"), [(True, 3), (False, 1)])
def test_bodies_in_flight_have_a_budget_and_waiting_for_it_is_no_timeout(with_length: bool, at_once: int) -> None:
    """A body without a length counts as the largest that is allowed; 12 of them in turn take longer than a deadline."""
    body = JPEG + bytes(90_000)

    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        length = f"Content-Length: {len(body)}" if with_length else "Connection: close"
        writer.write(f"HTTP/1.1 200 OK\r\n{length}\r\n\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(body)
        if not with_length:
            await writer.drain()
            writer.close()

    async def run() -> tuple[list[Answer], int, int]:
        config = replace(FETCH, max_bytes_in_flight=300_000, total_timeout_s=0.8, read_timeout_s=5.0)
        async with Fetcher(config, LIMITS) as fetcher:
            budget, highest = fetcher._budget, 0

            async def one(number: int) -> Answer:
                nonlocal highest
                answer = await fetcher.fetch(f"{base_url}/{number}.jpg")
                highest = max(highest, budget.held)
                await asyncio.sleep(0.1)  # the decoder's
                fetcher.let_go(answer)
                return answer

            answers = await asyncio.gather(*map(one, range(12)))
            return answers, highest, budget.held

    with raw_server(talk) as (base_url, _):
        began = time.monotonic()
        answers, highest, left = asyncio.run(run())
        seconds = time.monotonic() - began
    assert [answer.status for answer in answers] == ["ok"] * 12
    assert highest <= 300_000
    assert left == 0
    assert seconds >= 12 / at_once * 0.1, "no more at once"
    assert max(answer.milliseconds for answer in answers) < 800
    assert with_length or seconds > 0.8


def test_the_budget_comes_back_from_whatever_fails() -> None:
    async def run(base_url: str) -> int:
        config = replace(FETCH, max_bytes_in_flight=1000, max_attempts=2)
        async with Fetcher(config, LIMITS) as fetcher:
            names = ("short", "text", "empty", "long", "picture")
            for name in names * 3:
                fetcher.let_go(await fetcher.fetch(f"{base_url}/{name}"))
            task = asyncio.create_task(fetcher.fetch(f"{base_url}/stalls"))
            await asyncio.sleep(0.2)
            assert fetcher._budget.held > 0
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return fetcher._budget.held

    async def talk(head: str, writer: asyncio.StreamWriter) -> None:
        name = head.split()[1]
        if name == "/short":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + JPEG[:100])
            writer.close()
        elif name == "/stalls":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + JPEG[:100])
            await asyncio.sleep(60)
        else:
            bodies = {"/text": b"no picture" * 50, "/empty": b"", "/long": JPEG + bytes(400_000), "/picture": JPEG}
            writer.write(http(bodies[name]))

    with raw_server(talk) as (base_url, _):
        assert asyncio.run(run(base_url)) == 0


def test_a_budget_is_given_out_in_turn() -> None:
    async def run() -> None:
        budget, order = ByteBudget(100), list[int]()

        async def one(number: int, wanted: int) -> None:
            held = await budget.take(wanted)
            order.append(number)
            await asyncio.sleep(1.0)
            budget.give(held)

        tasks = [asyncio.create_task(one(*item)) for item in enumerate((60, 50, 10, 1000, 30, 100))]
        await asyncio.sleep(0.5)
        assert (order, budget.held) == ([0], 60), "small ones do not push in"
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (order, budget.held) == ([0, 2, 3, 4, 5], 0), "more than there is means all there is"
        assert budget.take_now(101) == 100
        assert budget.take_now(1) is None

    on_fast_clock(run())


def test_a_busy_machine_has_fewer_links_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MAX_LAG_S", 0.1)

    async def run() -> tuple[int, int]:
        async with Fetcher(FETCH, LIMITS) as fetcher:
            before = fetcher.num_places
            for _ in range(50):
                await asyncio.sleep(0.001)
                time.sleep(0.5)  # somebody keeps the loop
                if fetcher.num_places < before:
                    break
            return before, fetcher.num_places

    before, after = asyncio.run(run())
    assert after <= before / 2


@pytest.mark.slow
def test_a_million_links_of_many_hosts_do_not_grow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    async def hop(self: Fetcher, target: Any, answer: Answer, take: Any) -> bytes:
        if target.port == 81:
            raise FetchError("timeout.connect", "simulated")
        answer.http_status = 503 if target.port == 82 else 200
        return JPEG

    async def run() -> list[int]:
        peaks = []
        async with Fetcher(FetchConfig(), LIMITS) as fetcher:
            for part in range(100):
                hosts = [(part * 10_000 + n) % 300_000 for n in range(10_000)]
                links = [fetcher.fetch(f"http://host{n}.test:{80 + n % 4}/{part}") for n in hosts]
                await asyncio.gather(*links)
                peaks.append(psutil.Process().memory_info().rss)
        return peaks

    monkeypatch.setattr(Fetcher, "_hop", hop)
    peaks, _ = on_fast_clock(run())
    assert max(peaks) - peaks[9] < 30e6, [round(peak / 1e6) for peak in peaks[::10]]
