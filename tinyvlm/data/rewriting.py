"""Short answers made into sentences by a language model, each asked for once.

    (question, short answer) ─▶ cache, a SQLite file ─▶ sentence, or "none that can be used"
                                  ▲        └ not there ─▶ some at a time ─▶ endpoint ─▶ keeps the answer's words? ─┐
                                  └──────────────────────────────────────────────────────────────────────────────┘

What the model said first is what counts from then on, so with its cache a data set comes out the same every time, and
a run that was killed asks only for what it had not got yet.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvlm.config import speed
from tinyvlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tinyvlm.endpoint import Endpoint, Talk

VERSION = 1
"""Of the question and of what is refused; another one asks anew."""
MAX_WORDS = 60
"""Longer sentences are refused."""
NUM_ROUNDS = 2
"""How often a pair is asked about before its short answer is left to the rules."""

Pair = tuple[str, str]
"""Question and short answer."""

_INSTRUCTION = (
    "You turn short answers to questions about pictures into full sentences.  You answer with JSON and nothing else."
)
_QUESTION = """Each of these lines has a question about a picture and its short answer.  For each write one sentence
that gives the answer in full.  Use every word of the short answer as it is written there, digits as digits; add nothing
that the question and the answer do not say.  An answer yes or no is the sentence's first word.
{lines}
Answer with {{"sentences": {{"1": "…", "2": "…", …}}}}."""


@dataclass(frozen=True, kw_only=True)
class RewriteConfig:
    """A language model that makes short answers into sentences."""

    url: str = ""
    """Base address of an OpenAI-compatible endpoint."""
    model: str = ""
    cache: str = ""
    """File that keeps what it said; made if it is not there."""
    pairs_per_request: int = 20
    key_env: str = speed("OPENAI_API_KEY")
    """The variable that holds the endpoint's key."""
    num_requests: int = speed(4)
    """At the same time."""
    timeout_s: float = speed(120.0)

    def __post_init__(self) -> None:
        if self.url and not (self.model and self.cache):
            raise ConfigError("prepare.rewrite.url wants prepare.rewrite.model and prepare.rewrite.cache, a file, too.")
        if not (1 <= self.pairs_per_request <= 200 and 1 <= self.num_requests <= 256 and self.timeout_s > 0):
            raise ConfigError(
                "prepare.rewrite.pairs_per_request wants 1 to 200, num_requests 1 to 256 and timeout_s more than 0, "
                f"got {self.pairs_per_request}, {self.num_requests} and {self.timeout_s:g}."
            )

    def endpoint(self) -> Endpoint:
        """Whom to ask."""
        from tinyvlm.endpoint import Endpoint

        key = os.environ.get(self.key_env, "").strip() or None
        return Endpoint(url=self.url, model=self.model, key=key, timeout_s=self.timeout_s, called="prepare.rewrite.")


class Rewriter:
    """Asks for sentences, and keeps them."""

    def __init__(self, config: RewriteConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        """`asked`: pairs that the endpoint was asked about; `rewritten` and `refused`: answers that got a sentence of
        it, or did not."""

    def sentences(self, pairs: Sequence[Pair]) -> list[str | None]:
        """A sentence for each pair; None where the model gave none that keeps the answer's words.

        Raises:
            ClusterError: nobody answers; what was answered before is kept.
            DataError: the endpoint refuses, or the cache is no such file.
        """
        with _open(self.config.cache) as cache:
            known = self._known(cache, pairs)
            new = list(dict.fromkeys(pair for pair in pairs if pair not in known))
            if new:
                self.counts["asked"] += len(new)
                asyncio.run(self._ask(cache, new))
                known |= self._known(cache, new)
        found = [known[pair] for pair in pairs]
        self.counts["rewritten"] += sum(sentence is not None for sentence in found)
        self.counts["refused"] += sum(sentence is None for sentence in found)
        return found

    def _known(self, cache: sqlite3.Connection, pairs: Sequence[Pair]) -> dict[Pair, str | None]:
        """What the cache has; None: the model was asked and gave nothing of use."""
        by_hash = {self._hash(pair): pair for pair in pairs}
        known: dict[Pair, str | None] = {}
        for some in _some(list(by_hash), 500):
            marks = ",".join("?" * len(some))
            for row in cache.execute(f"SELECT hash, sentence FROM sentences WHERE hash IN ({marks})", some):
                known[by_hash[row[0]]] = row[1]
        return known

    def _hash(self, pair: Pair) -> bytes:
        text = "\x1f".join((str(VERSION), self.config.model, *pair))
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()

    async def _ask(self, cache: sqlite3.Connection, pairs: Sequence[Pair]) -> None:
        from tinyvlm.endpoint import talking

        slots = asyncio.Semaphore(self.config.num_requests)
        async with talking(self.config.endpoint(), _INSTRUCTION) as talk:

            async def ask(some: Sequence[Pair]) -> None:
                async with slots:
                    said = await self._say(talk, some)
                rows = [(self._hash(pair), said.get(pair)) for pair in some]
                with cache:
                    cache.executemany("INSERT OR IGNORE INTO sentences VALUES (?, ?)", rows)

            await asyncio.gather(*(ask(some) for some in _some(pairs, self.config.pairs_per_request)))

    async def _say(self, talk: Talk, pairs: Sequence[Pair]) -> dict[Pair, str]:
        """The usable sentences about these pairs; those that come to nothing are asked about again."""
        said: dict[Pair, str] = {}
        for _ in range(NUM_ROUNDS):
            missing = [pair for pair in pairs if pair not in said]
            if not missing:
                break
            lines = [
                json.dumps({"number": number, "question": question, "answer": answer}, ensure_ascii=False)
                for number, (question, answer) in enumerate(missing, 1)
            ]
            sentences = sentences_in(await talk.say(_QUESTION.format(lines="\n".join(lines))))
            for number, pair in enumerate(missing, 1):
                sentence = " ".join(sentences.get(str(number), "").split())
                if keeps(pair[1], sentence):
                    said[pair] = sentence
        return said


def keeps(answer: str, sentence: str) -> bool:
    """Whether a sentence says a short answer: all its words in their order, and yes or no at the beginning."""
    wanted, words = _words(answer), _words(sentence)
    if not wanted or not len(wanted) <= len(words) <= MAX_WORDS:
        return False
    if wanted in (["yes"], ["no"]):
        return words[:1] == wanted
    rest = iter(words)
    return all(word in rest for word in wanted)


def sentences_in(text: str) -> dict[str, str]:
    """Number → sentence in what a model answered; fences and words around the JSON do no harm."""
    start, end = text.find("{"), text.rfind("}")
    try:
        content: Any = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return {}
    inside = content.get("sentences", content)
    if isinstance(inside, list):
        inside = dict(enumerate(inside, 1))
    if not isinstance(inside, Mapping):
        return {}
    return {str(number): sentence for number, sentence in inside.items() if isinstance(sentence, str)}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _some(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    waiting = iter(items)
    while some := list(itertools.islice(waiting, size)):
        yield some


@contextmanager
def _open(cache: str) -> Iterator[sqlite3.Connection]:
    path = Path(cache)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS sentences (hash BLOB PRIMARY KEY, sentence TEXT) WITHOUT ROWID"
                )
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise DataError(f"prepare.rewrite.cache={cache} cannot be used ({error}); give a file of its own.") from error
