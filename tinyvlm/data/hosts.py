"""Manners at one host: how many at a time, how often, when not at all; and which hosts are dead.

    row ──enter──▶ host's queue ─┬─ a connection is free, the pause is over, the rate allows it ──▶ asks ──leave──▶
                                 └─ host closed or dead: refused at once, the whole queue with it

One `Hosts` serves one worker.  Rows are routed to workers by host, so what it knows holds for the whole run.  Two kinds
of hosts are asked by several workers, each of which takes its part of their budget: the giants, whose links are spread
over all, and those that only redirects lead to.  What is remembered is bounded: a host about which there is nothing to
remember is forgotten, and the idle that were not asked for longest make room for others.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from tinyvlm.data.addresses import NotAsked

K = TypeVar("K")
V = TypeVar("V")

MAX_HOSTS = 20_000
"""Hosts remembered beyond those in use, newest first; some 10 MB."""
DEAD_S = 600.0
"""How long a dead host is not asked."""
CLOSED_S = 600.0
"""How long a host is left alone that throttled us again and again."""
MAX_STRIKES = 6
"""Pauses in a row, without a picture between them, after which a host is left alone."""
LONGEST_PAUSE_S = 3600.0
"""A longer `Retry-After` counts as this long."""


class Bounded(OrderedDict[K, V]):
    """A dictionary that forgets what was set longest ago."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self._most:
            self.popitem(last=False)


class _Host:
    """What is known of one host name.  Times are the loop's, s."""

    __slots__ = ("active", "limit", "next_at", "paused_until", "spacing_s", "strikes", "timer", "waiting")

    def __init__(self, limit: int, spacing_s: float) -> None:
        self.limit, self.spacing_s = limit, spacing_s
        self.active = self.strikes = 0
        self.next_at = self.paused_until = 0.0
        self.waiting: deque[tuple[asyncio.Future[None], int | None]] = deque()
        self.timer: asyncio.TimerHandle | None = None

    def idle(self) -> bool:
        return not self.active and not self.waiting


@dataclass(slots=True)
class _Door:
    """Whether anybody answers at one port of a host.  Times are the loop's, s."""

    failures: int = 0
    """In a row."""
    dead_until: float = 0.0
    answered_at: float = -math.inf


