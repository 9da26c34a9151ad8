"""A list of links in Parquet, CSV or JSONL → the `links` folder that `download` reads.

    links.parquet | links.csv | links.jsonl | a folder of them
        └─ needed columns, first `limit` rows ─ hosts together ─▶ {root}/links-{fingerprint}/data/part-00000.parquet …

The folder is one of the line's stage folders, with rows of `schema.LINKS`, cut into one file for each part of the
download.  Making it streams through the input, so that a list of any length fits into memory, and happens once: the
fingerprint covers the settings and the bytes of the input files.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from numpy.typing import NDArray

import tinyvlm
from tinyvlm import config as settings
from tinyvlm import schema, stage, storage
from tinyvlm.data.routing import Router, SortedParts
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.folders import (
    Input,
    Manifest,
    close_folder,
    describe,
    git_commit,
    is_finished,
    point_latest,
    require_space,
)
from tinyvlm.lease import Lease
from tinyvlm.upkeep import tidy

STAGE = "links"
VERSION = 2
SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
_BATCH_ROWS = 20_000
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
    identity = [STAGE, VERSION, settings.to_dict(config), [storage.sha256(file) for file in files]]
    fingerprint = settings.fingerprint(identity)
    folder = root.absolute() / f"{STAGE}-{fingerprint[:12]}"
    if not is_finished(folder):
        _make_folder(folder, files, config, fingerprint)
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
    names = [] if is_file else list(storage.sizes(path))
    if names or (not storage.is_object(path) and path.is_dir()):
        files = [path / name for name in names if Path(name).suffix in SUFFIXES and name[0] not in "._"]
        if not files:
            raise DataError(f"A list of links wants {', '.join(SUFFIXES)} files, but the folder {path} has none.")
    elif is_file and path.suffix in SUFFIXES:
        files = [path]
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


def _make_folder(folder: Path, files: list[Path], config: LinksConfig, fingerprint: str) -> None:
    """Write the folder as its only writer; a bad list leaves nothing behind."""
    require_space(folder.parent, 0, STAGE)
    with Lease.take(folder) as lease:
        if is_finished(folder):  # another driver's, since we looked
            return
        try:
            storage.remove_tree(folder / "data")  # of somebody who was killed
            tidy(folder)
            manifest = _write_parts(folder, files, config, fingerprint)
        except DataError:
            storage.remove_tree(folder)
            raise
        Lease.check(folder, lease.number)
        numbers = {"rows_in": manifest.rows_in, "rows_out": manifest.rows_out, "seconds": manifest.seconds}
        close_folder(folder, manifest, {"stage": STAGE, "statuses": {}, **numbers})


def _write_parts(folder: Path, files: list[Path], config: LinksConfig, fingerprint: str) -> Manifest:
    started = time.perf_counter()
    entries: dict[str, dict[str, Any]] = {}
    num_rows = 0
    all_keys: list[NDArray[np.int64]] = []
    router = Router(config.rows_per_part)
    for index, table in enumerate(_routed(files, config, folder, router)):
        num_rows += table.num_rows
        if config.key_column is not None:
            all_keys.append(table["key"].to_numpy())
        name = f"part-{index:05d}.parquet"
        entries[name] = _write_part(folder / "data" / name, table)
    if not num_rows:
        raise DataError(f"The list of links at {files[0].parent if len(files) > 1 else files[0]} has no rows.")
    _check_unique(all_keys, config)
    seconds = round(time.perf_counter() - started, 2)
    return Manifest(
        stage=STAGE,
        version=VERSION,
        fingerprint=fingerprint,
        settings=settings.to_dict(config),
        inputs={"files": [str(file) for file in files], "folders": {}},
        rows_in=num_rows,
        rows_out=num_rows,
        statuses={},
        files=entries,
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tinyvlm_version=tinyvlm.__version__,
        git_commit=git_commit(),
        extra={"giants": sorted(router.giants)},
    )


def _routed(files: list[Path], config: LinksConfig, folder: Path, router: Router) -> Iterator[pa.Table]:
    """The list's rows as parts: hosts together, copies of a link in one part (see routing.py)."""
    for urls in _urls(files, config):
        router.count(urls)
    with _sorting(folder) as sorting, SortedParts(sorting, schema.LINKS, router.num_rows) as parts:
        for rows in _rows(files, config):
            parts.add(rows, router.routes(rows))
        yield from parts.parts(config.rows_per_part)


@contextmanager
def _sorting(folder: Path) -> Iterator[Path]:
    """Room on a disk for sorting: where the folder lies, if it lies on one."""
    if storage.is_object(folder):
        with tempfile.TemporaryDirectory(prefix="tinyvlm-sorting-") as scratch:
            yield Path(scratch) / "sorting"
    else:
        yield folder / ".sorting.tmp"
        storage.remove_tree(folder / ".sorting.tmp")


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
        return rows[column].cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"The column {column!r} wants {wanted}, but holds {rows[column].type}: {reason}") from None


def _check_unique(all_keys: list[NDArray[np.int64]], config: LinksConfig) -> None:
    if not all_keys:
        return
    keys = np.sort(np.concatenate(all_keys))
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        raise DataError(
            f"The key column {config.key_column!r} wants unique numbers, but {int(twice[0])} occurs more than once."
        )


def _write_part(path: Path, table: pa.Table) -> dict[str, Any]:
    with storage.draft(path) as draft:
        draft.write_table(table.combine_chunks(), compression="zstd")
        with draft.content() as content:
            described = describe(content)
        draft.publish()
    return described


def _column_names(file: Path) -> list[str]:
    source = storage.readable(file)
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
    source = storage.readable(file)
    if file.suffix == ".parquet":
        with pq.ParquetFile(source) as parquet:
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
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{file} cannot be read as {file.suffix[1:]}: {reason}") from error
