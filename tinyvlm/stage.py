"""The stage contract: one input folder, one output folder, rows to rows, resumable, finished by a manifest.

    {root}/{stage}-{fingerprint[:12]}/
        data/part-00000.parquet …   temp + rename; one output part for each input part, its counts in its own footer
        stats.json, report.html     what a person looks at
        manifest.json               written last: its existence means finished
        lease.json                  who is writing (see lease.py)
    {root}/latest/{stage}.json      which of several folders of a stage the last command made or confirmed

The unit of work is a `Stage`: a light, picklable object that maps a table to a table and does not know who runs it.
`run_local` runs it in this process; `ray_jobs/_run_stage.py` runs the same `StageRun` over Ray Data.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import tinyvlm
from tinyvlm import config as settings
from tinyvlm import schema
from tinyvlm.errors import DataError, StageError
from tinyvlm.lease import Lease

FOOTER = b"tinyvlm"
"""Key of the JSON that each part carries in its Parquet footer: {"counts": {status: rows}, "rows_in": n}."""


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
    folders: Mapping[str, str] = {}
    """Where each folder that the stage reads is; filled in by `StageRun`."""

    def select(self, rows: pa.Table) -> pa.Table:
        """The rows of a stage folder that this stage maps; those that earlier stages rejected stay behind."""
        return rows.filter(pc.equal(rows["status"], schema.OK))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map rows to outcome rows; never raises for a bad row."""
        raise NotImplementedError

    def statistics(self, folder: Path) -> dict[str, Any]:
        """Numbers and charts for stats.json and report.html, from the finished parts of `folder`."""
        return {}


@dataclass(frozen=True)
class Part:
    """A piece of input that becomes one output file: `num_rows` rows from `offset` of `path`."""

    index: int
    path: str
    offset: int
    num_rows: int

    @property
    def file_name(self) -> str:
        return f"part-{self.index:05d}.parquet"


@dataclass(frozen=True)
class Input:
    """What a stage reads: its parts, their fingerprint, and where each folder that it reads is."""

    parts: tuple[Part, ...]
    fingerprint: str
    folders: Mapping[str, str]
    is_stage: bool
    """True: rows come from a stage folder and `Stage.select` chooses among them."""


@dataclass
class PartResult:
    """What one part came to."""

    index: int
    rows_in: int
    counts: dict[str, int]
    num_bytes: int
    seconds: float = 0.0
    resumed: bool = False


