"""New labels from a language model behind any OpenAI-compatible endpoint.

    Growth ──names so far──▶ POST {url}/chat/completions ──JSON, more or less──▶ Growth.offer ──▶ enough? else again

A model repeats itself, forgets the format and stops in the middle: rounds go on while they bring something new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tinyvlm.endpoint import Endpoint, talking
from tinyvlm.errors import DataError
from tinyvlm.labels.grow import Growth, candidates_in_text

MAX_IDLE_ROUNDS = 3
"""So many rounds without a new label end the asking."""
MAX_ASKED = 40
"""Labels asked for in one round: longer answers are cut off more often."""

_INSTRUCTION = "You write labels for zero-shot image classification.  You answer with JSON and nothing else."
_QUESTION = """Write {number} new labels for the category "{category}".
A label names one kind of thing, scene or activity that a photo or graphic on the web may show, in one to four words of
lower-case singular English.  Its description says in 6 to 16 words what one sees (shape, colour, parts, surroundings),
so that one who does not know the word would recognise it; it begins with an article where English wants one and does
not only repeat the label.  Neither these labels again nor their plurals or synonyms: {known}.
Answer with {{"labels": [{{"name": "…", "description": "…"}}, …]}}."""


def ask_for_labels(endpoint: Endpoint, growth: Growth, on_round: Callable[[str], None] = lambda said: None) -> None:
    """Ask, round after round, until `growth` has what it wants or nothing new comes any more.

    Raises:
        ClusterError: nobody answers, or the endpoint stays busy.
        DataError: it refuses the question, or never says anything that holds labels.
    """
    asyncio.run(_rounds(endpoint, growth, on_round))


async def _rounds(endpoint: Endpoint, growth: Growth, on_round: Callable[[str], None]) -> None:
    idle, number, understood, last = 0, 0, False, ""
    async with talking(endpoint, _INSTRUCTION) as talk:
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
