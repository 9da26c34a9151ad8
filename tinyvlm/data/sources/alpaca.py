"""Alpaca: instructions without pictures, and files of its shape (tatsu-lab/alpaca, its cleaned and regenerated kin).

    {"instruction", "input", "output"} ──▶ user: instruction, an empty line, input     assistant: output

No "### Instruction:" frame is written around them: saying who speaks is what the chat template does.

Rows that are broken in the ways that AlpacaDataCleaned lists (github.com/gururise/AlpacaDataCleaned, README) and a rule
can see end as `bad_text`, with the rule as their detail.  Wrong answers, its largest group, are not found here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvlm.chat import Message
from tinyvlm.data.sources import Dialogue, FileSource, Outline, text_of

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

NOTHING = ("noinput", "nooutput", "noinputneeded", "noinputrequired", "n/a")
"""What stands for nothing, without its brackets, spaces and capitals."""

_ADDRESSES = re.compile(r"\W*((https?://|www\.)\S+\W*)+", re.IGNORECASE)
_ABOUT_ADDRESSES = re.compile(r"\b(urls?|links?|hyperlinks?|domains?|web ?addresse?s?)\b", re.IGNORECASE)
_ABOUT_PAGES = re.compile(
    r"\b(articles?|blogs?|contents?|describe|essays?|explain|home ?page|news|pages?|paragraphs?|passages?|photos?"
    r"|pictures?|posts?|read|reviews?|stor(y|ies)|summar\w+|texts?|videos?|web ?pages?)\b",
    re.IGNORECASE,
)
_THINGS = r"(image|picture|photo|photograph|painting|drawing|figure|graph|chart|diagram|video|audio|file|document)s?"
_ABSENT = re.compile(
    rf"[<\[(][^<>\[\](),\n]*\b({_THINGS}|attached|attachment)\b[^<>\[\](),\n]*[>\])]"  # <Picture Attached>
    rf"|(see |the |an? )*(attached {_THINGS}|{_THINGS} (is |are )?attached)\W*"
    r"|.*!\[[^\]\n]*\]\(http.*",  # a picture in Markdown
    re.IGNORECASE | re.DOTALL,
)
_NEXT_TASK = re.compile(r"^\W*\d{1,2}\.\s*instruction\s*:|^\s*#{2,}\s*instruction\b|\n\W*instruction\s*:", re.I | re.M)
"""How the list of tasks went on, which text-davinci-003 was asked to write."""


class Alpaca(FileSource):
    """The reader."""

    name = "alpaca"
    required = ("instruction", "input", "output")

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        """Told apart by all three texts."""
        return Outline(same="\x1f".join(_fields(record)), about={"family": "text"})

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        """The one conversation of a record."""
        instruction, given, output = _fields(record)
        prompt = f"{instruction}\n\n{given}".strip()
        messages = (Message("user", (prompt,)), Message("assistant", (output,)))
        wrong = what_is_wrong(instruction, given, output)
        status = "bad_text" if wrong else "ok"
        return [Dialogue("text", "train", messages, (), {"input": bool(given)}, status=status, detail=wrong)]


def what_is_wrong(instruction: str, given: str, output: str) -> str | None:
    """The rule against which a row offends; None: it is fine.

    Args:
        given: the input, "" where there is none.
    """
    if not instruction:
        return "the instruction is empty"
    if _is_nothing(output):
        return f"the output is empty ({output})" if output else "the output is empty"
    if _NEXT_TASK.search(output) or _NEXT_TASK.search(instruction):
        return "another instruction follows in the same row"
    if _ABSENT.fullmatch(output):
        return f"the output stands for something that is not there: {output[:80]}"
    if _ABSENT.fullmatch(given):
        return f"the input stands for something that is not there: {given[:80]}"
    asks_the_address = _ABOUT_ADDRESSES.search(instruction) and not _ABOUT_PAGES.search(instruction)
    if _ADDRESSES.fullmatch(given) and not asks_the_address:
        return f"the input is a link whose page nobody has read: {given[:80]}"
    return None


def _fields(record: Mapping[str, Any]) -> tuple[str, str, str]:
    instruction, given, output = (text_of(record.get(name)) for name in Alpaca.required)
    return instruction, "" if _is_nothing(given) else given, output


def _is_nothing(text: str) -> bool:
    return not text or (len(text) < 30 and re.sub(r"[\s<>\[\](){}`'\"*.:_-]", "", text).lower() in NOTHING)
