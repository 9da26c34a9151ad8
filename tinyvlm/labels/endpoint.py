"""New labels from a language model behind any OpenAI-compatible endpoint.

    Growth ──names so far──▶ POST {url}/chat/completions ──JSON, more or less──▶ Growth.offer ──▶ enough? else again

A model repeats itself, forgets the format and stops in the middle: rounds go on while they bring something new.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tinyvlm.errors import ClusterError, ConfigError, DataError
from tinyvlm.labels.grow import Growth, candidates_in_text

MAX_IDLE_ROUNDS = 3
"""So many rounds without a new label end the asking."""
MAX_ASKED = 40
"""Labels asked for in one round: longer answers are cut off more often."""
MAX_ANSWER_BYTES = 4_000_000

_INSTRUCTION = "You write labels for zero-shot image classification.  You answer with JSON and nothing else."
_QUESTION = """Write {number} new labels for the category "{category}".
A label names one kind of thing, scene or activity that a photo or graphic on the web may show, in one to four words of
lower-case singular English.  Its description says in 6 to 16 words what one sees (shape, colour, parts, surroundings),
so that one who does not know the word would recognise it; it begins with an article where English wants one and does
not only repeat the label.  Neither these labels again nor their plurals or synonyms: {known}.
Answer with {{"labels": [{{"name": "…", "description": "…"}}, …]}}."""


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

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError(f"--url wants http(s)://host[:port][/v1] and no password, got {_hidden(self.url)!r}.")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ConfigError("The endpoint's key has characters that no HTTP header may have; check its variable.")

    @property
    def address(self) -> str:
        base = self.url.rstrip("/")
        return f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"


def ask_for_labels(endpoint: Endpoint, growth: Growth, on_round: Callable[[str], None] = lambda said: None) -> None:
    """Ask, round after round, until `growth` has what it wants or nothing new comes any more.

    Raises:
        ClusterError: nobody answers, or the endpoint stays busy.
        DataError: it refuses the question, or never says anything that holds labels.
    """
    asyncio.run(_rounds(endpoint, growth, on_round))


async def _rounds(endpoint: Endpoint, growth: Growth, on_round: Callable[[str], None]) -> None:
    idle, number, understood, last = 0, 0, False, ""
    limit = aiohttp.ClientTimeout(total=endpoint.timeout_s)
    async with aiohttp.ClientSession(timeout=limit) as session:
        talk = _Talk(endpoint, session)
        while idle < MAX_IDLE_ROUNDS and (growth.missing is None or growth.missing > 0):
            number += 1
            last = await talk.say(_question(growth))
            candidates = candidates_in_text(last)
            understood = understood or bool(candidates)
            new = growth.offer(candidates)
            idle = 0 if new else idle + 1
            on_round(f"round {number}: {len(candidates)} labels came, {new} of them new")
    if not understood:
        said = f"{endpoint.address} answered {number} times, but never with labels as JSON (lastly {last[:80]!r})"
        raise DataError(talk.plain(f"{said}; try another --model."))


def _question(growth: Growth) -> str:
    wanted = MAX_ASKED if growth.missing is None else min(MAX_ASKED, growth.missing + 4)
    twins = [name for name, why in growth.dropped.items() if why.startswith("the same as")]
    known = dict.fromkeys([*growth.names, *twins])
    return _QUESTION.format(number=wanted, category=growth.category, known=", ".join(known) or "(none yet)")


class _Talk:
    """Questions to one endpoint, asked again when that may help."""

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        self.endpoint, self.session = endpoint, session
        self.wants_json = True
        """Whether `response_format` is sent; not every server knows it."""

    async def say(self, question: str) -> str:
        """What the model answers; "" when the answer is no chat completion."""
        endpoint, wait_s = self.endpoint, self.endpoint.first_wait_s
        trouble = ""
        tries = endpoint.num_tries
        while tries:
            tries -= 1
            try:
                status, body, asked_wait_s = await self._post(question)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                trouble, asked_wait_s = str(error) or f"no answer in {endpoint.timeout_s:g} s", None
            else:
                if status == 200:
                    return _content(body)
                trouble = f"HTTP {status}: {_message(body)}"
                if status in (400, 422) and self.wants_json:
                    self.wants_json, tries = False, tries + 1
                    continue
                if status not in (408, 409, 425, 429) and status < 500:
                    raise DataError(
                        self.plain(f"{endpoint.address} refuses the question ({trouble}); {_advice(status)}.")
                    )
            if tries:
                await asyncio.sleep(min(endpoint.longest_wait_s, wait_s if asked_wait_s is None else asked_wait_s))
                wait_s *= 2
        raise ClusterError(
            self.plain(
                f"{endpoint.address} gave no answer in {endpoint.num_tries} tries ({trouble}); "
                "is it running, and is --url right?"
            )
        )

    async def _post(self, question: str) -> tuple[int, bytes, float | None]:
        """Status, body, and the wait in seconds that was asked for.  Redirects are not followed: they take the key."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": question}],
        }
        if self.wants_json:
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


def _advice(status: int) -> str:
    if status in (401, 403):
        return "put its key into the variable that --key-env names"
    return "check --url and --model" if status >= 400 else "give the address that it redirects to as --url"


def _hidden(url: str) -> str:
    """An address without password and query, which may hold secrets."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="…" if parts.query else "").geturl()
