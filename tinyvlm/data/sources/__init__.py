"""Where conversations come from: one reader per dataset, all with the same face.

    input row (key, caption, meta) ──Source.dialogues──▶ Dialogue, Dialogue, …      (prepare.py makes rows of them)

A reader is given one finished picture's row at a time and says what is talked about it.  Every choice (wording, order,
split) is drawn by a hash of the row, never by a random generator's mood, so the same row always says the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tinyvlm import schema
from tinyvlm.chat import Message

Family = Literal["caption", "vqa", "multi_turn", "text"]
Split = Literal["train", "validation", "test"]
FAMILIES: tuple[Family, ...] = ("caption", "vqa", "multi_turn", "text")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

CAPTION_PROMPTS = (
    "Describe this image.",
    "Write a caption for this image.",
    "What does this image show?",
    "Generate a caption describing this image.",
    "Provide a description of this image.",
    "What's depicted in this image?",
    "Write a description for this image.",
    "Generate text describing this image.",
    "Create a caption for this image.",
    "What can you see in this image?",
    "Describe what you observe in this image.",
    "Write text explaining this image.",
    "Generate a description of this image.",
    "What is shown in this image?",
    "Provide a caption for this image.",
    "Explain what this image depicts.",
    "Write what you see in this image.",
    "Describe the contents of this image.",
    "Generate text about this image.",
    "What appears in this image?",
)
"""The twenty prompts of the published system."""


@dataclass(frozen=True)
class Dialogue:
    """One conversation before it becomes a row; `status` other than ok says why it cannot be used."""

    family: Family
    split: Split
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    status: str = schema.OK
    detail: str | None = None


@dataclass(frozen=True)
class SourceRow:
    """What a reader may know of a picture: its key, the link list's caption, and the parsed `meta`."""

    key: int
    caption: str | None
    meta: Mapping[str, Any]


class Source(Protocol):
    """A reader.  Heavy files are read on first use."""

    name: str

    def dialogues(self, row: SourceRow) -> Sequence[Dialogue]:
        """All that is said about one picture; at least one entry, with a status when nothing can be said."""

    def num_questions(self) -> Mapping[str, Mapping[int, int]]:
        """Split of the data set → picture → how many questions it has, asked or not; empty when there is no list."""


def drawn(*parts: object) -> int:
    """A 64-bit number drawn from `parts` by hashing: the same on every machine and in every run."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def share(*parts: object) -> float:
    """A number in [0, 1) drawn from `parts`."""
    return drawn(*parts) / 2**64
