"""Turns as people write them down → messages and pictures: the one reading of every chat-like record.

    {"role": "user", "content": "<image> what is it?"}          OpenAI, LLaMA-Factory      "images": ["a.jpg", …]
    {"role": "user", "content": [{"type": "image_url", …}, …]}  OpenAI, transformers, TRL
    {"from": "human", "value": "<image>\\nwhat is it?"}          ShareGPT, LLaVA            "image": "a.jpg"
        └─ read_turns ─▶ Message("user", (Picture(0), "what is it?")), …   +   the pictures, in the order they are shown

A picture's place is a part of a message, or the mark `<image>` in a user's words.  Places that name no picture of their
own take those of the record, one after the other.  Where a record has pictures and no place at all, they stand before
the first user's words (so does TRL).  Numbers that do not agree are left as they are: `conversations.check` says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from tinyvlm.chat import PICTURE_TYPES, Message, Part, Picture, Role
from tinyvlm.data.sources import GivenImage, StoredImage, text_of

MARK = "<image>"
"""What stands in words for a picture; a line's end beside it belongs to it."""
TEXT_TYPES = ("text", "input_text", "output_text")
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
"""What roles are called: OpenAI's and Gemini's words, and those of ShareGPT's files."""
TOOLS = ("tool", "function", "function_call", "observation", "ipython")
"""Roles of programs."""
_CALLS = ("tool_calls", "function_call")
_ADDRESSES = ("bytes", "base64", "data", "source", "image_url", "image", "url", "path")
"""Where a picture's part, or the object that stands for a picture, has the picture itself; the first one counts."""
_PACKED = ("bytes", "base64", "data")
"""Those of them whose text is base64."""
_MARKS = re.compile(r"\n?<image>\n?")
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk", "AAAA")
"""How the base64 of a JPEG, PNG, GIF, WebP, TIFF, BMP, AVIF begins."""
_MIN_BASE64 = 120
"""A shorter text is a name: no picture is that small."""
_MAX_SHOWN = 60
_MAX_NESTED = 8


class RefusedError(Exception):
    """A record cannot be used; `status` and the text say why."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True)
class _Place:
    """Where a picture stands in a message."""

    own: Any = None
    """The picture, if the place itself has it."""
    index: int | None = None
    """Which of the record's pictures it is; None: the next one."""


def read_turns(
    turns: Any, images: Any, folder: str, system: Any = None
) -> tuple[tuple[Message, ...], tuple[GivenImage, ...]]:
    """Messages, and the pictures that their `Picture(0)`, `Picture(1)`, … are.

    Args:
        turns: the record's list of turns, or that list as JSON.
        images: what the record has as its pictures: one or a list of names, bytes, `data:` addresses, base64, or
            objects of `bytes` and `path` as `datasets` writes them.
        folder: what names of pictures are relative to.
        system: words that stand before the turns, where the record has such a field.

    Raises:
        RefusedError: there is no such conversation to be made of it.
    """
    told = [_turn(turn, number) for number, turn in enumerate(_list_of(turns))]
    before: Role = "system"
    if text_of(system) and not any(role == before for role, _ in told):
        told.insert(0, (before, [text_of(system)]))
    told = [(role, parts) for role, parts in told if role != before or any(parts)]  # empty system messages say nothing
    listed = _several(images)
    if listed and not any(isinstance(part, _Place) for _, parts in told for part in parts):
        first = next((parts for role, parts in told if role == "user"), None)
        if first is not None:
            first[:0] = [_Place() for _ in listed]
    return _numbered(told, listed, folder)


def speaker_of(turn: Any) -> str:
    """Who speaks in a turn, as it says; "" where it does not."""
    role = _role(turn) if isinstance(turn, dict) else None
    return role.strip().lower() if isinstance(role, str) else ""


def _role(turn: Mapping[str, Any]) -> Any:
    return turn.get("from") if turn.get("role") is None else turn["role"]


def parts_of(words: str) -> list[str | _Place]:
    """A user's words, cut where pictures stand."""
    parts: list[str | _Place] = []
    for number, piece in enumerate(_MARKS.split(words)):
        parts += [_Place()] if number else []
        parts += [piece] if piece else []
    return parts


def given(image: Any, folder: str, nested: int = 0) -> GivenImage:
    """A picture as a record has it.

    Raises:
        RefusedError: it is none.
    """
    if isinstance(image, bytes) and image:
        return image
    if isinstance(image, str) and image.strip():
        text = image.strip()
        if text[:5].lower() == "data:":
            return text
        if len(text) >= _MIN_BASE64 and text.startswith(_BASE64):
            return f"data:;base64,{text}"
        return StoredImage(unquote(text[7:]) if text[:7].lower() == "file://" else text, folder)
    if isinstance(image, Mapping) and nested < _MAX_NESTED:
        name = next((name for name in _ADDRESSES if not _is_nothing(image.get(name))), None)
        if name is None:
            raise RefusedError("no_picture", f"a picture has none of {', '.join(_ADDRESSES)}")
        inner = image[name]
        if name in _PACKED and isinstance(inner, str) and inner[:5].lower() != "data:":
            return f"data:;base64,{inner}"
        return given(inner, folder, nested + 1)
    if _is_nothing(image):
        raise RefusedError("no_picture", "a picture is empty")
    raise RefusedError("bad_record", f"a picture is {type(image).__name__}, not a name, address or bytes")


