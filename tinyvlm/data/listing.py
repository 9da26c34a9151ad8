"""Write the folder of a stage that lists what its input holds: rows in order, cut into parts, manifest last.

    tables, a little at a time ─▶ parts ─▶ {stage}-{fingerprint}/data/part-00000.parquet … ─▶ manifest.json

An input that turns out to be bad leaves nothing behind.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

import tinyvlm
from tinyvlm import config as settings
from tinyvlm import storage
from tinyvlm.errors import TinyVLMError
from tinyvlm.folders import Manifest, Part, close_folder, describe, git_commit, is_finished, require_space
from tinyvlm.lease import Lease
from tinyvlm.upkeep import tidy


@dataclass(frozen=True, kw_only=True)
class Closing:
    """What is said of a listing besides its rows."""

    statistics: dict[str, Any] = field(default_factory=dict)
    """More for stats.json."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More for the manifest."""


Close = Callable[[int, Counter[str]], Closing]
"""Given the number of rows and how many have each status: checks them."""


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


def make_folder(listing: Listing, root: Path, parts: Iterable[pa.Table], close: Close) -> Path:
    """Write the folder of a listing, one file for each of `parts`, as its only writer.

    Raises:
        TinyVLMError: what `parts` and `close` raise, or no space; nothing is left behind that counts.
    """
    folder = listing.folder(root)
    require_space(folder.parent, 0, listing.name)
    with Lease.take(folder) as lease:
        if is_finished(folder):  # another driver's, since we looked
            return folder
        try:
            storage.remove_tree(folder / "data")  # of somebody who was killed
            tidy(folder)
            manifest, statistics = _write(folder, listing, parts, close)
        except TinyVLMError:
            storage.remove_tree(folder)
            raise
        Lease.check(folder, lease.number)
        close_folder(folder, manifest, statistics)
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


def _write(folder: Path, listing: Listing, parts: Iterable[pa.Table], close: Close) -> tuple[Manifest, dict[str, Any]]:
    started = time.perf_counter()
    entries: dict[str, dict[str, Any]] = {}
    statuses: Counter[str] = Counter()
    for index, table in enumerate(parts):
        if "status" in table.column_names:
            statuses.update(table["status"].to_pylist())
        name = Part(index, "", 0, 0).file_name
        entries[name] = _write_part(folder / "data" / name, table)
    num_rows = sum(entry["rows"] for entry in entries.values())
    more = close(num_rows, statuses)
    manifest = Manifest(
        stage=listing.name,
        version=listing.version,
        fingerprint=listing.fingerprint,
        settings=settings.to_dict(listing.settings),
        inputs={"files": listing.inputs, "folders": {}},
        rows_in=num_rows,
        rows_out=num_rows,
        statuses=dict(statuses.most_common()),
        files=entries,
        seconds=round(time.perf_counter() - started, 2),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tinyvlm_version=tinyvlm.__version__,
        git_commit=git_commit(),
        extra=more.extra,
    )
    numbers = {"rows_in": num_rows, "rows_out": num_rows, "statuses": manifest.statuses, "seconds": manifest.seconds}
    return manifest, {"stage": listing.name, **numbers, **more.statistics}


def _write_part(path: Path, table: pa.Table) -> dict[str, Any]:
    with storage.draft(path) as draft:
        draft.write_table(table.combine_chunks(), compression="zstd")
        with draft.content() as content:
            described = describe(content)
        draft.publish()
    return described
