"""A few rows with their pictures out of a large stage folder, for what people look at."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyvlm.folders import part_paths
from tinyvlm.storage import readable

_ROWS_AT_A_TIME = 64


class Place(NamedTuple):
    """Where a row lies: the position of its part among `part_paths`, and its number in that part."""

    part: int
    row: int


class Draw:
    """Keeps `number` rows of each kind, drawn by a hash of their keys: from all over a folder, every time the same."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._kept: dict[str, list[tuple[int, Place]]] = {}

    def add(self, part: int, keys: pa.ChunkedArray, kinds: pa.ChunkedArray, rows: npt.NDArray[np.int64]) -> None:
        """Rows of a part: their keys, the name of each one's kind, and their numbers in the part."""
        if not len(keys):
            return
        named = kinds.combine_chunks().dictionary_encode()
        codes, luck = named.indices.to_numpy(), _mixed(keys.to_numpy())
        order = np.lexsort((luck, codes))
        firsts = np.searchsorted(codes[order], np.arange(len(named.dictionary)))
        for name, first, after in zip(named.dictionary.to_pylist(), firsts, [*firsts[1:], len(order)], strict=True):
            best = order[first : min(after, first + self.number)]
            kept = self._kept.setdefault(name, [])
            kept += [(int(luck[place]), Place(part, int(rows[place]))) for place in best]
            kept.sort()
            del kept[self.number :]

    @property
    def places(self) -> dict[str, list[Place]]:
        """Kind → the rows drawn of it, by the kinds' names."""
        return {name: [place for _, place in self._kept[name]] for name in sorted(self._kept)}

    def mixed(self, number: int) -> list[Place]:
        """At most `number` rows: the first of each kind, then the second of each, and so on."""
        rounds = chain.from_iterable(zip_longest(*self.places.values()))
        return [place for place in rounds if place is not None][:number]


def kinds_of(table: pa.Table, columns: Sequence[str]) -> pa.ChunkedArray:
    """The name of each row's kind: what the columns say, with blanks between."""
    texts = [pc.fill_null(table[name], "") for name in columns]
    return pc.binary_join_element_wise(*texts, " ")


def _mixed(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Numbers without any order, one for each key (the last step of SplitMix64; Steele, Lea & Flood, 2014)."""
    mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def rows_at(paths: Sequence[Path], places: Iterable[Place], columns: Sequence[str]) -> dict[Place, dict[str, Any]]:
    """The rows at these places; of each row group that has some of them, what comes before the last one is read.

    Columns that a file does not have are left out.
    """
    found: dict[Place, dict[str, Any]] = {}
    wanted: dict[int, set[int]] = {}
    for place in places:
        wanted.setdefault(place.part, set()).add(place.row)
    for part, rows in sorted(wanted.items()):
        with pq.ParquetFile(readable(paths[part]), pre_buffer=False, buffer_size=1 << 20) as file:
            known = [name for name in columns if name in file.schema_arrow.names]
            start = 0
            for group in range(file.metadata.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                inside = sorted(row for row in rows if start <= row < end)
                for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=known) if inside else ():
                    here = [row for row in inside if start <= row < start + batch.num_rows]
                    for row in here:
                        found[Place(part, row)] = batch.slice(row - start, 1).to_pylist()[0]
                    start += batch.num_rows
                    if start > inside[-1]:
                        break
                start = end
    return found


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
