"""Write the folder of a stage that lists what its input holds: rows in order, cut into parts, manifest last.

    tables, a little at a time ─▶ pieces of `rows_per_part` rows ─▶ .{folder}.….tmp ──rename──▶ {stage}-{fingerprint}/

It is written under another name and renamed, so that an input that turns out to be bad leaves nothing that counts.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import tinyvlm
from tinyvlm import config as settings
from tinyvlm.folders import Manifest, close_folder, describe_part, git_commit, require_space

Close = Callable[[int, Counter[str]], dict[str, Any]]
"""Given the number of rows and how many have each status: checks them, and gives further statistics."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a listing is called and was made from."""

    name: str
    """The stage's name, which begins the folder's."""
    version: int
    fingerprint: str
    settings: Any
    inputs: list[str]
    """Where the rows come from, for the manifest."""

    def folder(self, root: Path) -> Path:
        """Where under `root` it lies."""
        return root.absolute() / f"{self.name}-{self.fingerprint[:12]}"


def make_folder(
    listing: Listing,
    root: Path,
    tables: Iterable[pa.Table],
    rows_per_part: int,
    close: Close,
) -> Path:
    """Write the folder of a listing.  `close` is asked before it counts.

    Raises:
        TinyVLMError: what `tables` and `close` raise, or no space; nothing is left behind.
    """
    folder = listing.folder(root)
    require_space(folder.parent, 0, listing.name)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write(temporary, listing, cut(tables, rows_per_part), close)
        if folder.exists() and not (folder / "manifest.json").is_file():
            shutil.rmtree(folder)  # somebody took its manifest away
        with suppress(OSError):  # another driver was faster: its folder is as good
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cut(tables: Iterable[pa.Table], rows_per_part: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows_per_part` rows, the last one shorter."""
    waiting: list[pa.Table] = []
    missing = rows_per_part
    for rows in tables:
        while rows.num_rows >= missing:
            yield pa.concat_tables([*waiting, rows.slice(0, missing)])
            rows = rows.slice(missing)
            waiting, missing = [], rows_per_part
        if rows.num_rows:
            waiting.append(rows)
            missing -= rows.num_rows
    if waiting:
        yield pa.concat_tables(waiting)


def _write(folder: Path, listing: Listing, parts: Iterable[pa.Table], close: Close) -> None:
    started = time.perf_counter()
    (folder / "data").mkdir(parents=True)
    entries: dict[str, dict[str, Any]] = {}
    statuses: Counter[str] = Counter()
    for index, table in enumerate(parts):
        if "status" in table.column_names:
            statuses.update(table["status"].to_pylist())
        path = folder / "data" / f"part-{index:05d}.parquet"
        entries[path.name] = _write_part(path, table)
    num_rows = sum(entry["rows"] for entry in entries.values())
    more = close(num_rows, statuses)
    seconds = round(time.perf_counter() - started, 2)
    counts = dict(statuses.most_common())
    manifest = Manifest(
        stage=listing.name,
        version=listing.version,
        fingerprint=listing.fingerprint,
        settings=settings.to_dict(listing.settings),
        inputs={"files": listing.inputs, "folders": {}},
        rows_in=num_rows,
        rows_out=num_rows,
        statuses=counts,
        files=entries,
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tinyvlm_version=tinyvlm.__version__,
        git_commit=git_commit(),
    )
    statistics = {"stage": listing.name, "rows_in": num_rows, "rows_out": num_rows, "statuses": counts}
    close_folder(folder, manifest, {**statistics, "seconds": seconds, **more})


def _write_part(path: Path, table: pa.Table) -> dict[str, Any]:
    pq.write_table(table.combine_chunks(), path, compression="zstd")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return describe_part(path)
