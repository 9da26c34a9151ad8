"""Dialogues ⇄ the columns of a row, and what makes a conversation fit to be trained on.

Dialogue ──check──▶ the same, or with the status that keeps it out of training ──to_columns──▶ messages
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tinyvlm import schema
from tinyvlm.chat import ROLES, Message, Part, Picture
from tinyvlm.data.sources import Dialogue

EMPTY_ANSWERS = ("<nooutput>", "<no output>", "<noinput>", "<no input>")
"""What stands for "nothing" where language models wrote the answers (AlpacaDataCleaned's list)."""


def check(dialogue: Dialogue, num_images: int) -> Dialogue:
    """The dialogue, with a status and a reason if training must not see it.

    Roles take turns and end with the assistant, every picture is referred to once and in order, nobody is silent.
    """
    if dialogue.status != schema.OK:
        return dialogue
    for status, detail in (
        ("bad_turns", _wrong_turn(dialogue.messages)),
        ("bad_count", _wrong_count(dialogue.messages, num_images)),
        ("bad_text", _silence(dialogue.messages)),
    ):
        if detail is not None:
            return replace(dialogue, status=status, detail=detail)
    return dialogue


def _wrong_turn(messages: Sequence[Message]) -> str | None:
    roles: list[str] = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        return "there are no messages"
    for number, role in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            known = role if role in ROLES else repr(role)
            return f"turn {number} is {known}'s, not {wanted}'s"
    if turns[-1] != "assistant":
        return "the assistant does not have the last word"
    shown = next((m.role for m in messages if m.role != "user" and any(isinstance(p, Picture) for p in m.parts)), None)
    return f"a picture in a message of {shown}" if shown else None


def _wrong_count(messages: Sequence[Message], num_images: int) -> str | None:
    shown = [part.index for message in messages for part in message.parts if isinstance(part, Picture)]
    if shown == list(range(num_images)):
        return None
    if len(shown) != num_images:
        return f"the text refers to {len(shown)} pictures, and {num_images} came"
    return f"the text refers to its {num_images} pictures in the order {shown}"


def _silence(messages: Sequence[Message]) -> str | None:
    for number, message in enumerate(messages):
        words = message.text.strip()
        if message.role == "assistant" and (not words or words.lower() in EMPTY_ANSWERS):
            return f"message {number}, an answer, is empty" + (f" ({words})" if words else "")
        if not words and not any(isinstance(part, Picture) for part in message.parts):
            return f"message {number} is empty"
    return None


def to_columns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the column `messages` has them."""
    return [{"role": message.role, "parts": [_column(part) for part in message.parts]} for message in messages]


def _column(part: Part) -> dict[str, Any]:
    if isinstance(part, Picture):
        return {"text": None, "image": part.index}
    return {"text": part.encode("utf-8", "replace").decode(), "image": None}


def messages_of(column: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The `messages` column of one row as messages."""
    return [
        Message(
            message["role"],
            tuple(
                (part["text"] or "") if part["image"] is None else Picture(part["image"]) for part in message["parts"]
            ),
        )
        for message in column
    ]
