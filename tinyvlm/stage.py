"""The stage contract: one input folder, one output folder, rows to rows, resumable, finished by a manifest.

    part of input ─▶ Stage.select ─▶ Stage.__call__ ─▶ checked: same keys, known statuses ─▶ data/part-00007.parquet
                                                                                                      │ all parts
                                            manifest.json ◀─ report.html ◀─ stats.json ◀─ every row accounted for

The unit of work is a `Stage`: a light, picklable object that maps a table to a table and does not know who runs it.
`run_local` runs it in this process; `ray_jobs/_run_stage.py` runs the same `StageRun` over Ray Data.  What lies in a
folder, and how one is found, is in folders.py.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import tinyvlm
from tinyvlm import config as settings
from tinyvlm import schema
from tinyvlm.errors import DataError, StageError, TinyVLMError
from tinyvlm.folders import (
    Input,
    Manifest,
    Part,
    PartResult,
    close_folder,
    describe_part,
    find_folder,
    git_commit,
    point_latest,
    read_rows,
    require_space,
    scan,
    verify,
    write_atomic,
)
from tinyvlm.lease import STALE_S, Lease

__all__ = [
    "Input",
    "Manifest",
    "Part",
    "PartResult",
    "Stage",
    "StageRun",
    "close_folder",
    "find_folder",
    "git_commit",
    "open_input",
    "point_latest",
    "read_rows",
    "run_local",
    "scan",
    "verify",
    "write_atomic",
]

FOOTER = b"tinyvlm"
"""Key of the JSON that each part carries in its Parquet footer: {"counts": {status: rows}, "rows_in": n}."""

log = logging.getLogger(__name__)


class Stage:
    """One step of the line.  Heavy things (models, sockets) are built on first call, never in the constructor.

    Subclasses set the class attributes, take their settings in the constructor, and define `__call__`.
    """

    name: str
    version: int = 1
    """Raise it when the code changes the bytes that come out."""
    reads: tuple[str, ...]
    """Names of the stages whose folders this one reads; the rows of the first are mapped."""
    fan_out: bool = False
    """False: the same keys out as in.  True: each input key appears at least once in the output's `source_key`."""
    settings: Any
    """A frozen dataclass; its byte-changing fields are fingerprinted."""
    writes: pa.Schema
    bytes_per_row: int = 20_000
    """Rough size of an output row, for the check of free disk before the start."""
    folders: Mapping[str, str] = {}
    """Where each folder that the stage reads is; filled in by `StageRun`."""

    def check(self) -> None:
        """Raise a TinyVLMError when the stage cannot work here; called before anything is written."""

    def select(self, rows: pa.Table) -> pa.Table:
        """The rows of a stage folder that this stage maps; those that earlier stages rejected stay behind."""
        return rows.filter(pc.equal(rows["status"], schema.OK))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map rows to outcome rows; never raises for a bad row."""
        raise NotImplementedError

    def statistics(self, folder: Path) -> dict[str, Any]:
        """Numbers and charts for stats.json and report.html, from the finished parts of `folder`."""
        return {}


def open_input(stage: Stage, inputs: Sequence[Path]) -> Input:
    """Resolve the folders that a stage reads, and cut the first one into parts (one for each of its files)."""
    folders = {name: find_folder(inputs, name, stage.name).absolute() for name in stage.reads}
    manifests = {name: Manifest.read(folder) for name, folder in folders.items()}
    first = stage.reads[0]
    parts = []
    for index, (name, entry) in enumerate(sorted(manifests[first].files.items())):
        path = folders[first] / "data" / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise StageError(
                f"{stage.name} reads {path}, which is missing or not as {first!r} left it; "
                f"remove {folders[first]} and run `python -m ray_jobs.{first}` again."
            )
        parts.append(Part(index, str(path), 0, int(entry["rows"])))
    identity = {name: manifest.identity for name, manifest in manifests.items()}
    return Input(tuple(parts), settings.fingerprint(identity), {n: str(f) for n, f in folders.items()}, is_stage=True)


Execute = Callable[[list[Part], int], Iterable[PartResult]]
"""Works on parts under a lease number and gives each one's result as it comes."""


