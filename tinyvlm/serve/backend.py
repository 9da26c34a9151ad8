"""What the web app asks of whoever does the work, and the backend that does it in this process.

app ──▶ Backend ──┬── LocalBackend: a thread for preprocessing, a `Scheduler` for the model   (here)
                  └── RayBackend: handles to deployments that scale separately                 (ray_jobs/serve.py)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from tinyvlm import images, schema
from tinyvlm.errors import InputError
from tinyvlm.images import ImageError, LimitConfig
from tinyvlm.serve.protocol import Answer, ChatRequest, Encoded, Finish, SamplingFields

if TYPE_CHECKING:  # imports torch, which a web process can do without
    from tinyvlm.model.processing import TinyVLMProcessor
    from tinyvlm.serve.scheduler import Scheduler


class Backend(Protocol):
    """Preprocessing and generation behind the web app.  Leaving a call (cancel, `aclose`) stops the work."""

    async def ready(self) -> bool:
        """Whether requests can be answered now."""

    async def encode(self, request: ChatRequest) -> Encoded:
        """Messages and pictures as tensors; raises InputError for what cannot be read."""

    async def complete(self, encoded: Encoded, sampling: SamplingFields) -> Answer:
        """The whole answer at once."""

    def stream(self, encoded: Encoded, sampling: SamplingFields) -> AsyncGenerator[str | Finish, None]:
        """Pieces of the answer as they come, then how it ended."""


def encode(processor: TinyVLMProcessor, request: ChatRequest, limits: LimitConfig) -> Encoded:
    """Decode the pictures of a request under `limits` and encode the conversation.

    Raises:
        InputError: a picture or the conversation cannot be used.  Says nothing that a decoder said: those texts hold
            addresses of this process.
    """
    pictures = []
    for index, data in enumerate(request.pictures):
        try:
            pictures.append(images.decode(data, limits))
        except ImageError as error:
            reason = schema.STATUSES.get(error.status, "it cannot be read")
            raise InputError(f"Picture {index + 1} cannot be used: {reason}.", field="messages") from None
    sample = processor.encode(request.messages, pictures, open_answer=True)
    return Encoded(sample.input_ids, sample.pixels)


class LocalBackend:
    """Everything in this process: for tests, for measuring, and for a machine without Ray."""

    def __init__(self, processor: TinyVLMProcessor, scheduler: Scheduler, limits: LimitConfig) -> None:
        self.processor, self.scheduler, self.limits = processor, scheduler, limits
        # One thread: tokenizers are not made for several.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="preprocess")

    async def ready(self) -> bool:
        return self.scheduler.is_alive

    async def encode(self, request: ChatRequest) -> Encoded:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, encode, self.processor, request, self.limits)

    async def complete(self, encoded: Encoded, sampling: SamplingFields) -> Answer:
        return await self.scheduler.complete(encoded, sampling)

    def stream(self, encoded: Encoded, sampling: SamplingFields) -> AsyncGenerator[str | Finish, None]:
        return self.scheduler.stream(encoded, sampling)
