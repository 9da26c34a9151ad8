"""The endpoint as Ray Serve deployments, each scaling by itself.

    HTTP ─▶ Ingress (the web app) ──encode──▶ Preprocess (CPU)
                                  ──stream──▶ Generate (model, GPU where there is one)

The library does the work; these classes give it a place.  Expected failures travel as values: as exceptions, Ray would
wrap them and log a traceback for each bad picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from tinyvlm.errors import InputError
from tinyvlm.serve.app import build_app
from tinyvlm.serve.backend import encode
from tinyvlm.serve.protocol import Answer, ChatRequest, Encoded, Finish, SamplingFields
from tinyvlm.serve.settings import ReplicaConfig, ServeConfig

T = TypeVar("T")

HEADROOM = 64
"""Requests beyond `max_queue` that an ingress takes from Ray, to refuse them itself with a proper 429."""


def application(model_folder: str, settings: ServeConfig) -> serve.Application:
    """The three deployments, joined."""
    preprocess = _deployment(
        Preprocess, settings.preprocess, settings, 2 * int(settings.preprocess.target_ongoing_requests)
    )
    generate = _deployment(Generate, settings.generate, settings, 2 * settings.max_batch)
    ingress = _deployment(serve.ingress()(Ingress), settings.ingress, settings, settings.max_queue + HEADROOM)
    joined: serve.Application = ingress.options(name="Ingress").bind(
        preprocess.bind(model_folder, settings), generate.bind(model_folder, settings), settings
    )
    return joined


def _deployment(kind: type, replicas: ReplicaConfig, settings: ServeConfig, max_ongoing: int) -> Any:
    return serve.deployment(
        kind,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        max_ongoing_requests=max(max_ongoing, 1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            target_ongoing_requests=replicas.target_ongoing_requests,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
        ),
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        max_surge_percent=settings.surge_percent,
        health_check_period_s=5.0,
        # A deployment that cannot start says so at once, with its reason.
        max_constructor_retry_count=2,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    )


class Preprocess:
    """Pictures and messages to tensors."""

    def __init__(self, model_folder: str, settings: ServeConfig) -> None:
        import torch

        from tinyvlm.model.processing import TinyVLMProcessor

        torch.set_num_threads(1)
        self._processor, self._settings = TinyVLMProcessor.from_pretrained(model_folder), settings
        # One thread: tokenizers are not made for several.  More replicas are the way to more speed.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="preprocess")

    async def encode(self, request: ChatRequest) -> Encoded | InputError:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, encode, self._processor, request, self._settings.pictures)
        except InputError as error:
            return error

    async def ready(self) -> bool:
        return True


class Generate:
    """The model behind a scheduler."""

    def __init__(self, model_folder: str, settings: ServeConfig) -> None:
        import torch

        from tinyvlm.generation import Engine
        from tinyvlm.model import load
        from tinyvlm.serve.scheduler import Scheduler

        torch.set_num_threads(settings.threads)
        model, processor = load(model_folder, getattr(torch, settings.precision))
        model.to("cuda" if settings.generate.num_gpus and torch.cuda.is_available() else "cpu")
        engine = Engine(model, processor, batch_size=settings.max_batch)
        _warm_up(engine, processor)
        self._scheduler = Scheduler(engine, settings.max_batch)

    async def complete(self, encoded: Encoded, sampling: SamplingFields) -> Answer | InputError:
        try:
            return await self._scheduler.complete(encoded, sampling)
        except InputError as error:
            return error

    async def stream(
        self, encoded: Encoded, sampling: SamplingFields
    ) -> AsyncGenerator[str | Finish | InputError, None]:
        try:
            async with contextlib.aclosing(self._scheduler.stream(encoded, sampling)) as pieces:
                async for piece in pieces:
                    yield piece
        except InputError as error:
            yield error

    async def ready(self) -> bool:
        return self._scheduler.is_alive

    async def num_running(self) -> int:
        """Requests that the model works on now."""
        return self._scheduler.num_running

    def check_health(self) -> None:
        """Ray replaces this replica when this raises."""
        if not self._scheduler.is_alive:
            raise RuntimeError("The scheduler's thread has ended.")


def _warm_up(engine: Any, processor: Any) -> None:
    """One small question, so that the first client does not pay for what is done once."""
    from PIL import Image

    from tinyvlm.chat import Message, Picture
    from tinyvlm.generation import Sampling

    messages = [Message("user", (Picture(0), "ready?"))]
    sample = processor.encode(messages, [Image.new("RGB", (64, 64))], open_answer=True)
    engine.generate([sample], Sampling(max_new_tokens=2))


class Ingress:
    """The web app, asking the other two."""

    def __init__(self, preprocess: Any, generate: Any, settings: ServeConfig) -> None:
        self._backend, self._settings = RayBackend(preprocess, generate), settings
        # Ray's own handlers show warnings; the reason of a 500 must be among them.
        logging.getLogger("tinyvlm").setLevel(logging.WARNING)

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_app(self._backend, self._settings)


class RayBackend:
    """`tinyvlm.serve.backend.Backend` over two `DeploymentHandle`s."""

    def __init__(self, preprocess: Any, generate: Any) -> None:
        self._preprocess, self._generate = preprocess, generate
        self._streaming = generate.options(stream=True)
        self._was_ready = False

    async def ready(self) -> bool:
        if not self._was_ready:
            answers = await asyncio.gather(self._preprocess.ready.remote(), self._generate.ready.remote())
            self._was_ready = all(answers)
        return self._was_ready

    async def encode(self, request: ChatRequest) -> Encoded:
        return cast(Encoded, await _call(lambda: self._preprocess.encode.remote(request)))

    async def complete(self, encoded: Encoded, sampling: SamplingFields) -> Answer:
        return cast(Answer, await _call(lambda: self._generate.complete.remote(encoded, sampling)))

    async def stream(self, encoded: Encoded, sampling: SamplingFields) -> AsyncGenerator[str | Finish, None]:
        pieces = self._streaming.stream.remote(encoded, sampling)
        is_over = False
        try:
            async for piece in pieces:
                is_over = not isinstance(piece, str)
                yield _value(piece)
        finally:
            if not is_over:
                pieces.cancel()


async def _call(start: Callable[[], Any]) -> Any:
    """The value of a call.  Leaving cancels it; a replica that dies under it is replaced by another, once."""
    for is_last in (False, True):
        response = start()
        try:
            return _value(await response)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayActorError:
            if is_last:
                raise
    raise AssertionError("unreachable")


def _value(result: T | InputError) -> T:
    if isinstance(result, InputError):
        raise result
    return result
