"""Small stages that tests run: an input of numbers, and stages that keep, bend or break the contract."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import config, schema
from tinyvlm.errors import ConfigError
from tinyvlm.folders import Manifest, close_folder, describe_part, point_latest, read_rows
from tinyvlm.stage import Stage, open_input
from tinyvlm.stage_run import StageRun, run_local

NUMBERS = pa.schema(
    [
        pa.field("key", pa.int64(), False),
        pa.field("status", pa.string(), False),
        pa.field("detail", pa.string()),
        pa.field("value", pa.int64()),
        pa.field("milliseconds", pa.float64(), metadata=schema.MEASURED),
    ]
)


def write_numbers(root: Path, num_parts: int = 4, rows_per_part: int = 5, first_value: int = 0) -> Path:
    """A finished folder of the stage `numbers`; every fifth row was rejected there."""
    folder = root / "numbers-000000000000"
    files: dict[str, Any] = {}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for index in range(num_parts):
        keys = list(range(index * rows_per_part, (index + 1) * rows_per_part))
        table = pa.table(
            {
                "key": keys,
                "status": ["timeout.read" if key % 5 == 4 else "ok" for key in keys],
                "detail": [None] * len(keys),
                "value": [first_value + key for key in keys],
                "milliseconds": [time.time()] * len(keys),
            },
            schema=NUMBERS,
        )
        path = folder / "data" / f"part-{index:05d}.parquet"
        pq.write_table(table, path)
        files[path.name] = describe_part(path)
    num_rows = num_parts * rows_per_part
    manifest = Manifest("numbers", 1, "0" * 64, {}, {}, num_rows, num_rows, {}, files, 0.0, "", "", None)
    close_folder(folder, manifest, {"stage": "numbers"})
    point_latest(root, "numbers", folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class DoubleConfig:
    factor: int = 2
    part_seconds: float = config.speed(0.0)
    fault: str = ""
    """What goes wrong, and `fault_key` where; with `once` (a file) only until that file exists."""
    fault_key: int = -1
    once: str = config.speed("")


class Double(Stage):
    """value → factor × value; even results are ok, values over 1000 are `too_large`."""

    name = "double"
    reads = ("numbers",)
    writes = NUMBERS
    bytes_per_row = 10

    def __init__(self, settings: DoubleConfig) -> None:
        self.settings = settings

    def check(self) -> None:
        if self.settings.fault == "check":
            raise ConfigError("double.fault wants something that works, but got 'check'; choose another.")

    def __call__(self, rows: pa.Table) -> pa.Table:
        time.sleep(self.settings.part_seconds)
        self._fault(rows)
        values = [self.settings.factor * value for value in rows["value"].to_pylist()]
        out = pa.table(
            {
                "key": rows["key"],
                "status": ["too_large" if value > 1000 else "ok" for value in values],
                "detail": [None] * len(values),
                "value": values,
                "milliseconds": [time.time()] * len(values),
            },
            schema=self.writes,
        )
        return self._bend(out) if self.settings.fault_key in rows["key"].to_pylist() else out

    def statistics(self, folder: Path) -> dict[str, Any]:
        return {"charts": [{"kind": "bar", "title": "<toy>", "labels": ["a"], "values": [1]}]}

    def _fault(self, rows: pa.Table) -> None:
        once = self.settings.once
        if self.settings.fault_key not in rows["key"].to_pylist() or (once and Path(once).exists()):
            return
        if once:
            Path(once).touch()
        if self.settings.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.settings.fault == "raise":
            raise RuntimeError("the toy broke\nand said more")

    def _bend(self, out: pa.Table) -> pa.Table:
        fault = self.settings.fault
        if fault == "lose":
            return out.slice(1)
        if fault == "invent":
            return out.set_column(0, NUMBERS.field("key"), pa.array([*out["key"].to_pylist()[:-1], 999]))
        if fault == "repeat":
            return pa.concat_tables([out, out.slice(0, 1)])
        if fault == "move":
            return out.take(list(reversed(range(out.num_rows))))
        if fault == "status":
            return out.set_column(1, NUMBERS.field("status"), pa.array(["splendid"] * out.num_rows))
        if fault == "empty":
            return out.set_column(1, NUMBERS.field("status"), pa.array([None] * out.num_rows, pa.string()))
        if fault == "columns":
            return out.drop_columns(["value"])
        if fault == "type":
            return out.set_column(3, "value", out["value"].cast(pa.float64()))
        return out


class Spread(Double):
    """Two rows for each row: a stage that fans out."""

    name = "spread"
    fan_out = True
    writes = NUMBERS.insert(3, pa.field("source_key", pa.int64()))

    def __call__(self, rows: pa.Table) -> pa.Table:
        source = [key for key in rows["key"].to_pylist() for _ in range(2)]
        if self.settings.fault == "lose":
            source = source[2:]
        step = 0 if self.settings.fault == "repeat" else 2
        keys = [step * key + index % 2 for index, key in enumerate(source)]
        keys = [index for index in range(len(source))] if self.settings.fault == "across" else keys
        columns = {"key": keys, "status": ["ok"] * len(source), "source_key": source}
        rest = {name: [None] * len(source) for name in ("detail", "value", "milliseconds")}
        return pa.table({name: {**columns, **rest}[name] for name in self.writes.names}, schema=self.writes)


def start(root: Path, stage: Stage, output: Path | None = None) -> StageRun:
    """A run of `stage` on the numbers in `root`."""
    return StageRun(stage, open_input(stage, [root]), output or root)


def rows_of(run: StageRun) -> list[dict[str, Any]]:
    """All rows of a folder by key, without the measured columns."""
    tables = [read_rows(str(path), 0, 10**9) for path in sorted((run.folder / "data").glob("*.parquet"))]
    table = pa.concat_tables(tables).drop_columns(sorted(schema.measured_columns(run.stage.writes)))
    return sorted(table.to_pylist(), key=lambda row: row["key"])


def main(root: str, part_seconds: str) -> None:
    """What a test kills in the middle."""
    run_local(start(Path(root), Double(DoubleConfig(part_seconds=float(part_seconds)))))