class StageRun:
    """One stage being carried out on one input: plans parts, works on each, and closes the folder."""

    def __init__(self, stage: Stage, source: Input, root: Path) -> None:
        # A copy, so that the same stage object may be run on another input.
        self.stage, self.source, self.root = copy.copy(stage), source, root.absolute()
        self.stage.folders = source.folders
        identity = [stage.name, stage.version, settings.to_dict(stage.settings, with_speed=False), source.fingerprint]
        self.fingerprint = settings.fingerprint(identity)
        self.folder = self.root / f"{stage.name}-{self.fingerprint[:12]}"

    @property
    def is_finished(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    def finished_manifest(self) -> Manifest:
        """The manifest of a finished folder; also points `latest` at it."""
        manifest = Manifest.read(self.folder)
        self._point_latest()
        log.info("%s is finished already, nothing to do: %s", self.stage.name, self.folder)
        return manifest

    def todo(self) -> tuple[list[Part], list[PartResult]]:
        """Parts still to do, and the results of those that an earlier run left behind."""
        todo: list[Part] = []
        done: list[PartResult] = []
        for part in self.source.parts:
            result = self._read_result(part)
            if result is None:
                todo.append(part)
            else:
                done.append(result)
        return todo, done

    def check(self) -> None:
        """Everything that can be known to fail before the first byte is written.

        Raises:
            TinyVLMError: no rows, an output that cannot be written, too little disk, or what `Stage.check` says.
        """
        if not self.source.parts:
            raise DataError(f"{self.stage.name} has nothing to do: its input holds no rows.")
        num_rows = sum(part.num_rows for part in self.todo()[0])
        require_space(self.root, num_rows * self.stage.bytes_per_row, self.stage.name)
        self.stage.check()

    def carry_out(self, execute: Execute) -> Manifest:
        """Do what is left to do, through `execute`, and close the folder; a finished one is left as it is.

        Raises:
            TinyVLMError: parts that are done stay, and the same command continues.
        """
        if self.is_finished:
            return self.finished_manifest()
        self.check()
        started = time.perf_counter()
        with Lease.take(self.folder) as lease:
            if self.is_finished:  # by another driver, since we looked
                return self.finished_manifest()
            self._tidy()
            todo, results = self.todo()
            if results:
                log.info("%s continues: %d of %d parts are done", self.stage.name, len(results), len(self.source.parts))
            if todo:
                results += execute(todo, lease.number)
            return self.finish(results, time.perf_counter() - started, lease_number=lease.number)

    def work(self, part: Part, lease_number: int | None = None) -> PartResult:
        """Read one part, map it, check it, write it.  `lease_number` refuses the write when the lease has moved on.

        Raises:
            StageError: whatever went wrong, as a sentence; a bad row is no reason, broken code or a full disk is.
        """
        try:
            return self._work(part, lease_number)
        except TinyVLMError:
            raise
        except Exception as error:  # the boundary of a part: one sentence, its cause is kept
            said = str(error).strip().splitlines()
            raise StageError(
                f"{self.stage.name} failed in part {part.index} ({type(error).__name__}: {said[0] if said else ''}); "
                "parts that are done stay, and the same command continues."
            ) from error

    def finish(
        self,
        results: Iterable[PartResult],
        seconds: float,
        extra: dict[str, Any] | None = None,
        lease_number: int | None = None,
    ) -> Manifest:
        """Account for every row, write stats.json and report.html, then the manifest.

        Raises:
            StageError: parts or rows are missing, or another driver holds the folder.
        """
        by_index = {result.index: result for result in results}
        counts, files = self._account(by_index)
        rows_in, rows_out = sum(r.rows_in for r in by_index.values()), sum(counts.values())
        statistics = {
            "stage": self.stage.name,
            "rows_in": rows_in,
            "rows_out": rows_out,
            "statuses": dict(counts.most_common()),
            "seconds": round(seconds, 2),
            **self.stage.statistics(self.folder),
        }
        manifest = Manifest(
            stage=self.stage.name,
            version=self.stage.version,
            fingerprint=self.fingerprint,
            settings=settings.to_dict(self.stage.settings),
            inputs={"fingerprint": self.source.fingerprint, "folders": dict(self.source.folders)},
            rows_in=rows_in,
            rows_out=rows_out,
            statuses=dict(counts.most_common()),
            files=files,
            seconds=round(seconds, 2),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tinyvlm_version=tinyvlm.__version__,
            git_commit=git_commit(),
            extra=extra or {},
        )
        self._tidy()
        if lease_number is not None:
            Lease.check(self.folder, lease_number)
        close_folder(self.folder, manifest, statistics)
        self._point_latest()
        return manifest

    def for_worker(self) -> StageRun:
        """The same run without the list of parts: what a worker needs to `work` on the parts it is given."""
        light = copy.copy(self)
        light.source = replace(self.source, parts=())
        return light

    def _work(self, part: Part, lease_number: int | None) -> PartResult:
        started = time.perf_counter()
        rows = self._read_part(part)
        counts = self._check_rows(part, rows, out := self.stage(rows))
        footer = {FOOTER: json.dumps({"counts": counts, "rows_in": rows.num_rows}).encode()}
        # The stage's own schema, for the marks on its columns; one chunk a column, so that equal rows are equal bytes.
        out = pa.Table.from_arrays(out.columns, schema=self.stage.writes.with_metadata(footer)).combine_chunks()
        path = self.folder / "data" / part.file_name
        temporary = path.with_name(f".{part.file_name}.{uuid.uuid4().hex}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(out, temporary, compression="zstd", row_group_size=1024)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            described = describe_part(temporary)
            # Between this check and the rename a new holder may appear; it then finds a whole and equal part.
            if lease_number is not None:
                Lease.check(self.folder, lease_number)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        seconds = time.perf_counter() - started
        return PartResult(part.index, rows.num_rows, counts, described["bytes"], seconds, file=described)

    def _read_part(self, part: Part) -> pa.Table:
        try:
            rows = read_rows(part.path, part.offset, part.num_rows)
        except (OSError, pa.ArrowInvalid) as error:
            said = str(error).splitlines()[0]
            raise DataError(f"{self.stage.name} cannot read its input {part.path} ({said}).") from error
        if rows.num_rows != part.num_rows:
            raise DataError(f"{self.stage.name} wants {part.num_rows} rows of {part.path}, which gave {rows.num_rows}.")
        return self.stage.select(rows) if self.source.is_stage else rows

    def _check_rows(self, part: Part, rows: pa.Table, out: pa.Table) -> dict[str, int]:
        """The contract of a row map; gives the number of rows by status."""
        name, where = self.stage.name, f"in part {part.index}"
        if not out.schema.equals(self.stage.writes):
            raise StageError(f"{name} wrote other columns than its schema {where}: {_difference(out, self.stage)}.")
        if out["key"].null_count or out["status"].null_count:
            raise StageError(f"{name} left a key or a status empty {where}.")
        came, went = rows["key"].to_pylist(), out["key"].to_pylist()
        if len(set(went)) != len(went):
            twice = [key for key, count in Counter(went).items() if count > 1]
            raise StageError(f"{name} gave the same key to several rows {where}: {twice[:5]}.")
        came, went = (set(came), set(out["source_key"].to_pylist())) if self.stage.fan_out else (came, went)
        if came != went:
            lost, new = sorted(set(came) - set(went))[:5], list(set(went) - set(came))[:5]
            said = f"lost keys {lost}, new keys {new}" if lost or new else "the rows are in another order"
            raise StageError(f"{name} lost, invented or moved rows {where}: {said}.")
        counts = Counter(out["status"].to_pylist())
        unknown = sorted(set(counts) - set(schema.STATUSES))
        if unknown:
            raise StageError(f"{name} gave the status {unknown[0]!r} {where}, which is not in schema.STATUSES.")
        return dict(counts)

    def _account(self, by_index: Mapping[int, PartResult]) -> tuple[Counter[str], dict[str, Any]]:
        """Counts by status and the manifest's list of files.  Raises StageError unless every row is there."""
        name = self.stage.name
        missing = [part.index for part in self.source.parts if part.index not in by_index]
        if missing:
            raise StageError(f"{name} has no result for parts {missing[:10]}; run the same command again.")
        counts: Counter[str] = Counter()
        files: dict[str, Any] = {}
        for part in self.source.parts:
            result, path = by_index[part.index], self.folder / "data" / part.file_name
            if not path.is_file():
                raise StageError(f"{name} wrote {path}, which is gone; run the same command again.")
            # Two workers may have done the same part (one was thought dead): what lies there counts.
            same = result.file and result.num_bytes == path.stat().st_size
            entry = files[part.file_name] = result.file if same else describe_part(path)
            counts.update(result.counts)
            wanted = sum(result.counts.values())
            if entry["rows"] != wanted or (not self.stage.fan_out and wanted != result.rows_in):
                raise StageError(
                    f"{name} read {result.rows_in} rows in part {part.index} and counted {wanted}, "
                    f"but {path} holds {entry['rows']}; remove that file and run the same command again."
                )
        if self.stage.fan_out:
            keys = np.concatenate([table["key"].to_numpy() for table in scan(self.folder, ["key"])])
            if len(np.unique(keys)) != len(keys):
                raise StageError(f"{name} gave the same key to rows of different parts.")
        return counts, files

    def _read_result(self, part: Part) -> PartResult | None:
        path = self.folder / "data" / part.file_name
        try:
            footer = json.loads(pq.read_schema(path).metadata[FOOTER])
            return PartResult(part.index, footer["rows_in"], footer["counts"], path.stat().st_size, resumed=True)
        except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: to be done
            return None

    def _tidy(self) -> None:
        """Remove what killed workers left; a lease file in the making may be another driver's."""
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("data/.*.tmp")]:
            if not path.name.startswith(".lease.") or time.time() - path.stat().st_mtime > STALE_S:
                path.unlink(missing_ok=True)

    def _point_latest(self) -> None:
        point_latest(self.root, self.stage.name, self.folder)


def run_local(run: StageRun, on_part: Callable[[PartResult], None] = lambda result: None) -> Manifest:
    """Carry a stage out in this process; the same folder comes out as over Ray."""

    def execute(parts: list[Part], lease_number: int) -> Iterable[PartResult]:
        for part in parts:
            result = run.work(part, lease_number)
            on_part(result)
            yield result

    return run.carry_out(execute)


def _difference(out: pa.Table, stage: Stage) -> str:
    """The columns that came, those that were wanted, and the first type that differs."""
    came, wanted = out.schema, stage.writes
    if came.names != wanted.names:
        return f"{came.names} instead of {wanted.names}"
    return next(
        f"{a.name} is {a.type} instead of {b.type}" for a, b in zip(came, wanted, strict=True) if not a.equals(b)
    )
