"""The verdict by similarity, which can be given again with another threshold: on rows that are encoded already too.

status by cheap signs ─┐
similarity, reference ─┴─judge(threshold)──▶ status, detail       while encoding, and over a finished folder
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tinyvlm import schema
from tinyvlm.errors import StageError
from tinyvlm.folders import part_paths, read_rows


def judge(
    statuses: Sequence[str],
    details: Sequence[str | None],
    similarity: NDArray[np.float32],
    references: Sequence[str | None],
    threshold: float,
) -> tuple[pa.Array, pa.Array]:
    """Status and detail of rows; one that is neither usable nor judged by similarity stays what it is."""
    new_statuses, new_details = list(statuses), list(details)
    is_like = np.nan_to_num(similarity, nan=-2.0) >= np.float32(threshold)
    for index, status in enumerate(statuses):
        if status in (schema.OK, "placeholder.clip"):
            like = bool(is_like[index])
            new_statuses[index] = "placeholder.clip" if like else schema.OK
            new_details[index] = f"looks like the reference {references[index]!r}" if like else None
    return pa.array(new_statuses, pa.string()), pa.array(new_details, pa.string())


class EarlierRows:
    """Rows of a finished encode folder, found by the keys of the part that they were made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        firsts = [(read_rows(str(path), 0, 1, ["key"])["key"].to_pylist(), path) for path in part_paths(folder)]
        self._parts = {keys[0]: path for keys, path in firsts if keys}

    def like(self, keys: Sequence[int]) -> pa.Table:
        """The part with these keys.

        Raises:
            StageError: there is none.
        """
        path = self._parts.get(keys[0])
        found = None if path is None else read_rows(str(path), 0, len(keys))
        if found is None or found["key"].to_pylist() != list(keys):
            raise StageError(f"{self.folder} does not hold the rows that it was made of; remove it and encode again.")
        return found
