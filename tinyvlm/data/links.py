"""A list of links in Parquet, CSV or JSONL → the `links` folder that `download` reads.

    links.parquet | links.csv | links.jsonl | a folder of them
        └─ needed columns, first `limit` rows ─ hosts together ─▶ {root}/links-{fingerprint}/data/part-00000.parquet …

The folder is one of the line's stage folders, with rows of `schema.LINKS`, cut into one file for each part of the
download.  Making it streams through the input, so that a list of any length fits into memory, and happens once: the
fingerprint covers the settings and the bytes of the input files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tinyvlm import config as settings
from tinyvlm import schema, stage, storage
from tinyvlm.data import hub
from tinyvlm.data.listing import Closing, Listing, make_folder
from tinyvlm.data.routing import Router, SortedParts, sorting_room
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.folders import Input, is_finished, point_latest

STAGE = "links"
VERSION = 2
SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
_BATCH_ROWS = 20_000
_BYTES_PER_LINK = 160
"""A guess, for how many files the sorting goes through."""
_BLOCK_BYTES = 16 << 20
"""How much of a CSV or JSONL file is parsed at a time; no single row may be larger."""


@dataclass(frozen=True, kw_only=True)
class LinksConfig:
    """Which rows and columns of a link list are used; the defaults read CapsFusion-120M."""

    url_column: str = "image_url"
    """Column with the address of the picture."""
    caption_column: str = "capsfusion"
    """Column with the picture's caption."""
    key_column: str | None = None
    """Column of unique whole numbers that name the rows; None: the row's number in the list."""
    meta_columns: tuple[str, ...] = ()
    """Columns that are carried along as JSON."""
    limit: int = 5_000_000
    """How many rows are used at most, from the start of the list."""
    rows_per_part: int = 1_000
    """Rows that are written together; a few more where a host or a link with its copies would be torn apart."""

    def __post_init__(self) -> None:
        if self.limit < 1 or self.rows_per_part < 1:
            raise ConfigError(
                f"links.limit and links.rows_per_part want at least 1, got {self.limit} and {self.rows_per_part}."
            )

    @property
    def columns(self) -> list[str]:
        """Every column that is read, once each."""
        key = [self.key_column] if self.key_column is not None else []
        return list(dict.fromkeys([*key, self.url_column, self.caption_column, *self.meta_columns]))


def open_links(path: Path, config: LinksConfig, root: Path) -> Input:
    """The download's input for the list at `path`, written as a `links` folder under `root` unless it is there already.

    Raises:
        DataError: the list is missing, unreadable, empty, or lacks a column; nothing is left behind that counts.
    """
    files = find_files(path, config)
    identity = [STAGE, VERSION, settings.to_dict(config), [_digest(file) for file in files]]
    listing = Listing(
        name=STAGE,
        version=VERSION,
        fingerprint=settings.fingerprint(identity),
        settings=config,
        inputs=[str(file) for file in files],
    )
    folder = listing.folder(root)
    if not is_finished(folder):
        router, keys = Router(config.rows_per_part), _Keys(config)
        parts = keys.watching(_routed(files, config, folder, router))

        def close(num_rows: int, statuses: Counter[str]) -> Closing:
            if not num_rows:
                raise DataError(f"The list of links at {path} has no rows.")
            keys.check()
            return Closing(extra={"giants": sorted(router.giants)})

        make_folder(listing, root, parts, close)
    point_latest(folder.parent, STAGE, folder)
    return stage.open_input(_Reader(), [folder])


class _Reader(stage.Stage):
    """Stands for the download, so that this road to its input and `stage.open_input` give the same fingerprint."""

    name = "download"
    reads = (STAGE,)


def find_files(path: Path, config: LinksConfig) -> list[Path]:
    """The list's files, each checked for the needed columns; reads little and writes nothing.

    Raises:
        DataError: as `open_links`.
    """
    is_file = storage.is_file(path)
    typed = "" if storage.is_object(path) else hub.as_typed(path)
    names = [] if is_file else list(storage.sizes(path))
    if names or (not storage.is_object(path) and path.is_dir()):
        files = [path / name for name in names if Path(name).suffix in SUFFIXES and name[0] not in "._"]
        if not files:
            raise DataError(f"A list of links wants {', '.join(SUFFIXES)} files, but the folder {path} has none.")
    elif is_file and path.suffix in SUFFIXES:
        files = [path]
    elif not is_file and hub.is_address(typed):
        files = [Path(file) for file in hub.resolve(typed)]
    elif is_file:
        raise DataError(f"A list of links wants a {', '.join(SUFFIXES)} file, but got {path.name}; convert it first.")
    else:
        raise DataError(f"There is no list of links at {path}; give a {', '.join(SUFFIXES)} file or a folder of them.")
    for file in files:
        with _reading(file):
            names = _column_names(file)
        for column in config.columns:
            if column not in names:
                raise DataError(
                    f"{file} has no column {column!r}; it has {', '.join(names)}. "
                    "Name the right one, for example with --set links.url_column=url."
                )
    return files


def _routed(files: list[Path], config: LinksConfig, folder: Path, router: Router) -> Iterator[pa.Table]:
    """The list's rows as parts: hosts together, copies of a link in one part (see routing.py)."""
    for urls in _urls(files, config):
        router.count(urls)
    num_bytes = router.num_rows * _BYTES_PER_LINK
    with sorting_room(folder) as sorting, SortedParts(sorting, schema.LINKS, num_bytes=num_bytes) as parts:
        for rows in _rows(files, config):
            parts.add(rows, router.routes(rows))
        yield from parts.parts(config.rows_per_part)


