"""LLaVA-Instruct-150K and the 665k mix: talks about pictures in the ShareGPT shape, and files of that shape.

    {"id", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat …?"}, {"from": "gpt", "value": "The bus …"}, …]}
        └─ turns in their order, the picture where its `<image>` stands ─▶ one conversation

Rows without `image` are talks of ShareGPT without a picture.  A conversation is kept whole, with two exceptions that
LLaVA's own training makes too (`preprocess_v1` in llava/train/train.py skips a first turn that is not the human's and
masks a last question): answers before the first question, and questions after the last answer, are left out, counted
in the listing's report, and noted in the row's `meta`: the one lacks its question, the other its answer.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tinyvlm.chat import Message, Part, Picture, Role
from tinyvlm.data.sources import Dialogue, FileSource, Outline, text_of
from tinyvlm.schema import Family

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

Given = bytes | str
"""A picture as records of this shape give it: a file's bytes, or its name."""
MARK = "<image>"
"""Where a picture stands in the words."""
ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
"""How ShareGPT's exports spell the roles."""
MIXED = ("coco", "gqa", "ocr_vqa", "textvqa", "vg")
"""First folders of the pictures' names in the mix: the data sets that it is mixed from."""
_KINDS = re.compile(r"conversation|detail|complex_reasoning")
"""Files of one kind of question are named by it."""
_MARKED = re.compile(rf"\n*{MARK}\n*")


class Llava(FileSource):
    """The reader.  `subset`: the mix's data set, or the file's kind of question; of talks without picture `text`."""

    name = "llava"
    suffixes = (".json", ".jsonl", ".ndjson", ".parquet")
    required = ("conversations",)

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self._left_out: Counter[str] = Counter()

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        """Told apart by picture and words: the name's folder and where the mark stands differ between its files."""
        images = images_of(record.get("image"))
        messages = turns_of(record.get("conversations"))
        _, left_out = _answered(messages)
        if file not in self.config.known:
            self._left_out.update(left_out)
        names = [_file_name(image) for image in images]
        said = [f"{role}: {text.replace(MARK, '').strip()}" for role, text in messages]
        return Outline(
            together=names[0] if names else None,
            pictures=names,
            same="\n".join([*names, *said]) if said else None,
            about={"subset": self.subset(images, file)},
        )

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        """The one conversation of a record."""
        images = images_of(record.get("image"))
        subset = str(about.get("subset") or "")
        names = [image for image in images if isinstance(image, str)]
        meta: dict[str, Any] = {"id": record["id"]} if isinstance(record.get("id"), (str, int)) else {}
        meta |= {"image": names[0] if len(names) == 1 else names} if names else {}
        if not isinstance(record.get("conversations"), list):
            detail = f"`conversations` is {type(record.get('conversations')).__name__}, not a list of turns"
            return [Dialogue(_family((), images), "train", (), (), meta, "bad_record", detail, subset)]
        turns, left_out = _answered(turns_of(record["conversations"]))
        if not all(role for role, _ in turns):
            detail = "a turn does not say who speaks (`from`)"
            return [Dialogue(_family((), images), "train", (), (), meta, "bad_record", detail, subset)]
        messages = _with_pictures(turns, len(images))
        meta |= {"left_out": left_out} if left_out else {}
        given = tuple(image if isinstance(image, bytes) else self.picture_name(image) for image in images)
        marked = sum(text.count(MARK) for role, text in turns if role == "user")
        if marked and not images:
            detail = f"the text has {marked} {MARK}, and no picture came"
            return [Dialogue("text", "train", messages, (), meta, "bad_count", detail, subset)]
        return [Dialogue(_family(messages, images), "train", messages, given, meta, subset=subset)]

    def subset(self, images: Sequence[Given], file: str) -> str:
        """Which part of the source a record is of."""
        if not images:
            return "text"
        first = images[0].strip("/").partition("/")[0] if isinstance(images[0], str) else ""
        if first in MIXED:
            return first
        return _kind_of(file)

    def picture_name(self, image: str) -> str:
        """The name under which `prepare.images` is asked for a picture."""
        return image

    def account(self) -> Mapping[str, Any]:
        """How many turns were left out."""
        return {"turns_left_out": dict(self._left_out)}


@lru_cache
def _kind_of(file: str) -> str:
    kind = _KINDS.match(Path(file).name)
    return kind[0] if kind else ""


def images_of(value: Any) -> tuple[Given, ...]:
    """The pictures of a field: a name, a file's bytes, Hugging Face's `{"bytes", "path"}`, or a list of such."""
    if isinstance(value, list):
        return tuple(image for item in value for image in images_of(item))
    if isinstance(value, dict):
        return images_of(value.get("bytes") or value.get("path"))
    if isinstance(value, bytes):
        return (value,) if value else ()
    name = text_of(value)
    return (name,) if name else ()


def turns_of(value: Any) -> list[tuple[str, str]]:
    """Role and words of each turn; an unknown role stays as it is spelt, and "" is one that is not told."""
    turns = value if isinstance(value, list) else []
    read = [turn if isinstance(turn, dict) else {} for turn in turns]
    spoken = [
        (text_of(turn.get("from", turn.get("role"))), text_of(turn.get("value", turn.get("content")))) for turn in read
    ]
    return [(ROLES.get(speaker.lower(), speaker), text) for speaker, text in spoken]


def _answered(turns: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The turns from the first question to the last answer, and how many were left out; none that shows a picture."""
    system = [turn for turn in turns[:1] if turn[0] == "system"]
    rest = list(turns[len(system) :])
    before = _leading(rest, "assistant")
    after = _leading(rest[::-1], "user") if before < len(rest) else 0
    cut = rest[:before] + rest[len(rest) - after :]
    if any(MARK in text for _, text in cut) or before + after == len(rest):
        return [*system, *rest], {}
    counts = {"answers_before_the_first_question": before, "questions_after_the_last_answer": after}
    return system + rest[before : len(rest) - after], {name: number for name, number in counts.items() if number}


def _leading(turns: Sequence[tuple[str, str]], role: str) -> int:
    return next((number for number, (who, _) in enumerate(turns) if who != role), len(turns))


def _with_pictures(turns: Sequence[tuple[str, str]], num_images: int) -> tuple[Message, ...]:
    """Marks become pictures; without any mark the pictures stand in front of the first question.

    In an answer of a talk without pictures `<image>` is a word like any other (people talk about XML).
    """
    if not num_images:
        return tuple(Message(cast(Role, role), (text,)) for role, text in turns)
    messages: list[Message] = []
    num_shown = 0
    for role, text in turns:
        parts: list[Part] = []
        for number, piece in enumerate(_MARKED.split(text)):
            parts += [Picture(num_shown)] if number else []
            num_shown += number > 0
            parts += [piece] if piece else []
        messages.append(Message(cast(Role, role), tuple(parts)))
    if not num_shown:
        first = next((number for number, message in enumerate(messages) if message.role == "user"), None)
        if first is not None:
            pictures = [Picture(number) for number in range(num_images)]
            messages[first] = Message("user", (*pictures, *messages[first].parts))
    return tuple(messages)


def _family(messages: Sequence[Message], images: Sequence[Given]) -> Family:
    if not images:
        return "text"
    return "multi_turn" if sum(message.role == "user" for message in messages) > 1 else "instruction"


def _file_name(image: Given) -> str:
    """A picture's name without its folders, which differ from one list to the next."""
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image.replace("\\", "/").split("/")[-1]
