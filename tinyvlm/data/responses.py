"""What a server's answer, or the lack of one, means for a link: HTTP statuses, opt-outs, errors → `schema.STATUSES`.

200, 203                             a body: it decides
206 and other 2xx, 304, other 3xx    dead.http: nobody asked for a part, a change or a choice
301 302 303 307 308                  followed if they say where to, else dead.http
401 403 451 · 404 410                blocked.… · dead.http404
408 · 429 503                        timeout.read · throttled (both tried again)
500 502 504, Cloudflare's 520 to 524 broken.http5xx (tried again), other 5xx the same at once
101, below 200, 600 and above        dead.protocol, dead.http: no such status
"""

from __future__ import annotations

import asyncio
import errno
import zlib
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp import hdrs
from aiohttp.http_exceptions import TransferEncodingError
from multidict import CIMultiDictProxy

from tinyvlm import images
from tinyvlm.data.addresses import FetchError

REDIRECTS = frozenset((301, 302, 303, 307, 308))
PICTURES = frozenset((200, 203))
THROTTLED = frozenset((429, 503))
_TRANSIENT = frozenset((408, 429, 500, 502, 503, 504, *range(520, 525)))
AGENT = "tinyvlm"
"""The name by which owners may address us in robots.txt and `X-Robots-Tag`."""
_OPT_OUTS = {"noai", "noimageai", "noml", "noindex", "noimageindex", "none"}
# Directives of X-Robots-Tag that have a value behind a colon, where others have the name of a robot before it.
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_NOT_THERE = {errno.ETIMEDOUT: "timeout.connect", errno.ECONNRESET: "broken.reset", errno.ECONNABORTED: "broken.reset"}


def refusal(code: int, retry_after: str | None) -> FetchError:
    """The error for an HTTP status that brings no picture."""
    wait_s = retry_after_s(retry_after) if code in THROTTLED else None
    return FetchError(_status_of(code), f"HTTP {code}", transient=code in _TRANSIENT, wait_s=wait_s)


def _status_of(code: int) -> str:
    if code in THROTTLED:
        return "throttled"
    if code in (404, 410):
        return "dead.http404"
    if code in (401, 403, 451):
        return f"blocked.{code}"
    if code == 408:
        return "timeout.read"
    if code < 200:
        return "dead.protocol"
    return "broken.http5xx" if 500 <= code < 600 else "dead.http"


def opt_out(headers: CIMultiDictProxy[str]) -> FetchError | None:
    """The owner's wish in the headers that the picture be left alone.

    Source: `X-Robots-Tag`, whose lines may be addressed to one robot ("name: rule, rule"); "none" stands for "noindex,
    nofollow".  W3C TDM Reservation Protocol: `tdm-reservation: 1`.
    """
    for line in headers.getall("X-Robots-Tag", ()):
        agent = "*"
        for part in line.lower().split(","):
            name, colon, rule = (piece.strip() for piece in part.partition(":"))
            if not colon:
                rule = name
            elif name in _VALUED or " " in name:  # with a blank: the end of a date
                continue
            else:
                agent = name
            if rule in _OPT_OUTS and agent in (AGENT, "*"):
                return FetchError("optout.header", f"X-Robots-Tag: {rule}")
    if headers.get("tdm-reservation", "").strip() == "1":
        return FetchError("optout.tdm", "tdm-reservation: 1")
    return None


def explain(error: aiohttp.ClientError) -> FetchError:
    """What aiohttp met, in our statuses."""
    detail = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return FetchError("timeout.connect", "no connection in time", transient=True)
    if isinstance(error, (aiohttp.ServerTimeoutError, asyncio.TimeoutError)):
        return FetchError("timeout.read", "no answer in time", transient=True)
    if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch)):
        return FetchError("dead.tls", f"TLS: {detail}")
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, ConnectionRefusedError):
            return FetchError("dead.refused", "refused")
        status = _NOT_THERE.get(error.os_error.errno or 0, "broken.network")
        return FetchError(status, str(error.os_error), transient=True)
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("bad_url", detail)
    if isinstance(error, aiohttp.ClientResponseError):
        return FetchError("dead.protocol", f"the answer is not HTTP: {error.message}")
    if isinstance(error.__cause__, TransferEncodingError) and "not completed" not in detail:
        return FetchError("dead.protocol", f"the answer is not HTTP: {error.__cause__.message}")
    return FetchError("broken.reset", detail, transient=True)


def retry_after_s(text: str | None) -> float | None:
    """`Retry-After` as seconds from now; it may hold a number or a date."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        when = parsedate_to_datetime(text)
        return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


async def read_body(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The picture in an answer, unpacked; of `most` bytes.

    Raises:
        FetchError: it is longer, empty, or its first bytes are those of no picture.
    """
    encoding = response.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower()
    pieces: list[bytes] = []
    num_bytes = 0
    sniffed = encoding != "identity"
    async for piece in response.content.iter_any():
        pieces.append(piece)
        num_bytes += len(piece)
        if num_bytes > most:
            raise FetchError("too_large", f"more than {most} bytes")
        if not sniffed and num_bytes >= images.SIGNATURE_BYTES:
            sniffed = True
            first_bytes = b"".join(pieces)[: images.SIGNATURE_BYTES]
            if images.sniff(first_bytes) is None:
                raise FetchError("not_image", f"{response.content_type}, begins with {first_bytes[:12]!r}")
    if not num_bytes:
        raise FetchError("not_image", "empty answer")
    body = b"".join(pieces)
    return body if encoding == "identity" else unpack(body, encoding, most)


async def read_text(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The first `most` bytes of a file for robots, unpacked; of one that is not there, none.

    RFC 9309 §2.3.1: 4xx means that there is none; that 429 is no answer to the question is our reading.
    """
    code = response.status
    if code == 429 or code >= 500:
        raise refusal(code, response.headers.get(hdrs.RETRY_AFTER))
    if not 200 <= code < 300:
        return b""
    body = await response.content.read(0)
    while len(body) < most and (piece := await response.content.readany()):
        body += piece
    encoding = response.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower()
    return body[:most] if encoding == "identity" else unpack(body, encoding, most)


def unpack(body: bytes, encoding: str, most: int) -> bytes:
    """Undo a packing that we did not ask for, never beyond `most` bytes."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("not_image", f"packed as {encoding[:40]}, which we did not ask for")
    # "deflate" is zlib by the standard and raw by some servers; a zlib header's first two bytes divide by 31.
    raw = encoding == "deflate" and int.from_bytes(body[:2], "big") % 31 != 0
    unpacker = zlib.decompressobj(wbits=-15 if raw else 47)
    try:
        plain = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise FetchError("corrupt", f"{encoding}: {error}") from None
    if len(plain) > most:
        raise FetchError("too_large", f"more than {most} bytes unpacked")
    return plain
