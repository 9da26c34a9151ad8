"""Local servers that answer as a test wants, and a clock that runs as fast as it can."""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from aiohttp import web
from PIL import Image

from tinyvlm import images

T = TypeVar("T")
Talk = Callable[[str, asyncio.StreamWriter], Awaitable[None]]

JPEG = images.to_jpeg(Image.new("RGB", (16, 16), "red"), 95)


def picture(request: Any = None) -> web.Response:
    return web.Response(body=JPEG, content_type="image/jpeg")


def serving(**answers: Callable[[web.Request], web.StreamResponse]) -> web.Application:
    """A web of named pages; each answer may be a plain function."""
    app = web.Application()
    for name, answer in answers.items():

        async def handler(request: web.Request, answer: Any = answer) -> web.StreamResponse:
            response: web.StreamResponse = answer(request)
            return response

        app.router.add_get(f"/{name}", handler)
    return app


@contextmanager
def raw_server(talk: Talk, **options: Any) -> Iterator[tuple[str, list[str]]]:
    """A server that hands each request's head to `talk`, which writes whatever it likes; gives base URL and heads."""
    loop = asyncio.new_event_loop()
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            try:
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    heads.append(head)
                    await talk(head, writer)
                    await writer.drain()
            finally:
                writer.close()

    thread = threading.Thread(target=loop.run_forever, daemon=True, name="raw server")
    thread.start()
    started = asyncio.start_server(serve, "127.0.0.1", 0, **options)
    server = asyncio.run_coroutine_threadsafe(started, loop).result(10)

    async def stop() -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        scheme = "https" if "ssl" in options else "http"
        yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}", heads
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def http(body: bytes = JPEG, status: str = "200 OK", *lines: str) -> bytes:
    """A whole answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: image/jpeg", *lines]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def on_fast_clock(coroutine: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Run without sleeping: when nothing is left to do, the loop's clock jumps to the next deadline.

    Gives the result and the seconds that passed on that clock.  Neither sockets nor threads work in it.
    """

    class Selector(selectors.SelectSelector):
        def select(self, timeout: float | None = None) -> Any:
            if timeout is None:
                raise RuntimeError("everybody waits for ever")
            loop.now += timeout
            return super().select(0)

    class Loop(asyncio.SelectorEventLoop):
        now = 0.0

        def time(self) -> float:
            return self.now

    loop = Loop(Selector())
    try:
        return loop.run_until_complete(coroutine), loop.now
    finally:
        loop.close()
