"""Conversations of your own, as OpenAI, transformers, TRL, LLaMA-Factory and ShareGPT write them.

    {"messages": [{"role": "user", "content": …}, …], "images": …}      prepare.source=messages
    {"conversations": [{"from": "human", "value": …}, …], "image": …}   prepare.source=sharegpt

turns.py reads both; they differ in the field that has the turns.  Names of pictures are relative to the record's file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvlm.chat import Message
from tinyvlm.data.conversations import check, to_columns
from tinyvlm.data.sources import Dialogue, FileSource, GivenImage, Outline, StoredImage, text_of
from tinyvlm.data.sources.turns import RefusedError, read_turns
from tinyvlm.schema import OK, Family, Split

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

_TEST_WORDS = {"test", "val", "valid", "validation", "dev", "eval", "evaluation"}
_TRAIN_WORDS = {"train", "training"}


class Messages(FileSource):
    """Records with a list of turns in the field `messages`."""

    name = "messages"
    turns_field = "messages"
    required = ("messages",)

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self._tests: frozenset[str] = frozenset()

    def choose(self, files: Sequence[str]) -> Sequence[str]:
        """All.  Those named test or val beside one named train are never trained on, as `datasets` has it."""
        words = {file: set(re.split(r"[\W_]+", os.path.basename(file).lower())) for file in files}
        if any(named & _TRAIN_WORDS for named in words.values()):
            self._tests = frozenset(file for file, named in words.items() if named & _TEST_WORDS)
        return files

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        """Equal conversations, however they are written down, are the same one."""
        folder, name = os.path.split(file)
        about = {"folder": folder, "file": name, "split": "test" if file in self._tests else "train"}
        [one] = self.dialogues(record, about)
        if check(one, len(one.images)).status != OK:
            return Outline(about=about)  # its row has a better reason than being a duplicate
        shown = [_identity(image) for image in one.images]
        same = json.dumps([to_columns(one.messages), shown], separators=(",", ":"))
        return Outline(together=shown[0] if shown else None, pictures=shown, same=same, about=about)

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        """The record's one conversation."""
        split: Split = "test" if about.get("split") == "test" else "train"
        meta = {"id": text_of(record.get("id")), "file": about.get("file")}
        meta = {name: value for name, value in meta.items() if value}
        images = record.get("image") if record.get("images") is None else record["images"]
        turns = record.get(self.turns_field)
        try:
            messages, given = read_turns(turns, images, str(about.get("folder", "")), record.get("system"))
        except RefusedError as refused:
            return [Dialogue("instruction", split, (), meta=meta, status=refused.status, detail=str(refused))]
        return [Dialogue(_family(messages, given), split, messages, given, meta)]


class ShareGPT(Messages):
    """Records with a list of turns in the field `conversations`."""

    name = "sharegpt"
    turns_field = "conversations"
    required = ("conversations",)


def _family(messages: Sequence[Message], images: Sequence[GivenImage]) -> Family:
    if not images:
        return "text"
    return "multi_turn" if sum(message.role == "user" for message in messages) > 1 else "instruction"


def _identity(image: GivenImage) -> str:
    """Equal for equal pictures, as far as can be told without looking."""
    if isinstance(image, StoredImage):
        return f"{image.folder}/{image.name}"
    return hashlib.sha256(image if isinstance(image, bytes) else image.encode("utf-8", "replace")).hexdigest()
