"""The files of a dataset, record by record, and single records where they lie.

*.json (an array) · *.jsonl · *.parquet · *.csv      here, in an object store, on the hub
    └─ read_rows: every record with its place     read_records: the records of listed places
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import schema, storage
from tinyvlm.data import hub
from tinyvlm.data.json_array import ArrayError, read_array
from tinyvlm.errors import DataError

_PARQUET_ROWS_AT_A_TIME = 16
_READ_BYTES = 4 << 20

Place = tuple[int, int | None]
"""Offset and length in bytes, or a row's number and None."""


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
    except (pa.ArrowException, OSError, ArrayError, ijson.JSONError, csv.Error, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{file} cannot be read as {Path(file).suffix[1:] or 'JSON'}: {reason}") from error


def read_items(file: str, prefix: str, checksum: Any = None) -> Iterator[dict[str, Any]]:
    """The objects of an array inside a JSON file, a few in memory at a time; what is no object comes as an empty one.

    Args:
        prefix: where the array is, as ijson names it: `questions.item`.
        checksum: one of hashlib's; has all of the file's bytes when the last object has come.

    Raises:
        DataError: the file cannot be read, or is no JSON.
    """
    with _speaking(file), open_file(file) as raw:
        summed = raw if checksum is None else _Summed(raw, checksum)
        for item in ijson.items(summed, prefix, use_float=True, buf_size=_READ_BYTES):
            yield item if isinstance(item, dict) else {}


class _Summed:
    """A file that adds what is read of it to a checksum."""

    def __init__(self, raw: BinaryIO, checksum: Any) -> None:
        self._raw, self._checksum = raw, checksum

    def read(self, num_bytes: int = -1) -> bytes:
        data = self._raw.read(num_bytes)
        self._checksum.update(data)
        return data


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
