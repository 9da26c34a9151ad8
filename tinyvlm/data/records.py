"""Files of a dataset → the `records` folder that `prepare` reads: one row for each record.

    *.json (an array, or an object around one) · *.jsonl · *.parquet · *.csv      here, in an object store, on the hub
        └─ one pass: every record's outline ─ equal pictures together ─▶ {root}/records-{fingerprint}/data/part-…
                                                        └─ read, in the workers ─▶ record ─▶ source.dialogues

Short records (words) are copied as JSON; long ones (they hold pictures) stay where they are, and the row says where.
The pass streams, so a file of any size fits into memory, and happens once: the fingerprint covers the settings and the
names, sizes and times of change of the files (of a dataset on the hub, its commit).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tinyvlm import config as settings
from tinyvlm import schema, stage, storage
from tinyvlm.data import hub
from tinyvlm.data.listing import Closing, Listing, make_folder
from tinyvlm.data.picture_groups import PictureGroups
from tinyvlm.data.record_files import Place, read_rows
from tinyvlm.data.routing import SortedParts, sorting_room
from tinyvlm.data.sources import FileSource, drawn, require_fields, storable
from tinyvlm.data.sources.catalogue import fitting
from tinyvlm.errors import DataError
from tinyvlm.folders import Input, is_finished

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

STAGE = "records"
VERSION = 3
MAX_COPIED_BYTES = 16_384
"""Longer records stay in their file."""
MAX_PART_BYTES = 256 << 20
"""Of a part's records in JSON lines, which a worker holds at the same time; of Parquet's rows there are as many as of
any others, which is less."""
_ROWS_AT_A_TIME = 1_000


def open_records(places: Sequence[str], source: FileSource, config: PrepareConfig, root: Path) -> Input:
    """The input of `prepare` for the dataset at `places`, listed in a folder under `root` unless it is already.

    Raises:
        DataError: nothing is there, it lacks a field, has no records or cannot be read; nothing is left behind that
            counts.
    """
    files = list(source.choose(find_files(places, source)))
    identity = [
        STAGE, VERSION, source.name, config.listed, [[file, *_stat(file)] for file in [*files, *config.known]]
    ]  # fmt: skip
    listing = Listing(
        name=STAGE, version=VERSION, fingerprint=settings.fingerprint(identity), settings=config, inputs=files
    )
    folder = listing.folder(root)
    if not is_finished(folder):
        lister = _Lister(files, source, config)
        make_folder(listing, root, lister.parts(folder), lister.close)
    return stage.open_input(_Reader(), [folder])


class _Reader(stage.Stage):
    """Stands for `prepare`, so that this road to its input and `stage.open_input` give the same fingerprint."""

    name = "prepare"
    reads = (STAGE,)


def find_files(places: Sequence[str], source: FileSource) -> list[str]:
    """Addresses of the files at `places` that the source may read: files, folders of them (as deep as they go), or a
    dataset on the hub.

    Raises:
        DataError: there is none.
    """
    found: list[str] = []
    for place in places:
        path = storage.address(place)
        if hub.is_address(place) and (hub.is_pinned(place) or not storage.exists(path)):
            found += hub.resolve(place, source.suffixes)
        elif storage.is_file(path):
            found.append(str(path if storage.is_object(path) else path.absolute()))
        elif storage.exists(path):
            inside = sorted(str(file) for file in _walk(path) if file.suffix.lower() in source.suffixes)
            if not inside:
                raise DataError(f"prepare.source={source.name} wants {_or(source.suffixes)} files; {place} has none.")
            found += inside
        else:
            raise DataError(
                f"There is nothing at {place}; give files ({_or(source.suffixes)}), a folder of them, or a dataset of "
                "the Hugging Face hub (owner/name)."
            )
    return list(dict.fromkeys(found))


def _walk(folder: Path) -> Iterator[Path]:
    for entry in storage.entries(folder):
        if entry.name[0] not in "._":
            yield from _walk(folder / entry.name) if entry.is_folder else [folder / entry.name]


def _or(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _stat(file: str) -> tuple[Any, ...]:
    """Size and time of change; nothing of what lies on the hub."""
    if hub.is_pinned(file):
        return ()
    path = storage.address(file)
    if storage.is_object(path):
        return (storage.sizes(path.parent).get(path.name, 0), storage.modified(path))
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class _Lister:
    """One pass over all records."""

    def __init__(self, files: Sequence[str], source: FileSource, config: PrepareConfig) -> None:
        self.files, self.source, self.config = files, source, config
        self._seen: dict[int, int] = {}
        """Hash of each record's `same` → the key that has it; −1: a record of `prepare.known`."""
        self._groups = PictureGroups()

    def parts(self, folder: Path) -> Iterator[pa.Table]:
        """Rows of `schema.RECORDS`, cut into parts."""
        for file in self.config.known:
            for _, record in read_rows(file, self.config.columns):
                same = self.source.outline(record, file).same
                if same is not None:
                    self._seen.setdefault(drawn(same), -1)
        num_bytes = sum(next(iter(_stat(file)), 1 << 30) for file in self.files)
        with sorting_room(folder) as scratch, SortedParts(scratch, schema.RECORDS, num_bytes=num_bytes) as parts:
            rows = itertools.islice(self._rows(), self.config.limit)
            while chunk := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
                routes = np.array([row.pop("route") for row in chunk], np.uint64)
                parts.add(pa.Table.from_pylist(chunk, schema=schema.RECORDS), routes)
            for part in parts.parts(self.config.rows_per_part):
                yield from _within(self._grouped(part), MAX_PART_BYTES)

    def close(self, num_rows: int, statuses: Counter[str]) -> Closing:
        """The pass is over."""
        if not num_rows:
            raise DataError(f"{', '.join(self.files)}: there are no records.")
        return Closing(statistics={"files": len(self.files), **self.source.account()})

    def _grouped(self, part: pa.Table) -> pa.Table:
        """With groups instead of pictures, now that all records have been seen."""
        groups = [self._groups.group(picture) for picture in part["group"].to_pylist()]
        column = part.column_names.index("group")
        return part.set_column(column, "group", pa.array(groups, pa.uint64()))

    def _rows(self) -> Iterator[dict[str, Any]]:
        checked: set[str] = set()

        def rows_of(file: str) -> Iterable[tuple[Place, Mapping[str, Any]]]:
            for place, record in read_rows(file, self.config.columns):
                if file not in checked and record:
                    require_fields(record, self.source.required, file, fitting(record))
                    checked.add(file)
                yield place, record

        for key, (file, place, record) in enumerate(self.source.records(self.files, rows_of)):
            try:
                yield self._row(key, file, place, record)
            except RecursionError:
                yield self._bad(key, file, place, "bad_record", "nested too deeply")

    def _row(self, key: int, file: str, place: Place | None, record: Mapping[str, Any]) -> dict[str, Any]:
        if not record:
            return self._bad(key, file, place, "bad_record", "no JSON object")
        outline = self.source.outline(record, file)
        meta = storable(_to_json(outline.about))
        if outline.status != schema.OK:
            return self._bad(key, file, place, outline.status, outline.detail, meta)
        if outline.same is not None:
            first = self._seen.setdefault(drawn(outline.same), key)
            if first != key:
                which = "a record of prepare.known" if first < 0 else f"record {first}"
                return self._bad(key, file, place, "duplicate", f"says the same as {which}", meta)
        is_long = place is not None and place[1] is not None and place[1] > MAX_COPIED_BYTES
        text = None if is_long else _as_json(record)
        if text is not None and len(text) > MAX_COPIED_BYTES and place is not None and _can_seek(file):
            text = None
        lies = {"record": text} if text is not None else {"file": file, "offset": place[0], "length": place[1]}  # type: ignore[index]
        in_order = self.source.keeps_order or (file.endswith(".parquet") and text is None)
        together = f"{key}" if outline.together is None else outline.together
        route = key << 20 if in_order else drawn(together)
        pictures = [drawn("picture", picture) for picture in outline.pictures]
        self._groups.join(pictures)
        group = pictures[0] if pictures else None
        return {"key": key, "status": schema.OK, "detail": None, **lies, "meta": meta, "group": group, "route": route}

    def _bad(
        self, key: int, file: str, place: Place | None, status: str, detail: str | None, meta: str = "{}"
    ) -> dict[str, Any]:
        where = {"file": file, "offset": place[0], "length": place[1]} if place else {"file": file}
        detail = None if detail is None else storable(detail)
        return {"key": key, "status": status, "detail": detail, **where, "meta": meta, "route": drawn(key)}


def _within(part: pa.Table, max_bytes: int) -> Iterator[pa.Table]:
    """The part, in pieces whose records have at most so many bytes together (a single one may have more)."""
    ends = np.cumsum(part["length"].fill_null(0).to_numpy())
    start = 0
    while start < part.num_rows:
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
        yield part.slice(start, end - start)
        start = end


def _plain(value: Any) -> str:
    """What JSON cannot say: dates, which Parquet may hold and no reader wants, become words; bytes stay away."""
    if isinstance(value, bytes):
        raise TypeError("bytes")
    return str(value)


_to_json = json.JSONEncoder(ensure_ascii=False, default=_plain).encode


def _as_json(record: Mapping[str, Any]) -> str | None:
    """None where there are bytes in it."""
    try:
        return storable(_to_json(record))
    except TypeError:
        return None


def _can_seek(file: str) -> bool:
    return file.endswith((".jsonl", ".ndjson", ".parquet"))
