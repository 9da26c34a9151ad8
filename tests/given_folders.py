"""Finished stage folders with given rows, for tests of the stage that reads them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import schema
from tinyvlm.folders import Input, Part
from tinyvlm.stage import Stage
from tinyvlm.stage_run import StageRun, run_local


class Given(Stage):
    """A stage whose rows are given."""

    reads, settings = ("nothing",), "given"

    def __init__(self, name: str, writes: pa.Schema) -> None:
        self.name, self.writes = name, writes

    def __call__(self, rows: pa.Table) -> pa.Table:
        return rows


def preprocessed(images: list[bytes]) -> pa.Table:
    rows = [
        {"key": key, "status": "ok", "url": f"http://x/{key}", "meta": "{}", "image": data, "sha256": str(key)}
        for key, data in enumerate(images)
    ]
    return pa.Table.from_pylist(rows, schema=schema.PREPROCESSED)


def preprocess_folder(rows: pa.Table, root: Path, num_parts: int = 2) -> Path:
    """`root`, with a finished folder of the stage `preprocess` that holds `rows`."""
    return given_folder("preprocess", rows, root, num_parts)


def given_folder(name: str, rows: pa.Table, root: Path, num_parts: int = 2) -> Path:
    """`root`, with a finished folder of the stage `name` that holds `rows`."""
    stage = Given(name, rows.schema)
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{name}.parquet"
    pq.write_table(rows, path)
    size = -(-rows.num_rows // num_parts)
    cut = [Part(i, str(path), i * size, min(size, rows.num_rows - i * size)) for i in range(num_parts)]
    run_local(StageRun(stage, Input(tuple(cut), "rows", {}, is_stage=False), root))
    return root
