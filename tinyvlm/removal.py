"""Takes what is on a takedown list out of stage folders that exist.

    ROOT or FOLDER … ─▶ the stage folders there, each after the one that it was made of
        data/part-00007.parquet ──the rows that are meant──▶ data/part-00007.g1.parquet     their contents gone
        manifest.json           ──names the new files──────▶ the old files are removed at once
        stats.json, report.html ──without pictures─────────▶ drawn anew when the stage's command confirms the folder

A row is meant by what it says itself (takedown.py), because the row that it was made of is (so an explored row is
found, which has no link), or because the one row that was made of it is (so the words of a link are found whose picture
is listed).  A conversation goes with any of its pictures.  Nothing is noted beside the folders: killed half-way, the
same command finds what is left to do by looking, and when it is done finds nothing.  Folders that are not finished are
treated alike, journals included; and a run that goes on while a list is added looks through its parts before it closes
(stage_run.py).

A manifest's identity stays what it was, so later stages start nothing anew: they are cleared of the same rows here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tinyvlm import schema, storage
from tinyvlm.errors import DataError, StageError
from tinyvlm.folders import (
    FOOTER,
    SHARED_PICTURES,
    WRITING,
    Manifest,
    Part,
    describe,
    describe_part,
    footer_of,
    is_finished,
    newest,
    part_of,
    write_manifest,
    write_report,
)
from tinyvlm.journal import SUFFIX
from tinyvlm.lease import Lease
from tinyvlm.takedown import Takedown, clear
from tinyvlm.upkeep import tidy

Keys = NDArray[np.int64]

_FOLDER = re.compile(r"[a-z_]+-[0-9a-f]{12}")
_LIGHT = ("key", "source_key", "status", "url", "final_url", "sha256", "image_sha256")
_NO_KEYS: Keys = np.empty(0, np.int64)


@dataclass(frozen=True)
class Removed:
    """What became of one folder."""

    folder: Path
    num_rows: int = 0
    """Rows that were cleared now."""
    in_use: str = ""
    """Why it could not be touched: a run that works in it looks at the lists itself before it closes."""
    trained_on: bool = False
    """A model that was trained on rows which are taken down: its weights are not changed."""


@dataclass(frozen=True)
class Judged:
    """Which rows of a table are meant; the masks have one entry for each row."""

    meant: NDArray[np.bool_]
    due: NDArray[np.bool_]
    """Those that are not cleared yet."""
    keys: Keys
    """Keys of the rows that are meant."""
    made_of: Keys
    """Keys of the rows that those were made of."""
    pictures: frozenset[str]
    """sha256 of theirs."""
    was: Counter[str]
    """Statuses of the rows that are due."""
    is_fan_out: bool
    """The rows have keys of their own, and the keys of those that they were made of beside them."""


def take_down(takedown: Takedown, places: Sequence[Path]) -> list[Removed]:
    """Add the list to the roots of `places`, stage folders or roots, and clear what lies there.

    Raises:
        DataError: a place is not there, or a folder is damaged.
    """
    folders: list[Path] = []
    for place in (given.absolute() for given in places):
        if not storage.exists(place):
            raise DataError(f"There is no folder {place}; give a stage folder, or a root that holds some.")
        is_folder = _FOLDER.fullmatch(place.name) and (is_finished(place) or storage.entries(place / "data"))
        takedown.add_to(place.parent if is_folder else place)
        names = [entry.name for entry in storage.entries(place) if entry.is_folder and _FOLDER.fullmatch(entry.name)]
        folders += [place] if is_folder else [place / name for name in names]
    return _Removal(folders).carry_out()


class _Removal:
    """One command on some folders; remembers which keys are gone from which folder."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.sources = {folder: _source_of(folder) for folder in dict.fromkeys(folders)}
        self.lists = {root: Takedown.of(root) for root in {folder.parent for folder in self.sources}}
        self._found: dict[Path, _Found] = {}
        self._gone: dict[Path, Keys] = {}
        self._pictures: frozenset[str] = frozenset()
        """sha256 of all that is gone, by whatever it was meant."""

    def carry_out(self) -> list[Removed]:
        """Look through all folders, then clear them, each after the one that it was made of."""
        order = self._ordered()
        for folder in order:
            self._found[folder] = _look_through(folder, self.lists[folder.parent], self._keys_gone_from(folder))
            self._gone[folder] = self._found[folder].keys
        for folder in reversed(order):
            source = self.sources[folder]
            if source is None or source not in self.sources:
                continue
            if not self._found[folder].is_fan_out:
                self._gone[source] = np.union1d(self._gone[source], self._gone[folder])
            elif source.name.startswith("records-"):  # they may hold the picture itself, and have no hash of it
                self._gone[source] = np.union1d(self._gone[source], self._found[folder].made_of)
        done = [self._clear(folder) for folder in order]
        touched = {folder.name for folder, keys in self._gone.items() if len(keys)}
        return [replace(item, trained_on=_is_model_of(item.folder, touched)) for item in done]

    def _clear(self, folder: Path) -> Removed:
        takedown, found = self.lists[folder.parent], self._found[folder]
        sources = self._keys_gone_from(folder)
        if not found.is_fan_out:  # its rows have the keys of those that they were made of
            sources = self._gone[folder] = np.union1d(sources, self._gone[folder])
        elif self._pictures:
            takedown |= Takedown(digests=self._pictures)
        if np.setdiff1d(sources, found.sources).size or takedown is not self.lists[folder.parent]:
            found = _look_through(folder, takedown, sources)
        self._pictures |= found.pictures
        self._gone[folder] = np.union1d(self._gone[folder], found.keys)
        if not found.is_due:
            return Removed(folder)
        try:
            with Lease.take(folder):
                return Removed(folder, _clear_folder(folder, takedown, sources))
        except StageError as error:
            return Removed(folder, in_use=str(error))

    def _keys_gone_from(self, folder: Path) -> Keys:
        """Keys gone from the folder that this one was made of, which may be one that is only read here."""
        source = self.sources[folder]
        if source is None:
            return _NO_KEYS
        if source not in self._gone:
            lists = Takedown.of(source.parent) | self.lists[folder.parent]
            self._gone[source] = _look_through(source, lists, _NO_KEYS).keys
        return self._gone[source]

    def _ordered(self) -> list[Path]:
        """Every folder after the one that it was made of."""
        ordered: dict[Path, None] = {}

        def add(folder: Path) -> None:
            source = self.sources[folder]
            if source is not None and source in self.sources and source not in ordered:
                add(source)
            ordered.setdefault(folder)

        for folder in self.sources:
            add(folder)
        return list(ordered)


