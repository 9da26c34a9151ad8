"""Takedown lists: links, hosts and pictures that must not be kept, and which rows they mean.

    LIST (text, CSV, Parquet) ──read──▶ Takedown ──add_to──▶ {root}/takedown/{digest}.txt ──of──▶ every stage that
                                            │                                                     writes under the root
                                  mask: rows that are meant ──clear──▶ status optout.takedown, contents gone

A list says what is not kept, and nothing of what the other rows become: it is in no fingerprint, so that a longer list
starts nothing anew.  A root's lists add up; what is already in its folders is taken out by removal.py.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from yarl import URL

from tinyvlm import schema, storage
from tinyvlm.errors import DataError

FOLDER = "takedown"
"""Where a root keeps its lists."""
COLUMNS = ("takedown", "url", "link", "image_url", "host", "sha256")
"""Names of columns that are read of a table with several."""
DETAIL = "on a takedown list: picture, words and features removed"

_LINK_COLUMNS = ("url", "final_url")
_DIGEST_COLUMNS = ("sha256", "image_sha256")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMENT = re.compile(r"(^|\s)#.*")
_HOST = re.compile(r"\s*https?://(?:[^/?#\\]*@)?([a-z0-9._-]+)(?:[:/?#]|$)", re.IGNORECASE)
"""The host of an ordinary link; of others yarl decides."""


@dataclass(frozen=True)
class Takedown:
    """What is not kept."""

    links: frozenset[str] = frozenset()
    """As `link_key` writes them."""
    hosts: frozenset[str] = frozenset()
    """Each with all hosts below it: `example.org` means `img.example.org` too."""
    digests: frozenset[str] = frozenset()
    """sha256 of pictures as they were sent, hexadecimal."""

    def __bool__(self) -> bool:
        return bool(self.links or self.hosts or self.digests)

    def __or__(self, other: Takedown) -> Takedown:
        return Takedown(self.links | other.links, self.hosts | other.hosts, self.digests | other.digests)

    @classmethod
    def of(cls, root: Path) -> Takedown:
        """All lists of a root; nothing where there are none."""
        found = cls()
        for name in storage.sizes(root / FOLDER):
            if name.endswith(".txt") and not name.startswith("."):
                found |= read_list(root / FOLDER / name)
        return found

    def add_to(self, root: Path) -> None:
        """From now on every stage that writes under `root` keeps to this list.  Adding it again changes nothing."""
        lines = [
            *(f"host:{host}" for host in sorted(self.hosts)),
            *sorted(self.digests),
            *(f"http://{link}" for link in sorted(self.links)),
        ]
        text = "".join(f"{line}\n" for line in lines)
        path = root / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
        if not storage.is_file(path):
            storage.write_atomic(path, text)

    def lists_link(self, url: str | None) -> bool:
        """Whether this address, or its host, is on the list."""
        if not url or not (self.links or self.hosts):
            return False
        ordinary = _HOST.match(url)
        if ordinary and not self._concerns(ordinary[1].lower().rstrip(".")):
            return False  # nearly every link of nearly every list ends here
        key = link_key(url)
        return key is not None and (key in self.links or self._lists_host(_host_of_key(key)))

    def mask(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Which rows are meant, by the columns they have: links, sha256, or that of a conversation's pictures."""
        found = np.zeros(rows.num_rows, np.bool_)
        for name in _LINK_COLUMNS if self.links or self.hosts else ():
            if name in rows.column_names:
                found |= np.fromiter(map(self.lists_link, rows[name].to_pylist()), np.bool_, rows.num_rows)
        for name in _DIGEST_COLUMNS if self.digests else ():
            if name in rows.column_names:
                found |= self._listed(rows[name].to_pylist())
        if self.digests and "images" in rows.column_names:
            images = rows["images"].combine_chunks()
            digests = pc.struct_field(pc.list_flatten(images), "sha256").to_pylist()
            found[pc.list_parent_indices(images).to_numpy()[self._listed(digests)]] = True
        return found

    def _listed(self, digests: list[str | None]) -> NDArray[np.bool_]:
        return np.fromiter((digest in self.digests for digest in digests), np.bool_, len(digests))

    def _concerns(self, host: str) -> bool:
        return host in self._hosts_of_links or self._lists_host(host)

    def _lists_host(self, host: str) -> bool:
        if not self.hosts:
            return False
        labels = host.split(".")
        return any(".".join(labels[start:]) in self.hosts for start in range(len(labels)))

    @cached_property
    def _hosts_of_links(self) -> frozenset[str]:
        return frozenset(map(_host_of_key, self.links))


