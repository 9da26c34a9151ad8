"""Outcomes of a part that is not finished yet, kept as they come: so a crash costs little, however long a part takes.

    rows ─▶ outcomes, a few at a time ─▶ data/.part-00007.journal/<name>.arrow   (each whole or not there)
                                                    │ all there
                               data/part-00007.parquet ◀─┘  then the journal is removed

Only stages whose rows cost more than computing (a request to somebody's server) keep one.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from tinyvlm import storage

SUFFIX = ".journal"


class Outlook:
    """How far the parts of a folder are that have journals; each of their files is looked at once."""

    def __init__(self, data: Path) -> None:
        self._data, self._seen = data, dict[str, Counter[str]]()

    def __call__(self) -> dict[int, Counter[str]]:
        """Index of each part in work → its kept outcomes by status; none on an object store, slow to list."""
        found: dict[int, Counter[str]] = {}
        if storage.is_object(self._data):
            return found
        for entry in storage.entries(self._data):
            if entry.is_folder and entry.name.endswith(SUFFIX):
                part = int(entry.name.removeprefix(".part-").split(".")[0])
                counts = found.setdefault(part, Counter())
                for name in storage.sizes(self._data / entry.name):
                    if name.endswith(".arrow"):
                        counts.update(self._seen.get(name) or self._look(self._data / entry.name / name))
        return found

    def _look(self, path: Path) -> Counter[str]:
        with suppress(OSError, pa.ArrowInvalid), pa.memory_map(str(path)) as file:  # or removed since
            table = pa.ipc.open_file(file).read_all()  # mapped: the pictures are not read
            counts = Counter(table["status"].to_pylist())
            self._seen[path.name] = counts
            return counts
        return Counter()


class Journal:
    """The journal of one part: a folder of small Arrow files, each whole or not there."""

    def __init__(self, folder: Path, schema: pa.Schema, may_write: Callable[[], None] = lambda: None) -> None:
        """`may_write` raises when this worker must not write any more (see lease.py)."""
        self.folder, self.schema, self._may_write = folder, schema, may_write

    def read(self) -> pa.Table:
        """What earlier tries kept, each key once, in no particular order; damaged files count as not there."""
        tables = [self.schema.empty_table()]
        for name in storage.sizes(self.folder):
            if not name.endswith(".arrow"):
                continue
            try:
                table = pa.ipc.open_file(pa.py_buffer(storage.read(self.folder / name))).read_all()
            except (OSError, pa.ArrowInvalid):
                continue
            if table.schema.equals(self.schema):
                tables.append(table)
        rows = pa.concat_tables(tables)
        # Two workers may have done the same row (one was thought dead): either outcome is as good.
        places = pa.table({"key": rows["key"], "place": pa.array(range(rows.num_rows), pa.int64())})
        return rows.take(places.group_by("key").aggregate([("place", "min")])["place_min"])

    def append(self, rows: pa.Table) -> None:
        """Keep some outcomes.  Not flushed to disk: a killed process loses nothing, a lost machine may."""
        if not rows.num_rows:
            return
        content = pa.BufferOutputStream()
        with pa.ipc.new_file(content, self.schema) as writer:
            writer.write_table(rows)
        with storage.draft(self.folder / f"{uuid.uuid4().hex}.arrow", sync=False) as draft:
            draft.write(content.getvalue())
            self._may_write()
            draft.publish()

    def forget(self, statuses: Collection[str]) -> None:
        """Let go of the rows with these statuses, so that they are done again."""
        rows, names = self.read(), list(storage.sizes(self.folder))
        self.append(rows.filter(pc.invert(pc.is_in(rows["status"], pa.array(statuses, pa.string())))))
        for name in names:
            storage.remove(self.folder / name)

    def remove(self) -> None:
        """The part is finished."""
        with suppress(OSError):  # `clean` comes after us
            storage.remove_tree(self.folder)
