"""A small web on 127.0.0.1: real pictures and every kind of trouble that a downloader meets (`links.py` lists it).

    python -m tinyvlm.toy.web_server --port 8899 [--folder pictures]

Some answers wait for ever or never end, on purpose.  The "image not available" pictures are drawn here, in several
designs and sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import io
import logging
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web
from PIL import Image, ImageDraw, ImageFont

from tinyvlm.errors import TinyVLMError
from tinyvlm.toy.links import find_pictures

HOST = "127.0.0.1"
_log = logging.getLogger(__name__)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(folder: Path | None = None) -> web.Application:
    """The web application; `folder` replaces easy-VQA's pictures (see `links.find_pictures`)."""
    pictures = {
        f"{split}/{image_id}.png": path.read_bytes()
        for split, by_id in find_pictures(folder).items()
        for image_id, path in by_id.items()
    }
    _bomb_bytes()  # takes a moment: made before anybody waits for it
    app = web.Application()
    app.add_routes(
        [
            web.get("/healthz", _healthz),
            web.get("/pictures/{name:.+}", _picture(pictures)),
            web.get("/moved/{name:.+}", _moved),
            web.get("/busy-{status:(503|429)}/{name:.+}", _busy(pictures)),
            web.get("/placeholder/{n}.png", _placeholder),
            web.get("/{status:(404|410|403|500)}/{n}.jpg", _failing),
            web.get("/html/{n}.jpg", _html),
            web.get("/empty/{n}.jpg", _empty),
            web.get("/truncated/{n}.jpg", _truncated),
            web.get("/bomb/{n}.png", _bomb),
            web.get("/reset/{n}.jpg", _reset),
            web.get("/silent/{n}.jpg", _silent),
            web.get("/drip/{n}.jpg", _drip),
            web.get("/endless/{n}.jpg", _endless),
            web.get("/loop/{n}/{step}", _loop),
            web.get("/opted-out/{n}.png", _opted_out),
        ]
    )
    return app


