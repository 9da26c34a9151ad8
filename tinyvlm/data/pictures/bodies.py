"""The bytes of listed pictures, one after the other, from where they lie.

rows of a listing ─▶ neighbours in one file: opened once ─▶ by offset and length, or by row and column ─▶ Body
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tinyvlm import schema, storage
from tinyvlm.data import hub
from tinyvlm.data.pictures.found import open_regular, path_of, shown
from tinyvlm.data.pictures.tables import modified_of, open_table
from tinyvlm.errors import DataError

ROWS_AT_A_TIME = 16
"""Pictures of a column, or objects of a store, that are in memory together."""
_OBJECTS = ""
"""Stands for the file of pictures that are objects of their own."""


@dataclass(frozen=True)
class Body:
    """A picture's bytes, or why there are none."""

    data: bytes | None
    status: str = schema.OK
    detail: str | None = None


def read_bodies(rows: pa.Table, max_bytes: int) -> Iterator[Body]:
    """One body for each row of a listing, in order; longer ones than `max_bytes` are not read where that is known.

    Raises:
        DataError: a tar or Parquet file has changed since it was listed, or cannot be read.
    """
    needed = rows.select(["status", "detail", "url", "file", "column", "offset", "length", "modified"])
    for (file, column), run in itertools.groupby(needed.to_pylist(), key=_together):
        together = list(run)
        if file == _OBJECTS:
            yield from _objects(together, max_bytes)
        elif column is None:
            yield from _pieces(file, together, max_bytes)
        else:
            yield from _cells(file, column, together)


def _together(row: dict[str, Any]) -> tuple[str, str | None]:
    """What neighbours must have in common to be read together: their file, or that each is an object of its own."""
    if row["column"] is None and storage.is_object_address(row["file"]):
        return _OBJECTS, None
    return row["file"], row["column"]


def _objects(rows: list[dict[str, Any]], max_bytes: int) -> Iterator[Body]:
    """Whole objects, some at a time, because each answer takes a while to come."""
    place = storage.address(rows[0]["file"])
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        yield from storage.each(lambda row: _object(row, max_bytes), rows[start : start + ROWS_AT_A_TIME], place)


def _object(row: dict[str, Any], max_bytes: int) -> Body:
    if row["length"] > max_bytes:
        return Body(None, "too_large", f"{row['length']} bytes, {max_bytes} allowed")
    try:
        data = storage.read(storage.address(row["file"]))
    except (FileNotFoundError, PermissionError) as error:
        return Body(None, "unreadable", error.strerror or str(error))
    except OSError as error:  # a store that does not answer is no fault of the picture: the same command continues
        raise DataError(f"{row['file']} cannot be read: {error.strerror or error}.") from error
    return Body(data) if len(data) == row["length"] else Body(None, "unreadable", "changed since it was listed")


def _pieces(file: str, rows: list[dict[str, Any]], max_bytes: int) -> Iterator[Body]:
    """By offset and length."""
    alone = rows[0]["url"] == file and rows[0]["status"] == schema.OK
    try:
        body = open_regular(path_of(file))
    except OSError as error:
        if not alone:
            raise DataError(f"{shown(path_of(file))} cannot be opened: {error.strerror or error}.") from error
        yield from (Body(None, "unreadable", error.strerror or str(error)) for _ in rows)
        return
    with body:
        status = os.fstat(body.fileno())
        if status.st_mtime_ns != rows[0]["modified"]:
            if not alone:
                raise DataError(_changed(file))
            yield from (Body(None, "unreadable", "changed since it was listed") for _ in rows)
            return
        for row in rows:
            if row["status"] != schema.OK:
                yield Body(None, row["status"], row["detail"])
            elif row["length"] > max_bytes:
                yield Body(None, "too_large", f"{row['length']} bytes, {max_bytes} allowed")
            else:
                yield _piece(body.fileno(), row["offset"], row["length"])


def _piece(descriptor: int, offset: int, length: int) -> Body:
    try:
        data = os.pread(descriptor, length, offset)  # whole: Linux reads up to 2 GiB at once from a file
    except OSError as error:  # a bad block of the disk costs a row
        return Body(None, "unreadable", error.strerror)
    if len(data) != length:
        return Body(None, "unreadable", f"{len(data)} bytes instead of {length}")
    return Body(data)


def _cells(file: str, column: str, rows: list[dict[str, Any]]) -> Iterator[Body]:
    """By row and column: streams through the row groups that hold them."""
    if not hub.is_pinned(file):
        try:
            modified = modified_of(file)
        except OSError as error:
            raise DataError(f"{_named(file)} cannot be opened: {error.strerror}.") from error
        if modified != rows[0]["modified"]:
            raise DataError(_changed(file))
    with open_table(file) as table:
        cells = _column(table, column, [row["offset"] for row in rows])
        for row in rows:
            data = next(cells)
            yield Body(data) if data is not None else Body(None, "not_image", f"no bytes in row {row['offset']}")


def _column(table: Any, column: str, wanted: Iterable[int]) -> Iterator[bytes | None]:
    """The column's values in the wanted rows, which rise."""
    waiting = iter(wanted)
    number, start = next(waiting, None), 0
    for group in range(table.metadata.num_row_groups):
        end = start + table.metadata.row_group(group).num_rows
        if number is not None and number < end:
            for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=[column]):
                values = batch.column(0)
                while number is not None and number < start + len(values):
                    yield _bytes(values[number - start].as_py())
                    number = next(waiting, None)
                start += len(values)
                if number is None:
                    return
                if number >= end:
                    break
        start = end


def _bytes(value: Any) -> bytes | None:
    """Through the struct that the bytes may lie in."""
    while isinstance(value, dict):
        value = next(iter(value.values()), None)
    return value if isinstance(value, bytes) else None


def _changed(file: str) -> str:
    return f"{_named(file)} has changed since it was listed; run the same command again to list it anew."


def _named(file: str) -> str:
    return shown(path_of(file)) if file.startswith("file://") else file
