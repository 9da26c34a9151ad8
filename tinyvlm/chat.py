"""Conversations and the text that the language model sees: the only place that writes a prompt.

A conversation is a list of messages.  A message has a role and a list of parts; a part is text or "picture number i":

    Message("user", (Picture(0), "what shape is in the image?"))
         │ render                                        (this file)
         ▼
    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<IMAGE><Image_Token>×K<IMAGE_END>what shape …<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\n\ncircle<|eot_id|>
                                                    ╰──── supervised ────╯

The layout is that of Llama 3 Instruct without its date lines; `CHAT_TEMPLATE` is the same layout as a Jinja template
for `apply_chat_template`, and a test keeps the two equal.

What people typed and what this file wrote stay apart: a segment says which of the two it is, and only the second kind
is searched for special tokens.  Someone who types `<|eot_id|>` has typed ten characters, not ended a turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tinyvlm.errors import InputError

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"
LLAMA_TOKENS = (BEGIN_OF_TEXT, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN, PAD)
"""Control tokens of Llama 3 (names from its tokenizer_config.json), present in the tiny tokenizer too."""

IMAGE = "<IMAGE>"
IMAGE_END = "<IMAGE_END>"
IMAGE_TOKEN = "<Image_Token>"
IMAGE_TOKENS = (IMAGE, IMAGE_END, IMAGE_TOKEN)
"""The three special tokens that this project adds to the language model's vocabulary, in this order."""

PLACEHOLDER = "<IMGPLH>"
"""What a prompt writes where a picture belongs; plain text, replaced before tokenisation."""

PICTURE_TYPES = ("image", "image_url", "input_image")
"""How the parts of a message that are pictures call themselves in OpenAI's and transformers' shapes."""

Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Picture:
    """The place of picture number `index` (0-based, in the conversation's list of pictures)."""

    index: int


Part = str | Picture


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and text and pictures in the order in which they stand."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The words alone."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Segment:
    """A stretch of prompt text of one kind."""

    text: str
    supervised: bool
    """The loss counts it: the assistant's words and the end-of-turn token after them."""
    is_layout: bool
    """Written by this file: its special-token names are special tokens.  Otherwise typed by someone: plain text."""


def place_pictures(text: str, num_pictures: int) -> tuple[Part, ...]:
    """Turn text with `<IMGPLH>` marks into parts, pictures numbered from 0.

    A single picture without a mark is put in front; with several, marks and pictures must agree in number.

    Raises:
        InputError: the number of marks and of pictures differ.
    """
    pieces = text.split(PLACEHOLDER)
    num_marks = len(pieces) - 1
    if num_marks == 0 and num_pictures == 1:
        return (Picture(0), text)
    if num_marks != num_pictures:
        raise InputError(
            f"The text has {num_marks} {PLACEHOLDER} and comes with {num_pictures} pictures; "
            f"write one {PLACEHOLDER} where each picture belongs.",
            field="messages",
        )
    parts: list[Part] = [pieces[0]]
    for index, piece in enumerate(pieces[1:]):
        parts += [Picture(index), piece]
    return tuple(part for part in parts if part != "")


def check_pictures(messages: Sequence[Message], num_pictures: int) -> None:
    """Refuse a conversation whose picture marks are not exactly 0 … num_pictures-1, each once and in order.

    Raises:
        InputError: with both numbers.
    """
    indices = [part.index for message in messages for part in message.parts if isinstance(part, Picture)]
    if indices != list(range(num_pictures)):
        raise InputError(
            f"The conversation refers to {len(indices)} pictures (numbers {indices}) but comes with {num_pictures}; "
            "each picture must stand exactly once, in order.",
            field="messages",
        )


def check_turns(messages: Sequence[Message]) -> None:
    """Refuse empty conversations, unknown roles, a system message that is not first, and pictures outside user turns.

    Raises:
        InputError: naming the message by its position.
    """
    if not messages:
        raise InputError("The conversation has no messages; give at least one user message.", field="messages")
    for position, message in enumerate(messages):
        if message.role not in ROLES:
            raise InputError(
                f"Message {position} has the role {message.role!r}; use one of {', '.join(ROLES)}.", field="messages"
            )
        if message.role == "system" and position != 0:
            raise InputError(f"Message {position} is a system message; only the first one may be.", field="messages")
        if message.role != "user" and any(isinstance(part, Picture) for part in message.parts):
            raise InputError(f"Message {position} ({message.role}) has a picture; only user messages may.", "messages")


