"""The verdict by similarity, which can be given again with another threshold: on rows that are encoded already too.

status by cheap signs ─┐
similarity, reference ─┴─judge(threshold)──▶ status, detail       while encoding, and over a finished folder
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tinyvlm import schema
from tinyvlm.errors import StageError
from tinyvlm.folders import part_paths, read_rows
from tinyvlm.storage import readable


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
        self.folder, self._paths = folder, part_paths(folder)
        keys = [pq.read_table(readable(path), columns=["key"])["key"].to_numpy() for path in self._paths]
        parts = np.repeat(np.arange(len(keys)), [len(some) for some in keys])
        all_keys = np.concatenate([np.empty(0, np.int64), *keys])
        order = np.argsort(all_keys)
        self._keys, self._parts = all_keys[order], parts[order]

    def like(self, keys: Sequence[int]) -> pa.Table:
        """The rows with these keys, which lie in one part; it may hold more, if some were taken down in between.

        Raises:
            StageError: there are none.
        """
        place = int(np.searchsorted(self._keys, keys[0]))
        if place < len(self._keys) and self._keys[place] == keys[0]:
            found = read_rows(str(self._paths[self._parts[place]]), 0, 10**9)
            places = {key: number for number, key in enumerate(found["key"].to_pylist())}
            if places.keys() >= set(keys):
                return found.take([places[key] for key in keys])
        raise StageError(f"{self.folder} does not hold the rows that it was made of; remove it and encode again.")