@contextmanager
def running(app: web.Application, port: int = 0) -> Iterator[str]:
    """Serve from a thread of this process; gives the base URL.  For tests."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    listener = socket.create_server((HOST, port), backlog=1024)
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="toy web server")
    thread.start()

    async def start() -> None:
        await runner.setup()
        await web.SockSite(runner, listener).start()

    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        yield f"http://{HOST}:{listener.getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tinyvlm.toy.web_server", description="The demo's web.")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, named in the first line of the log")
    parser.add_argument("--folder", type=Path, help="pictures as train/<number>.png and test/…; default: easy-VQA's")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        app = build_app(given.folder)
        listener = socket.create_server((HOST, given.port), backlog=1024)
    except TinyVLMError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:
        reason = f"The toy web wants port {given.port} of {HOST}, but got: {error.strerror}."
        parser.exit(2, f"{reason}  Stop what listens there, or choose another --port.\n")
    _log.info("toy web on http://%s:%d", HOST, listener.getsockname()[1])
    web.run_app(app, sock=listener, access_log=None, handler_cancellation=True, shutdown_timeout=0.5, print=None)


async def _healthz(request: web.Request) -> web.StreamResponse:
    return web.json_response({"status": "ok"})


def _picture(pictures: dict[str, bytes]) -> _Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = pictures.get(request.match_info["name"])
        if body is None:
            raise web.HTTPNotFound
        return web.Response(body=body, content_type="image/png")

    return answer


async def _moved(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound(f"/pictures/{request.match_info['name']}")


def _busy(pictures: dict[str, bytes]) -> _Handler:
    """Turns every odd request for a picture away for a second, so that each run of a downloader meets it once."""
    seen: Counter[str] = Counter()

    async def answer(request: web.Request) -> web.StreamResponse:
        seen[request.path] += 1
        if seen[request.path] % 2:
            return web.Response(status=int(request.match_info["status"]), headers={"Retry-After": "1"})
        return await _picture(pictures)(request)

    return answer


async def _failing(request: web.Request) -> web.StreamResponse:
    return web.Response(status=int(request.match_info["status"]), text="<h1>Sorry</h1>", content_type="text/html")


async def _html(request: web.Request) -> web.StreamResponse:
    # Half of them claim to be a picture, as in real life.
    kind = "image/jpeg" if int(request.match_info["n"]) % 2 else "text/html"
    return web.Response(body=b"<!doctype html><title>Shop</title>" + b"<p>Buy!</p>" * 500, content_type=kind)


async def _empty(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"", content_type="image/jpeg")


async def _truncated(request: web.Request) -> web.StreamResponse:
    whole = _photo_bytes()
    return web.Response(body=whole[: len(whole) // 2], content_type="image/jpeg")


async def _bomb(request: web.Request) -> web.StreamResponse:
    return web.Response(body=_bomb_bytes(), content_type="image/png")


async def _reset(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    return web.Response()


async def _drip(request: web.Request) -> web.StreamResponse:
    """A byte every tenth of a second: never a pause long enough for a read deadline."""
    response = web.StreamResponse(headers={"Content-Type": "image/jpeg", "Content-Length": str(len(_photo_bytes()))})
    await response.prepare(request)
    for byte in _photo_bytes():
        await response.write(bytes([byte]))
        await asyncio.sleep(0.1)
    return response


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
    await response.prepare(request)
    await response.write(_photo_bytes())
    while True:
        await response.write(bytes(65536))


async def _loop(request: web.Request) -> web.StreamResponse:
    other = "b" if request.match_info["step"] == "a" else "a"
    raise web.HTTPFound(f"/loop/{request.match_info['n']}/{other}")


async def _opted_out(request: web.Request) -> web.StreamResponse:
    headers = {"X-Robots-Tag": "noai, noimageai"}
    return web.Response(body=_photo_bytes(), content_type="image/jpeg", headers=headers)


async def _placeholder(request: web.Request) -> web.StreamResponse:
    number = int(request.match_info["n"])
    design = number % len(DESIGNS)
    body = placeholder_bytes(design, SIZES[number // len(DESIGNS) % len(SIZES)])
    return web.Response(body=body, content_type="image/png")


@functools.cache
def _photo_bytes() -> bytes:
    """A busy JPEG of some kilobytes."""
    image = Image.radial_gradient("L").convert("RGB")
    for index in range(0, 256, 8):
        ImageDraw.Draw(image).line([(index, 0), (255 - index, 255)], fill=(index, 255 - index, 128))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


@functools.cache
def _bomb_bytes() -> bytes:
    """A true PNG of 12,000 × 12,000 black pixels in some 20 kB; as RGB it would take 432 MB."""
    side = 12_000
    image = Image.new("1", (8, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    signature = buffer.getvalue()[:8]
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return signature + b"".join(_chunk(*pair) for pair in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


# "Image not available" in eight designs.  Each draws on a canvas of any size; u is a tenth of its shorter side.

SIZES = ((120, 120), (200, 150), (320, 240), (400, 400), (600, 400))


def _broken_icon(draw: ImageDraw.ImageDraw, w: int, h: int, u: float) -> None:
    x, y = w / 2, h / 2
    draw.rectangle([0, 0, w, h], fill="#eeeeee")
    draw.rectangle([x - 2 * u, y - 2.5 * u, x + 2 * u, y + u], outline="#999999", width=max(1, int(u / 4)))
    draw.line([x - 2 * u, y - 2.5 * u, x + 2 * u, y + u], fill="#999999", width=max(1, int(u / 4)))
    _text(draw, x, y + 2.5 * u, "Image not available", u, "#777777")


def _plain_words(draw: ImageDraw.ImageDraw, w: int, h: int, u: float) -> None:
    x, y = w / 2, h / 2
    draw.rectangle([0, 0, w - 1, h - 1], fill="white", outline="#cccccc")
    _text(draw, x, y, "NO IMAGE", 1.6 * u, "#bbbbbb")


def _dark_camera(draw: ImageDraw.ImageDraw, w: int, h: int, u: float) -> None:
    x, y = w / 2, h / 2
    draw.rectangle([0, 0, w, h], fill="#2b2f36")
    draw.rounded_rectangle([x - 2.5 * u, y - 2 * u, x + 2.5 * u, y + 1.5 * u], u / 2, fill="#8a919c")
    draw.ellipse([x - 1.2 * u, y - 1.4 * u, x + 1.2 * u, y + u], fill="#2b2f36")
    draw.line([x - 3 * u, y + 2.5 * u, x + 3 * u, y - 3 * u], fill="#d65c5c", width=max(2, int(u / 2)))
    _text(draw, x, y + 3.3 * u, "photo unavailable", u, "#c4c9d1")


def _mountains(draw: ImageDraw.ImageDraw, w: int, h: int, u: float) -> None:
    x, y = w / 2, h / 2
    draw.rectangle([0, 0, w, h], fill="#dfe6ee")
    draw.polygon([(x - 4 * u, y + 2 * u), (x - u, y - 2 * u), (x + 2 * u, y + 2 * u)], fill="#a9b8c9")
    draw.polygon([(x, y + 2 * u), (x + 2 * u, y - u), (x + 4 * u, y + 2 * u)], fill="#93a5b9")
    draw.ellipse([x + u, y - 3 * u, x + 2.4 * u, y - 1.6 * u], fill="#a9b8c9")


def _four_oh_four(draw: ImageDraw.ImageDraw, w: int, h: int, u: float) -> None:
    x, y = w / 2, h / 2
    draw.rectangle([0, 0, w, h], fill="#f7f3e8")
    _text(draw, x, y - u, "404", 4 * u, "#5b5346")
    _text(draw, x, y + 2.6 * u, "picture not found", u, "#5b5346")


def _no_longer(draw: ImageDraw.ImageDraw, w: int, h: int, u: float) -> None:
    x, y = w / 2, h / 2
    draw.rectangle([0, 0, w, h], fill="#f3f5f6")
    _text(draw, x, y - 0.8 * u, "This photo is", 1.1 * u, "#4a4a4a")
    _text(draw, x, y + 0.8 * u, "no longer available", 1.1 * u, "#4a4a4a")


def _forbidden_sign(draw: ImageDraw.ImageDraw, w: int, h: int, u: float) -> None:
    x, y = w / 2, h / 2
    draw.rectangle([0, 0, w, h], fill="white")
    draw.ellipse([x - 3 * u, y - 4 * u, x + 3 * u, y + 2 * u], outline="#c62828", width=max(2, int(0.8 * u)))
    draw.line([x - 2 * u, y - 3 * u, x + 2 * u, y + u], fill="#c62828", width=max(2, int(0.8 * u)))
    _text(draw, x, y + 3.4 * u, "hotlinking not allowed", u, "#c62828")


def _coming_soon(draw: ImageDraw.ImageDraw, w: int, h: int, u: float) -> None:
    x, y = w / 2, h / 2
    for row in range(h):
        level = 235 - int(60 * row / h)
        draw.line([0, row, w, row], fill=(level, level, level + 15))
    _text(draw, x, y - 0.9 * u, "IMAGE", 1.7 * u, "white")
    _text(draw, x, y + 1.1 * u, "COMING SOON", 1.2 * u, "white")


DESIGNS = (
    _broken_icon,
    _plain_words,
    _dark_camera,
    _mountains,
    _four_oh_four,
    _no_longer,
    _forbidden_sign,
    _coming_soon,
)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, words: str, size: float, fill: str) -> None:
    draw.text((x, y), words, fill=fill, font=ImageFont.load_default(size=max(8, round(size))), anchor="mm")


@functools.cache
def placeholder_bytes(design: int, size: tuple[int, int]) -> bytes:
    """PNG bytes of one of the `DESIGNS` at (width, height)."""
    image = Image.new("RGB", size)
    DESIGNS[design](ImageDraw.Draw(image), size[0], size[1], min(size) / 10)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
