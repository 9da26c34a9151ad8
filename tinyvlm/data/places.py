"""How many links are in flight in a worker: more while all goes well, half as many when it does not.

Additive increase, multiplicative decrease (Chiu and Jain, 1989), as TCP does it, with a doubling start.  Trouble is
what too many connections bring about: timeouts, resets, an overwhelmed name server, an event loop that comes late.
Dead links bring timeouts too, so only a share of trouble well above the usual one counts; and where halving did not
lower it, the list is like that and not the load: the share becomes the usual one, and the places are given back.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

FLOOR = 16
START = 64
STEP = 8
"""Places added each second while all goes well."""
MIN_OUTCOMES = 20
"""Outcomes from which a share of trouble is believed."""
USUAL_SHARE = 0.1
"""Share of trouble that is expected before anything was seen."""
MARGIN = 0.1
"""A share of trouble counts from this much above the usual one (and three standard errors)."""
MAX_LAG_S = 0.5
"""How late the loop may come, on average over a second; deadlines are ten times as long."""


class Places:
    """Places for links in flight, given out first come, first served."""

    def __init__(self, most: int, settle_s: float) -> None:
        """`settle_s`: how long after a change old timeouts still come in."""
        self.most, self.floor = most, min(FLOOR, most)
        self.limit = float(min(START, most))
        self._settle_s, self._settled_at = settle_s, 0.0
        self._active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._doubling = True
        self._usual = USUAL_SHARE
        self._before: tuple[float, float] | None = None  # share of trouble and places when they were last halved
        self._outcomes = self._troubles = 0
        self._wanted = False

    async def enter(self, *, first: bool = False) -> None:
        """Wait for a place; `leave` must follow.  `first`: before the others."""
        if not self._waiting and self._active < int(self.limit):
            self._active += 1
            return
        self._wanted = True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Give the place to the next one who waits."""
        self._active -= 1
        self._pump()

    def record(self, *, trouble: bool) -> None:
        """Note how one request ended."""
        self._outcomes += 1
        self._troubles += trouble

    def adapt(self, now: float, lag_s: float) -> None:
        """Once a second: change the number of places.  `lag_s`: how late the loop came, on average."""
        if now < self._settled_at:
            self._outcomes = self._troubles = 0
        elif lag_s > MAX_LAG_S:
            self._before = None
            self._halve(now)
        elif self._outcomes >= MIN_OUTCOMES:
            self._judge(now, self._troubles / self._outcomes, self._outcomes)
            self._outcomes = self._troubles = 0
        self._wanted = bool(self._waiting)
        self._pump()

    def _judge(self, now: float, share: float, num: int) -> None:
        if self._before is not None:
            share_before, limit_before = self._before
            self._before = None
            if share > 0.8 * share_before:
                self._usual, self.limit = share, max(self.limit, limit_before)
                return
        error = math.sqrt(self._usual * (1 - self._usual) / num)
        if share > self._usual + MARGIN + 3 * error:
            self._before = (share, self.limit)
            self._halve(now)
            return
        # Slowly up, so that a growing load does not become usual by and by; quickly down.
        self._usual += (share - self._usual) * (0.02 if share > self._usual else 0.2)
        if self._wanted:
            self.limit = min(self.most, self.limit * 2 if self._doubling else self.limit + STEP)

    def _halve(self, now: float) -> None:
        self.limit = max(self.floor, self.limit / 2)
        self._doubling = False
        self._settled_at = now + self._settle_s
        self._outcomes = self._troubles = 0

    def _pump(self) -> None:
        while self._waiting and self._active < int(self.limit):
            future = self._waiting.popleft()
            if not future.done():
                self._active += 1
                future.set_result(None)
