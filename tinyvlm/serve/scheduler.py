"""Requests wait here for the model, which one thread runs.

    complete ─┐                        ┌─ group A ─ step ─┐
    stream   ─┴─▶ line ─▶ the thread ──┼─ group B ─ step ─┼─▶ pieces, to each request's own queue
                                       └─ …          ↺    ┘

Requests that wait at the same time become one group and are decoded together; groups take steps in turn, so nobody
waits for another's answer to end.  Leaving the coroutine or closing the generator takes a request out of the line, or
out of its group before the next step.  An engine failure belongs to the requests that it struck; the thread goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tinyvlm.serve.protocol import Answer, Encoded, Finish, SamplingFields

if TYPE_CHECKING:  # imports torch, which comes with the engine
    from tinyvlm.generation import Completion, Piece, Sampling
    from tinyvlm.model.processing import Sample


class Decoding(Protocol):
    """A group under way."""

    @property
    def is_done(self) -> bool:
        """Every answer is finished or cancelled."""

    def cancel(self, index: int) -> None:
        """Give up one answer."""

    def step(self) -> Sequence[Piece]:
        """One more token for every unfinished answer."""


class Engine(Protocol):
    """What the scheduler needs of an engine; `tinyvlm.generation.Engine` is one."""

    def start(self, samples: Sequence[Sample], samplings: Sequence[Sampling]) -> Decoding:
        """Begin a group whose steps the caller takes."""


@dataclass(eq=False)
class _Job:
    """A request; what becomes of it is put into `outcome` on the event loop that waits for it."""

    encoded: Encoded
    sampling: SamplingFields
    loop: asyncio.AbstractEventLoop
    outcome: asyncio.Queue[str | Finish | Exception] = field(default_factory=asyncio.Queue)
    is_left: bool = False

    def put(self, item: str | Finish | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.outcome.put_nowait, item)


@dataclass(eq=False)
class _Group:
    jobs: list[_Job]
    decoding: Decoding
    over: set[int] = field(default_factory=set)
    """Places of the jobs that are finished or were left."""


class Scheduler:
    """Runs an engine in a thread of its own, for callers on event loops.

    Args:
        engine: used by that thread alone.
        max_batch: most requests that are worked on at once, all groups together.
    """

    def __init__(self, engine: Engine, max_batch: int) -> None:
        self._engine, self._max_batch = engine, max_batch
        self._line: deque[_Job] = deque()
        self._groups: list[_Group] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="scheduler")
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def num_running(self) -> int:
        """Requests that the model works on."""
        return sum(len(group.jobs) - len(group.over) for group in list(self._groups))

    async def complete(self, encoded: Encoded, sampling: SamplingFields) -> Answer:
        """A whole answer."""
        text = ""
        async with contextlib.aclosing(self.stream(encoded, sampling)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Finish):
                    return Answer(text, piece)
                text += piece
        raise RuntimeError("The engine ended an answer without saying how.")

    async def stream(self, encoded: Encoded, sampling: SamplingFields) -> AsyncGenerator[str | Finish, None]:
        """Pieces of an answer as they come, then how it ended."""
        job = _Job(encoded, sampling, asyncio.get_running_loop())
        with self._changed:
            if self._closed:
                raise RuntimeError("The scheduler is closed.")
            self._line.append(job)
            self._changed.notify()
        try:
            while True:
                item = await job.outcome.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Finish):
                    return
        finally:
            job.is_left = True

    def close(self) -> None:
        """Stop the thread; requests that are still here fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._line or self._groups or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                jobs = self._take()
            if jobs:
                self._groups += self._start(jobs)
            self._groups = [group for group in self._groups if self._step(group)]
        for job in (*self._line, *(job for group in self._groups for job in group.jobs)):
            job.put(RuntimeError("The server is shutting down."))

    def _take(self) -> list[_Job]:
        """Requests from the line, as many as there is room for."""
        jobs: list[_Job] = []
        room = self._max_batch - self.num_running
        while self._line and len(jobs) < room:
            job = self._line.popleft()
            if not job.is_left:
                jobs.append(job)
        return jobs

    def _start(self, jobs: list[_Job]) -> list[_Group]:
        try:
            samples, samplings = zip(*((_sample(job.encoded), _sampling(job.sampling)) for job in jobs), strict=True)
            return [_Group(jobs, self._engine.start(samples, samplings))]
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].put(error)
                return []
            # One of them is at fault; alone, each finds out whether it is the one.
            return [group for job in jobs for group in self._start([job])]

    def _step(self, group: _Group) -> bool:
        """One more token for each request of a group; False when the group is over."""
        try:
            for index, job in enumerate(group.jobs):
                if job.is_left and index not in group.over:
                    group.over.add(index)
                    group.decoding.cancel(index)
            for piece in group.decoding.step():
                job = group.jobs[piece.index]
                if piece.text:
                    job.put(piece.text)
                if piece.completion is not None:
                    group.over.add(piece.index)
                    job.put(_finish(piece.completion))
            return not group.decoding.is_done
        except Exception as error:
            for job in group.jobs:
                job.put(error)
            return False


def _sample(encoded: Encoded) -> Sample:
    import numpy as np

    from tinyvlm.model.processing import Sample

    return Sample(encoded.input_ids, np.zeros(len(encoded.input_ids), np.bool_), encoded.pixels)


def _sampling(fields: SamplingFields) -> Sampling:
    from tinyvlm.generation import Sampling

    return Sampling(**fields)


def _finish(completion: Completion) -> Finish:
    return Finish(
        completion.finish_reason,
        completion.num_prompt_tokens,
        completion.num_image_tokens,
        len(completion.token_ids),
    )
