"""How many bytes of bodies a worker may hold: who wants more than is left waits, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque


class ByteBudget:
    """Bytes that are given out and come back.  Each body takes all it may need at once, so nobody waits in a circle."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    def take_now(self, num_bytes: int) -> int | None:
        """What is taken, if nobody has to wait for it: never more than there is in all."""
        wanted = min(num_bytes, self.total)
        if self._waiting or self.held + wanted > self.total:
            return None
        self.held += wanted
        return wanted

    async def take(self, num_bytes: int) -> int:
        """Wait for so many bytes, or for all there are; gives what was taken, which `give` must bring back."""
        wanted = min(num_bytes, self.total)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, wanted))
        self._pump()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(wanted)
            self._pump()
            raise
        return wanted

    def give(self, num_bytes: int) -> None:
        """Bring bytes back; a negative number takes some that turned out to be needed, without waiting."""
        self.held -= num_bytes
        self._pump()

    def _pump(self) -> None:
        while self._waiting:
            future, wanted = self._waiting[0]
            if not future.done():
                if self.held + wanted > self.total:
                    return
                self.held += wanted
                future.set_result(None)
            self._waiting.popleft()
