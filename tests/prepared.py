"""`prepare` run whole over given files, for the tests of its sources."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tiny_model import picture

from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_input import chosen, open_prepare
from tinyvlm.images import PictureConfig
from tinyvlm.stage_run import StageRun, run_local

SIZE = 32


def photo(number: int, kind: str = "JPEG") -> bytes:
    """A picture's file; equal numbers are equal bytes."""
    buffer = io.BytesIO()
    picture(number).resize((50, 40)).save(buffer, kind)
    return buffer.getvalue()


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON, one row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(places: Sequence[Path], root: Path, config: PrepareConfig) -> list[dict[str, Any]]:
    """The rows of the whole stage, in the order of their keys."""
    stage = Prepare(chosen(config, places), picture=PictureConfig(size=SIZE, tower_size=SIZE))
    run = StageRun(stage, open_prepare(stage, places, root), root)
    manifest = run_local(run)
    rows = [row for name in manifest.files for row in pq.read_table(run.folder / "data" / name).to_pylist()]
    return sorted(rows, key=lambda row: int(row["key"]))


def said(row: Mapping[str, Any]) -> list[tuple[str, list[str | int]]]:
    """A row's messages: (role, parts), a picture as its number."""
    return [
        (message["role"], [part["text"] if part["image"] is None else part["image"] for part in message["parts"]])
        for message in row["messages"]
    ]
