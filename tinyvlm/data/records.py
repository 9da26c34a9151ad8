"""Files of a dataset → the `records` folder that `prepare` reads: one row for each record.

    *.json (an array, or an object around one) · *.jsonl · *.parquet · *.csv      here, in an object store, on the hub
        └─ one pass: every record's outline ─ equal pictures together ─▶ {root}/records-{fingerprint}/data/part-…
                                                        └─ read, in the workers ─▶ record ─▶ source.dialogues

Short records (words) are copied as JSON; long ones (they hold pictures) stay where they are, and the row says where.
The pass streams, so a file of any size fits into memory, and happens once: the fingerprint covers the settings and the
names, sizes and times of change of the files (of a dataset on the hub, its commit).
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import config as settings
from tinyvlm import schema, stage, storage
from tinyvlm.data import hub
from tinyvlm.data.json_array import ArrayError, read_array
from tinyvlm.data.listing import Closing, Listing, make_folder
from tinyvlm.data.routing import SortedParts
from tinyvlm.data.sources import FileSource, drawn, require_fields, storable
from tinyvlm.data.sources.catalogue import fitting
from tinyvlm.errors import DataError
from tinyvlm.folders import Input, is_finished

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

STAGE = "records"
VERSION = 2
MAX_COPIED_BYTES = 16_384
"""Longer records stay in their file."""
MAX_PART_BYTES = 256 << 20
"""Of a part's records in JSON lines, which a worker holds at the same time; of Parquet's rows there are as many as of
any others, which is less."""
_ROWS_AT_A_TIME = 1_000
_PARQUET_ROWS_AT_A_TIME = 16
_READ_BYTES = 4 << 20
Place = tuple[int, int | None]
"""Offset and length in bytes, or a row's number and None."""


def open_records(places: Sequence[str], source: FileSource, config: PrepareConfig, root: Path) -> Input:
    """The input of `prepare` for the dataset at `places`, listed in a folder under `root` unless it is already.

    Raises:
        DataError: nothing is there, it lacks a field, has no records or cannot be read; nothing is left behind that
            counts.
    """
    files = list(source.choose(find_files(places, source)))
    identity = [
        STAGE, VERSION, source.name, config.listed, [[file, *_stat(file)] for file in [*files, *config.known]]
    ]  # fmt: skip
    listing = Listing(
        name=STAGE, version=VERSION, fingerprint=settings.fingerprint(identity), settings=config, inputs=files
    )
    folder = listing.folder(root)
    if not is_finished(folder):
        lister = _Lister(files, source, config)
        make_folder(listing, root, lister.parts(folder), lister.close)
    return stage.open_input(_Reader(), [folder])


class _Reader(stage.Stage):
    """Stands for `prepare`, so that this road to its input and `stage.open_input` give the same fingerprint."""

    name = "prepare"
    reads = (STAGE,)


def find_files(places: Sequence[str], source: FileSource) -> list[str]:
    """Addresses of the files at `places` that the source may read: files, folders of them (as deep as they go), or a
    dataset on the hub.

    Raises:
        DataError: there is none.
    """
    found: list[str] = []
    for place in places:
        path = storage.address(place)
        if hub.is_address(place) and (hub.is_pinned(place) or not storage.exists(path)):
            found += hub.resolve(place, source.suffixes)
        elif storage.is_file(path):
            found.append(str(path if storage.is_object(path) else path.absolute()))
        elif storage.exists(path):
            inside = sorted(str(file) for file in _walk(path) if file.suffix.lower() in source.suffixes)
            if not inside:
                raise DataError(f"prepare.source={source.name} wants {_or(source.suffixes)} files; {place} has none.")
            found += inside
        else:
            raise DataError(
                f"There is nothing at {place}; give files ({_or(source.suffixes)}), a folder of them, or a dataset of "
                "the Hugging Face hub (owner/name)."
            )
    return list(dict.fromkeys(found))


def _walk(folder: Path) -> Iterator[Path]:
    for entry in storage.entries(folder):
        if entry.name[0] not in "._":
            yield from _walk(folder / entry.name) if entry.is_folder else [folder / entry.name]


