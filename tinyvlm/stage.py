"""The stage contract: rows to rows, one input folder, one output folder.

The unit of work is a `Stage`: a light, picklable object that maps a table to a table and does not know who runs it.
`stage_run.run_local` runs it in this process; `ray_jobs/_run_stage.py` runs the same `StageRun` over Ray Data.  What
lies in a folder, and how one is found, is in folders.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tinyvlm import config as settings
from tinyvlm import schema, storage
from tinyvlm.errors import StageError
from tinyvlm.folders import Input, Manifest, Part, find_folder
from tinyvlm.journal import Journal


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
    parts_at_once: int = 1
    """Parts that one worker has in hand at the same time, each in a thread of its own."""
    num_workers: int = 1
    """Workers that carry the stage out together; filled in by what runs it."""
    pointer: str = ""
    """What `latest/` calls the folder; "" means the stage's name."""
    writing: Mapping[str, Any] = {}
    """More options for pyarrow's `write_table`."""
    bytes_per_row: int = 20_000
    """Rough size of an output row, for the check of free disk before the start."""
    folders: Mapping[str, str] = {}
    """Where each folder that the stage reads is; filled in by `StageRun`."""
    folder: Path | None = None
    """Where the output goes; filled in by `StageRun`."""

    def check(self) -> None:
        """Raise a TinyVLMError when the stage cannot work here; called before anything is written."""

    def select(self, rows: pa.Table) -> pa.Table:
        """The rows of a stage folder that this stage maps; those that earlier stages rejected stay behind."""
        return rows.filter(pc.equal(rows["status"], schema.OK))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map rows to outcome rows; never raises for a bad row."""
        raise NotImplementedError

    def map_part(self, rows: pa.Table, journal: Journal | None) -> pa.Table:
        """`__call__` on the rows of a part; outcomes may be kept in `journal`, and found there after a crash."""
        return self(rows)

    def close(self) -> None:
        """Let go of what the first call made: threads, sockets, processes.  The stage may be called again."""

    def row_groups(self, rows: pa.Table) -> list[int]:
        """How many rows each row group of a finished part gets; [] means all of the usual size."""
        return []

    def statistics(self, folder: Path) -> dict[str, Any]:
        """Numbers and charts for stats.json and report.html, from the finished parts of `folder`."""
        return {}


def open_input(stage: Stage, inputs: Sequence[Path]) -> Input:
    """Resolve the folders that a stage reads, and cut the first one into parts (one for each of its files)."""
    folders = {name: find_folder(inputs, name, stage.name).absolute() for name in stage.reads}
    manifests = {name: Manifest.read(folder) for name, folder in folders.items()}
    first = stage.reads[0]
    parts = []
    sizes = storage.sizes(folders[first] / "data")
    for index, (name, entry) in enumerate(sorted(manifests[first].files.items())):
        path = folders[first] / "data" / name
        if sizes.get(name) != entry["bytes"]:
            raise StageError(
                f"{stage.name} reads {path}, which is missing or not as {first!r} left it; "
                f"remove {folders[first]} and run `python -m ray_jobs.{first}` again."
            )
        parts.append(Part(index, str(path), 0, int(entry["rows"])))
    identity = {name: manifest.identity for name, manifest in manifests.items()}
    return Input(tuple(parts), settings.fingerprint(identity), {n: str(f) for n, f in folders.items()}, is_stage=True)