def render(messages: Sequence[Message], num_image_tokens: int, *, open_answer: bool = False) -> list[Segment]:
    """Write a conversation as prompt text, cut where the supervision or the author changes.

    Args:
        messages: the turns.
        num_image_tokens: K, how many `<Image_Token>` stand for one picture.
        open_answer: end with the assistant's header, for generation.

    White space around a message's content is dropped, as Llama's own template does.

    Raises:
        InputError: the turns break a rule of `check_turns`.
    """
    check_turns(messages)
    picture = IMAGE + IMAGE_TOKEN * num_image_tokens + IMAGE_END
    segments: list[Segment] = []
    layout = BEGIN_OF_TEXT
    for message in messages:
        layout += f"{START_HEADER}{message.role}{END_HEADER}\n\n"
        is_answer = message.role == "assistant"
        for part in _content(message):
            if isinstance(part, Picture):
                layout += picture
                continue
            if layout:
                segments.append(Segment(layout, False, True))
            segments.append(Segment(part, is_answer, False))
            layout = ""
        if is_answer:
            if layout:
                segments.append(Segment(layout, False, True))
            segments.append(Segment(END_OF_TURN, True, True))
            layout = ""
        else:
            layout += END_OF_TURN
    if open_answer:
        layout += f"{START_HEADER}assistant{END_HEADER}\n\n"
    if layout:
        segments.append(Segment(layout, False, True))
    return segments


def _content(message: Message) -> list[Part]:
    """The parts of a message: neighbouring texts joined, outer white space and empty texts dropped."""
    parts: list[Part] = []
    for part in message.parts:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return [part for part in parts if part != ""]


CONTROL_NAME = re.compile(r"<(?=\|[^|<>\s]{1,64}\|>|IMAGE>|IMAGE_END>|Image_Token>)")
"""The `<` of what looks like the name of a special token."""


def neutralise(text: str) -> str:
    """Break special-token names, with a zero-width space, in text that will be tokenised together with the layout.

    Our own road does not need this, because `render` keeps typed text apart; transformers' `apply_chat_template`, which
    hands one whole string to the tokenizer, does.
    """
    return CONTROL_NAME.sub("<\u200b", text) if "<" in text else text


def messages_from_dicts(dicts: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Read `{"role", "content"}` messages as OpenAI and transformers write them.

    Content is a string or a list of `{"type": "text", "text": …}` and `{"type": "image"}` / `{"type": "image_url"}`
    items; pictures are numbered in order of appearance.  The role "developer" is OpenAI's newer word for "system".

    Raises:
        InputError: for anything else, naming the message.
    """
    messages: list[Message] = []
    num_pictures = 0
    for position, item in enumerate(dicts):
        if not isinstance(item, Mapping):
            kind = type(item).__name__
            raise InputError(f"Message {position} is a {kind}; give an object with role and content.", "messages")
        parts = tuple(_read_part(part, position) for part in _content_items(item.get("content"), position))
        numbered: list[Part] = []
        for part in parts:
            numbered.append(part if isinstance(part, str) else Picture(num_pictures))
            num_pictures += not isinstance(part, str)
        role = item.get("role", "")
        messages.append(Message("system" if role == "developer" else role, tuple(numbered)))
    check_turns(messages)
    return messages


def _content_items(content: Any, position: int) -> Sequence[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return content
    kind = type(content).__name__
    raise InputError(f"Message {position} has content of type {kind}; give a string or a list of parts.", "messages")


def _read_part(part: Any, position: int) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in PICTURE_TYPES:
        return Picture(0)
    detail = "without a string 'text'" if kind == "text" else f"of type {kind!r}"
    raise InputError(f"Message {position} has a part {detail}; use 'text' or 'image_url'.", "messages")


CHAT_TEMPLATE = (
    "{{- '<|begin_of_text|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{%- set content -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] in ['image', 'image_url', 'input_image'] -%}{{- '<IMGPLH>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endset -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{- content | trim + '<|eot_id|>' -}}{% endgeneration %}"
    "{%- else -%}{{- content | trim + '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)
"""The layout of `render` in Jinja, pictures as `<IMGPLH>`; the processor expands those (it knows K)."""