@dataclass(frozen=True)
class _Found:
    """What a folder holds of what is listed."""

    keys: Keys
    made_of: Keys
    pictures: frozenset[str]
    is_due: bool
    is_fan_out: bool
    sources: Keys
    """What it was looked through with."""


def _is_model_of(folder: Path, touched: set[str]) -> bool:
    if not is_finished(folder) or storage.entries(folder / "data"):
        return False
    read = Manifest.read(folder).inputs.get("folders") or {}
    return bool(touched & {Path(str(path)).name for path in read.values()})


def judge(rows: pa.Table, takedown: Takedown, sources: Keys = _NO_KEYS) -> Judged:
    """Which rows are meant by the lists, or made of a row with one of the keys `sources`."""
    meant = takedown.mask(rows)
    keys, is_fan_out = rows["key"].to_numpy(), "source_key" in rows.column_names
    if len(sources):
        made_of = rows["source_key" if is_fan_out else "key"]
        is_known = pc.is_valid(made_of).to_numpy()
        meant |= is_known & np.isin(pc.fill_null(made_of, 0).to_numpy(), sources)
    if "status" in rows.column_names:
        is_cleared = pc.equal(rows["status"], schema.TAKEN_DOWN).to_numpy()
        meant |= is_cleared
    else:  # a list of links: its words are what there is to clear
        words = [name for name in ("caption", "meta") if name in rows.column_names]
        is_cleared = np.ones(rows.num_rows, np.bool_)
        for name in words:
            is_cleared &= pc.is_null(rows[name]).to_numpy()
    due = meant & ~is_cleared
    was = Counter(rows["status"].filter(pa.array(due)).to_pylist() if "status" in rows.column_names else [])
    digests = rows["sha256"].filter(pa.array(meant)).drop_null().to_pylist() if "sha256" in rows.column_names else ()
    made_of = rows["source_key"].filter(pa.array(meant)).drop_null().to_numpy() if is_fan_out else keys[meant]
    return Judged(meant, due, keys[meant], made_of, frozenset(digests), was, is_fan_out)


