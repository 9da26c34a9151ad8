"""Carry out one stage on one input: plan its parts, work on each, account for every row, close the folder.

    part of input ─▶ Stage.select ─▶ Stage.map_part ─▶ checked (contract.py) ─▶ data/part-00007.parquet
                                                                                       │ all parts
                             manifest.json ◀─ report.html ◀─ stats.json ◀─ every row accounted for

A retry of some statuses works the same way on a finished folder: each part that has such rows is written anew as
`part-00007.g1.parquet`, and counts from the moment when a new manifest names it; the old files stay for `clean`.

What is on a takedown list of the output's root (takedown.py), or is made of a row that was taken down, leaves `_work`
as a row without contents; lists that were added since are looked at once more before the folder is closed.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import tinyvlm
from tinyvlm import config as settings
from tinyvlm import schema, storage
from tinyvlm.contract import check_counts, check_rows
from tinyvlm.errors import ConfigError, DataError, StageError, TinyVLMError
from tinyvlm.folders import (
    FOOTER,
    WRITING,
    Input,
    Manifest,
    Part,
    PartResult,
    close_folder,
    describe,
    describe_part,
    git_commit,
    is_finished,
    part_of,
    point_latest,
    read_rows,
    require_space,
    write_manifest,
    write_report,
)
from tinyvlm.journal import SUFFIX, Journal
from tinyvlm.lease import Lease
from tinyvlm.removal import Keys, judge, judge_file, next_name, rewrite
from tinyvlm.stage import Stage
from tinyvlm.takedown import Takedown, clear
from tinyvlm.upkeep import tidy

log = logging.getLogger(__name__)

Execute = Callable[[list[Part], int], Iterable[PartResult]]
"""Works on parts under a lease number and gives each one's result as it comes."""


