"""Conversations and the text that the language model sees: the only place that writes a prompt.

A conversation is a list of messages.  A message has a role and a list of parts; a part is text or "picture number i":

    Message("user", ("<picture 0>", "what shape is in the image?"))
         │ render                                        (this file)
         ▼
    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<IMAGE><Image_Token>×K<IMAGE_END>what shape …<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\n\ncircle<|eot_id|>
                                                    ╰──── supervised ────╯

The layout is that of Llama 3 Instruct without its date lines; `CHAT_TEMPLATE` is the same layout as a Jinja template for
`tokenizer.apply_chat_template`, and a test keeps the two equal.
"""

from __future__ import annotations

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
    """A stretch of prompt text; `supervised` stretches carry the loss."""

    text: str
    supervised: bool


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
            raise InputError(f"Message {position} ({message.role}) has a picture; only user messages may.", field="messages")


def render(messages: Sequence[Message], num_image_tokens: int, *, open_answer: bool = False) -> list[Segment]:
    """Write a conversation as prompt text, split where the supervision changes.

    Args:
        messages: the turns, already checked.
        num_image_tokens: K, how many `<Image_Token>` stand for one picture.
        open_answer: end with the assistant's header, for generation.

    The assistant's words and the end-of-turn token after them are supervised, nothing else.  Special-token names inside
    user text are defused by `neutralise`, so that text can never become a control token.
    """
    check_turns(messages)
    picture_text = IMAGE + IMAGE_TOKEN * num_image_tokens + IMAGE_END
    segments: list[Segment] = []
    pending = BEGIN_OF_TEXT
    for message in messages:
        pending += f"{START_HEADER}{message.role}{END_HEADER}\n\n"
        content = "".join(picture_text if isinstance(part, Picture) else neutralise(part) for part in message.parts)
        if message.role == "assistant":
            segments += [Segment(pending, False), Segment(content.strip() + END_OF_TURN, True)]
            pending = ""
        else:
            pending += content.strip() + END_OF_TURN
    if open_answer:
        pending += f"{START_HEADER}assistant{END_HEADER}\n\n"
    if pending:
        segments.append(Segment(pending, False))
    return segments


def neutralise(text: str) -> str:
    """Break special-token names that users typed, so that they tokenise as ordinary text (a zero-width space is put in)."""
    for name in (*LLAMA_TOKENS, *IMAGE_TOKENS):
        if name in text:
            text = text.replace(name, name[0] + "\u200b" + name[1:])
    return text


def messages_from_dicts(dicts: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Read `{"role", "content"}` messages as OpenAI and transformers write them.

    Content is a string or a list of `{"type": "text", "text": …}` and `{"type": "image"}` / `{"type": "image_url"}` items;
    pictures are numbered in order of appearance.

    Raises:
        InputError: for anything else, naming the message.
    """
    messages: list[Message] = []
    num_pictures = 0
    for position, item in enumerate(dicts):
        content = item.get("content")
        if isinstance(content, str):
            parts: tuple[Part, ...] = (content,)
        elif isinstance(content, Sequence):
            collected: list[Part] = []
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    collected.append(part["text"])
                elif kind in ("image", "image_url", "input_image"):
                    collected.append(Picture(num_pictures))
                    num_pictures += 1
                else:
                    raise InputError(
                        f"Message {position} has a part of type {kind!r}; use 'text' or 'image_url'.", field="messages"
                    )
            parts = tuple(collected)
        else:
            raise InputError(
                f"Message {position} has content of type {type(content).__name__}; give a string or a list of parts.",
                field="messages",
            )
        messages.append(Message(item.get("role", ""), parts))
    check_turns(messages)
    return messages


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
