"""Outcomes of a part that is not finished yet, kept as they come: so a crash costs little, however long a part takes.

    rows ─▶ outcomes, a few at a time ─▶ data/.part-00007.journal/<name>.arrow   (each whole or not there)
                                                    │ all there
                               data/part-00007.parquet ◀─┘  then the journal is removed

Only stages whose rows cost more than computing (a request to somebody's server) keep one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from tinyvlm import storage

SUFFIX = ".journal"


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

    def remove(self) -> None:
        """The part is finished."""
        with suppress(OSError):  # `clean` comes after us
            storage.remove_tree(self.folder)
