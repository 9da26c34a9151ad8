"""The web app: OpenAI's chat completions, the page, health, and the published system's own call.

    socket ─▶ _Envelope (request id, headers, log) ─▶ router ─▶ _Exchange: admit · read · parse · encode · generate
                                                                   each failure is one error object, with its status

The task that answers a request is the only one that works for it: when the client leaves, or time is up, cancelling
that task closes the generator, and with it the work in the scheduler.  An error after the first byte is an event.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyvlm.serve import protocol
from tinyvlm.serve.backend import Backend
from tinyvlm.serve.parse import parse_chat, parse_process
from tinyvlm.serve.protocol import ApiError, ChatRequest, Encoded, Finish, Json
from tinyvlm.serve.settings import ServeConfig

log = logging.getLogger(__name__)

THREAD_BYTES = 64 * 1024
"""Bodies above this are parsed in a thread: base64 of large pictures would hold up the event loop."""


def build_app(backend: Backend, settings: ServeConfig) -> Starlette:
    """The endpoint as an ASGI app.  Needs no Ray and starts nothing."""
    server = _Server(backend, settings)
    created = int(time.time())
    page, policy = _page(settings)

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    async def list_models(request: Request) -> Response:
        return JSONResponse(protocol.models(settings, created))

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        ready = await backend.ready()
        return JSONResponse({"status": "ready" if ready else "starting"}, 200 if ready else 503)

    routes = [
        Route("/", show_page),
        Route("/v1/models", list_models),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/v1/chat/completions", _Call(server, server.chat), methods=["POST"]),
        Route("/process", _Call(server, server.process), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: _routing_error, Exception: _unexpected_error}
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(_Envelope)])
    app.router.redirect_slashes = False
    return app


class _Server:
    """What the two calls that generate share: one bounded line of requests, one road through the backend."""

    def __init__(self, backend: Backend, settings: ServeConfig) -> None:
        self.backend, self.settings = backend, settings
        self.num_requests = 0

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """A place in the line for as long as the block runs.

        Raises:
            ApiError: the line is full.
        """
        if self.num_requests >= self.settings.max_queue:
            raise ApiError(
                429,
                "The server has all the requests that it can hold; try again soon.",
                kind="rate_limit_error",
                code="overloaded",
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    async def chat(self, body: bytes, exchange: _Exchange) -> None:
        """POST /v1/chat/completions."""
        request = await self._parse(parse_chat, body)
        if request.stream:
            await self._stream(request, exchange)
        else:
            encoded = await self._encode(request)
            answer = await self.backend.complete(encoded, request.sampling)
            await exchange.json(200, protocol.completion(request, answer))

    async def process(self, body: bytes, exchange: _Exchange) -> None:
        """POST /process: {"message", "image"} → {"response"}."""
        request = await self._parse(parse_process, body)
        encoded = await self._encode(request)
        answer = await self.backend.complete(encoded, request.sampling)
        await exchange.json(200, {"response": answer.text})

    async def _stream(self, request: ChatRequest, exchange: _Exchange) -> None:
        encoded = await self._encode(request)
        chunks = protocol.Chunks(request)
        finish = None
        async with contextlib.aclosing(self.backend.stream(encoded, request.sampling)) as pieces:
            async for piece in pieces:
                if not exchange.started:  # not before: a failure up to here still has its status
                    await exchange.start(
                        200, {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
                    )
                    await exchange.write(chunks.start())
                if isinstance(piece, Finish):
                    finish = piece
                elif piece:
                    await exchange.write(chunks.text(piece))
        if finish is None:
            raise RuntimeError("The backend ended a stream without saying how.")
        await exchange.write(b"".join(chunks.end(finish)))
        await exchange.write(b"", last=True)

    async def _parse(self, parse: Callable[[bytes, ServeConfig], ChatRequest], body: bytes) -> ChatRequest:
        if len(body) > THREAD_BYTES:
            return await asyncio.to_thread(parse, body, self.settings)
        return parse(body, self.settings)

    async def _encode(self, request: ChatRequest) -> Encoded:
        encoded = await self.backend.encode(request)
        num_tokens = len(encoded.input_ids)
        if num_tokens > self.settings.max_prompt_tokens:
            raise ApiError(
                400,
                f"The conversation has {num_tokens} tokens, pictures included, but this server reads "
                f"{self.settings.max_prompt_tokens}; shorten it.",
                kind="invalid_request_error",
                code="context_length_exceeded",
                param="messages",
            )
        return encoded


class _Call:
    """One of the two calls as an ASGI app: everything that may go wrong around it, in one place."""

    def __init__(self, server: _Server, answer: Callable[[bytes, _Exchange], Coroutine[Any, Any, None]]) -> None:
        self.server, self.answer = server, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(send, self.server.settings)
        limit = asyncio.timeout(self.server.settings.request_timeout_s)
        try:
            with self.server.admit():
                async with limit:
                    body = await _read_body(Headers(scope=scope), receive, self.server.settings)
                    await _while_connected(receive, self.answer(body, exchange))
        except _ClientGone:
            log.info("client left before the answer was complete")
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                seconds = self.server.settings.request_timeout_s
                error = ApiError(
                    504, f"The answer took longer than {seconds:g} s.", kind="server_error", code="timeout"
                )
            await exchange.fail(error)


class _Exchange:
    """The answering side of one request; knows whether the first byte has left."""

    def __init__(self, send: Send, settings: ServeConfig) -> None:
        self._send, self._settings = send, settings
        self.started = False

    async def json(self, status: int, data: Json, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
        await self.start(
            status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        )
        await self.write(body, last=True)

    async def fail(self, error: Exception) -> None:
        """Answer with an error: as a status, or as the last event where the answer has begun."""
        status, data = protocol.error_object(error)
        if status == 500:
            log.error("request failed", exc_info=error)
        if self.started:
            with contextlib.suppress(OSError):
                await self.write(protocol.sse(data) + protocol.DONE, last=True)
        else:
            await self.json(status, data, {"Retry-After": str(self._settings.retry_after_s)} if status == 429 else None)

    async def start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes, *, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})


class _ClientGone(Exception):
    """Nobody is there to read the answer."""


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, but stop it as soon as the client leaves."""

    async def wait_until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(wait_until_gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise _ClientGone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_body(headers: Headers, receive: Receive, settings: ServeConfig) -> bytes:
    """The request's body, within its limits of size and time.

    Raises:
        ApiError: not JSON by its header, too large, or too slow.
    """
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # A page on another site can send other types without asking first; JSON it cannot.
        raise ApiError(415, "Send JSON, with the header Content-Type: application/json.", kind="invalid_request_error")
    chunks: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _ClientGone
                size += len(message.get("body", b""))
                if size <= settings.max_request_bytes:
                    chunks.append(message.get("body", b""))
                elif size > 4 * settings.max_request_bytes:
                    break
                else:  # read on for a while without keeping it: many clients only listen once they have spoken
                    chunks.clear()
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(
            408, "The request's body did not arrive in time.", kind="invalid_request_error", code="timeout"
        ) from None
    if size > settings.max_request_bytes:
        raise ApiError(
            413,
            f"The request has more than the {settings.max_request_bytes} bytes allowed; send smaller pictures.",
            kind="invalid_request_error",
            code="request_too_large",
        )
    return b"".join(chunks)


class _Envelope:
    """Around every request: an id, headers that close the browser's doors, and one line in the log without contents."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        given_id = Headers(scope=scope).get("x-request-id")
        request_id = given_id or f"req-{uuid.uuid4().hex}"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                if given_id is None:  # whoever gave the request an id (a proxy does) returns it, too
                    headers["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            milliseconds = round((time.perf_counter() - started) * 1000, 1)
            entry = {
                "id": request_id[:64],
                "method": scope["method"],
                "path": scope["path"][:64],
                "status": status or 499,
            }
            log.info("%s", json.dumps({**entry, "ms": milliseconds}))


_SAFE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


async def _routing_error(request: Request, error: Exception) -> Response:
    """404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    address = f"{request.method} {request.url.path[:64]}"
    wrong_method = error.status_code == 405
    allowed = (error.headers or {}).get("Allow", "another method")
    message = f"{address}: this address takes {allowed}." if wrong_method else f"{address}: no such address here."
    code = "method_not_supported" if wrong_method else "unknown_url"
    _, data = protocol.error_object(ApiError(error.status_code, message, kind="invalid_request_error", code=code))
    return JSONResponse(data, error.status_code, headers=dict(error.headers or {}))


async def _unexpected_error(request: Request, error: Exception) -> Response:
    status, data = protocol.error_object(error)
    return JSONResponse(data, status)


def _page(settings: ServeConfig) -> tuple[str, str]:
    """The page with its settings filled in, and the policy that lets exactly its own script and style run."""
    html = (resources.files("tinyvlm.serve") / "web" / "index.html").read_text(encoding="utf-8")
    shown = {
        "model": settings.model_name,
        "defaultQuestion": settings.default_question,
        "maxPictures": settings.max_pictures,
        "maxPictureBytes": settings.pictures.max_bytes,
        "maxRequestBytes": settings.max_request_bytes,
        "maxNewTokens": settings.max_new_tokens,
        "defaultNewTokens": settings.default_new_tokens,
    }
    html = html.replace("/*settings*/{}", json.dumps(shown).replace("<", "\\u003c"))
    hashes = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
