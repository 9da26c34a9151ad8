"""Parquet files with pictures in a column, as Hugging Face's `datasets` writes them; here, in an
object store, or in a dataset on the hub.

image: struct<bytes, path>   text: string   …          or `jpg: binary`, as img2dataset writes them
  └ row number ──▶ a worker reads these rows       └ read here, one row group after the other
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import config as settings
from tinyvlm import storage
from tinyvlm.data import hub
from tinyvlm.data.pictures.found import (
    CAPTION_NAMES,
    Found,
    PicturesConfig,
    caption_of,
    open_regular,
    path_of,
    shown,
    to_meta,
)
from tinyvlm.errors import DataError

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")
"""Columns that are taken for pictures when they hold bytes and nothing marks one as pictures, in this order."""
STREAM_BYTES = 4 << 20
"""How much of a column is read at a time, so that a row group of any size fits into memory."""


class Tables:
    """Parquet files, one after the other; a file is an address (`file:`, `s3:`, `hf:` of a pinned revision)."""

    def __init__(self, name: str, files: Sequence[str], config: PicturesConfig) -> None:
        self.name, self.files, self.config = name, files, config
        self.left_out: Counter[str] = Counter()
        self.damaged: list[str] = []
        with open_table(files[0]) as table:  # a wrong column is told before anything is written
            self._columns(files[0], table.schema_arrow)
        self.identity = self.measure()

    def measure(self) -> str:
        """Of names, sizes and times of change; an address on the hub carries its commit, and never changes."""
        return settings.fingerprint([[file, *_stat(file)] for file in self.files])

    def __iter__(self) -> Iterator[Found]:
        for file in self.files:
            modified = modified_of(file)
            with open_table(file) as table:
                column, others = self._columns(file, table.schema_arrow)
                for number, fields in enumerate(_rows(table, others)):
                    caption, rest = caption_of(fields, self.config)
                    meta = to_meta({name: rest[name] for name in self.config.meta_columns if name in rest})
                    url = f"{file}#row={number}"
                    yield Found(url, file, number, None, modified, column, caption, meta)

    def _columns(self, file: str, schema: pa.Schema) -> tuple[str, list[str]]:
        """The column with the pictures' bytes, and those that are read for words."""
        config = self.config
        asked = [name for name in (config.image_column, config.caption_column, *config.meta_columns) if name]
        for name in asked:
            if name not in schema.names:
                raise DataError(
                    f"{_readable(file)} has no column {name!r}; it has {', '.join(schema.names)}. "
                    "Name the right one, for example with --set pictures.caption_column=text."
                )
        names = CAPTION_NAMES if config.caption_column is None else (config.caption_column,)
        words = [name for name in names if name in schema.names and _is_text(schema.field(name).type)]
        if config.caption_column and not words:
            kind = schema.field(config.caption_column).type
            raise DataError(f"The column {config.caption_column!r} of {_readable(file)} wants text, but holds {kind}.")
        return _image_column(file, schema, config), list(dict.fromkeys([*words[:1], *config.meta_columns]))


@contextmanager
def open_table(file: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file at an address, read a little at a time.

    Raises:
        DataError: what pyarrow or the hub say, as a sentence.
    """
    try:
        trouble = hub.speaking(file) if hub.is_pinned(file) else nullcontext()
        with trouble, open_file(file) as body:
            with pq.ParquetFile(body, pre_buffer=False, buffer_size=STREAM_BYTES) as table:
                yield table
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{_readable(file)} cannot be read as Parquet: {reason}") from error


def open_file(file: str) -> Any:
    """The bytes at an address: a file of Python's, or one of Arrow's."""
    if storage.is_object_address(file):
        return storage.readable(storage.address(file))
    return hub.open_file(file) if hub.is_pinned(file) else open_regular(path_of(file))


def has_images(file: str) -> bool:
    """Whether a Parquet file has a column that we would take for pictures."""
    try:
        with open_table(file) as table:
            _image_column(file, table.schema_arrow, PicturesConfig())
    except DataError:
        return False
    return True


def _image_column(file: str, schema: pa.Schema, config: PicturesConfig) -> str:
    """The column's dotted path to its bytes."""
    if config.image_column is not None:
        column = _bytes_of(schema.field(config.image_column))
        if column is None:
            kind = schema.field(config.image_column).type
            raise DataError(f"The column {config.image_column!r} of {_readable(file)} wants bytes, but holds {kind}.")
        return column
    by_name = {field.name: _bytes_of(field) for field in schema}
    structs = [field.name for field in schema if pa.types.is_struct(field.type)]
    for name in (*_marked(schema), *IMAGE_NAMES, *structs):
        if by_name.get(name) is not None:
            return str(by_name[name])
    raise DataError(
        f"{_readable(file)} has no column of pictures; it has {', '.join(map(str, schema))}. "
        "Name the right one with --set pictures.image_column=…, or give links to `download`."
    )


def _bytes_of(field: pa.Field) -> str | None:
    """`image.bytes` of struct<bytes, path>, `jpg` of bytes, else None."""
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        inner = _bytes_of(field.type.field(index)) if index >= 0 else None
        return f"{field.name}.{inner}" if inner else None
    is_bytes = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    return str(field.name) if is_bytes else None


def _marked(schema: pa.Schema) -> list[str]:
    """Columns that `datasets` marks as pictures in the file's metadata."""
    try:
        features: dict[str, Any] = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name, feature in features.items() if feature.get("_type") == "Image"]
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _rows(table: pq.ParquetFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(table.metadata.num_rows))
        return
    for group in range(table.metadata.num_row_groups):
        for batch in table.iter_batches(1_000, row_groups=[group], columns=columns):
            yield from batch.to_pylist()


def modified_of(file: str) -> int | None:
    """A file's time of change, ns; None of what lies on the hub.  Raises OSError."""
    return next(iter(_stat(file)[1:]), None)


def _stat(file: str) -> tuple[int, ...]:
    """Size and time of change; nothing of what lies on the hub."""
    if hub.is_pinned(file):
        return ()
    if storage.is_object_address(file):
        path = storage.address(file)
        return storage.sizes(path.parent).get(path.name, 0), round(storage.modified(path) * 1e9)
    status = os.stat(path_of(file))
    return status.st_size, status.st_mtime_ns


def _readable(file: str) -> str:
    return shown(path_of(file)) if file.startswith("file://") else file
