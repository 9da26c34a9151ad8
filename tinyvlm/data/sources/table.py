"""Conversations from CSV: what `tinyvlm data export` wrote, and the published table.

    … family, split, messages, images, sha256, phash, meta    as they were, with their pictures byte for byte
    instruction, inputs, outputs, image_path                  one question and one answer a row, and a picture or none

A picture's name is looked for where `prepare.images` says, or else beside the CSV.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tinyvlm import schema, storage
from tinyvlm.chat import Message, Part, Picture
from tinyvlm.data import hub
from tinyvlm.data.sources import Dialogue, FileSource, Outline, RowReader, StoredImage, require_fields, text_of

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

OWN = ("status", "detail", "source", "family", "split", "messages", "images", "sha256", "phash", "meta")
"""The columns that `tinyvlm data export` writes and this reads; `key` and `source_key` are given anew."""
PUBLISHED = ("instruction", "inputs", "outputs", "image_path")
"""The published system's columns."""


class Table(FileSource):
    """The reader."""

    name = "csv"
    suffixes = (".csv",)
    required: tuple[str, ...] = OWN

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self.required = ()  # there are two kinds of tables, and `records` looks which it is

    def records(self, files: Sequence[str], rows: RowReader) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
        """Each file's rows; it has all columns of one of the two kinds."""
        for file in files:
            is_first = True
            for place, record in rows(file):
                if is_first:
                    require_fields(record, OWN if "messages" in record else PUBLISHED, file)
                is_first = False
                yield file, place, record

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        """Rows with the same pictures lie together."""
        shown = record.get("images") if "messages" in record else record.get("image_path")
        folder = "" if hub.is_pinned(file) else str(storage.address(file).parent)
        return Outline(together=shown if shown not in ("", "[]") else None, about={"folder": folder})

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        """The row's conversation."""
        if "messages" not in record:
            return [_published(record, about["folder"])]
        try:
            return [self._own(record, about["folder"])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever somebody made of it by hand
            detail = f"{type(error).__name__}: {error}"[:200]
            return [Dialogue("instruction", "train", (), status="bad_record", detail=detail)]

    def _own(self, record: Mapping[str, Any], folder: str) -> Dialogue:
        family, split = _one_of(schema.FAMILIES, record, "family"), _one_of(schema.SPLITS, record, "split")
        images = zip(*(json.loads(record[name]) for name in ("images", "sha256", "phash")), strict=True)
        meta = json.loads(record["meta"] or "{}")
        if not isinstance(meta, dict):
            raise ValueError("meta is no JSON object")
        # A source's name is what prepare.name says; its parts keep theirs.
        source, called = record["source"] or "", self.config.called
        return Dialogue(
            cast(schema.Family, family),
            cast(schema.Split, split),
            tuple(_message(message) for message in json.loads(record["messages"])),
            tuple(_stored(name, folder, sha256, phash) for name, sha256, phash in images),
            meta,
            _one_of(tuple(schema.STATUSES), record, "status"),
            record["detail"] or None,
            subset="" if source == called else source.removeprefix(f"{called}/"),
            keeps_split=True,
        )


def _published(record: Mapping[str, Any], folder: str) -> Dialogue:
    asked = "\n".join(filter(None, (text_of(record.get("instruction")), text_of(record.get("inputs")))))
    name = text_of(record.get("image_path"))
    messages = (Message("user", (Picture(0), asked) if name else (asked,)),
                Message("assistant", (text_of(record.get("outputs")),)))  # fmt: skip
    images = (StoredImage(name, folder),) if name else ()
    return Dialogue("instruction" if name else "text", "train", messages, images)


def _one_of(known: Sequence[str], record: Mapping[str, Any], column: str) -> str:
    if record[column] not in known:
        raise ValueError(f"{column} is {record[column]!r}")
    return str(record[column])


def _stored(name: Any, folder: str, sha256: Any, phash: Any) -> StoredImage:
    is_text = all(value is None or isinstance(value, str) for value in (name, sha256))
    if not is_text or not (phash is None or (type(phash) is int and 0 <= phash < 2**64)):
        raise ValueError(f"a picture is {name!r}, {sha256!r}, {phash!r}")
    return StoredImage(name, folder, sha256, phash)


def _message(given: Mapping[str, Any]) -> Message:
    role = given["role"].encode("utf-8", "replace").decode()
    return Message(role, tuple(_part(part) for part in given["parts"]))


def _part(given: Mapping[str, Any]) -> Part:
    if isinstance(given.get("text"), str):
        return str(given["text"])
    if type(given.get("image")) is int and 0 <= given["image"] < 2**31:
        return Picture(given["image"])
    raise ValueError(f"a part is {given!r}")