def shown(value: Any) -> str:
    """Something of a record's, short enough for a sentence."""
    text = f"a {type(value).__name__}" if isinstance(value, (dict, list, bytes)) else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _list_of(turns: Any) -> Sequence[Any]:
    if isinstance(turns, str):  # CSV, and Parquet that was made of it
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise RefusedError("bad_record", f"the turns are text, and no JSON: {shown(turns)}") from None
    if not isinstance(turns, list):
        raise RefusedError("bad_record", f"the turns are {type(turns).__name__}, not a list")
    if not turns:
        raise RefusedError("bad_record", "there are no turns")
    return turns


def _several(images: Any) -> list[Any]:
    """The pictures of a record that are any."""
    if isinstance(images, str) and images.lstrip()[:1] == "[":  # CSV again
        try:
            images = json.loads(images)
        except (ValueError, RecursionError):
            pass
    return [image for image in (images if isinstance(images, list) else [images]) if not _is_nothing(image)]


def _is_nothing(value: Any) -> bool:
    return value in (None, "", b"") or (isinstance(value, float) and math.isnan(value))


def _turn(turn: Any, number: int) -> tuple[Role, list[str | _Place]]:
    if not isinstance(turn, dict):
        raise RefusedError("bad_record", f"turn {number} is {type(turn).__name__}, not an object with role and content")
    speaker = speaker_of(turn)
    call = next((name for name in _CALLS if turn.get(name)), None)
    if speaker in TOOLS or call:
        raise RefusedError(
            "bad_record", f"turn {number} is a tool's or calls one ({call or speaker}): no words to learn"
        )
    role = ROLES.get(speaker)
    if role is None:
        there = "no role" if _role(turn) is None else f"the role {shown(_role(turn))!r}"
        raise RefusedError("bad_turns", f"turn {number} has {there}; wanted: {', '.join(ROLES)}")
    weight = turn.get("weight")
    if role == "assistant" and weight is not None and weight != 1:
        raise RefusedError("bad_record", f"turn {number} has weight {shown(weight)}: every answer is trained on alike")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    return role, [part for item in _items(content, number) for part in _parts(item, role, number)]


def _items(content: Any, number: int) -> Iterable[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, (dict, bytes)):
        raise RefusedError(
            "bad_record", f"the content of turn {number} is {type(content).__name__}, not text or a list"
        )
    return [{"type": "text", "text": content}]


def _parts(item: Any, role: Role, number: int) -> Iterator[str | _Place]:
    """The parts that one item of a message's content is."""
    if not isinstance(item, dict):
        raise RefusedError("bad_record", f"turn {number} has a part that is {type(item).__name__}, not an object")
    kind = item.get("type")
    if kind in TEXT_TYPES or (kind is None and isinstance(item.get("text"), str)):
        # Words are kept as they are, white space at their ends too: parts of one message are joined.
        text = item.get("text")
        words = text.encode("utf-8", "replace").decode() if isinstance(text, str) else text_of(text)
        yield from parts_of(words) if role == "user" else [words] if words else []
    elif kind in PICTURE_TYPES or (kind is None and any(item.get(name) for name in PICTURE_TYPES)):
        if item.get("file_id"):
            raise RefusedError(
                "no_picture", f"turn {number} shows a file of somebody's server ({shown(item['file_id'])})"
            )
        own = {name: item[name] for name in _ADDRESSES if not _is_nothing(item.get(name))}
        index = item.get("index")
        yield _Place(own or None, index if isinstance(index, int) and not isinstance(index, bool) else None)
    else:
        raise RefusedError("bad_record", f"turn {number} has a part of type {shown(kind)}; wanted: text or image")


def _numbered(
    told: Sequence[tuple[Role, Sequence[str | _Place]]], listed: Sequence[Any], folder: str
) -> tuple[tuple[Message, ...], tuple[GivenImage, ...]]:
    """With every place's picture, numbered as they are shown; those that no place shows come last."""
    waiting, used = iter(range(len(listed))), set[int]()
    images: list[GivenImage] = []
    num_places = 0
    messages: list[Message] = []
    for role, parts in told:
        made: list[Part] = []
        for part in parts:
            if isinstance(part, str):
                made.append(part)
                continue
            made.append(Picture(num_places))
            num_places += 1
            if part.own is not None:
                images.append(given(part.own, folder))
                continue
            index = part.index if part.index is not None else next(waiting, None)
            if index is None:
                continue
            if not 0 <= index < len(listed):
                raise RefusedError(
                    "bad_count", f"a part shows picture {shown(index)}, and the record has {len(listed)}"
                )
            used.add(index)
            images.append(given(listed[index], folder))
        messages.append(Message(role, tuple(made)))
    images += [given(listed[index], folder) for index in range(len(listed)) if index not in used]
    return tuple(messages), tuple(images)
