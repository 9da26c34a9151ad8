"""Conversations on disk → lengths for the plan, samples for the loop.

    data/part-*.parquet ──measure──▶ one row of lengths for each conversation   (texts only, no picture is read)
                        ──Conversations.load(pack)──▶ samples, through the processor

Row groups are read whole and a window of them is kept, each picture once however many rows show it; encoded samples
are remembered up to a budget, tokens by conversation and pictures by content, so that a small data set is read and
decoded once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyvlm import schema
from tinyvlm.data.conversations import messages_of
from tinyvlm.errors import DataError, InputError
from tinyvlm.folders import part_paths
from tinyvlm.images import ImageError
from tinyvlm.model.processing import Sample, TinyVLMProcessor
from tinyvlm.train.features import Cache
from tinyvlm.train.plan import LENGTHS, Item, Pack
from tinyvlm.train.reading import READ_COLUMNS, Place, Window, group_bytes
from tinyvlm.train.stored import StoredFeatures

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)

_DIGESTS, _BYTES = READ_COLUMNS[2:]
"""Reading the first of these leaves alone counts a conversation's pictures without reading them."""


def data_files(folders: Iterable[Path]) -> list[Path]:
    """The data files of `prepare` folders, in order; their positions are the `part` of a plan."""
    return [path for folder in folders for path in part_paths(folder)]


def measure(files: Mapping[int, Path], processor: TinyVLMProcessor) -> pa.Table:
    """Lengths (`plan.LENGTHS`) of all training and validation conversations; of unusable ones, the reason.

    Args:
        files: data files by their number among all.

    Raises:
        DataError: a file cannot be read.
    """
    tables = [LENGTHS.empty_table()]
    for part, path in files.items():
        try:
            tables += _measure_file(path, part, processor)
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"{path} cannot be read as conversations ({error}); run `prepare` again.") from None
    return pa.concat_tables(tables)


def _measure_file(path: Path, part: int, processor: TinyVLMProcessor) -> Iterator[pa.Table]:
    file = pq.ParquetFile(path)
    for group in range(file.metadata.num_row_groups):
        rows = file.read_row_group(group, columns=["key", "status", "source", "family", "split", "messages", _DIGESTS])
        rows = rows.append_column("row", pa.array(range(len(rows)), pa.int32()))
        rows = rows.filter(pc.is_in(rows["split"], pa.array(["train", "validation"])))
        pictures = pc.fill_null(pc.list_value_length(rows["images"]), 0).to_pylist()
        statuses, tokens, supervised = [], [], []
        for status, messages, number in zip(
            rows["status"].to_pylist(), rows["messages"].to_pylist(), pictures, strict=True
        ):
            if status == schema.OK:
                status, num_tokens, num_supervised = _measure_row(messages, number, processor)
            else:
                num_tokens = num_supervised = 0
            statuses.append(status)
            tokens.append(num_tokens)
            supervised.append(num_supervised)
        columns = {
            "key": rows["key"],
            "part": np.full(len(rows), part, np.int32),
            "group": np.full(len(rows), group, np.int32),
            "row": rows["row"],
            "source": pc.fill_null(rows["source"], "").dictionary_encode(),
            "family": pc.fill_null(rows["family"], "").dictionary_encode(),
            "split": rows["split"].dictionary_encode(),
            "status": pa.array(statuses, pa.string()).dictionary_encode(),
            "tokens": pa.array(tokens, pa.int32()),
            "pictures": pa.array(pictures, pa.int32()),
            "supervised": pa.array(supervised, pa.int32()),
        }
        yield pa.table(columns, schema=LENGTHS)


def _measure_row(messages: Any, num_pictures: int, processor: TinyVLMProcessor) -> tuple[str, int, int]:
    try:
        ids, supervised = processor.tokens(messages_of(messages or []), num_pictures)
    except InputError:
        return "bad_text", 0, 0
    learned = int(supervised[1:].sum())
    return (schema.OK if learned else "bad_text"), len(ids), learned


@dataclass(frozen=True)
class SampleOfFeatures(Sample):
    """A conversation whose pictures are there as stored features; it has no pixels."""

    features: npt.NDArray[np.float32]
    """(N,K,Dv)"""


class _TakenDownError(Exception):
    """The row has lost its content since the plan was made (takedown.py)."""