def judge_file(path: Path, takedown: Takedown, sources: Keys = _NO_KEYS) -> Judged:
    """`judge` on the rows of a data file; reads no picture.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with pq.ParquetFile(storage.readable(path)) as file:
            names = [file.metadata.schema.column(place).path for place in range(file.metadata.num_columns)]
            more = () if "status" in names else ("caption", "meta")
            light = [name for name in names if name in (*_LIGHT, *more)]
            rows = file.read(columns=light + [name for name in names if re.fullmatch(r"images\..*\.sha256", name)])
    except (OSError, pa.ArrowInvalid) as error:
        said = str(error).splitlines()[0]
        folder = path.parent.parent
        raise DataError(f"{path} cannot be read ({said}); see `tinyvlm verify {folder}`.") from error
    return judge(rows, takedown, sources)


def rewrite(path: Path, new: Path, due: NDArray[np.bool_]) -> tuple[dict[str, Any], dict[str, int]]:
    """The data file at `path` without the contents of the rows that are due, as `new`: its entry, and its counts.

    Row groups stay as they are (training finds conversations by them), and so does `content`.
    """
    with pq.ParquetFile(storage.readable(path)) as file:
        rows, metadata = file.read(), file.metadata
    said = footer_of(metadata)
    rows = clear(rows, due).combine_chunks()
    counts = dict(Counter(rows["status"].to_pylist())) if "status" in rows.column_names else {}
    about = {"counts": counts, "rows_in": said.get("rows_in", rows.num_rows), "content": describe_part(path)["content"]}
    rows = rows.replace_schema_metadata({FOOTER: json.dumps(about).encode()})
    with storage.draft(new) as draft:
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        shared = SHARED_PICTURES if "images" in rows.column_names else {}
        draft.write_table(rows, row_groups=sizes, **{**WRITING, **shared})
        with draft.content() as content:
            described = describe(content)
        draft.publish()
    return described, counts


def next_name(folder: Path, name: str, generation: int) -> str:
    """What the data file `name` is called in another generation."""
    part = part_of(name)
    assert part is not None
    return Part(part[0], "", 0, 0, generation=generation).name_in(folder)


def _source_of(folder: Path) -> Path | None:
    """The folder whose rows a finished one was made of: beside it, or where it was then."""
    if not is_finished(folder):
        return None
    read = Manifest.read(folder).inputs.get("folders") or {}
    for path in list(read.values())[:1]:
        there = storage.address(str(path))
        beside = folder.parent / there.name
        return next((place for place in (beside, there) if is_finished(place)), None)
    return None


def _look_through(folder: Path, takedown: Takedown, sources: Keys) -> _Found:
    data = folder / "data"
    names = [name for name in storage.sizes(data) if part_of(name)]
    current = set(_current(folder, names))
    found = storage.each(lambda name: judge_file(data / name, takedown, sources), names, folder)
    counted = [judged for name, judged in zip(names, found, strict=True) if name in current]
    keys, made_of = ([_NO_KEYS, *(getattr(one, what) for one in counted)] for what in ("keys", "made_of"))
    is_due = any(judged.due.any() for judged in found)
    is_due = is_due or any(judged.due.any() for _, _, judged in _journals(data, takedown, sources))
    is_fan_out = any(judged.is_fan_out for judged in found)
    pictures = frozenset().union(*(judged.pictures for judged in found))
    is_due = is_due or _shows_too_much(folder)
    return _Found(np.concatenate(keys), np.concatenate(made_of), pictures, is_due, is_fan_out, sources)


def _current(folder: Path, names: Iterable[str]) -> list[str]:
    """The data files that count: those of the manifest; without one, of each part the newest."""
    if is_finished(folder):
        return [name for name in Manifest.read(folder).files if part_of(name)]
    return list(newest(names).values())


def _clear_folder(folder: Path, takedown: Takedown, sources: Keys) -> int:
    """Clear a folder under its lease; gives the number of rows."""
    tidy(folder)
    data = folder / "data"
    finished = Manifest.read(folder) if is_finished(folder) else None
    names = [name for name in storage.sizes(data) if part_of(name)]
    new: dict[str, tuple[str, dict[str, Any]]] = {}
    was: Counter[str] = Counter()
    num_rows = 0
    for name in _current(folder, names):
        judged = judge_file(data / name, takedown, sources)
        if judged.due.any():
            generation = finished.generation if finished else (part_of(name) or (0, 0))[1]
            named = next_name(folder, name, generation + 1)
            new[name] = named, rewrite(data / name, data / named, judged.due)[0]
            was += judged.was
            num_rows += int(judged.due.sum())
    if finished and new:
        files: dict[str, Any] = dict(new.get(name, (name, entry)) for name, entry in finished.files.items())
        statuses = Counter(finished.statuses) - was
        statuses[schema.TAKEN_DOWN] += was.total()
        write_manifest(
            folder,
            replace(
                finished,
                files=files,
                statuses=dict((+statuses).most_common()),
                generation=finished.generation + 1,
                extra={**finished.extra, "taken_down": finished.extra.get("taken_down", 0) + num_rows},
            ),
        )
    for name in names:  # the files that were replaced, and what retries and earlier tries left
        if name in new or (name not in _current(folder, names) and _is_due(data / name, takedown, sources)):
            storage.remove(data / name)
    for path, rows, judged in _journals(data, takedown, sources):
        if judged.due.any():
            _rewrite_journal(path, clear(rows, judged.due))
    if _shows_too_much(folder):
        _write_small_report(folder)
    return num_rows


def _is_due(path: Path, takedown: Takedown, sources: Keys) -> bool:
    return storage.is_file(path) and bool(judge_file(path, takedown, sources).due.any())


def _journals(data: Path, takedown: Takedown, sources: Keys) -> Iterable[tuple[Path, pa.Table, Judged]]:
    """The files of all journals: where, their rows, and which of them are meant."""
    for entry in storage.entries(data):
        if entry.is_folder and entry.name.endswith(SUFFIX):
            for name in storage.sizes(data / entry.name):
                if name.endswith(".arrow"):
                    path = data / entry.name / name
                    try:
                        rows = pa.ipc.open_file(pa.py_buffer(storage.read(path))).read_all()
                    except (OSError, pa.ArrowInvalid):
                        continue  # as the journal itself does: damaged files count as not there
                    yield path, rows, judge(rows, takedown, sources)


def _rewrite_journal(path: Path, rows: pa.Table) -> None:
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, rows.schema) as writer:
        writer.write_table(rows)
    storage.write_atomic(path, memoryview(content.getvalue()))


def _shows_too_much(folder: Path) -> bool:
    """The report is older than the last rows that were taken down."""
    if not is_finished(folder):
        return False
    manifest = Manifest.read(folder)
    if not manifest.extra.get("taken_down"):
        return False
    try:
        shown = json.loads(storage.read(folder / "stats.json"))
    except (OSError, ValueError):
        return True
    return manifest.generation not in (shown.get("generation"), shown.get("taken_down_in_generation"))


def _write_small_report(folder: Path) -> None:
    """Numbers alone: pictures and examples may show what was taken down.  The stage's command draws all of it anew."""
    manifest = Manifest.read(folder)
    told = (
        "Rows were taken down, and with them this report's pictures and examples.  The stage's command, given again, "
    )
    statistics = {
        "stage": manifest.stage,
        "note": told + "draws it anew.",
        "rows_in": manifest.rows_in,
        "rows_out": manifest.rows_out,
        "statuses": manifest.statuses,
        "seconds": manifest.seconds,
        "taken_down_in_generation": manifest.generation,
    }
    write_report(folder, statistics)
