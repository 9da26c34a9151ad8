"""A folder of picture files in an object store, with their captions beside them; the rules are those of folders.py.

    s3://bucket/photos/a.jpg · a.txt (or a.caption, a.json) · metadata.csv or .jsonl
        └─ one listing of each folder, in order of its names; texts are read some at a time ─▶ Found

Each picture is an object of its own, which bodies.py reads whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

from tinyvlm import storage
from tinyvlm.data.pictures.folders import Metadata, is_metadata
from tinyvlm.data.pictures.found import (
    IMAGE_SUFFIXES,
    MAX_WORD_BYTES,
    WORD_SUFFIXES,
    Found,
    PicturesConfig,
    is_hidden,
    suffix_of,
    words,
)
from tinyvlm.errors import DataError

_AT_ONCE = 256
"""Pictures whose texts are read together."""


@dataclass(frozen=True)
class Object:
    """A file below the folder."""

    path: Path
    name: bytes
    """Its path from the folder."""
    num_bytes: int
    version: str
    texts: tuple[str, ...] = ()
    """Suffixes, as they are written, of the texts of the same stem beside it."""


@dataclass(frozen=True)
class Survey:
    """What a walk sees."""

    suffixes: Counter[str] = field(default_factory=Counter)
    tables: list[str] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)
    digest: str = ""
    """Of names, sizes and versions of all pictures and texts."""


class Store:
    """The picture files below a folder."""

    def __init__(self, root: Path, config: PicturesConfig, seen: Survey) -> None:
        self.name, self.root, self.config, self.seen = str(root), root, config, seen
        self.identity = seen.digest
        self.left_out: Counter[str] = Counter()
        self.damaged: list[str] = []

    def measure(self) -> str:
        """`identity`, as it is now."""
        return survey(self.root).digest

    def __iter__(self) -> Iterator[Found]:
        self.left_out.clear()
        with Metadata(os.fsencode(self.name), self.seen.metadata, self.config, _open) as metadata:
            waiting: list[Object] = []
            for each in walk(self.root, self.left_out):
                suffix = suffix_of(each.name)
                if suffix in IMAGE_SUFFIXES:
                    waiting.append(each)
                elif suffix not in WORD_SUFFIXES and not is_metadata(each.name):
                    self.left_out[suffix or "no suffix"] += 1
                if len(waiting) == _AT_ONCE:
                    yield from self._found(waiting, metadata)
                    waiting = []
            yield from self._found(waiting, metadata)
            self.left_out["names in metadata without a picture"] += metadata.num_unused()

    def _found(self, pictures: list[Object], metadata: Metadata) -> Iterator[Found]:
        known = [metadata.get(picture.name) for picture in pictures]
        texts = storage.each(_texts, [p for p, told in zip(pictures, known, strict=True) if told is None], self.root)
        read = iter(texts)
        for picture, told in zip(pictures, known, strict=True):
            if told is None:
                beside = next(read)
                unusable = [suffix for suffix, text in beside.items() if not text]
                self.left_out["texts that cannot be read, are empty or too long"] += len(unusable)
                told = words({suffix: text for suffix, text in beside.items() if text}, self.config)
            caption, meta = told
            url = str(picture.path)
            yield Found(url, url, 0, picture.num_bytes, None, caption=caption, meta=meta)


def survey(root: Path) -> Survey:
    """Walk through a folder once, without opening an object."""
    digest = hashlib.sha256(str(root).encode())
    seen = Survey()
    for each in walk(root, Counter()):
        suffix = suffix_of(each.name)
        seen.suffixes[suffix] += 1
        if suffix == ".parquet":
            seen.tables.append(str(each.path))
        elif is_metadata(each.name):
            seen.metadata.append(each.name)
        if suffix in (*IMAGE_SUFFIXES, *WORD_SUFFIXES) or is_metadata(each.name):
            digest.update(f"{len(each.name)} {each.num_bytes} {each.version} ".encode() + each.name)
    return replace(seen, digest=digest.hexdigest())


def walk(root: Path, left_out: Counter[str], below: bytes = b"") -> Iterator[Object]:
    """The objects below a folder, each folder's names in order; counts what is left out.

    Raises:
        DataError: the store does not answer.
    """
    try:
        entries = storage.entries(root)
    except OSError as error:
        raise DataError(f"{root} cannot be listed: {error.strerror or error}.") from error
    names = {entry.name for entry in entries if not entry.is_folder}
    for entry in entries:
        name = os.path.join(below, os.fsencode(entry.name))
        if is_hidden(os.fsencode(entry.name)):
            left_out["hidden"] += 1
        elif entry.is_folder:
            yield from walk(root / entry.name, left_out, name)
        else:
            stem = os.path.splitext(entry.name)[0]
            endings = [ending for suffix in WORD_SUFFIXES for ending in (suffix, suffix.upper())]
            texts = tuple(ending for ending in endings if stem + ending in names)
            yield Object(root / entry.name, name, entry.size, entry.version, texts)


def _texts(picture: Object) -> dict[str, bytes]:
    """The texts beside a picture, by suffix in small letters; b"" for one that is no use."""
    found: dict[str, bytes] = {}
    for ending in picture.texts:
        path = picture.path.with_suffix(ending)
        try:
            text = storage.read(path) if ending.lower() not in found else b""
        except FileNotFoundError:
            text = b""
        found.setdefault(ending.lower(), text if len(text) <= MAX_WORD_BYTES else b"")
    return found


def _open(path: bytes) -> BinaryIO:
    return cast(BinaryIO, storage.address(os.fsdecode(path)).open("rb"))
