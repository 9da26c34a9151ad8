"""What carries a worker's downloads: one thread with one event loop, for all parts that the worker has in hand.

    thread of a part ──links──▶ event loop: fetch (fetch.py) ──body──▶ decode (threads) ──▶ queue ──▶ thread of the part
                                      ▲                                                                    │
                                      └────── room for more: outcomes are kept (journal.py) ◀──────────────┘

One loop means one place for what is known of each host.  Links that were asked for and are not kept yet would be asked
for again after a crash; there are never more of them than `MAX_UNSAVED`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tinyvlm import images
from tinyvlm.data.fetch import Answer, Fetcher

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
    """What became of one link: the answer, and the columns that its picture fills."""

    answer: Answer
    image: bytes | None = None
    sha256: str | None = None
    phash: int | None = None
    bytes: int | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    finished_at: datetime = field(default_factory=lambda: datetime.now(UTC))


Batch = list[tuple[int, Outcome]]


class Downloader:
    """Started by the first call of `outcomes`, ended by `close`; several threads may use it at the same time."""

    def __init__(self, config: DownloadConfig, picture: images.PictureConfig, limits: images.LimitConfig) -> None:
        self.config, self.picture, self.limits = config, picture, limits
        self._loop = asyncio.new_event_loop()
        self._unsaved = asyncio.Semaphore(MAX_UNSAVED)
        self._keeping_up = asyncio.Event()
        self._keeping_up.set()
        self._backlog = 0
        self._decoders = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="downloads")
        self._thread.start()
        self._fetcher = Fetcher(config.fetch, limits, {})
        self._do(self._fetcher.__aenter__())

    def outcomes(self, urls: Sequence[str]) -> Iterator[Batch]:
        """(position, outcome) of every link, a few at a time, as they come; asking for more says that they are kept."""
        came: queue.SimpleQueue[tuple[int, Outcome] | BaseException] = queue.SimpleQueue()
        tasks = self._do(self._start(urls, came))
        missing, held = len(urls), 0
        try:
            while missing:
                batch = _next_batch(came, missing)
                missing, held = missing - len(batch), len(batch)
                yield batch
                self._release(held)
                held = 0
        finally:
            if missing or held:
                self._do(self._cancel(tasks))
                self._release(held + _count(came))

    def close(self) -> None:
        """End the loop and the decoders; what is still in flight is given up."""
        self._do(self._fetcher.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._decoders.shutdown(cancel_futures=True)

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _release(self, number: int) -> None:
        def release() -> None:
            for _ in range(number):
                self._unsaved.release()

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
        self._count_backlog(1)
        try:
            return await self._loop.run_in_executor(self._decoders, self._keep, answer)
        finally:
            self._count_backlog(-1)

    def _count_backlog(self, change: int) -> None:
        self._backlog += change
        if self._backlog >= MAX_BACKLOG:
            self._keeping_up.clear()
        elif self._backlog <= MAX_BACKLOG // 2:
            self._keeping_up.set()

    def _keep(self, answer: Answer) -> Outcome:
        """Decode the body and keep what the settings say; runs in a thread."""
        body, answer.body = answer.body or b"", None
        outcome = Outcome(answer, sha256=hashlib.sha256(body).hexdigest(), bytes=len(body))
        try:
            outcome.format, image = images.decode_as(body, self.limits)
            outcome.width, outcome.height = image.size
            outcome.phash = images.perceptual_hash(image)
            if self.config.store == "finished":
                body = images.to_jpeg(images.square(image, self.picture)[0], self.picture.jpeg_quality)
            outcome.image = body
        except images.ImageError as error:
            answer.status, answer.detail = error.status, error.detail[:200]
        except Exception as error:  # a bug of ours, or no memory: costs a row, not the run
            _log.exception("cannot decode %s", answer.final_url)
            answer.status, answer.detail = "internal_error", f"{type(error).__name__}: {error}"[:200]
        return outcome


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
            raise item
        if not batch:
            until = time.monotonic() + KEEP_S
        batch.append(item)
    return batch


def _count(came: queue.SimpleQueue[Any]) -> int:
    number = 0
    while not came.empty():
        number += not isinstance(came.get(), BaseException)
    return number
