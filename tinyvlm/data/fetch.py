"""One link → bytes or a reason: deadlines, retries, redirects, limits and manners.

    fetch(url): attempt ─┬─ hop ─ hop ─ … ─▶ body        each hop: address checked (urls, addresses), robots asked
                         │                               (robots), a place in its host's queue (hosts), then one among
                         └─ transient failure: again     all (places); waiting for anything holds no place among all

One `Fetcher` lives as long as its worker and takes millions of links.  How each ended teaches it: `hosts` which ones
are dead or want a pause, `places` how much the machine and its network bear, `breaker` that nothing works any more.
Nothing here decodes pictures or knows of tables; `download.py` does.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self, TypeVar

import aiohttp
from aiohttp import hdrs
from yarl import URL

from tinyvlm import __version__, images
from tinyvlm.config import speed
from tinyvlm.data.addresses import FetchError, Known, NotAsked, Resolver, is_invalid
from tinyvlm.data.breaker import GRACE_S, SILENT, Breaker
from tinyvlm.data.budget import ByteBudget
from tinyvlm.data.hosts import Hosts
from tinyvlm.data.places import Places
from tinyvlm.data.responses import PICTURES, REDIRECTS, THROTTLED, explain, opt_out, read_body, read_text, refusal
from tinyvlm.data.robots import MAX_BYTES, Robots
from tinyvlm.data.session import open_session, tls_context, tune_process
from tinyvlm.data.urls import check_url, join, unescape
from tinyvlm.errors import ConfigError, NetworkError
from tinyvlm.schema import OK, TAKEN_DOWN
from tinyvlm.takedown import DETAIL, Takedown

_log = logging.getLogger(__name__)
T = TypeVar("T")

TICK_S = 0.25
"""How often the event loop's lag is measured."""
# Beginnings of statuses.  What counts towards a dead host if no HTTP answer came; a name that does not exist is not
# among them: the DNS cache says so at once, and says more.
_NO_ANSWER = ("dead.refused", "broken.", "timeout.")
# What too many connections may bring about (`places`).
_TROUBLE = ("timeout.", "broken.reset", "broken.dns", "broken.network")
# What shows the breaker that the network works, although no HTTP answer came.
_SIGNS_OF_LIFE = ("dead.refused", "dead.protocol", "timeout.read", "broken.reset")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How links are fetched."""

    user_agent: str = f"TinyVLM/{__version__} (collects pictures for a vision-language model)"
    """Says who asks; add an address at which site owners reach you."""
    respect_opt_outs: bool = True
    """Leave pictures alone whose server sends `X-Robots-Tag: noai` (noimageai, noindex, …) or `tdm-reservation: 1`."""
    respect_robots: bool = False
    """Ask each site's robots.txt and tdmrep.json first; two more requests for each site."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that may have private addresses, as written in the links, for example 127.0.0.1."""
    ca_file: str = ""
    """Certificates (PEM) that are trusted besides the system's, for servers of an intranet."""
    dns_timeout_s: float = 10.0
    """To look a host name up, s."""
    connect_timeout_s: float = 5.0
    """To open a connection, encryption included, s."""
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
    dead_after: int = 5
    """Failures in a row to get any answer from a host after which its other links are not asked for ten minutes
    (`dead.host`); 0: always ask."""
    max_redirects: int = 5
    """Redirects followed for one link."""
    concurrency: int = speed(256)
    """Most links in flight in one worker; how many really are follows how well it goes."""
    max_bytes_in_flight: int = speed(256 << 20)
    """Most bytes of bodies that one worker holds, from the first byte until the picture is decoded; a body without a
    length counts as limits.max_bytes.  Links wait for room, and their deadlines with them."""
    concurrency_per_host: int = speed(8)
    """Links in flight at one host."""
    rate_per_host: float = speed(20.0)
    """Requests a second to one host; 0: no limit.  A page with pictures costs a host about as much a second."""
    circuit_breaker: bool = speed(True)
    """Stop when host after host gives no sign of life: the network is broken, not the links."""
    dns_threads: int = speed(32)
    """Name lookups at a time in one worker."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "concurrency_per_host", "dns_threads", "max_attempts", "max_bytes_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"fetch.{name} wants at least 1, but got {getattr(self, name)}.")
        for name in ("rate_per_host", "dead_after", "backoff_s", "max_wait_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"fetch.{name} wants 0 or more, but got {getattr(self, name)}.")


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
    held_bytes: int = 0
    """Of the worker's budget, for `body`; `Fetcher.let_go` brings them back."""
    deadline: asyncio.Timeout | None = field(default=None, repr=False)
    """Of the request that is under way."""


