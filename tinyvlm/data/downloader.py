"""What carries a worker's downloads: one thread with one event loop, for all parts that the worker has in hand.

    thread of a part ──links──▶ event loop: fetch (fetch.py) ──body──▶ decoding.py ──▶ queue   ──▶ thread of the part
                                      ▲                                                                    │
                                      └────── room for more: outcomes are kept (journal.py) ◀──────────────┘

One loop means one place for what is known of each host.  Links that were asked for and are not kept yet would be asked
for again after a crash; there are never more of them than `MAX_UNSAVED`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tinyvlm import images
from tinyvlm.data.decoding import Decoded, Decoders
from tinyvlm.data.fetch import Answer, Fetcher
from tinyvlm.data.session import new_event_loop
from tinyvlm.schema import OK
from tinyvlm.takedown import Takedown

if TYPE_CHECKING:
    from tinyvlm.data.download import DownloadConfig

MAX_UNSAVED = 1000
"""Links of one worker whose outcome a crash would lose."""
KEEP_ROWS, KEEP_S = 64, 1.0
"""Outcomes are kept when there are so many, or when one has waited so long."""
MAX_BACKLOG = 64
"""Bodies that may wait for a decoder before no new link is asked for: memory, not speed."""

_log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What became of one link: the answer, and what is kept of its picture."""

    answer: Answer
    decoded: Decoded | None = None
    image: bytes | None = None
    bytes: int | None = None
    finished_at: datetime = field(default_factory=lambda: datetime.now(UTC))


Batch = list[tuple[int, Outcome]]


class Downloader:
    """Started by the first call of `outcomes`, ended by `close`; several threads may use it at the same time."""

    def __init__(
        self,
        config: DownloadConfig,
        picture: images.PictureConfig,
        limits: images.LimitConfig,
        giants: Collection[str] = (),
        num_workers: int = 1,
        takedown: Takedown | None = None,
    ) -> None:
        """`giants`: hosts that each of `num_workers` workers asks, sharing their budget.  `takedown`: not asked."""
        self.config = config
        self._loop = new_event_loop()
        self._unsaved = asyncio.Semaphore(MAX_UNSAVED)
        self._keeping_up = asyncio.Event()
        self._keeping_up.set()
        self._backlog = 0
        self._decoders = Decoders(picture, limits, config.store, config.decode_processes, config.decode_timeout_s)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="downloads")
        self._thread.start()
        self._fetcher = Fetcher(config.fetch, limits, shared_hosts=giants, num_workers=num_workers, takedown=takedown)
        self._do(self._fetcher.__aenter__())

    def outcomes(self, urls: Sequence[str]) -> Iterator[Batch]:
        """(position, outcome) of every link, a few at a time, as they come; asking for more says that they are kept."""
        came: queue.SimpleQueue[tuple[int, Outcome] | BaseException] = queue.SimpleQueue()
        tasks = self._do(self._start(urls, came))
        missing, held = len(urls), Batch()
        try:
            while missing:
                held = _next_batch(came, missing)
                missing -= len(held)
                yield held
                self._release(held)
                held = Batch()
        finally:
            if missing or held:
                self._do(self._cancel(tasks))
                self._release([*held, *_rest(came)])

    def close(self) -> None:
        """End the loop and the decoders; what is still in flight is given up."""
        self._do(self._fetcher.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._decoders.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _release(self, batch: Batch) -> None:
        def release() -> None:
            for _, outcome in batch:
                self._unsaved.release()
                self._fetcher.let_go(outcome.answer)  # of an original, which was held until now

        self._loop.call_soon_threadsafe(release)

    async def _start(self, urls: Sequence[str], came: queue.SimpleQueue[Any]) -> list[asyncio.Task[None]]:
        return [self._loop.create_task(self._one(place, url, came)) for place, url in enumerate(urls)]

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, place: int, url: str, came: queue.SimpleQueue[Any]) -> None:
        await self._unsaved.acquire()
        try:
            outcome = await self._outcome(url)
        except BaseException as error:
            self._unsaved.release()
            if not isinstance(error, asyncio.CancelledError):
                came.put(error)
                return
            raise
        came.put((place, outcome))

    async def _outcome(self, url: str) -> Outcome:
        await self._keeping_up.wait()
        answer = await self._fetcher.fetch(url)
        if answer.body is None:
            return Outcome(answer)
        body, answer.body = answer.body, None
        self._count_backlog(1)
        try:
            decoded = await asyncio.wrap_future(self._decoders.submit(body))
        except BaseException:
            self._fetcher.let_go(answer)
            raise
        finally:
            self._count_backlog(-1)
        answer.status, answer.detail = decoded.status, decoded.detail
        # An original is kept as it was sent; whether it is good was only looked at.
        image = body if self.config.store == "original" and decoded.status == OK else decoded.image
        if image is not body:
            self._fetcher.let_go(answer)
        return Outcome(answer, decoded, image, len(body))

    def _count_backlog(self, change: int) -> None:
        self._backlog += change
        if self._backlog >= MAX_BACKLOG:
            self._keeping_up.clear()
        elif self._backlog <= MAX_BACKLOG // 2:
            self._keeping_up.set()


def _next_batch(came: queue.SimpleQueue[Any], most: int) -> Batch:
    """Wait for at least one outcome, and a little for more.  Raises what a link's task raised."""
    batch: Batch = []
    until = time.monotonic() + KEEP_S
    while len(batch) < min(KEEP_ROWS, most):
        try:
            item = came.get(timeout=max(0.0, until - time.monotonic()) if batch else None)
        except queue.Empty:
            break
        if isinstance(item, BaseException):
            if not batch:
                raise item
            came.put(item)  # for the next call: what came before it is kept first
            break
        if not batch:
            until = time.monotonic() + KEEP_S
        batch.append(item)
    return batch


def _rest(came: queue.SimpleQueue[Any]) -> Batch:
    """The outcomes that nobody took."""
    rest = Batch()
    while not came.empty():
        item = came.get()
        if not isinstance(item, BaseException):
            rest.append(item)
    return rest