def link_key(link: str) -> str | None:
    """What two spellings of one address have in common: host, port if it is an unusual one, path and query.

    Neither the scheme counts, nor a fragment, a user, capitals of the host, or how letters are percent-encoded; None
    for what is no address of the web.
    """
    text = link.strip()
    if text.startswith("//"):
        text = f"http:{text}"
    if not text.lower().startswith(("http://", "https://")):
        return None
    try:
        url = URL(text)
        host, port = (url.raw_host or "").lower().rstrip("."), url.explicit_port
    except ValueError:
        return None
    host = f"[{host}]" if ":" in host else host
    return f"{host}{f':{port}' if port not in (None, 80, 443) else ''}{url.raw_path_qs}" if host else None


def _host_of_key(key: str) -> str:
    return re.split(r"[/?]|:\d+", key, maxsplit=1)[0] if key[0] != "[" else key.partition("]")[0] + "]"


def read_list(path: Path) -> Takedown:
    """The list in a text, CSV or Parquet file: a link, `host:NAME` or a sha256 (64 hexadecimal digits) a line.

    Text behind a `#` that begins a line or follows a blank is a comment.  A table has one column, or some of `COLUMNS`;
    in one that is called `host` the names stand alone.

    Raises:
        DataError: the file cannot be read, holds nothing, or something else; with the line and what it says.
    """
    links, hosts, digests = set[str](), set[str](), set[str]()
    try:
        for where, column, text in _cells(path):
            kind, entry = _entry(f"host:{text}" if column == "host" and not text.startswith("host:") else text)
            if not entry:
                wanted = "a link (http://… or https://…), host:NAME, or a sha256 of 64 hexadecimal digits"
                raise DataError(f"{path}, {where}: a takedown list wants {wanted}, but got {text[:200]!r}.")
            {"link": links, "host": hosts, "sha256": digests}[kind].add(entry)
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid, csv.Error) as error:
        said = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise DataError(
            f"The takedown list {path} cannot be read ({said}); give a text, CSV or Parquet file."
        ) from None
    found = Takedown(frozenset(links), frozenset(hosts), frozenset(digests))
    if not found:
        raise DataError(f"The takedown list {path} names nothing; give one link, host:NAME or sha256 a line.")
    return found


def _entry(text: str) -> tuple[str, str]:
    """Kind and value; an empty value when it is none of the three."""
    if _SHA256.fullmatch(text.lower()):
        return "sha256", text.lower()
    if text.lower().startswith("host:"):
        name = text[5:].strip().removeprefix("*.").rstrip(".")
        key = link_key(f"http://{name}/") if re.fullmatch(r"[^\s/?#@:\\]+|\[[^\s\]]+\]", name) else None
        return "host", _host_of_key(key) if key else ""
    return "link", (None if re.search(r"\s", text) else link_key(text)) or ""


def _cells(path: Path) -> Iterator[tuple[str, str, str]]:
    """Where it stands, its column, and what it says; without comments and what is empty."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with pq.ParquetFile(storage.readable(path)) as file:
            names = _wanted(path, file.schema_arrow.names)
            start = 1
            for batch in file.iter_batches(columns=names):
                for name in names:
                    texts = (str(value or "") for value in batch.column(name).to_pylist())
                    yield from _filled("row", name, texts, start)
                start += batch.num_rows
        return
    lines = storage.read(path).decode("utf-8-sig").splitlines()
    first = next((place for place, line in enumerate(lines) if _COMMENT.sub("", line).strip()), len(lines))
    if suffix != ".csv" or first == len(lines) or _entry(_COMMENT.sub("", lines[first]).strip())[1]:
        yield from _filled("line", "", lines, 1)
        return
    rows = csv.DictReader(lines[first:])
    names = _wanted(path, list(rows.fieldnames or []))
    for row in rows:
        for name in names:
            yield from _filled("line", name, [row[name] or ""], first + rows.line_num)


def _filled(unit: str, column: str, texts: Iterable[str], start: int) -> Iterator[tuple[str, str, str]]:
    for number, text in enumerate(texts, start):
        said = _COMMENT.sub("", text).strip()
        if said:
            yield f"{unit} {number}", column, said


def _wanted(path: Path, names: list[str]) -> list[str]:
    known = [name for name in names if name in COLUMNS]
    if not known and len(names) != 1:
        raise DataError(f"{path} wants a column {', '.join(COLUMNS)}, or one alone; it has {', '.join(names)}.")
    return known or names


def clear(rows: pa.Table, taken: NDArray[np.bool_]) -> pa.Table:
    """The same rows; of those that are `taken` only what names them and tells what became of them stays."""
    if not taken.any():
        return rows
    stays = pa.array(np.arange(rows.num_rows), mask=taken)
    said = {"status": schema.TAKEN_DOWN, "detail": DETAIL}
    columns = []
    for field in rows.schema:
        column = rows[field.name]
        if field.name in said:
            column = pc.if_else(pa.array(taken), pa.scalar(said[field.name], field.type), column)
        elif field.name not in schema.KEPT_OF_TAKEN:
            column = column.take(stays)
        columns.append(column)
    return pa.table(columns, schema=rows.schema)
