"""Stage `preprocess`: downloaded pictures → square JPEG pictures of one size.

    originals ─▶ decode ─▶ crop the centre, or pad with black ─▶ JPEG        (download.store=original)
    finished pictures ──────────── passed on as they are ─────────▶          (download.store=finished)

`sha256` stays that of the bytes as they came from the web, so that a picture is known by it in every stage.
"""

from __future__ import annotations

import base64
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tinyvlm import images, schema
from tinyvlm.errors import ConfigError
from tinyvlm.folders import Manifest, part_paths, read_rows, scan
from tinyvlm.stage import Stage
from tinyvlm.storage import address

if TYPE_CHECKING:
    from tinyvlm.recipes import Recipe

_log = logging.getLogger(__name__)

RATIO_EDGES = [round(0.05 * step, 2) for step in range(1, 21)]
"""Edges of the 19 bins of shorter/longer side; the rule's 0.6 is one of them."""
NUM_SAMPLES = 12
_CARRIED = ("key", "url", "caption", "meta", "sha256", "phash", "final_url")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What comes out, and what is refused."""

    picture: images.PictureConfig = field(default_factory=images.PictureConfig)
    limits: images.LimitConfig = field(default_factory=images.LimitConfig)


class Preprocess(Stage):
    """Makes each picture square."""

    name = "preprocess"
    version = 2
    reads = ("download",)
    writes = schema.PREPROCESSED

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.settings = {"picture": config.picture.stored, "limits": config.limits}
        self.bytes_per_row = config.picture.size**2 // 4
        self._finished: bool | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Preprocess:
        """The stage with a recipe's settings."""
        return cls(PreprocessConfig(picture=recipe.picture, limits=recipe.limits))

    def check(self) -> None:
        """Refuses finished pictures of other settings: they cannot be undone."""
        wanted, stored = self.config.picture.stored, self._stored()
        for name in stored:
            if stored[name] != wanted.get(name):
                raise ConfigError(
                    f"preprocess wants picture.{name}={wanted.get(name)}, but download stored finished pictures with "
                    f"{stored[name]}; download again, or with --set download.store=original."
                )

    def __call__(self, rows: pa.Table) -> pa.Table:
        images.quiet_pillow()
        if self._finished is None:
            self._finished = bool(self._stored())
        outcomes = [self._outcome(row) for row in rows.select(["image", "width", "height", "final_url"]).to_pylist()]
        columns: dict[str, Any] = {name: rows[name] for name in _CARRIED}
        columns |= {"original_width": rows["width"], "original_height": rows["height"]}
        for index, name in enumerate(("status", "detail", "image", "fit")):
            columns[name] = [outcome[index] for outcome in outcomes]
        return pa.table({name: columns[name] for name in self.writes.names}, schema=self.writes)

    def statistics(self, folder: Path) -> dict[str, Any]:
        """How many were cropped and padded, their shapes, and some to look at."""
        fits: Counter[str] = Counter()
        counts = np.zeros(len(RATIO_EDGES) - 1, np.int64)
        for table in scan(folder, ["fit", "original_width", "original_height"], only_ok=True):
            fits.update(table["fit"].to_pylist())
            sides = np.stack([table["original_width"].to_numpy(), table["original_height"].to_numpy()])
            ratios = sides.min(axis=0) / sides.max(axis=0)
            counts += np.histogram(np.clip(ratios, RATIO_EDGES[0], 1.0), bins=RATIO_EDGES)[0]
        threshold = self.config.picture.crop_ratio
        return {
            "cropped": fits["crop"],
            "padded": fits["pad"],
            "charts": [
                {
                    "kind": "bar",
                    "title": "How pictures became square",
                    "labels": ["centre cropped", "padded with black"],
                    "values": [fits["crop"], fits["pad"]],
                },
                {
                    "kind": "histogram",
                    "title": f"Shorter ÷ longer side; cropped from {threshold:g} upwards, padded below",
                    "edges": RATIO_EDGES,
                    "counts": counts.tolist(),
                    "x_label": "shorter ÷ longer side",
                },
            ],
            "pictures": {"title": "Finished pictures", "items": _samples(folder)},
        }

    def _stored(self) -> dict[str, Any]:
        """The picture settings with which `download` finished its pictures; empty when it kept originals."""
        if "download" not in self.folders:
            return {}
        made: dict[str, Any] = Manifest.read(address(self.folders["download"])).settings.get("picture", {})
        return made

    def _outcome(self, row: dict[str, Any]) -> tuple[str, str | None, bytes | None, images.Fit | None]:
        """status, detail, picture, fit."""
        picture = self.config.picture
        try:
            if self._finished:
                return schema.OK, None, row["image"], images.fit_of(row["width"], row["height"], picture)
            square, fit = images.square(images.decode(row["image"], self.config.limits), picture)
            return schema.OK, None, images.to_jpeg(square, picture.jpeg_quality), fit
        except images.ImageError as error:
            return error.status, error.detail[:200], None, None
        except Exception as error:  # a bug of ours, or no memory: costs a row, not the run
            _log.exception("cannot preprocess %s", row["final_url"])
            return "internal_error", f"{type(error).__name__}: {error}"[:200], None, None


def _samples(folder: Path) -> list[dict[str, str]]:
    """About a dozen finished pictures, from parts all over the folder."""
    paths = part_paths(folder)
    num_chosen = min(NUM_SAMPLES, len(paths))
    chosen = [paths[index * len(paths) // num_chosen] for index in range(num_chosen)]
    each = -(-NUM_SAMPLES // max(1, num_chosen))
    items: list[dict[str, str]] = []
    for path in chosen:
        # Images lie in one column chunk for each row group: a small slice reads no more than that.
        rows = read_rows(str(path), 0, 8 * NUM_SAMPLES, ["status", "fit", "image", "original_width", "original_height"])
        usable = [row for row in rows.to_pylist() if row["status"] == schema.OK]
        for row in usable[:each]:
            caption = f"{row['original_width']}×{row['original_height']} {row['fit']}"
            items.append({"caption": caption, "jpeg_base64": base64.b64encode(row["image"]).decode()})
    return items[:NUM_SAMPLES]
