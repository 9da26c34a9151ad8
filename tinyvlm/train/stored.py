"""Features that the stage `encode` has stored, instead of pictures that a frozen tower encodes again.

    encode folder ──sha256, status, encoder──▶ an index in memory: picture → file, row group, row
                  ──features of a row group──▶ the last few groups are kept; conversations lie in the order of pictures,
                                               so the window of a lane meets the same groups again and again

Half precision loses what `LOSS_TOLERANCE` states; eight bits lose more (encode's statistics say how much).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tinyvlm import schema
from tinyvlm.data.feature_store import unpack
from tinyvlm.data.towers import encoder_fingerprint
from tinyvlm.errors import DataError
from tinyvlm.folders import part_paths
from tinyvlm.images import PictureConfig
from tinyvlm.train.features import Cache

Features = npt.NDArray[np.float32]

LOSS_TOLERANCE = 1e-3
"""A step's loss from features in half precision is that of live pictures within this share."""


class _Place(NamedTuple):
    file: int
    group: int
    row: int


class StoredFeatures:
    """Features of pictures by their sha256.

    Args:
        folders: of the stage `encode`.
        encoder: `encoder_fingerprint` of the model's own tower.
        cache_bytes: budget for row groups of features.

    Raises:
        DataError: other weights or another preprocessing made them.
    """

    def __init__(self, folders: Sequence[Path], encoder: str, cache_bytes: int) -> None:
        self.folders = list(folders)
        self._files = [path for folder in folders for path in part_paths(folder)]
        self._groups: Cache[dict[int, Features]] = Cache(cache_bytes)
        self._lock = threading.Lock()
        self._index: dict[bytes, _Place] = {}
        for number, path in enumerate(self._files):
            self._read_index(number, path, encoder)

    def _read_index(self, number: int, path: Path, encoder: str) -> None:
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                rows = file.read_row_group(group, columns=["sha256", "status", "encoder"]).to_pylist()
                for row, line in enumerate(rows):
                    if line["status"] != schema.OK or not line["sha256"]:
                        continue
                    if line["encoder"] != encoder:
                        raise DataError(
                            f"{path} holds features of the encoder {line['encoder']}, but the model's tower is "
                            f"{encoder}: other weights or another preprocessing; run `encode` with this tower."
                        )
                    self._index[bytes.fromhex(line["sha256"])] = _Place(number, group, row)

    def __len__(self) -> int:
        return len(self._index)

    def of(self, digests: Sequence[str]) -> Features:
        """(N,K,D) of pictures.

        Raises:
            DataError: a picture was not encoded.
        """
        return np.stack([self._one(digest) for digest in digests])

    def _one(self, digest: str) -> Features:
        place = self._index.get(bytes.fromhex(digest)) if len(digest) == 64 else None
        if place is None:
            folders = ", ".join(map(str, self.folders))
            raise DataError(
                f"The picture {digest} of a conversation has no features in {folders}; encode the folder that "
                "`prepare` has read, or set features='live'."
            )
        with self._lock:
            rows = self._groups.get((place.file, place.group))
            if rows is None:
                rows = self._read_group(place)
        return rows[place.row]

    def _read_group(self, place: _Place) -> dict[int, Features]:
        with pq.ParquetFile(self._files[place.file]) as file:
            names = [name for name in ("features", "feature_scale") if name in file.schema_arrow.names]
            table = file.read_row_group(place.group, columns=names)
        has = table["features"].is_valid().to_numpy()
        values = unpack(table.filter(has))
        rows = dict(zip(np.flatnonzero(has).tolist(), values, strict=True))
        self._groups.put((place.file, place.group), rows, values.nbytes)
        return rows


def open_features(
    folders: Sequence[str], model: Any, picture: PictureConfig, num_image_tokens: int, cache_bytes: int
) -> StoredFeatures:
    """The features of encode folders, if the model's tower would make the same."""
    encoder = encoder_fingerprint(model.vision.state_dict(), picture, num_image_tokens)
    return StoredFeatures(list(map(Path, folders)), encoder, cache_bytes)