def _urls(files: list[Path], config: LinksConfig) -> Iterator[pa.ChunkedArray]:
    """The links alone, of the first `limit` rows."""
    left = config.limit
    for file in files:
        with _reading(file):
            for batch in _batches(file, config, [config.url_column]):
                links = pa.table([_cast(batch.slice(0, left), config.url_column, pa.string(), "text")], ["url"])
                yield links["url"]
                left -= links.num_rows
                if not left:
                    return


def _rows(files: list[Path], config: LinksConfig) -> Iterator[pa.Table]:
    """The first `limit` rows with the columns of `schema.LINKS`, a little at a time."""
    num_rows = 0
    for file in files:
        with _reading(file):
            for batch in _batches(file, config, config.columns):
                rows = _normalise(batch.slice(0, config.limit - num_rows), config, num_rows)
                num_rows += rows.num_rows
                yield rows
                if num_rows == config.limit:
                    return


def _normalise(rows: pa.RecordBatch, config: LinksConfig, first_key: int) -> pa.Table:
    if config.key_column is None:
        keys = pa.array(range(first_key, first_key + rows.num_rows), pa.int64())
    else:
        keys = _cast(rows, config.key_column, pa.int64(), "unique whole numbers")
        if keys.null_count:
            raise DataError(f"The key column {config.key_column!r} wants a number in each row, but some are empty.")
    meta = [
        json.dumps(dict(zip(config.meta_columns, values, strict=True)), ensure_ascii=False, default=str)
        for values in zip(*(rows[name].to_pylist() for name in config.meta_columns), strict=True)
    ]
    columns = {
        "key": keys,
        "url": _cast(rows, config.url_column, pa.string(), "text"),
        "caption": _cast(rows, config.caption_column, pa.string(), "text"),
        "meta": meta or ["{}"] * rows.num_rows,
    }
    return pa.table(columns, schema=schema.LINKS)


def _cast(rows: pa.RecordBatch, column: str, kind: pa.DataType, wanted: str) -> pa.Array:
    try:
        values = rows[column]
        if pa.types.is_floating(values.type) and pa.types.is_string(kind):  # "not a number" is no word
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        return values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"The column {column!r} wants {wanted}, but holds {rows[column].type}: {reason}") from None


class _Keys:
    """Sees that keys which come from the list are unique."""

    def __init__(self, config: LinksConfig) -> None:
        self._column = config.key_column
        self._seen: list[NDArray[np.int64]] = []

    def watching(self, parts: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The same parts."""
        for part in parts:
            if self._column is not None:
                self._seen.append(part["key"].to_numpy())
            yield part

    def check(self) -> None:
        """Raises DataError when a key came twice."""
        keys = np.sort(np.concatenate([np.empty(0, np.int64), *self._seen]))
        twice = keys[1:][keys[1:] == keys[:-1]]
        if len(twice):
            raise DataError(
                f"The key column {self._column!r} wants unique numbers, but {int(twice[0])} occurs more than once."
            )


def _readable(file: Path) -> Any:
    """What pyarrow's readers take; of the hub, only what they ask for is fetched."""
    return hub.open_file(file) if hub.is_pinned(file) else storage.readable(file)


def _digest(file: Path) -> str:
    """What stands for a file's content; an address on the hub carries its commit."""
    return str(file) if hub.is_pinned(file) else storage.sha256(file)


def _column_names(file: Path) -> list[str]:
    source = _readable(file)
    if file.suffix == ".parquet":
        names = pq.read_schema(source).names
    elif file.suffix == ".csv":
        with pa_csv.open_csv(source, parse_options=_csv_parsing(), read_options=_csv_reading()) as reader:
            names = reader.schema.names
    else:
        with pa_json.open_json(source, read_options=pa_json.ReadOptions(block_size=_BLOCK_BYTES)) as reader:
            names = reader.schema.names
    return [str(name) for name in names]


def _batches(file: Path, config: LinksConfig, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, a little at a time."""
    source = _readable(file)
    if file.suffix == ".parquet":
        with pq.ParquetFile(source, buffer_size=_BLOCK_BYTES) as parquet:
            yield from parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
    elif file.suffix == ".csv":
        texts = {name: pa.string() for name in (config.url_column, config.caption_column) if name in columns}
        converting = pa_csv.ConvertOptions(include_columns=columns, column_types=texts)
        with pa_csv.open_csv(source, _csv_reading(), _csv_parsing(), converting) as reader:
            yield from reader
    else:
        with pa_json.open_json(source, read_options=pa_json.ReadOptions(block_size=_BLOCK_BYTES)) as reader:
            for batch in reader:
                yield batch.select(columns)


def _csv_reading() -> Any:
    return pa_csv.ReadOptions(block_size=_BLOCK_BYTES)


def _csv_parsing() -> Any:
    return pa_csv.ParseOptions(newlines_in_values=True)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what pyarrow raises on a bad file into one sentence."""
    try:
        with hub.speaking(str(file)) if hub.is_pinned(file) else nullcontext():
            yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{file} cannot be read as {file.suffix[1:]}: {reason}") from error
