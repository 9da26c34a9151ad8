"""robots.txt (RFC 9309) and tdmrep.json: what a site's owner asks of robots, read once for each site.

    URL ──check──▶ rules of its origin: remembered, or read through the same safe road as pictures (`read`)

A robots.txt that is not there (4xx) allows everything; one that cannot be read now (5xx, no connection, too slow)
allows nothing for a while, and rows end with the status of that failure: the owner has not said no.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from protego import Protego
from yarl import URL

from tinyvlm.data.addresses import FetchError
from tinyvlm.data.responses import AGENT

MAX_BYTES = 500 * 1024
"""How much of a robots.txt is read; RFC 9309 §2.5 asks for at least this."""
MAX_ORIGINS = 20_000
"""Sites whose rules are remembered, newest first."""
MAX_TOTAL_BYTES = 8_000_000
"""Bytes of the files whose rules are remembered; parsed, they take some thirty times as much."""
MAX_RULES = 1_000_000
"""Robots named × lines; a file beyond it is an attack on parsers, and reads as one that cannot be read."""
MAX_PLACES = 100
"""Entries of a tdmrep.json that are read."""
KEEP_S = 24 * 3600.0
"""How long rules hold; RFC 9309 §2.4."""
KEEP_FAILURE_S = 300.0
"""How long nothing is asked after rules could not be read."""

Read = Callable[[str], Awaitable[bytes]]
"""Address → bytes, at most `MAX_BYTES`, b"" for one that is not there; raises FetchError."""


@dataclass(frozen=True)
class _Rules:
    until: float
    robots: Protego | None = None
    reserved: tuple[tuple[Protego, bool], ...] = ()
    failure: FetchError | None = None
    num_bytes: int = 0


class Robots:
    """The rules of all sites; `check` asks them."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._known: OrderedDict[str, _Rules] = OrderedDict()
        self._num_bytes = 0
        self._running: dict[str, asyncio.Task[_Rules]] = {}

    async def check(self, target: URL) -> None:
        """Let `target` pass.

        Raises:
            FetchError: `optout.robots`, `optout.tdm`, or why the rules could not be read.
        """
        origin = str(target.origin())
        rules = self._known.get(origin)
        if rules is None or rules.until < time.monotonic():
            if origin not in self._running:
                task = asyncio.create_task(self._learn(origin))
                task.add_done_callback(lambda _: self._running.pop(origin, None))
                self._running[origin] = task
            rules = await asyncio.shield(self._running[origin])
        if rules.failure is not None:
            raise FetchError(rules.failure.status, rules.failure.detail)
        if rules.robots is not None and not rules.robots.can_fetch(str(target), AGENT):
            raise FetchError("optout.robots", "robots.txt: disallowed")
        reserved = (yes for place, yes in rules.reserved if not place.can_fetch(str(target), AGENT))
        if next(reserved, False):
            raise FetchError("optout.tdm", "tdmrep.json: reserved")

    async def _learn(self, origin: str) -> _Rules:
        try:
            text = await self._read(f"{origin}/robots.txt")
            robots = await asyncio.to_thread(_parse, text) if text else None
            reserved = _reservations(await self._read(f"{origin}/.well-known/tdmrep.json"))
            rules = _Rules(time.monotonic() + KEEP_S, robots, reserved, num_bytes=len(text))
        except FetchError as error:
            failure = FetchError(error.status, f"robots.txt or tdmrep.json: {error.detail}")
            rules = _Rules(time.monotonic() + KEEP_FAILURE_S, failure=failure)
        self._remember(origin, rules)
        return rules

    def _remember(self, origin: str, rules: _Rules) -> None:
        if origin in self._known:
            self._num_bytes -= self._known.pop(origin).num_bytes
        self._known[origin] = rules
        self._num_bytes += rules.num_bytes
        while len(self._known) > MAX_ORIGINS or self._num_bytes > MAX_TOTAL_BYTES:
            self._num_bytes -= self._known.popitem(last=False)[1].num_bytes


def _parse(data: bytes) -> Protego:
    text = data.decode("utf-8-sig", "replace")
    num_agents = text.lower().count("agent")
    if num_agents * (text.count("\n") + text.count("\r") + 1) > MAX_RULES:
        raise FetchError("dead.protocol", "too many rules for too many robots")
    return Protego.parse(text)


def _reservations(data: bytes) -> tuple[tuple[Protego, bool], ...]:
    """(place, reserved?) in the file's order, of which the first that holds the address counts.

    Source: W3C TDM Reservation Protocol, "TDM file on the origin server"; its patterns are those of robots.txt, so each
    place is written down as one.
    """
    try:
        rules: Any = json.loads(data)[:MAX_PLACES]
        pairs = [(str(rule["location"]).split()[0], rule.get("tdm-reservation") in (1, "1")) for rule in rules]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ()  # absent, or an error page
    return tuple((Protego.parse(f"User-agent: *\nDisallow: {place}"), yes) for place, yes in pairs)