def _or(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _stat(file: str) -> tuple[Any, ...]:
    """Size and time of change; nothing of what lies on the hub."""
    if hub.is_pinned(file):
        return ()
    path = storage.address(file)
    if storage.is_object(path):
        return (storage.sizes(path.parent).get(path.name, 0), storage.modified(path))
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class _Lister:
    """One pass over all records."""

    def __init__(self, files: Sequence[str], source: FileSource, config: PrepareConfig) -> None:
        self.files, self.source, self.config = files, source, config
        self._seen: dict[int, int] = {}
        """Hash of each record's `same` → the key that has it; −1: a record of `prepare.known`."""

    def parts(self, folder: Path) -> Iterator[pa.Table]:
        """Rows of `schema.RECORDS`, cut into parts."""
        for file in self.config.known:
            for _, record in read_rows(file, self.config.columns):
                same = self.source.outline(record, file).same
                if same is not None:
                    self._seen.setdefault(drawn(same), -1)
        num_bytes = sum(next(iter(_stat(file)), 1 << 30) for file in self.files)
        with _sorting(folder) as scratch, SortedParts(scratch, schema.RECORDS, num_bytes=num_bytes) as parts:
            rows = itertools.islice(self._rows(), self.config.limit)
            while chunk := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
                routes = np.array([row.pop("route") for row in chunk], np.uint64)
                parts.add(pa.Table.from_pylist(chunk, schema=schema.RECORDS), routes)
            for part in parts.parts(self.config.rows_per_part):
                yield from _within(part, MAX_PART_BYTES)

    def close(self, num_rows: int, statuses: Counter[str]) -> Closing:
        """The pass is over."""
        if not num_rows:
            raise DataError(f"{', '.join(self.files)}: there are no records.")
        return Closing(statistics={"files": len(self.files), **self.source.account()})

    def _rows(self) -> Iterator[dict[str, Any]]:
        checked: set[str] = set()

        def rows_of(file: str) -> Iterable[tuple[Place, Mapping[str, Any]]]:
            for place, record in read_rows(file, self.config.columns):
                if file not in checked and record:
                    require_fields(record, self.source.required, file, fitting(record))
                    checked.add(file)
                yield place, record

        for key, (file, place, record) in enumerate(self.source.records(self.files, rows_of)):
            try:
                yield self._row(key, file, place, record)
            except RecursionError:
                yield self._bad(key, file, place, "bad_record", "nested too deeply")

    def _row(self, key: int, file: str, place: Place | None, record: Mapping[str, Any]) -> dict[str, Any]:
        if not record:
            return self._bad(key, file, place, "bad_record", "no JSON object")
        outline = self.source.outline(record, file)
        meta = storable(_to_json(outline.about))
        if outline.status != schema.OK:
            return self._bad(key, file, place, outline.status, outline.detail, meta)
        if outline.same is not None:
            first = self._seen.setdefault(drawn(outline.same), key)
            if first != key:
                which = "a record of prepare.known" if first < 0 else f"record {first}"
                return self._bad(key, file, place, "duplicate", f"says the same as {which}", meta)
        is_long = place is not None and place[1] is not None and place[1] > MAX_COPIED_BYTES
        text = None if is_long else _as_json(record)
        if text is not None and len(text) > MAX_COPIED_BYTES and place is not None and _can_seek(file):
            text = None
        lies = {"record": text} if text is not None else {"file": file, "offset": place[0], "length": place[1]}  # type: ignore[index]
        in_order = self.source.keeps_order or (file.endswith(".parquet") and text is None)
        together = f"{key}" if outline.together is None else outline.together
        route = key << 20 if in_order else drawn(together)
        return {"key": key, "status": schema.OK, "detail": None, **lies, "meta": meta, "route": route}

    def _bad(
        self, key: int, file: str, place: Place | None, status: str, detail: str | None, meta: str = "{}"
    ) -> dict[str, Any]:
        where = {"file": file, "offset": place[0], "length": place[1]} if place else {"file": file}
        detail = None if detail is None else storable(detail)
        return {"key": key, "status": status, "detail": detail, **where, "meta": meta, "route": drawn(key)}


def _within(part: pa.Table, max_bytes: int) -> Iterator[pa.Table]:
    """The part, in pieces whose records have at most so many bytes together (a single one may have more)."""
    ends = np.cumsum(part["length"].fill_null(0).to_numpy())
    start = 0
    while start < part.num_rows:
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
        yield part.slice(start, end - start)
        start = end


def _plain(value: Any) -> str:
    """What JSON cannot say: dates, which Parquet may hold and no reader wants, become words; bytes stay away."""
    if isinstance(value, bytes):
        raise TypeError("bytes")
    return str(value)


_to_json = json.JSONEncoder(ensure_ascii=False, default=_plain).encode


def _as_json(record: Mapping[str, Any]) -> str | None:
    """None where there are bytes in it."""
    try:
        return storable(_to_json(record))
    except TypeError:
        return None


def _can_seek(file: str) -> bool:
    return file.endswith((".jsonl", ".ndjson", ".parquet"))


@contextmanager
def _sorting(folder: Path) -> Iterator[Path]:
    """Room on a disk for sorting: where the folder lies, if it lies on one."""
    if storage.is_object(folder):
        with tempfile.TemporaryDirectory(prefix="tinyvlm-sorting-") as scratch:
            yield Path(scratch) / "sorting"
    else:
        storage.remove_tree(folder / ".sorting.tmp")
        yield folder / ".sorting.tmp"
        storage.remove_tree(folder / ".sorting.tmp")


def read_rows(file: str, columns: Mapping[str, str] | None = None) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Place and record of each row of a file; the record is empty where there is no JSON object.

    Args:
        columns: wanted name → the name that the file has for it.

    Raises:
        DataError: the file cannot be read, or is not what its name says.
    """
    suffix = Path(file).suffix.lower()
    reader = {".jsonl": _lines, ".ndjson": _lines, ".parquet": _table, ".csv": _csv}.get(suffix, _array)
    with _speaking(file):
        for place, record in reader(file):
            yield place, renamed(record, columns or {})


def renamed(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """With the fields under the names that are wanted."""
    for wanted, theirs in columns.items():
        if theirs in record:
            record[wanted] = record.pop(theirs)
    return record


def open_file(file: str) -> BinaryIO:
    """The bytes at an address."""
    if hub.is_pinned(file):
        return hub.open_file(file)
    return storage.address(file).open("rb")


def read_file(file: str) -> bytes:
    """All of a small file.

    Raises:
        DataError: it cannot be had.
    """
    with _speaking(file), open_file(file) as raw:
        return raw.read()


@contextmanager
def _speaking(file: str) -> Iterator[None]:
    """Turns what reading a bad file raises into one sentence."""
    trouble: AbstractContextManager[None] = hub.speaking(file) if hub.is_pinned(file) else nullcontext()
    try:
        with trouble:
            yield
    except (pa.ArrowException, OSError, ArrayError, csv.Error, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{file} cannot be read as {Path(file).suffix[1:] or 'JSON'}: {reason}") from error


def _lines(file: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    with open_file(file) as raw, io.BufferedReader(cast(io.RawIOBase, raw), _READ_BYTES) as lines:
        offset = 0
        for line in lines:
            if not offset and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{file} is written in UTF-16; save it as UTF-8.")
            if line.strip():
                yield (offset, len(line)), parse(line)
            offset += len(line)


def parse(text: bytes | str) -> dict[str, Any]:
    """A JSON object; empty when it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _array(file: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """An array of objects; JSON lines under that name are read too."""
    with open_file(file) as raw:
        first = raw.read(_READ_BYTES)
        first = first.removeprefix(codecs.BOM_UTF8).lstrip()
        if first[:1] == b"{" and b"\n" not in first:
            first += raw.readline()
    if first[:1] == b"{":
        if not parse(first.split(b"\n")[0]):
            raise DataError(f"{file} is one JSON object; an array of records was wanted, or one record a line.")
        yield from _lines(file)
        return
    with open_file(file) as raw:
        for number, record in enumerate(read_array(raw, _READ_BYTES)):
            yield (number, None), record if isinstance(record, dict) else {}


def _table(file: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    with open_file(file) as raw, pq.ParquetFile(raw, pre_buffer=False, buffer_size=_READ_BYTES) as table:
        number = 0
        for group in range(table.metadata.num_row_groups):
            for batch in table.iter_batches(_PARQUET_ROWS_AT_A_TIME, row_groups=[group]):
                for record in batch.to_pylist():
                    yield (number, None), record
                    number += 1


def _csv(file: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    with open_file(file) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines)):
            yield (number, None), {name: value for name, value in record.items() if name is not None}


def read_records(rows: pa.Table, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The record of each row of a listing, in order; empty where the row's status is not ok.

    Raises:
        DataError: a file is gone or has changed since it was listed.
    """
    needed = rows.select(["status", "record", "file", "offset", "length"]).to_pylist()
    found: list[dict[str, Any]] = [{} for _ in needed]
    elsewhere: dict[str, list[int]] = {}
    for number, row in enumerate(needed):
        if row["status"] != schema.OK:
            continue
        if row["record"] is not None:
            found[number] = parse(row["record"])
        else:
            elsewhere.setdefault(row["file"], []).append(number)
    for file, numbers in elsewhere.items():
        with _speaking(file):
            read = _read_cells if needed[numbers[0]]["length"] is None else _read_pieces
            read(file, [(needed[number], number) for number in numbers], found, columns)
    return found


def _read_pieces(
    file: str, rows: list[tuple[dict[str, Any], int]], found: list[dict[str, Any]], columns: Mapping[str, str]
) -> None:
    with open_file(file) as raw:
        for row, number in sorted(rows, key=lambda pair: int(pair[0]["offset"])):
            raw.seek(row["offset"])
            found[number] = renamed(parse(raw.read(row["length"])), columns)
            if not found[number]:
                raise DataError(f"{file} has changed since it was listed; run the same command again to list it anew.")


def _read_cells(
    file: str, rows: list[tuple[dict[str, Any], int]], found: list[dict[str, Any]], columns: Mapping[str, str]
) -> None:
    wanted = {int(row["offset"]): number for row, number in rows}
    with open_file(file) as raw, pq.ParquetFile(raw, pre_buffer=False, buffer_size=_READ_BYTES) as table:
        start = 0
        for group in range(table.metadata.num_row_groups):
            end = start + table.metadata.row_group(group).num_rows
            inside = [number for number in wanted if start <= number < end]
            for batch in table.iter_batches(_PARQUET_ROWS_AT_A_TIME, row_groups=[group]) if inside else ():
                for place in range(batch.num_rows):
                    if start + place in wanted:
                        record = batch.slice(place, 1).to_pylist()[0]
                        found[wanted[start + place]] = renamed(record, columns)
                start += batch.num_rows
                if start > max(inside):
                    break
            start = end
