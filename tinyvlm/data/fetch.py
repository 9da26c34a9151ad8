"""One link → bytes or a reason: deadlines, retries, redirects, limits and manners.

    fetch(url): attempt ─┬─ hop ─ hop ─ … ─▶ body            each hop: address checked, a place in its host's queue
                         └─ transient failure: wait, again    waiting takes up no place

Nothing here decodes pictures or knows of tables; `download.py` does.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Self

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDictProxy
from yarl import URL

from tinyvlm import __version__, images
from tinyvlm.config import speed
from tinyvlm.data.addresses import FetchError, Known, Resolver, check_url
from tinyvlm.errors import ConfigError
from tinyvlm.schema import OK

_log = logging.getLogger(__name__)

REDIRECTS = {301, 302, 303, 307, 308}
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
THROTTLED = {429, 503}
OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "none"}
"""Directives of `X-Robots-Tag` that keep a picture out; "none" stands for "noindex, nofollow"."""
AGENT = "tinyvlm"


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How links are fetched."""

    user_agent: str = f"TinyVLM/{__version__} (collects pictures for a vision-language model)"
    """Says who asks; add an address at which site owners reach you."""
    respect_opt_outs: bool = True
    """Leave pictures alone whose server sends `X-Robots-Tag: noai` (noimageai, noindex, …) or `tdm-reservation: 1`."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that may have private addresses, as written in the links, for example 127.0.0.1."""
    connect_timeout_s: float = 5.0
    """To open a connection, s."""
    read_timeout_s: float = 10.0
    """Between two pieces of an answer, s."""
    total_timeout_s: float = 30.0
    """For one attempt: name lookup, redirects and body, without waiting in queues, s."""
    max_attempts: int = 3
    """Attempts for failures that may pass: timeouts, resets, 5xx, 429."""
    backoff_s: float = 1.0
    """Pause after the first failed attempt, doubled after each further one, ±50 % by lot, s."""
    max_wait_s: float = 30.0
    """Longest pause; a server that asks for more (`Retry-After`) is left alone, s."""
    max_redirects: int = 5
    """Redirects followed for one link."""
    concurrency: int = speed(256)
    """Links in flight in one worker."""
    concurrency_per_host: int = speed(16)
    """Links in flight at one host, in one worker."""
    dns_threads: int = speed(32)
    """Name lookups at a time in one worker."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "concurrency_per_host", "dns_threads", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"fetch.{name} wants at least 1, but got {getattr(self, name)}.")


@dataclass
class Answer:
    """What became of one link."""

    status: str = OK
    detail: str | None = None
    body: bytes | None = None
    http_status: int | None = None
    """Of the last answer."""
    final_url: str | None = None
    """The last address asked."""
    attempts: int = 0
    milliseconds: float = 0.0
    """Spent on the network, without pauses and queues."""


class Fetcher:
    """An async context manager around one session; `fetch` never raises for a bad link."""

    def __init__(self, config: FetchConfig, limits: images.LimitConfig, dns_cache: dict[str, Known]) -> None:
        self.config, self.limits = config, limits
        self._dns_cache = dns_cache
        self._places = asyncio.Semaphore(config.concurrency)
        self._places_at: dict[tuple[str | None, int | None], asyncio.Semaphore] = {}
        self._random = random.Random()

    async def __aenter__(self) -> Self:
        config = self.config
        self._resolver = Resolver(config.allow_hosts, self._dns_cache, config.dns_threads)
        connector = aiohttp.TCPConnector(resolver=self._resolver, use_dns_cache=False, limit=config.concurrency)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=config.connect_timeout_s, sock_read=config.read_timeout_s
            ),
            headers={
                hdrs.USER_AGENT: config.user_agent,
                hdrs.ACCEPT: "image/*",
                hdrs.ACCEPT_ENCODING: "identity",
            },
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._resolver.close()

    async def fetch(self, url: str) -> Answer:
        """The bytes behind `url`, or why there are none."""
        answer = Answer(final_url=url)
        while True:
            answer.attempts += 1
            try:
                answer.body = await self._attempt(url, answer)
                return answer
            except FetchError as error:
                failure = error
            except Exception as error:  # a bug of ours costs a row, not the run
                _log.exception("cannot fetch %s", url)
                failure = FetchError("internal_error", f"{type(error).__name__}: {error}")
            wait_s = self._wait_s(failure, answer.attempts)
            if wait_s is None:
                answer.status, answer.detail = failure.status, failure.detail[:200]
                return answer
            await asyncio.sleep(wait_s)

    def _wait_s(self, failure: FetchError, attempts: int) -> float | None:
        """How long to wait before the next attempt; None: give up."""
        if not failure.transient or attempts >= self.config.max_attempts:
            return None
        lot = self._random.uniform(0.5, 1.5)
        pause_s = min(self.config.max_wait_s, self.config.backoff_s * 2.0 ** (attempts - 1) * lot)
        if failure.wait_s is None:
            return pause_s
        return max(failure.wait_s, pause_s) if failure.wait_s <= self.config.max_wait_s else None

    async def _attempt(self, url: str, answer: Answer) -> bytes:
        """Follow `url` to its body, noting in `answer` what was met."""
        left_s = self.config.total_timeout_s
        seen: set[str] = set()
        while True:
            answer.final_url, answer.http_status = url, None
            target = check_url(url, self.config.allow_hosts)
            seen.add(str(target))
            async with self._place(target):
                started = time.perf_counter()
                try:
                    async with asyncio.timeout(left_s):
                        found = await self._hop(target, answer)
                except TimeoutError:
                    detail = f"not done after {self.config.total_timeout_s:g} s"
                    raise FetchError("timeout.total", detail, transient=True) from None
                finally:
                    took_s = time.perf_counter() - started
                    answer.milliseconds += took_s * 1000
            if isinstance(found, bytes):
                return found
            left_s -= took_s
            url = str(found)
            if url in seen:
                raise FetchError("dead.redirects", "redirects in a circle")
            if len(seen) > self.config.max_redirects:
                raise FetchError("dead.redirects", f"more than {self.config.max_redirects}")

    @asynccontextmanager
    async def _place(self, target: URL) -> AsyncIterator[None]:
        """A place in the host's queue, then one among all: a slow host must not hold places that others could use."""
        place = (target.host, target.port)
        at_host = self._places_at.setdefault(place, asyncio.Semaphore(self.config.concurrency_per_host))
        async with at_host, self._places:
            yield

    async def _hop(self, target: URL, answer: Answer) -> bytes | URL:
        """One request: the body, or where it points to instead."""
        try:
            async with self._session.get(target, allow_redirects=False) as response:
                answer.http_status = response.status
                if response.status in REDIRECTS:
                    return _location(response)
                self._check_status(response)
                self._check_opt_out(response.headers)
                return await self._read(response)
        except aiohttp.ClientError as error:
            raise _explain(error) from None

    def _check_status(self, response: aiohttp.ClientResponse) -> None:
        code = response.status
        if code == 200:
            return
        status = _status_of(code)
        wait_s = _retry_after_s(response.headers.get(hdrs.RETRY_AFTER)) if code in TRANSIENT else None
        raise FetchError(status, f"HTTP {code}", transient=code in TRANSIENT, wait_s=wait_s)

    def _check_opt_out(self, headers: CIMultiDictProxy[str]) -> None:
        if not self.config.respect_opt_outs:
            return
        for line in headers.getall("X-Robots-Tag", []):
            agent, colon, rules = line.lower().rpartition(":")
            if colon and agent.strip() not in (AGENT, "*"):
                continue  # meant for another robot
            found = OPT_OUTS & {rule.strip() for rule in rules.split(",")}
            if found:
                raise FetchError("optout.header", f"X-Robots-Tag: {min(found)}")
        if headers.get("tdm-reservation", "").strip() == "1":
            raise FetchError("optout.tdm", "tdm-reservation: 1")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The body, given up as soon as it is too long or cannot be a picture."""
        most = self.limits.max_bytes
        if (response.content_length or 0) > most:
            raise FetchError("too_large", f"{response.content_length} bytes announced, {most} allowed")
        encoding = response.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
        body = bytearray()
        sniffed = encoding != "identity"
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > most:
                raise FetchError("too_large", f"more than {most} bytes")
            if not sniffed and len(body) >= images.SIGNATURE_BYTES:
                sniffed = True
                if images.sniff(bytes(body[: images.SIGNATURE_BYTES])) is None:
                    raise FetchError("not_image", f"{response.content_type}, begins with {bytes(body[:12])!r}")
        if not body:
            raise FetchError("not_image", "empty answer")
        return bytes(body) if encoding == "identity" else _unpack(bytes(body), encoding, most)


def _status_of(code: int) -> str:
    """Our status for an HTTP status that brings no picture."""
    if code in THROTTLED:
        return "throttled"
    if code in (404, 410):
        return "dead.http404"
    if code in (401, 403, 451):
        return f"blocked.{code}"
    return "broken.http5xx" if code >= 500 else "dead.http"


def _location(response: aiohttp.ClientResponse) -> URL:
    location = response.headers.get(hdrs.LOCATION)
    if not location:
        raise FetchError("dead.http", f"HTTP {response.status} without a Location")
    try:
        return response.url.join(URL(location)).with_fragment(None)
    except ValueError as error:
        raise FetchError("bad_url", f"redirected to {location[:80]!r}: {error}") from None


def _explain(error: aiohttp.ClientError) -> FetchError:
    """What aiohttp met, in our statuses."""
    detail = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return FetchError("timeout.connect", "no connection in time", transient=True)
    if isinstance(error, aiohttp.ServerTimeoutError):
        return FetchError("timeout.read", "no answer in time", transient=True)
    if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch)):
        return FetchError("dead.tls", f"TLS: {detail}")
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, ConnectionRefusedError):
            return FetchError("dead.refused", "refused")
        return FetchError("broken.reset", detail, transient=True)
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("bad_url", detail)
    if isinstance(error, aiohttp.ClientResponseError):
        return FetchError("dead.protocol", f"the answer is not HTTP: {error.message}")
    return FetchError("broken.reset", detail, transient=True)


def _retry_after_s(text: str | None) -> float | None:
    """`Retry-After` as seconds from now; it may hold a number or a date."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _unpack(body: bytes, encoding: str, most: int) -> bytes:
    """Undo a packing that we did not ask for, never beyond `most` bytes."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("not_image", f"packed as {encoding}, which we did not ask for")
    unpacker = zlib.decompressobj(wbits=47 if encoding != "deflate" else 15)
    try:
        plain = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise FetchError("corrupt", f"{encoding}: {error}") from None
    if len(plain) > most:
        raise FetchError("too_large", f"more than {most} bytes unpacked")
    return plain
