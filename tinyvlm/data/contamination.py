"""Pictures of evaluation sets, so that nothing is trained on them.

    places with evaluation pictures ─one pass─▶ {root}/evaluation-{fingerprint}/: sha256 and perceptual hash of each
                                                     └─ prepare sets equal and near ones aside

Sources: GPT-3 and later reports remove overlaps by content; smollm's m4 hashes its test pictures
(`create_set_hashes_test_images.py`).  Bytes find copies, the perceptual hash finds resized and recompressed ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tinyvlm import config as settings
from tinyvlm import images, schema
from tinyvlm.data.decoding import Decoded
from tinyvlm.data.listing import Closing, Listing, cut, make_folder
from tinyvlm.data.pictures import PicturesConfig, find_sources, listed
from tinyvlm.data.preprocess import Preprocess, PreprocessConfig
from tinyvlm.folders import is_finished, scan

STAGE = "evaluation"
VERSION = 1
SIMILAR_BITS = 4
"""Hashes that differ in no more of their 64 bits count as of the same picture; copies differ in a few, strangers in
about 32 (`images.perceptual_hash`)."""
_ROWS_AT_A_TIME = 256

SEEN = pa.schema(
    [
        *(schema.PICTURES.field(name) for name in ("key", "status", "detail")),
        pa.field("name", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.uint64()),
    ]
)
"""Rows of an `evaluation` folder."""


@dataclass(frozen=True)
class Evaluated:
    """What is known of the evaluation's pictures."""

    names: dict[str, str] = field(default_factory=dict)
    """sha256 → the picture's name."""
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    hash_names: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Evaluated:
        """From the folder that `open_evaluation` made."""
        names: dict[str, str] = {}
        hashes: dict[int, str] = {}
        for table in scan(folder, ["name", "sha256", "phash"]):
            for name, sha256, phash in zip(*(table[column].to_pylist() for column in table.column_names), strict=True):
                if sha256:
                    names.setdefault(sha256, name)
                if phash:  # a flat picture's 0 says nothing
                    hashes.setdefault(phash, name)
        return cls(names, np.array(list(hashes), np.uint64), tuple(hashes.values()))

    def find(self, shown: Sequence[Decoded]) -> tuple[str, str] | None:
        """Status and detail when one of the pictures is in an evaluation set."""
        for image in shown:
            if image.sha256 in self.names:
                return "contaminated.same", f"the picture of {self.names[image.sha256]}"
        if len(self.hashes):
            for image in shown:
                if image.phash:
                    distances = np.bitwise_count(self.hashes ^ np.uint64(image.phash))
                    nearest = int(distances.argmin())
                    if distances[nearest] <= SIMILAR_BITS:
                        said = f"{int(distances[nearest])} of 64 bits from {self.hash_names[nearest]}"
                        return "contaminated.similar", said
        return None


def open_evaluation(
    places: Sequence[str], picture: images.PictureConfig, limits: images.LimitConfig, root: Path
) -> tuple[Path, str]:
    """The folder with the hashes of all pictures at `places`, made under `root` unless it is there; its fingerprint.

    Raises:
        DataError: a place has no pictures or cannot be read.
    """
    given = [source for place in places for source in find_sources(place, PicturesConfig(), root)]
    fingerprint = settings.fingerprint([STAGE, VERSION, limits, [source.identity for source in given]])
    listing = Listing(
        name=STAGE, version=VERSION, fingerprint=fingerprint, settings=PicturesConfig(), inputs=[s.name for s in given]
    )
    folder = listing.folder(root)
    if not is_finished(folder):

        def close(num_rows: int, statuses: Counter[str]) -> Closing:
            return Closing(statistics={"statuses": dict(statuses)})

        hashing = Preprocess(PreprocessConfig(picture=picture, limits=limits))
        try:
            rows = _hashed(hashing, listed(given, PicturesConfig(rows_per_part=_ROWS_AT_A_TIME)))
            make_folder(listing, root, cut(rows, 100_000), close)
        finally:
            hashing.close()
    return folder, fingerprint


def _hashed(hashing: Preprocess, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    for rows in tables:
        done = hashing(rows)
        columns: dict[str, Any] = {name: done[name] for name in ("key", "status", "detail")}
        columns |= {"name": rows["url"], "sha256": done["sha256"], "phash": done["phash"]}
        yield pa.table(columns, schema=SEEN)
