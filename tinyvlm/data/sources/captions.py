"""Plain captions: the words that the link list itself brings for each picture (CapsFusion and its kind).

row.caption ──▶ user: picture + one of the twenty prompts   assistant: the caption
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tinyvlm.chat import Message, Picture
from tinyvlm.data.sources import CAPTION_PROMPTS, Dialogue, SourceRow, drawn

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig


class Captions:
    """The reader; it needs no file of its own."""

    name = "captions"
    reads = "encode"
    without_caption = "the link list has no caption for it"

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config

    def num_questions(self) -> Mapping[str, Mapping[int, int]]:
        """Captions are not questions: nothing to account for."""
        return {}

    def dialogues(self, row: SourceRow) -> Sequence[Dialogue]:
        """One caption conversation, or its reason why not."""
        caption = (row.caption or "").strip()
        if not caption:
            return [Dialogue("caption", "train", (), status="bad_text", detail=self.without_caption)]
        prompt = CAPTION_PROMPTS[drawn("prompt", row.key, self.config.seed) % len(CAPTION_PROMPTS)]
        return [Dialogue("caption", "train", (Message("user", (Picture(0), prompt)), Message("assistant", (caption,))))]