class StageRun:
    """One stage being carried out on one input: plans parts, works on each, and closes the folder."""

    def __init__(self, stage: Stage, source: Input, root: Path, retry: Sequence[str] = ()) -> None:
        """`retry`: rows of these statuses (see `schema.statuses_of`) are done again in a folder that is finished."""
        # A copy, so that the same stage object may be run on another input.
        self.stage, self.source, self.root = copy.copy(stage), source, root.absolute()
        self.retry = schema.statuses_of(retry)
        if self.retry and stage.fan_out:
            raise ConfigError(f"{stage.name} makes several rows of one, so single rows cannot be tried again.")
        self.stage.folders = source.folders
        identity = [stage.name, stage.version, settings.to_dict(stage.settings, with_speed=False), source.fingerprint]
        self.fingerprint = settings.fingerprint(identity)
        self.folder = self.root / f"{stage.name}-{self.fingerprint[:12]}"
        self.stage.folder = self.folder

    @cached_property
    def takedown(self) -> Takedown:
        """What must not be kept under this root, as it was when this was first asked for."""
        return Takedown.of(self.root)

    @property
    def is_finished(self) -> bool:
        """There is a manifest, and no row in it that should be tried again."""
        if not is_finished(self.folder):
            return False
        return not self.retry or not set(self.retry) & set(Manifest.read(self.folder).statuses)

    def finished_manifest(self) -> Manifest:
        """The manifest of a finished folder; also points `latest` at it."""
        manifest = Manifest.read(self.folder)
        self._refresh_report(manifest)
        point_latest(self.root, self.stage.pointer or self.stage.name, self.folder)
        what = f"has no row left with status {', '.join(self.retry)}" if self.retry else "is finished already"
        log.info("%s %s, nothing to do: %s", self.stage.name, what, self.folder)
        return manifest

    def todo(self) -> tuple[list[Part], list[PartResult]]:
        """Parts still to do, and the results of those that are done."""
        parts, done = self._plan()
        sizes = storage.sizes(self.folder / "data")
        written = _by_part(sizes)

        def look(part: Part) -> PartResult | None:
            names = written.get(part.index, [])
            if part.previous:  # of a retry, what it has made itself, and not what another one left
                names = [name for name in names if part_of(name) == (part.index, part.generation)]
            return next(filter(None, (self._read_result(part, name, sizes[name]) for name in names)), None)

        results = storage.each(look, parts, self.folder)
        todo = [part for part, result in zip(parts, results, strict=True) if result is None]
        return todo, done + [result for result in results if result is not None]

    def _plan(self) -> tuple[list[Part], list[PartResult]]:
        """The parts of this run, and the results of those that a finished folder keeps as they are."""
        if not is_finished(self.folder):
            return list(self.source.parts), []
        manifest = Manifest.read(self.folder)
        parts: list[Part] = []
        kept: list[PartResult] = []
        names = manifest.parts

        def look(part: Part) -> PartResult | None:
            name = names[part.index]
            return self._read_result(part, name, int(manifest.files[name]["bytes"]))

        for part, result in zip(self.source.parts, storage.each(look, self.source.parts, self.folder), strict=True):
            if result is None:
                raise StageError(f"{self.folder} is damaged; see `tinyvlm verify {self.folder}`.")
            if set(self.retry) & set(result.counts):
                made_of = settings.fingerprint([manifest.files[result.name]["sha256"], sorted(self.retry)])
                number = manifest.generation + 1
                parts.append(replace(part, generation=number, previous=result.name, made_of=made_of))
            else:
                kept.append(result)
        return parts, kept

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
            tidy(self.folder)
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
        before = Manifest.read(self.folder).generation if is_finished(self.folder) else None
        listed = Takedown.of(self.root)  # anew: lists may have come since the parts were done
        by_index = {result.index: result for result in results}
        if listed:
            self._take_down(by_index, listed, before)
        counts, files = self._account(by_index)
        # After `discard_damaged` files of several generations may come together in a new manifest.
        newest_file = max((part[1] for name in files if (part := part_of(name))), default=0)
        manifest = Manifest(
            stage=self.stage.name,
            version=self.stage.version,
            fingerprint=self.fingerprint,
            settings=settings.to_dict(self.stage.settings),
            inputs={"fingerprint": self.source.fingerprint, "folders": dict(self.source.folders)},
            rows_in=sum(result.rows_in for result in by_index.values()),
            rows_out=sum(counts.values()),
            statuses=dict(counts.most_common()),
            files=files,
            seconds=round(seconds, 2),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tinyvlm_version=tinyvlm.__version__,
            git_commit=git_commit(),
            generation=newest_file if before is None else before + 1,
            extra=extra or {},
        )
        tidy(self.folder)
        if lease_number is not None:
            Lease.check(self.folder, lease_number)
        if before is None:
            # Statistics look at what lies there: of each part one file, and not what earlier tries left.
            for name in storage.sizes(self.folder / "data"):
                if part_of(name) and name not in files:
                    storage.remove(self.folder / "data" / name)
            close_folder(self.folder, manifest, self._statistics(manifest))
        else:  # the old manifest names the old files, so the new one comes first and statistics look at what it names
            write_manifest(self.folder, manifest)
            if listed:
                self._drop_taken_down(files, listed)
            self._refresh_report(manifest)
        point_latest(self.root, self.stage.pointer or self.stage.name, self.folder)
        return manifest

    def _statistics(self, manifest: Manifest) -> dict[str, Any]:
        """What stats.json says."""
        retried = {"generation": manifest.generation} if manifest.generation else {}
        return {
            "stage": manifest.stage,
            "rows_in": manifest.rows_in,
            "rows_out": manifest.rows_out,
            "statuses": manifest.statuses,
            "seconds": manifest.seconds,
            **retried,
            **self.stage.statistics(self.folder),
        }

    def _refresh_report(self, manifest: Manifest) -> None:
        """Write stats.json and report.html where they are not there, or of an earlier generation."""
        try:
            shown = json.loads(storage.read(self.folder / "stats.json")).get("generation", 0)
        except (OSError, ValueError):
            shown = None
        if shown != manifest.generation:
            write_report(self.folder, self._statistics(manifest))

    def for_worker(self, num_workers: int) -> StageRun:
        """The same run without the list of parts: what each of `num_workers` needs to `work` on parts it is given."""
        light = copy.copy(self)
        light.source = replace(self.source, parts=())
        light.stage = copy.copy(self.stage)
        light.stage.num_workers = num_workers
        light.__dict__.pop("takedown", None)  # may be long: each worker reads it where it lies
        return light

    def _work(self, part: Part, lease_number: int | None) -> PartResult:
        started = time.perf_counter()

        def may_write() -> None:
            if lease_number is not None:
                Lease.check(self.folder, lease_number)

        rows, gone = self._read_part(part)
        journal = Journal(self.folder / "data" / f".{part.file_name}{SUFFIX}", self.stage.writes, may_write)
        out = self._map(part, rows, journal)
        # Of a retry: rows that were usable in the input when they were first done, and are taken down there now.
        left = set(gone.tolist()) - set(rows["key"].to_pylist()) if part.previous else ()
        left = left & set(out["key"].to_pylist()) if left else ()
        check_rows(self.stage, part.index, rows, out, left)
        out = clear(out, judge(out, self.takedown, gone).meant)
        counts = dict(Counter(out["status"].to_pylist()))
        rows_in = rows.num_rows + len(left)
        about = {"counts": counts, "rows_in": rows_in, **({"made_of": part.made_of} if part.made_of else {})}
        footer = {FOOTER: json.dumps(about).encode()}
        # The stage's own schema, for the marks on its columns; one chunk a column, so that equal rows are equal bytes.
        out = pa.Table.from_arrays(out.columns, schema=self.stage.writes.with_metadata(footer)).combine_chunks()
        with storage.draft(self.folder / "data" / part.name_in(self.folder)) as draft:
            draft.write_table(out, row_groups=self.stage.row_groups(out), **{**WRITING, **self.stage.writing})
            with draft.content() as content:
                described = describe(content)
            # Between this check and the rename a new holder may appear; it then finds a whole and equal part.
            may_write()
            draft.publish()
        journal.remove()
        seconds = time.perf_counter() - started
        return PartResult(part.index, rows_in, counts, described["bytes"], seconds, draft.path.name, file=described)

    def _map(self, part: Part, rows: pa.Table, journal: Journal) -> pa.Table:
        """All rows of a part through the stage; of a retry only those with the wanted statuses, in their old places."""
        if not part.previous:
            return self.stage.map_part(rows, journal)
        previous = storage.readable(self.folder / "data" / part.previous)
        before = pq.read_table(previous, schema=self.stage.writes)
        again = pc.is_in(before["status"], pa.array(self.retry))
        chosen = pc.is_in(rows["key"], before.filter(again)["key"].combine_chunks())
        out = pa.concat_tables([before, self.stage.map_part(rows.filter(chosen), journal)])
        newest = {key: place for place, key in enumerate(out["key"].to_pylist())}
        return out.take([newest[key] for key in before["key"].to_pylist()])

    def _read_part(self, part: Part) -> tuple[pa.Table, Keys]:
        """The rows to map, and the keys of those in the input that must not be kept."""
        try:
            rows = read_rows(str(self._where(part)), part.offset, part.num_rows)
        except (OSError, pa.ArrowInvalid) as error:
            said = str(error).splitlines()[0]
            raise DataError(f"{self.stage.name} cannot read its input {part.path} ({said}).") from error
        if rows.num_rows != part.num_rows:
            raise DataError(f"{self.stage.name} wants {part.num_rows} rows of {part.path}, which gave {rows.num_rows}.")
        return (self.stage.select(rows) if self.source.is_stage else rows), judge(rows, self.takedown).keys

    def _where(self, part: Part) -> Path:
        """The part's file; what replaced it, if rows were taken down there while this run goes on."""
        path = storage.address(part.path)
        known = part_of(path.name)
        if not self.source.is_stage or known is None or storage.is_file(path):
            return path
        manifests = {name: Manifest.read(storage.address(folder)) for name, folder in self.source.folders.items()}
        is_same = settings.fingerprint({name: m.identity for name, m in manifests.items()}) == self.source.fingerprint
        now = Manifest.read(path.parent.parent).parts.get(known[0])
        return path.with_name(now) if is_same and now else path

    def _take_down(self, by_index: dict[int, PartResult], listed: Takedown, before: int | None) -> None:
        """Clear finished parts of what is listed, as files of the next generation."""
        for part in self.source.parts:
            result = by_index.get(part.index)
            if result is None or not storage.is_file(path := self.folder / "data" / result.name):
                continue  # `_account` says so
            judged = judge_file(path, listed, judge_file(self._where(part), listed).keys)
            if judged.due.any():
                number = ((part_of(result.name) or (0, 0))[1] if before is None else before) + 1
                name = next_name(self.folder, result.name, number)
                file, counts = rewrite(path, path.with_name(name), judged.due)
                by_index[part.index] = replace(result, name=name, file=file, counts=counts, num_bytes=file["bytes"])

    def _drop_taken_down(self, files: Mapping[str, Any], listed: Takedown) -> None:
        """Remove data files that count no more and hold what is listed; `clean` takes the others in its time."""
        parts = {part.index: part for part in self.source.parts}
        for name in storage.sizes(self.folder / "data"):
            known, path = part_of(name), self.folder / "data" / name
            if known and name not in files and known[0] in parts:
                gone = judge_file(self._where(parts[known[0]]), listed).keys
                if judge_file(path, listed, gone).due.any():
                    storage.remove(path)

    def _account(self, by_index: Mapping[int, PartResult]) -> tuple[Counter[str], dict[str, Any]]:
        """Counts by status and the manifest's list of files.  Raises StageError unless every row is there."""
        name = self.stage.name
        missing = [part.index for part in self.source.parts if part.index not in by_index]
        if missing:
            raise StageError(f"{name} has no result for parts {missing[:10]}; run the same command again.")
        counts: Counter[str] = Counter()
        files: dict[str, Any] = {}
        sizes = storage.sizes(self.folder / "data")
        for part in self.source.parts:
            result = by_index[part.index]
            path = self.folder / "data" / result.name
            if result.name not in sizes:
                raise StageError(f"{name} wrote {path}, which is gone; run the same command again.")
            # Two workers may have done the same part (one was thought dead): what lies there counts.
            same = result.file and result.num_bytes == sizes[result.name]
            entry = files[result.name] = result.file if same else describe_part(path)
            counts.update(result.counts)
            check_counts(self.stage, str(path), part.index, result.rows_in, result.counts, entry["rows"])
        if self.stage.fan_out:
            paths = [storage.readable(self.folder / "data" / name) for name in files]
            keys = np.concatenate([pq.read_table(path, columns=["key"])["key"].to_numpy() for path in paths])
            if len(np.unique(keys)) != len(keys):
                raise StageError(f"{name} gave the same key to rows of different parts.")
        return counts, files

    def _read_result(self, part: Part, name: str, num_bytes: int) -> PartResult | None:
        """What the footer of a data file says; None when it is damaged, or what another retry left."""
        path = self.folder / "data" / name
        try:
            footer = json.loads(pq.read_schema(storage.readable(path)).metadata[FOOTER])
            result = PartResult(part.index, footer["rows_in"], footer["counts"], num_bytes, name=name, resumed=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result if not part.previous or footer.get("made_of") == part.made_of else None


def _by_part(names: Iterable[str]) -> dict[int, list[str]]:
    """Index of each part → its data files, the newest generation first."""
    found: dict[int, list[str]] = {}
    known = [(part, name) for name in names if (part := part_of(name))]
    for (index, _), name in sorted(known, reverse=True):
        found.setdefault(index, []).append(name)
    return found


def run_local(run: StageRun, on_part: Callable[[PartResult], None] = lambda result: None) -> Manifest:
    """Carry a stage out in this process; the same folder comes out as over Ray."""

    def execute(parts: list[Part], lease_number: int) -> Iterable[PartResult]:
        waiting, running = deque(parts), set[Future[PartResult]]()
        with ThreadPoolExecutor(run.stage.parts_at_once, thread_name_prefix="part") as threads:
            while waiting or running:
                while waiting and len(running) < run.stage.parts_at_once:
                    running.add(threads.submit(run.work, waiting.popleft(), lease_number))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    on_part(future.result())
                    yield future.result()

    try:
        return run.carry_out(execute)
    finally:
        run.stage.close()
