"""What every kind of place has in common: the settings, one found picture, and the rules for names, words and bytes.

Names.  A name is bytes, as the file system or the archive has it, and is never made into a path to write to.  It is
shown percent-encoded, in an address that leads back to the very same bytes: `file:///photos/caf%E9.jpg`,
`file:///shard-0.tar#dir/1.jpg`, `hf://datasets/owner/name@commit/a.parquet#row=7`.

Which files count.  The suffix decides, in any case of letters; whether the bytes are a picture is seen later, and is a
row's status.  Left out, counted, and told: hidden names (a dot in front) and `__MACOSX`, links that lead out of the
folder or to folders, and whatever is no regular file (a pipe or a device is never opened).
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import quote, unquote_to_bytes

from tinyvlm import schema
from tinyvlm.errors import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
WORD_SUFFIXES = (".txt", ".caption", ".json")
"""Files beside a picture that say something about it; of several captions the first in this order counts."""
CAPTION_NAMES = ("caption", "text", "capsfusion", "description", "alt_text", "title")
"""Where a caption is looked for, in this order, when `pictures.caption_column` names no place."""
MAX_WORD_BYTES = 1 << 20
"""A longer text beside a picture is no caption."""


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """How pictures that are already there are found."""

    caption_column: str | None = None
    """Column, JSON field or metadata field with the caption; None: the first of the usual names that is there."""
    image_column: str | None = None
    """Parquet column with the pictures; None: the one that is marked as pictures, or of a usual name."""
    meta_columns: tuple[str, ...] = ()
    """Parquet columns that are carried along as JSON."""
    limit: int | None = None
    """How many pictures are used at most, from the start; None: all."""
    rows_per_part: int = 1_000
    """Pictures that are worked on together, written together, and lost together in a crash."""

    def __post_init__(self) -> None:
        if self.rows_per_part < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(
                f"pictures.limit and pictures.rows_per_part want at least 1, got {self.limit} and {self.rows_per_part}."
            )


@dataclass(frozen=True)
class Found:
    """One picture where it lies; with a status other than ok, a piece of input that is damaged."""

    url: str
    """Names this picture."""
    file: str
    """Address of the file that holds it."""
    offset: int
    """Where in the file it begins, bytes; with a column, the row's number."""
    length: int | None
    """Bytes; unknown in a column."""
    modified: int | None
    """The file's time of change, ns; None where an address never changes."""
    column: str | None = None
    caption: str | None = None
    meta: str = "{}"
    status: str = schema.OK
    detail: str | None = None


class Source(Protocol):
    """A place with pictures."""

    name: str
    """As a person would write it."""
    left_out: Counter[str]
    """What was not used, and why."""

    damaged: list[str]
    """What cannot be read to its end, in words."""
    identity: str
    """`measure`, as it was when the place was found."""

    def measure(self) -> str:
        """A fingerprint that changes when the place does."""

    def __iter__(self) -> Iterator[Found]:
        """All that is there, in an order that depends on the place alone."""


def address(path: bytes | Path, member: bytes | None = None) -> str:
    """The address of a file, or of a member of it."""
    place = "file://" + quote(os.fsencode(path))
    return place if member is None else f"{place}#{quote(member)}"


def path_of(file: str) -> bytes:
    """The path that `address` was given."""
    return unquote_to_bytes(file.removeprefix("file://"))


def suffix_of(name: bytes) -> str:
    """`.jpg` of `A.JPG`; empty when there is none."""
    return os.path.splitext(name)[1].lower().decode("ascii", "replace")


def shown(name: bytes) -> str:
    """For a sentence."""
    return name.decode("utf-8", "replace")


def is_hidden(name: bytes) -> bool:
    """Whether one step of a path is not for us."""
    return name.startswith(b".") or name == b"__MACOSX"


def open_regular(path: bytes) -> BinaryIO:
    """Open a file that must be a regular one; a pipe that took its place does not stop us.

    Raises:
        OSError: as `open`, or it is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{shown(path)} is no regular file")
    return os.fdopen(descriptor, "rb")


def words(texts: Mapping[str, bytes], config: PicturesConfig) -> tuple[str | None, str]:
    """Caption and JSON object of meta from the texts beside a picture, by suffix."""
    fields = _json_object(texts[".json"]) if ".json" in texts else {}
    caption, rest = caption_of(fields, config)
    for suffix in (".caption", ".txt"):
        if suffix in texts:
            caption = clean(texts[suffix].decode("utf-8-sig", "replace")) or caption
    return caption, to_meta(rest)


def caption_of(fields: Mapping[str, Any], config: PicturesConfig) -> tuple[str | None, dict[str, Any]]:
    """The caption among the fields of a picture, and the other fields."""
    names = CAPTION_NAMES if config.caption_column is None else (config.caption_column,)
    name = next((name for name in names if text_of(fields.get(name)) is not None), None)
    if name is None:
        return None, dict(fields)
    # Of several captions of one picture the first is used; all of them stay in the meta.
    rest = {key: value for key, value in fields.items() if key != name or isinstance(value, list)}
    return text_of(fields[name]), rest


def text_of(value: Any) -> str | None:
    """A caption as it may come: text, or a list of texts whose first counts."""
    if isinstance(value, list):
        value = value[0] if value else None
    return clean(value) if isinstance(value, str) else None


def clean(text: str) -> str | None:
    """Without space around it and without halves of characters, which no file can store; None when nothing is left."""
    return text.strip().encode("utf-8", "replace").decode() or None


def to_meta(fields: Mapping[str, Any]) -> str:
    """A JSON object as the column `meta` has it."""
    try:
        return json.dumps(dict(fields), ensure_ascii=False, default=str).encode("utf-8", "replace").decode()
    except RecursionError:  # somebody's joke
        return "{}"


def _json_object(text: bytes) -> dict[str, Any]:
    """Empty when it is none: a bad text costs the words, not the picture."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
