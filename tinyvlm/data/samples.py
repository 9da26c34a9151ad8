"""A few rows with their pictures out of a large stage folder, for the sheets that people look at."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tinyvlm.folders import part_paths
from tinyvlm.storage import readable


def rows_by_key(folder: Path, keys: Iterable[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The rows of a stage folder with these keys; only row groups whose range of keys fits are read."""
    wanted = set(keys)
    found: dict[int, dict[str, Any]] = {}
    for path in part_paths(folder):
        if len(found) == len(wanted):
            break
        filters = [("key", "in", sorted(wanted - set(found)))]
        for row in pq.read_table(readable(path), columns=["key", *columns], filters=filters).to_pylist():
            found[int(row["key"])] = row
    return found


def sheet_item(caption: str, jpeg: bytes | None) -> dict[str, str]:
    """One picture of a "pictures" chart; without a picture the caption stands alone."""
    return {"caption": caption, "jpeg_base64": base64.b64encode(jpeg).decode() if jpeg else ""}
