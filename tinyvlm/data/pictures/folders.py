"""A folder of picture files, nested as deep as you like, with their captions beside them.

    photos/a.jpg · a.txt (or a.caption, a.json)          a text of the same stem
    photos/metadata.csv or .jsonl: file_name, text, …    as Hugging Face's ImageFolder; before texts beside the picture

Names are sorted folder by folder, so that the order depends on them alone; of a folder's files only the names are in
memory, and of a metadata file nothing is: it lies in a small database while the folder is listed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from tinyvlm.data.pictures.found import (
    IMAGE_SUFFIXES,
    MAX_WORD_BYTES,
    WORD_SUFFIXES,
    Found,
    PicturesConfig,
    address,
    caption_of,
    is_hidden,
    open_regular,
    shown,
    suffix_of,
    to_meta,
    words,
)
from tinyvlm.errors import DataError

METADATA = (b"metadata.csv", b"metadata.jsonl")
NAME_FIELD = "file_name"


@dataclass(frozen=True)
class File:
    """A regular file below the folder."""

    name: bytes
    """Its path from the folder."""
    num_bytes: int
    modified: int


@dataclass(frozen=True)
class Survey:
    """What a walk through a folder sees."""

    suffixes: Counter[str]
    """Files of each suffix."""
    tars: list[Path]
    tables: list[Path]
    metadata: list[bytes]
    """Names of metadata files, from the folder."""
    digest: str
    """Of names, sizes and times of change of all pictures and texts: to read them all twice is not worth it."""
    left_out: Counter[str]


class Folder:
    """The picture files below a folder."""

    def __init__(self, root: Path, config: PicturesConfig, seen: Survey) -> None:
        self.name, self.root, self.config, self.seen = str(root), os.fsencode(root), config, seen
        self.identity = seen.digest
        self.left_out: Counter[str] = Counter()
        self.damaged: list[str] = []
        self.word_suffixes = [suffix for suffix in WORD_SUFFIXES if seen.suffixes[suffix]]
        """Those that occur at all: others need not be looked for beside each picture."""

    def measure(self) -> str:
        """`identity`, as it is now."""
        return survey(Path(self.name)).digest

    def __iter__(self) -> Iterator[Found]:
        self.left_out.clear()
        with Metadata(self.root, self.seen.metadata, self.config) as metadata:
            for file in walk(self.root, self.left_out):
                suffix = suffix_of(file.name)
                if suffix in IMAGE_SUFFIXES:
                    yield self._found(file, metadata)
                elif suffix not in WORD_SUFFIXES and not is_metadata(file.name):
                    self.left_out[suffix or "no suffix"] += 1
            self.left_out["names in metadata without a picture"] += metadata.num_unused()

    def _found(self, file: File, metadata: Metadata) -> Found:
        path = os.path.join(self.root, file.name)
        known = metadata.get(file.name)
        caption, meta = known or words(self._texts(path), self.config)
        url = address(path)
        return Found(url, url, 0, file.num_bytes, file.modified, caption=caption, meta=meta)

    def _texts(self, path: bytes) -> dict[str, bytes]:
        stem = os.path.splitext(path)[0]
        found: dict[str, bytes] = {}
        for suffix in self.word_suffixes:
            for ending in (suffix.encode(), suffix.upper().encode()):
                if suffix not in found and os.path.lexists(stem + ending):
                    text = self._text(stem + ending)
                    found |= {suffix: text} if text is not None else {}
        return found

    def _text(self, path: bytes) -> bytes | None:
        try:
            if not _leads_inside(path, self.root):
                return None
            with open_regular(path) as file:
                text = file.read(MAX_WORD_BYTES + 1)
        except OSError:
            text = b""
        if not text or len(text) > MAX_WORD_BYTES:
            self.left_out["texts that cannot be read, are empty or too long"] += 1
            return None
        return text


def survey(root: Path) -> Survey:
    """Walk through a folder once, without opening a file."""
    digest = hashlib.sha256(os.fsencode(root))
    seen = Survey(Counter(), [], [], [], "", Counter())
    for file in walk(os.fsencode(root), seen.left_out):
        suffix = suffix_of(file.name)
        seen.suffixes[suffix] += 1
        if suffix in (".tar", ".parquet"):
            (seen.tars if suffix == ".tar" else seen.tables).append(root / os.fsdecode(file.name))
        elif is_metadata(file.name):
            seen.metadata.append(file.name)
        if suffix in (*IMAGE_SUFFIXES, *WORD_SUFFIXES) or is_metadata(file.name):
            digest.update(b"%d %d %d " % (len(file.name), file.num_bytes, file.modified) + file.name)
    return replace(seen, digest=digest.hexdigest())


def walk(root: bytes, left_out: Counter[str]) -> Iterator[File]:
    """The regular files below a folder, each folder's names in order of their bytes; counts what is left out.

    Raises:
        DataError: a folder below cannot be listed: nobody would know what is missing.
    """
    waiting = [(b"", iter(_names(root)))]
    while waiting:
        folder, names = waiting[-1]
        name = next(names, None)
        if name is None:
            waiting.pop()
            continue
        if is_hidden(name):
            left_out["hidden"] += 1
            continue
        path = os.path.join(root, folder, name)
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not _leads_inside(path, root):
                    left_out["links that lead out of the folder, or nowhere"] += 1
                    continue
                status = os.stat(path)
                if stat.S_ISDIR(status.st_mode):  # its files are there by their own names, or it is a circle
                    left_out["links to folders"] += 1
                    continue
        except OSError:
            left_out["gone while it was listed"] += 1
            continue
        if stat.S_ISDIR(status.st_mode):
            below = os.path.join(folder, name)
            waiting.append((below, iter(_names(os.path.join(root, below)))))
        elif stat.S_ISREG(status.st_mode):
            yield File(os.path.join(folder, name), status.st_size, status.st_mtime_ns)
        else:
            left_out["pipes, sockets, devices"] += 1


def _names(folder: bytes) -> list[bytes]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"The folder {shown(folder)} cannot be listed: {error.strerror}.") from error


def _leads_inside(path: bytes, root: bytes) -> bool:
    real, root = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath([real, root]) == root and os.path.exists(real)


def is_metadata(name: bytes) -> bool:
    """Whether a file tells the captions of the pictures beside it."""
    return os.path.basename(name) in METADATA


class Metadata:
    """The rows of all metadata files by their picture's path from the folder, in a database on disk that goes away."""

    def __init__(
        self,
        root: bytes,
        files: Sequence[bytes],
        config: PicturesConfig,
        open_file: Callable[[bytes], BinaryIO] = open_regular,
    ) -> None:
        self.config, self.open_file, self.num_used = config, open_file, 0
        self.database = sqlite3.connect("")  # an empty name: a temporary file
        self.database.execute("CREATE TABLE words (name BLOB PRIMARY KEY, caption TEXT, meta TEXT) WITHOUT ROWID")
        for name in files:
            self._read(root, name)
        self.num_rows = int(self.database.execute("SELECT COUNT(*) FROM words").fetchone()[0])

    def __enter__(self) -> Metadata:
        return self

    def __exit__(self, *raised: object) -> None:
        self.database.close()

    def get(self, name: bytes) -> tuple[str | None, str] | None:
        """Caption and meta of a picture, when a metadata file speaks of it."""
        if not self.num_rows:
            return None
        asked = self.database.execute("SELECT caption, meta FROM words WHERE name = ?", (name,))
        found: tuple[str | None, str] | None = asked.fetchone()
        self.num_used += found is not None
        return found

    def num_unused(self) -> int:
        """Rows that no picture asked for."""
        return self.num_rows - self.num_used

    def _read(self, root: bytes, name: bytes) -> None:
        path, folder = os.path.join(root, name), os.path.dirname(name)
        try:
            with self.open_file(path) as file:
                lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
                rows = _csv(lines) if name.endswith(b".csv") else _jsonl(lines)
                self.database.executemany(
                    "INSERT OR REPLACE INTO words VALUES (?, ?, ?)", (self._entry(folder, row) for row in rows)
                )
        except (OSError, ValueError, KeyError, csv.Error, RecursionError) as error:
            said = f"wants a column {NAME_FIELD!r}" if isinstance(error, KeyError) else f"cannot be read: {error}"
            raise DataError(f"{shown(path)} {said}.") from error

    def _entry(self, folder: bytes, row: dict[str, Any]) -> tuple[bytes, str | None, str]:
        place = os.fsencode(str(row[NAME_FIELD]))
        caption, rest = caption_of({key: value for key, value in row.items() if key != NAME_FIELD}, self.config)
        # What leads out of the folder is nobody's name there.
        return posixpath.normpath(posixpath.join(folder, place)), caption, to_meta(rest)


def _csv(lines: io.TextIOWrapper) -> Iterator[dict[str, Any]]:
    for row in csv.DictReader(lines, strict=True):
        if NAME_FIELD not in row:
            raise KeyError(NAME_FIELD)
        yield {str(key): value for key, value in row.items() if key is not None}


def _jsonl(lines: io.TextIOWrapper) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a line is {type(row).__name__}, not an object")
            yield row