class Hosts:
    """The queues of all hosts, and what became of asking them."""

    def __init__(
        self,
        *,
        per_host: int,
        rate: float,
        backoff_s: float,
        max_wait_s: float,
        dead_after: int,
        shared: Collection[str] = (),
        num_workers: int = 1,
    ) -> None:
        """`rate`: requests a second, 0: no limit.  `dead_after`: failures to connect in a row, 0: never dead."""
        self._per_host, self._rate, self._backoff_s, self._max_wait_s = per_host, rate, backoff_s, max_wait_s
        self._dead_after, self._shared, self._num_workers = dead_after, frozenset(shared), num_workers
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._doors: Bounded[tuple[str, int | None], _Door] = Bounded(MAX_HOSTS)
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._hosts)

    async def enter(self, name: str, port: int | None, *, first: bool = False, is_own: bool = True) -> None:
        """Wait until the host may be asked; `leave` must follow.  `first`: before the others in its queue.

        `is_own`: for a link of this worker; otherwise somebody else's link led here, and other workers may ask too.

        Raises:
            NotAsked: `dead.host`, or `throttled` if it is paused for longer than anybody should wait.
        """
        host = self._get(name, is_own=is_own)
        self._refuse(name, port, host)
        if not host.waiting and host.active < host.limit and self._ready_at(host) <= self._loop.time():
            self._admit(host)
            return
        future: asyncio.Future[None] = self._loop.create_future()
        (host.waiting.appendleft if first else host.waiting.append)((future, port))
        self._pump(host)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave(name)  # admitted in the same moment
            raise

    def leave(self, name: str) -> None:
        """Give the place at the host to the next in its queue."""
        host = self._hosts[name]
        host.active -= 1
        self._pump(host)
        if host.idle() and not host.strikes and self._ready_at(host) <= self._loop.time():
            del self._hosts[name]

    def may_ask(self, name: str, port: int | None) -> bool:
        """Whether nothing was learnt since `enter` that forbids to ask now."""
        return self._hosts[name].paused_until <= self._loop.time() and not self._is_dead(name, port)

    def answered(self, name: str, port: int | None, *, throttled: bool, asked_s: float | None = None) -> None:
        """Note an HTTP answer.  `throttled`: 429 or 503; `asked_s`: its `Retry-After`."""
        self._doors[name, port] = _Door(answered_at=self._loop.time())
        host = self._get(name)
        if throttled:
            self._pause(name, host, asked_s)
        else:
            host.strikes = 0

    def failed(self, name: str, port: int | None, began_at: float) -> None:
        """Note that a request that began at `began_at` (the loop's time) got no answer of any kind."""
        now = self._loop.time()
        door = self._doors.get((name, port)) or _Door()
        if began_at < door.answered_at:  # others were answered meanwhile: it is the link, not the host
            return
        door.failures += 1
        self._doors[name, port] = door
        if self._dead_after and door.failures >= self._dead_after and door.dead_until <= now:
            door.dead_until = now + DEAD_S
            host = self._hosts.get(name)
            if host is not None:
                doomed = [waiting for waiting in host.waiting if waiting[1] == port]
                host.waiting = deque(waiting for waiting in host.waiting if waiting[1] != port)
                _refuse_all(doomed, _dead(door))

    def _get(self, name: str, *, is_own: bool = False) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            self._make_room()
            host = self._hosts[name] = _Host(*self._budget(self._num_workers))
        if is_own and name not in self._shared:  # its links are this worker's alone, wherever else redirects lead
            host.limit, host.spacing_s = self._budget(1)
        self._hosts.move_to_end(name)
        return host

    def _budget(self, num_workers: int) -> tuple[int, float]:
        """Connections, and seconds between requests, of one of so many workers that ask a host."""
        return max(1, self._per_host // num_workers), num_workers / self._rate if self._rate else 0.0

    def _make_room(self) -> None:
        for _ in range(len(self._hosts) if len(self._hosts) >= MAX_HOSTS else 0):
            name, oldest = next(iter(self._hosts.items()))
            if oldest.idle():
                del self._hosts[name]
                return
            self._hosts.move_to_end(name)

    def _is_dead(self, name: str, port: int | None) -> bool:
        door = self._doors.get((name, port))
        return door is not None and door.dead_until > self._loop.time()

    def _refuse(self, name: str, port: int | None, host: _Host) -> None:
        if self._is_dead(name, port):
            raise _dead(self._doors[name, port])
        left_s = host.paused_until - self._loop.time()
        if left_s > self._max_wait_s:
            raise _closed(left_s)

    def _ready_at(self, host: _Host) -> float:
        return max(host.next_at, host.paused_until)

    def _admit(self, host: _Host) -> None:
        host.active += 1
        if host.spacing_s:
            host.next_at = max(host.next_at, self._loop.time()) + host.spacing_s

    def _pump(self, host: _Host) -> None:
        """Let in whoever may come in now, and set the clock for the next."""
        while host.waiting:
            future, _ = host.waiting[0]
            if future.done():
                host.waiting.popleft()
                continue
            if host.active >= host.limit:
                return
            wait_s = self._ready_at(host) - self._loop.time()
            if wait_s > 0:
                if host.timer is None:
                    host.timer = self._loop.call_later(wait_s, self._ring, host)
                return
            host.waiting.popleft()
            self._admit(host)
            future.set_result(None)

    def _ring(self, host: _Host) -> None:
        host.timer = None
        self._pump(host)

    def _pause(self, name: str, host: _Host, asked_s: float | None) -> None:
        now = self._loop.time()
        if host.paused_until <= now:  # requests that were under way when the pause began say nothing new
            host.strikes += 1
        backoff_s = self._backoff_s * 2.0 ** (host.strikes - 1) * random.uniform(0.5, 1.5)
        pause_s = min(asked_s or min(backoff_s, self._max_wait_s), LONGEST_PAUSE_S)
        if host.strikes >= MAX_STRIKES:
            pause_s = max(pause_s, CLOSED_S)
        host.paused_until = max(host.paused_until, now + pause_s)
        if pause_s > self._max_wait_s:
            doomed, host.waiting = host.waiting, deque()
            _refuse_all(doomed, _closed(pause_s))


def _refuse_all(waiting: Iterable[tuple[asyncio.Future[None], int | None]], error: NotAsked) -> None:
    for future, _ in waiting:
        if not future.done():
            future.set_exception(error)


def _dead(door: _Door) -> NotAsked:
    return NotAsked("dead.host", f"not asked: its host had not answered {door.failures} times in a row")


def _closed(left_s: float) -> NotAsked:
    return NotAsked("throttled", f"the host wants to be left alone for {left_s:.0f} s")