@dataclass(frozen=True)
class Manifest:
    """The last file of a stage folder."""

    stage: str
    version: int
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, Any]
    rows_in: int
    rows_out: int
    statuses: dict[str, int]
    files: dict[str, Any]
    """name → {"rows", "bytes", "sha256"} of each data file."""
    seconds: float
    created: str
    tinyvlm_version: str
    git_commit: str | None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises StageError when `folder` is not a finished stage folder."""
        try:
            return cls(**json.loads((folder / "manifest.json").read_text()))
        except FileNotFoundError:
            raise StageError(f"{folder} is not a finished stage folder: it has no manifest.json.") from None
        except (json.JSONDecodeError, TypeError) as error:
            raise StageError(f"{folder}/manifest.json cannot be read ({error}); run the stage again elsewhere.") from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write under another name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def find_folder(inputs: Sequence[Path], stage_name: str, reader: str) -> Path:
    """The finished folder of `stage_name` among `inputs`: stage folders themselves, or roots that hold some.

    Raises:
        StageError: there is none, naming it, or several and no pointer says which.
    """
    for given in inputs:
        if (given / "manifest.json").is_file() and Manifest.read(given).stage == stage_name:
            return given
    for root in inputs:
        pointer = root / "latest" / f"{stage_name}.json"
        if pointer.is_file():
            folder = root / str(json.loads(pointer.read_text())["folder"])
            if (folder / "manifest.json").is_file():
                return folder
            raise StageError(
                f"{reader} reads the folder of {stage_name!r}, but {folder} is gone or unfinished; "
                f"run `python -m ray_jobs.{stage_name}` again."
            )
        found = sorted(path.parent for path in root.glob(f"{stage_name}-*/manifest.json"))
        if len(found) == 1:
            return found[0]
        if found:
            raise StageError(f"{reader} found several folders of {stage_name!r} in {root}; give one of them as --input.")
    places = ", ".join(str(path) for path in inputs) or "no --input"
    raise StageError(
        f"{reader} reads the folder of {stage_name!r}, but found none in {places}; "
        f"run `python -m ray_jobs.{stage_name}` first, or give its folder as --input."
    )


def open_input(stage: Stage, inputs: Sequence[Path]) -> Input:
    """Resolve the folders that a stage reads, and cut the first one into parts (one for each of its files)."""
    folders = {name: find_folder(inputs, name, stage.name) for name in stage.reads}
    manifests = {name: Manifest.read(folder) for name, folder in folders.items()}
    first = stage.reads[0]
    parts = [
        Part(index, str(folders[first] / "data" / name), 0, int(entry["rows"]))
        for index, (name, entry) in enumerate(sorted(manifests[first].files.items()))
    ]
    identity = {name: manifest.fingerprint for name, manifest in manifests.items()}
    return Input(tuple(parts), settings.fingerprint(identity), {n: str(f) for n, f in folders.items()}, is_stage=True)


def read_rows(path: str, offset: int, num_rows: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows [offset, offset + num_rows) of a Parquet file, touching only the row groups that hold them."""
    file = pq.ParquetFile(path, memory_map=False)
    groups: list[int] = []
    start = skip = 0
    for group in range(file.metadata.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if start < offset + num_rows and start + length > offset:
            if not groups:
                skip = offset - start
            groups.append(group)
        start += length
    return file.read_row_groups(groups, columns=columns).slice(skip, num_rows)


def scan(folder: Path, columns: Sequence[str], *, only_ok: bool = False) -> Iterator[pa.Table]:
    """The named columns of each finished part of a stage folder, one table a part."""
    for path in sorted((folder / "data").glob("part-*.parquet")):
        filters = [("status", "=", schema.OK)] if only_ok else None
        yield pq.read_table(path, columns=list(columns), filters=filters)


class StageRun:
    """One stage being carried out on one input: plans parts, works on each, and closes the folder."""

    def __init__(self, stage: Stage, source: Input, root: Path) -> None:
        self.stage, self.source, self.root = stage, source, root.absolute()
        stage.folders = source.folders
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

    def work(self, part: Part, lease_number: int | None = None) -> PartResult:
        """Read one part, map it, check it, write it.  `lease_number` refuses the write when the lease has moved on."""
        started = time.perf_counter()
        rows = read_rows(part.path, part.offset, part.num_rows)
        if self.source.is_stage:
            rows = self.stage.select(rows)
        out = self.stage(rows)
        counts = self._check(part, rows, out)
        footer = {"counts": counts, "rows_in": rows.num_rows}
        out = out.replace_schema_metadata({FOOTER: json.dumps(footer).encode()})
        path = self.folder / "data" / part.file_name
        temporary = path.with_name(f".{part.file_name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(out, temporary, compression="zstd", row_group_size=1024)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if lease_number is not None:
            Lease.check(self.folder, lease_number)
        os.replace(temporary, path)
        return PartResult(part.index, rows.num_rows, counts, path.stat().st_size, time.perf_counter() - started)

    def finish(self, results: Iterable[PartResult], seconds: float, extra: dict[str, Any] | None = None) -> Manifest:
        """Account for every row, write stats.json and report.html, then the manifest.

        Raises:
            StageError: parts or rows are missing.
        """
        by_index = {result.index: result for result in results}
        missing = [part.index for part in self.source.parts if part.index not in by_index]
        if missing:
            raise StageError(f"{self.stage.name} has no result for parts {missing[:10]}; run the same command again.")
        counts: Counter[str] = Counter()
        for result in by_index.values():
            counts.update(result.counts)
        files = {part.file_name: self._describe_file(part) for part in self.source.parts}
        rows_in, rows_out = sum(r.rows_in for r in by_index.values()), sum(counts.values())
        if rows_out != sum(entry["rows"] for entry in files.values()):
            raise StageError(f"{self.stage.name} counted {rows_out} rows but its files hold another number.")
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
        close_folder(self.folder, manifest, statistics)
        self._point_latest()
        return manifest

    def _check(self, part: Part, rows: pa.Table, out: pa.Table) -> dict[str, int]:
        name = self.stage.name
        if not out.schema.equals(self.stage.writes):
            raise StageError(f"{name} wrote the columns {out.schema.names}, but its schema is {self.stage.writes.names}.")
        came, went = rows["key"].to_pylist(), out["key"].to_pylist()
        if self.stage.fan_out:
            came, went = sorted(set(came)), sorted(set(out["source_key"].to_pylist()))
        if came != went:
            lost, new = sorted(set(came) - set(went))[:5], sorted(set(went) - set(came))[:5]
            raise StageError(f"{name} lost or invented rows in part {part.index}: lost keys {lost}, new keys {new}.")
        counts = Counter(out["status"].to_pylist())
        unknown = set(counts) - set(schema.STATUSES)
        if unknown:
            raise StageError(f"{name} gave the status {sorted(unknown)[0]!r}, which is not in schema.STATUSES.")
        return dict(counts)

    def _read_result(self, part: Part) -> PartResult | None:
        path = self.folder / "data" / part.file_name
        if not path.is_file():
            return None
        try:
            footer = json.loads(pq.read_schema(path).metadata[FOOTER])
        except (pa.ArrowInvalid, KeyError, TypeError, OSError):
            return None
        return PartResult(part.index, footer["rows_in"], footer["counts"], path.stat().st_size, resumed=True)

    def _describe_file(self, part: Part) -> dict[str, Any]:
        path = self.folder / "data" / part.file_name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"rows": pq.read_metadata(path).num_rows, "bytes": path.stat().st_size, "sha256": digest}

    def _point_latest(self) -> None:
        point_latest(self.root, self.stage.name, self.folder)


def close_folder(folder: Path, manifest: Manifest, statistics: dict[str, Any]) -> None:
    """Write what a person looks at, then the manifest; after this the folder is finished."""
    from tinyvlm.report import stage_report

    write_atomic(folder / "stats.json", json.dumps(statistics, indent=2))
    write_atomic(folder / "report.html", stage_report(statistics))
    write_atomic(folder / "manifest.json", json.dumps(settings.to_dict(manifest), indent=2))


def point_latest(root: Path, stage_name: str, folder: Path) -> None:
    """Note that `folder` is what the last command for this stage made or confirmed."""
    write_atomic(root / "latest" / f"{stage_name}.json", json.dumps({"folder": folder.name}))


def run_local(run: StageRun, on_part: Callable[[PartResult], None] = lambda result: None) -> Manifest:
    """Carry a stage out in this process; the same folder comes out as over Ray."""
    if run.is_finished:
        return run.finished_manifest()
    started = time.perf_counter()
    with Lease.take(run.folder) as lease:
        todo, results = run.todo()
        for part in todo:
            results.append(run.work(part, lease.number))
            on_part(results[-1])
        return run.finish(results, time.perf_counter() - started)


def git_commit() -> str | None:
    """The commit of the code that runs, when it runs from a checkout."""
    try:
        place = Path(__file__).parent
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def verify(folder: Path) -> list[str]:
    """Differences between a folder's files and its manifest, in words; empty when all is well.

    Raises:
        DataError: the folder is not finished.
    """
    problems: list[str] = []
    try:
        manifest = Manifest.read(folder)
    except StageError as error:
        raise DataError(str(error)) from None
    for name, entry in manifest.files.items():
        path = folder / "data" / name
        if not path.is_file():
            problems.append(f"{name} is missing")
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                problems.append(f"{name} has changed")
    return problems
