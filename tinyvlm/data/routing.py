"""Which links are downloaded together: all of a host in one place, all copies of a link in one part.

    links ──count rows of each host──▶ giants
    links ──route: hash of the host; for a giant, hash of the link──▶ sorted by route on disk ──▶ cut into parts

So what is known of a host (its pace, its name lookup, that it is dead) is known where its links are, and the same link
is asked for once.  A giant, a host with more rows than a quarter of a part, is spread over all parts and workers, which
share its budget (see fetch.py).  Sorting goes through files, so a list of any length fits into memory.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tinyvlm import storage
from tinyvlm.data.sites import NO_HOST, hosts_of

Hashes = NDArray[np.uint64]

_COUNTERS = 1 << 22
"""Hosts are counted by hash; two that share a counter may make a giant too many, which costs nothing but its place."""
_BYTES_PER_BUCKET = 32 << 20
"""A bucket is sorted in memory, and takes a few times this."""
_MAX_BUCKETS = 256
"""Files that are open at a time while sorting."""
_WAITING_BYTES = 32 << 20
_MOST_TIMES = 4
"""A part has at most so many times its usual rows: a link with more copies is asked for once in each of its parts."""


def hashes_of(texts: pa.Array) -> Hashes:
    """64 bits of BLAKE2b of each text; equal texts are hashed once."""
    coded = texts.dictionary_encode()
    each = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in coded.dictionary.to_pylist()]
    found: Hashes = np.frombuffer(b"".join(each), ">u8").astype(np.uint64)
    places: NDArray[np.int64] = coded.indices.to_numpy()
    return found[places]


class Router:
    """First `count` all links, then ask for `routes`."""

    def __init__(self, rows_per_part: int) -> None:
        self.num_rows = 0
        self.giants: set[str] = set()
        """Names of the giants among the links that were routed."""
        self._most = max(1, rows_per_part // 4)
        self._counts = np.zeros(_COUNTERS, np.int64)

    def count(self, urls: pa.ChunkedArray) -> None:
        """Take some links into account."""
        self.num_rows += len(urls)
        places = (hashes_of(hosts_of(urls)) % _COUNTERS).astype(np.int64)
        self._counts += np.bincount(places, minlength=_COUNTERS)

    def routes(self, rows: pa.Table) -> Hashes:
        """A number for each row of `schema.LINKS`; rows with the same number should stay together."""
        hosts = hosts_of(rows["url"])
        routes = hashes_of(hosts)
        nowhere = pc.equal(hosts, NO_HOST).to_numpy(zero_copy_only=False)
        routes[nowhere] = hashes_of(rows["key"].combine_chunks().filter(pa.array(nowhere)).cast(pa.string()))
        is_giant = (self._counts[(routes % _COUNTERS).astype(np.int64)] > self._most) & ~nowhere
        if is_giant.any():
            mask = pa.array(is_giant)
            self.giants |= set(pc.unique(hosts.filter(mask)).to_pylist())
            routes[is_giant] = hashes_of(pc.utf8_trim_whitespace(rows["url"].filter(mask)).combine_chunks())
        return routes


@contextmanager
def sorting_room(folder: Path) -> Iterator[Path]:
    """A place on a disk for `SortedParts` that is gone afterwards: where the folder lies, if it lies on a disk."""
    if storage.is_object(folder):
        with tempfile.TemporaryDirectory(prefix="tinyvlm-sorting-") as scratch:
            yield Path(scratch) / "sorting"
    else:
        storage.remove_tree(folder / ".sorting.tmp")  # of somebody who was killed
        yield folder / ".sorting.tmp"
        storage.remove_tree(folder / ".sorting.tmp")


class SortedParts:
    """Sorts rows by route through files in `folder`, and cuts them into parts.  Use as a context manager."""

    def __init__(self, folder: Path, schema: pa.Schema, *, num_bytes: int) -> None:
        """`num_bytes`: about how large all rows are; it decides through how many files they go, and nothing else."""
        self.folder, self.schema = folder, schema.append(pa.field("route", pa.uint64()))
        self._num_buckets = min(_MAX_BUCKETS, -(-max(1, num_bytes) // _BYTES_PER_BUCKET))
        self._files: dict[int, Any] = {}
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        folder.mkdir(parents=True)

    def __enter__(self) -> SortedParts:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._files.values():
            writer.close()

    def add(self, rows: pa.Table, routes: Hashes) -> None:
        """Some more rows of the schema, each with its route."""
        self._waiting.append(rows.append_column("route", pa.array(routes)))
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes >= _WAITING_BYTES:
            self._spill()

    def parts(self, rows_per_part: int) -> Iterator[pa.Table]:
        """Tables of about `rows_per_part` rows, all rows of a route in the same one, inside a table sorted by key."""
        self._spill()
        for writer in self._files.values():
            writer.close()
        rest = self.schema.empty_table()
        for bucket in sorted(self._files):
            with pa.OSFile(str(self._path(bucket))) as file:
                rows = pa.ipc.open_file(file).read_all()
            rows = rows.sort_by([("route", "ascending"), ("key", "ascending")])
            rest = pa.concat_tables([rest, rows]).combine_chunks()
            routes = rest["route"].to_numpy()
            start = 0
            while len(routes) - start >= rows_per_part:
                end = int(np.searchsorted(routes, routes[start + rows_per_part - 1], side="right"))
                end = min(end, start + _MOST_TIMES * rows_per_part)
                yield self._part(rest.slice(start, end - start))
                start = end
            rest = rest.slice(start)
        if rest.num_rows:
            yield self._part(rest)

    def _part(self, rows: pa.Table) -> pa.Table:
        return rows.drop_columns(["route"]).sort_by("key").combine_chunks()

    def _spill(self) -> None:
        """Write the waiting rows to the files of their buckets, which are ranges of routes."""
        if not self._waiting:
            return
        rows = pa.concat_tables(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        # Buckets in the order of routes: the high bits decide.
        buckets = (rows["route"].to_numpy() >> np.uint64(32)) * np.uint64(self._num_buckets) >> np.uint64(32)
        order = np.argsort(buckets, kind="stable")
        numbers, starts = np.unique(buckets[order], return_index=True)
        rows = rows.take(pa.array(order))
        for number, start, end in zip(numbers.tolist(), starts, [*starts[1:], rows.num_rows], strict=True):
            if number not in self._files:
                self._files[number] = pa.ipc.new_file(str(self._path(number)), self.schema)
            self._files[number].write_table(rows.slice(start, end - start).combine_chunks())

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:03d}.arrow"
