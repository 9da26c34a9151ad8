"""Questions to any OpenAI-compatible endpoint: one system message, one question, one answer.

    async with talking(endpoint, instruction) as talk:
        answer = await talk.say(question)

An endpoint that is busy, failing or away is asked again, with longer and longer waits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tinyvlm.errors import ClusterError, ConfigError, DataError

MAX_ANSWER_BYTES = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A chat completions endpoint."""

    url: str
    """Base address: https://host/v1, or a bare https://host."""
    model: str
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; never shown."""
    timeout_s: float = 120.0
    """For one answer."""
    num_tries: int = 4
    """Of one question, when the endpoint is busy, failing or away."""
    first_wait_s: float = 0.5
    """Before the second try; it doubles, unless the endpoint says how long."""
    longest_wait_s: float = 60.0
    called: str = "--"
    """What stands before the names of the settings (`url`, `model`, `key-env`) where one gives them."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError(
                f"{self.setting('url')} wants http(s)://host[:port][/v1] and no password, got {_hidden(self.url)!r}."
            )
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ConfigError("The endpoint's key has characters that no HTTP header may have; check its variable.")

    @property
    def address(self) -> str:
        base = self.url.rstrip("/")
        return f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"

    def setting(self, name: str) -> str:
        """How whoever runs this gives a setting: `--key-env`, or `prepare.rewrite.key_env`."""
        return f"{self.called}{name if self.called == '--' else name.replace('-', '_')}"


@asynccontextmanager
async def talking(endpoint: Endpoint, instruction: str) -> AsyncIterator[Talk]:
    """A talk with an endpoint.

    Args:
        instruction: the system message of every question.
    """
    limit = aiohttp.ClientTimeout(total=endpoint.timeout_s)
    async with aiohttp.ClientSession(timeout=limit) as session:
        yield Talk(endpoint, session, instruction)


class Talk:
    """Questions to one endpoint, asked again when that may help."""

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession, instruction: str) -> None:
        self.endpoint, self.session, self.instruction = endpoint, session, instruction
        self.wants_json = True
        """Whether `response_format` is sent; not every server knows it."""

    async def say(self, question: str) -> str:
        """What the model answers; "" when the answer is no chat completion."""
        endpoint, wait_s = self.endpoint, self.endpoint.first_wait_s
        trouble = ""
        tries = endpoint.num_tries
        while tries:
            tries -= 1
            wants_json = self.wants_json  # another question of this talk may find out meanwhile
            try:
                status, body, asked_wait_s = await self._post(question, wants_json)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                trouble, asked_wait_s = str(error) or f"no answer in {endpoint.timeout_s:g} s", None
            else:
                if status == 200:
                    return _content(body)
                trouble = f"HTTP {status}: {_message(body)}"
                if status in (400, 422) and wants_json:
                    self.wants_json, tries = False, tries + 1
                    continue
                if status not in (408, 409, 425, 429) and status < 500:
                    raise DataError(
                        self.plain(f"{endpoint.address} refuses the question ({trouble}); {self._advice(status)}.")
                    )
            if tries:
                await asyncio.sleep(min(endpoint.longest_wait_s, wait_s if asked_wait_s is None else asked_wait_s))
                wait_s *= 2
        raise ClusterError(
            self.plain(
                f"{endpoint.address} gave no answer in {endpoint.num_tries} tries ({trouble}); "
                f"is it running, and is {endpoint.setting('url')} right?"
            )
        )

    async def _post(self, question: str, wants_json: bool) -> tuple[int, bytes, float | None]:
        """Status, body, and the wait in seconds that was asked for.  Redirects are not followed: they take the key."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": "system", "content": self.instruction}, {"role": "user", "content": question}],
        }
        if wants_json:
            body["response_format"] = {"type": "json_object"}
        headers = {"Authorization": f"Bearer {self.endpoint.key}"} if self.endpoint.key else {}
        async with self.session.post(
            self.endpoint.address, json=body, headers=headers, allow_redirects=False
        ) as answer:
            data = bytearray()
            async for chunk in answer.content.iter_chunked(65_536):
                data += chunk
                if len(data) > MAX_ANSWER_BYTES:
                    break
            said = answer.headers.get("Retry-After", "")
            return answer.status, bytes(data), float(said) if said.isdecimal() else None

    def _advice(self, status: int) -> str:
        url, model, key_env = map(self.endpoint.setting, ("url", "model", "key-env"))
        if status in (401, 403):
            return f"put its key into the variable that {key_env} names"
        return f"check {url} and {model}" if status >= 400 else f"give the address that it redirects to as {url}"

    def plain(self, message: str) -> str:
        """Without the key, which servers like to repeat."""
        return message.replace(self.endpoint.key, "…") if self.endpoint.key else message


def _content(body: bytes) -> str:
    try:
        said = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    return said if isinstance(said, str) else json.dumps(said)


def _message(body: bytes) -> str:
    """The words of an error body, OpenAI's or any other, in one short line."""
    text = body[:2000].decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return " ".join(text.split())[:200] or "no reason given"


def _hidden(url: str) -> str:
    """An address without password and query, which may hold secrets."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="…" if parts.query else "").geturl()