class Conversations:
    """Reads samples by their place.

    Args:
        files: as `data_files` gives them.
        window: which row groups to keep in memory.
        cache_bytes: budget for encoded samples.
        skip_bad_pictures: leave out a conversation with a picture that cannot be decoded, and say so.
        stored: where features of pictures lie that stand for the pictures themselves.
    """

    def __init__(
        self,
        files: Sequence[Path],
        processor: TinyVLMProcessor,
        *,
        window: Window,
        cache_bytes: int,
        skip_bad_pictures: bool = False,
        stored: StoredFeatures | None = None,
    ) -> None:
        self.files, self.processor, self._stored = list(files), processor, stored
        self._skip_bad_pictures, self._told = skip_bad_pictures, set[tuple[int, int, int]]()
        self._window = window
        self._kept: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._groups: dict[Place, pa.Table] = {}
        self._step = self._held_bytes = 0
        self._texts: Cache[tuple[Ids, Flags, list[str]]] = Cache(cache_bytes // 4)
        self._pictures: Cache[Pixels] = Cache(cache_bytes - cache_bytes // 4)
        self._lock = threading.Lock()
        self.groups_read = 0
        """Row groups read so far, repeats included."""
        self.bytes_read = 0
        """Of them, as they lie on disk."""
        self.peak_bytes = 0
        """Most memory that the window of row groups has taken."""

    def account(self) -> dict[str, int]:
        """What this worker has read so far, and the most memory that its window took."""
        return {"groups_read": self.groups_read, "bytes_read": self.bytes_read, "window_bytes": self.peak_bytes}

    def load(self, pack: Pack, step: int | None) -> list[Sample]:
        """The samples of a pack.  May be called from several threads.

        Args:
            step: of the plan; None for held-out conversations, whose rows are remembered as they are: they lie one
                here and one there, and come again and again.

        Raises:
            DataError: a picture cannot be decoded, with the conversation's key and file; a file cannot be read.
        """
        with self._lock:
            if step is not None:
                self._step = step
            else:
                self._kept.update({_place(item): self._row(item) for item in pack if _place(item) not in self._kept})
            return [sample for item in pack if (sample := self._sample_or_none(item)) is not None]

    def _sample_or_none(self, item: Item) -> Sample | None:
        try:
            return self._sample(item)
        except _TakenDownError:
            self._warn_once(item, f"Conversation {item.key} of {self.files[item.part]} was taken down")
            return None
        except ImageError as error:
            where = f"A picture of conversation {item.key} in {self.files[item.part]} cannot be decoded ({error})"
            if not self._skip_bad_pictures:
                said = f"{where}; run `prepare` again, or set on_bad_picture=skip to go on without it."
                raise DataError(said) from None
            self._warn_once(item, where)
            return None

    def _warn_once(self, item: Item, what: str) -> None:
        if _place(item) not in self._told:
            self._told.add(_place(item))
            log.warning("%s; going on without it", what)

    def _sample(self, item: Item) -> Sample:
        text = self._texts.get(_place(item))
        if text is None:
            return self._read(item)
        ids, supervised, digests = text
        if self._stored is not None:
            return self._of_features(ids, supervised, digests)
        pictures = [picture for digest in digests if (picture := self._pictures.get(digest)) is not None]
        return self._read(item) if len(pictures) < len(digests) else self._join(ids, supervised, pictures)

    def _join(self, ids: Ids, supervised: Flags, pictures: Sequence[Pixels]) -> Sample:
        return Sample(ids, supervised, np.stack(pictures) if pictures else self.processor.pixels([]))

    def _of_features(self, ids: Ids, supervised: Flags, digests: Sequence[str]) -> Sample:
        nothing = self.processor.pixels([])
        if self._stored is None or not digests:
            return Sample(ids, supervised, nothing)
        return SampleOfFeatures(ids, supervised, nothing, self._stored.of(digests))

    def _read(self, item: Item) -> Sample:
        row = self._kept.get(_place(item)) or self._row(item)
        if row["messages"] is None:
            raise _TakenDownError
        messages, images = messages_of(row["messages"]), row["images"] or []
        ids, supervised = self.processor.tokens(messages, len(images))
        digests = [image["sha256"] or f"{_place(item)}/{number}" for number, image in enumerate(images)]
        self._texts.put(_place(item), (ids, supervised, digests), ids.nbytes + supervised.nbytes + 500)
        if self._stored is not None:
            return self._of_features(ids, supervised, digests)
        each = [self._decode(digest, image["bytes"]) for digest, image in zip(digests, images, strict=True)]
        return self._join(ids, supervised, each)

    def _row(self, item: Item) -> dict[str, Any]:
        row: dict[str, Any] = self._group(item.part, item.group).slice(item.row, 1).to_pylist()[0]
        if row["key"] != item.key:
            raise DataError(f"{self.files[item.part]} has changed since the plan was made; delete this run, repeat it.")
        return row

    def _decode(self, digest: str, data: bytes) -> Pixels:
        pixels = self._pictures.get(digest)
        if pixels is None:
            pixels = self.processor.pixels([data])[0]
            self._pictures.put(digest, pixels, pixels.nbytes + 200)
        return pixels

    def _group(self, part: int, group: int) -> pa.Table:
        place = (part, group)
        if place in self._groups:
            return self._groups[place]
        for gone in self._window.enter(place, self._step):
            self._held_bytes -= self._groups.pop(gone).nbytes
        # As a dictionary, a picture that several rows show is in memory once.
        try:
            with pq.ParquetFile(self.files[part], read_dictionary=[_BYTES]) as file:
                table = file.read_row_group(group, columns=list(READ_COLUMNS), use_threads=False)
                self.bytes_read += group_bytes(file.metadata.row_group(group))
        except (OSError, pa.ArrowException) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            where = f"Row group {group} of {self.files[part]}"
            raise DataError(f"{where} cannot be read ({said}); run `prepare` again.") from None
        self.groups_read += 1
        self._groups[place] = table
        self._held_bytes += table.nbytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        return table


def _place(item: Item) -> tuple[int, int, int]:
    """What tells a conversation from all others: its key does so in its folder only."""
    return item.part, item.group, item.row