class Fetcher:
    """An async context manager around one session; `fetch` never raises for a bad link."""

    def __init__(
        self,
        config: FetchConfig,
        limits: images.LimitConfig,
        dns_cache: dict[str, Known] | None = None,
        *,
        shared_hosts: Collection[str] = (),
        num_workers: int = 1,
        takedown: Takedown | None = None,
    ) -> None:
        """`shared_hosts`: names of hosts that all `num_workers` workers ask, each with its part of their budget.
        `takedown`: links and hosts that are not asked, also where others redirect to them.

        Raises:
            ConfigError: the file of certificates cannot be read.
        """
        self.config, self.limits = config, limits
        self._dns_cache = {} if dns_cache is None else dns_cache
        self._shared_hosts, self._num_workers = shared_hosts, num_workers
        self._takedown = takedown or Takedown()
        self._tls = tls_context(config.ca_file)
        self._breaker = Breaker()
        self._stopped = ""
        self._tasks: set[asyncio.Task[object]] = set()

    async def __aenter__(self) -> Self:
        config = self.config
        tune_process()
        self._hosts = Hosts(
            per_host=config.concurrency_per_host,
            rate=config.rate_per_host,
            backoff_s=config.backoff_s,
            max_wait_s=config.max_wait_s,
            dead_after=config.dead_after,
            shared=self._shared_hosts,
            num_workers=self._num_workers,
        )
        self._budget = ByteBudget(config.max_bytes_in_flight)
        self._places = Places(config.concurrency, settle_s=config.connect_timeout_s)
        self._robots = Robots(self._read_text) if config.respect_robots else None
        self._resolver = Resolver(config.allow_hosts, self._dns_cache, config.dns_threads, config.dns_timeout_s)
        self._session = open_session(
            self._resolver,
            self._tls,
            user_agent=config.user_agent,
            connect_timeout_s=config.connect_timeout_s,
            read_timeout_s=config.read_timeout_s,
        )
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        await self._session.close()
        await self._resolver.close()

    @property
    def num_places(self) -> int:
        """How many links may be in flight now."""
        return int(self._places.limit)

    def let_go(self, answer: Answer) -> None:
        """The body is held no longer: others may have its room."""
        self._budget.give(answer.held_bytes)
        answer.held_bytes = 0

    async def fetch(self, url: str) -> Answer:
        """The bytes behind `url`, or why there are none; `let_go` must follow when they are not needed any more.

        Raises:
            NetworkError: nothing answers any more; all calls that wait get it.
        """
        self._check_stopped()
        answer = Answer(final_url=url)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            answer.body = await self._persist(unescape(url), answer, self._take_picture, self._robots)
        except FetchError as failure:
            answer.status, answer.detail = failure.status, failure.detail[:200]
        except asyncio.CancelledError:
            if self._stopped and task.uncancel() == 0:  # by `_stop`, not by the caller
                self._check_stopped()
            raise
        finally:
            self._tasks.discard(task)
            if answer.body is None:
                self.let_go(answer)
        return answer

    async def _persist(self, url: str, answer: Answer, take: _Take[T], robots: Robots | None) -> T:
        """Attempts until one succeeds or another would not help; raises the last failure that was met."""
        failure: FetchError | None = None
        while True:
            answer.attempts += 1
            try:
                found = await self._attempt(url, answer, take, robots)
            except NotAsked as error:
                answer.attempts -= 1
                failure = failure or error  # that its host died or closed meanwhile is not why this link failed
                break
            except FetchError as error:
                failure = error
            except Exception as error:  # a bug of ours costs a row, not the run
                _log.exception("cannot fetch %s", url)
                failure = FetchError("internal_error", f"{type(error).__name__}: {error}")
            else:
                self._note_attempt(answer, None, given_up=False)
                return found
            given_up = not failure.transient or answer.attempts >= self.config.max_attempts
            self._note_attempt(answer, failure, given_up=given_up)
            if given_up:
                break
            if failure.status != "throttled":  # those wait in their host's queue until its pause is over
                await asyncio.sleep(self._pause_s(answer.attempts))
        raise failure

    def _pause_s(self, attempts: int) -> float:
        if self._breaker.suspects:
            return GRACE_S
        return min(self.config.max_wait_s, self.config.backoff_s * 2.0 ** (attempts - 1) * random.uniform(0.5, 1.5))

    async def _attempt(self, url: str, answer: Answer, take: _Take[T], robots: Robots | None) -> T:
        """Follow `url` to its end, noting in `answer` what was met."""
        left_s = self.config.total_timeout_s
        first = answer.attempts > 1  # who has begun goes before those who have not
        seen: set[str] = set()
        own_host: str | None = None
        while True:
            answer.final_url = url
            target = check_url(url, self.config.allow_hosts)
            url = str(target)
            if self._takedown.lists_link(url):
                raise NotAsked(TAKEN_DOWN, DETAIL)
            if url in seen:
                raise FetchError("dead.redirects", "redirects in a circle")
            if len(seen) > self.config.max_redirects:
                raise FetchError("dead.redirects", f"more than {self.config.max_redirects}")
            seen.add(url)
            if robots is not None:
                await robots.check(target)
            before_ms = answer.milliseconds
            if own_host is None and take != self._take_text:  # robots.txt may be that of a redirect's target
                own_host = target.raw_host
            found = await self._ask(target, answer, take, left_s, first, is_own=target.raw_host == own_host)
            if not isinstance(found, _Elsewhere):
                return found
            url, first = found.url, True
            left_s -= (answer.milliseconds - before_ms) / 1000

    async def _ask(
        self, target: URL, answer: Answer, take: _Take[T], left_s: float, first: bool, *, is_own: bool
    ) -> T | _Elsewhere:
        """One request in its turn; what came of it is remembered.  `is_own`: see `Hosts.enter`."""
        name, port = target.raw_host or "", target.port
        failure: FetchError | None = None
        async with self._place(name, port, first, is_own):
            answer.final_url, answer.http_status = str(target), None
            started, began_at = time.perf_counter(), asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(left_s) as answer.deadline:
                    return await self._hop(target, answer, take)
            except TimeoutError:
                failure = FetchError(
                    "timeout.total", f"not done after {self.config.total_timeout_s:g} s", transient=True
                )
                raise failure from None
            except FetchError as error:
                failure = error
                raise
            finally:
                answer.milliseconds += (time.perf_counter() - started) * 1000
                self._note_request(name, port, answer.http_status, failure, began_at)

    @asynccontextmanager
    async def _place(self, name: str, port: int | None, first: bool, is_own: bool) -> AsyncIterator[None]:
        """A place at the host, then one among all: a slow host must not hold places that others could use."""
        while True:
            await self._hosts.enter(name, port, first=first, is_own=is_own)
            try:
                await self._places.enter(first=first)
            except BaseException:
                self._hosts.leave(name)
                raise
            try:
                if self._hosts.may_ask(name, port):
                    yield
                    return
            finally:
                self._places.leave()
                self._hosts.leave(name)
            first = True  # the host was paused or died while this one waited for a place among all

    async def _hop(self, target: URL, answer: Answer, take: _Take[T]) -> T | _Elsewhere:
        host = target.raw_host or ""
        if ":" not in host and not host.replace(".", "").isdigit():
            await self._resolver.look_up(host)  # has a deadline of its own; the connection finds the answer
        try:
            async with self._session.get(target, allow_redirects=False) as response:
                answer.http_status = response.status
                location = response.headers.get(hdrs.LOCATION) if response.status in REDIRECTS else None
                if location is not None:
                    return _Elsewhere(_join(target, location))
                return await take(response, answer)
        except aiohttp.ClientError as error:
            raise explain(error) from None

    async def _take_picture(self, response: aiohttp.ClientResponse, answer: Answer) -> bytes:
        if response.status not in PICTURES:
            raise refusal(response.status, response.headers.get(hdrs.RETRY_AFTER))
        if self.config.respect_opt_outs and (refused := opt_out(response.headers)):
            raise refused
        most, announced = self.limits.max_bytes, response.content_length
        if (announced or 0) > most:
            raise FetchError("too_large", f"{announced} bytes announced, {most} allowed")
        held = await self._hold(most if announced is None else announced, answer)
        try:
            body = await read_body(response, most)
        except BaseException:
            self._budget.give(held)
            raise
        self._budget.give(held - len(body))
        answer.held_bytes = len(body)
        return body

    async def _hold(self, num_bytes: int, answer: Answer) -> int:
        """Room for a body.  While it waits the deadline does, and it counts as no time on the network."""
        held, deadline, loop = self._budget.take_now(num_bytes), answer.deadline, asyncio.get_running_loop()
        if held is None and deadline is not None:
            due, began = deadline.when(), loop.time()
            deadline.reschedule(None)
            held = await self._budget.take(num_bytes)
            answer.milliseconds -= (loop.time() - began) * 1000
            deadline.reschedule(due and due + loop.time() - began)
        return held or 0

    async def _read_text(self, url: str) -> bytes:
        """What `robots` reads."""
        return await self._persist(url, Answer(), self._take_text, None)

    async def _take_text(self, response: aiohttp.ClientResponse, answer: Answer) -> bytes:
        return await read_text(response, MAX_BYTES)

    def _note_request(
        self, name: str, port: int | None, code: int | None, failure: FetchError | None, began_at: float
    ) -> None:
        if code is not None:
            asked_s = failure.wait_s if failure else None
            self._hosts.answered(name, port, throttled=code in THROTTLED, asked_s=asked_s)
        elif failure is not None and failure.status.startswith(_NO_ANSWER):
            self._hosts.failed(name, port, began_at)
        self._places.record(trouble=failure is not None and failure.status.startswith(_TROUBLE))

    def _note_attempt(self, answer: Answer, failure: FetchError | None, *, given_up: bool) -> None:
        """Tell the breaker; stop everybody if it says so."""
        if not self.config.circuit_breaker:
            return
        now = asyncio.get_running_loop().time()
        if failure is None or failure.status not in SILENT:
            if failure is None or answer.http_status is not None or failure.status.startswith(_SIGNS_OF_LIFE):
                self._breaker.answered(now)
            return
        host = URL(answer.final_url or "", encoded=True).raw_host or ""
        if is_invalid(host):  # nobody was asked
            return
        stop = self._breaker.silent(host, failure, now, given_up=given_up)
        if stop is not None and not self._stopped:
            self._stopped = str(stop)
            for task in self._tasks - {asyncio.current_task()}:
                task.cancel()
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopped:
            raise NetworkError(self._stopped)

    async def _watch(self) -> None:
        """Measure how late the loop comes, and let `places` follow."""
        loop = asyncio.get_running_loop()
        while True:
            lag_s = 0.0
            for _ in range(4):
                due = loop.time() + TICK_S
                await asyncio.sleep(TICK_S)
                lag_s += (loop.time() - due) / 4
            self._places.adapt(loop.time(), lag_s)


@dataclass(frozen=True)
class _Elsewhere:
    """Where a redirect leads."""

    url: str


_Take = Callable[[aiohttp.ClientResponse, Answer], Awaitable[T]]


def _join(base: URL, location: str) -> str:
    try:
        return join(base, location)
    except ValueError as error:
        raise FetchError("bad_url", f"redirected to {location[:80]!r}: {error}") from None
