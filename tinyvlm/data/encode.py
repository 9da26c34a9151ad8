"""The stage `encode`: one forward pass of the vision tower gives features for training and a placeholder test.

    448² JPEG ──▶ tower ─┬─ patches of the last hidden state ──block means──▶ features (K, D), half precision
                         └─ CLS of the same state ──cosine──▶ similarity to the nearest reference placeholder
                                                              at or above the threshold: status "placeholder.clip"
    sha256 ──────────────▶ the same picture behind many links:                         status "placeholder.repeated"

Features and CLS are taken before the final layer norm.  The similarity is stored on every row, so that another
threshold can be tried without encoding again.  Pooling is the model's own (`tinyvlm.model.modeling.pool_patches`):
cached and live features are the same numbers.

Shapes: N pictures, S side of the tower's input, P patches, K image tokens, D width of the tower, R references.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tinyvlm import config as settings_of
from tinyvlm import schema
from tinyvlm.data import towers
from tinyvlm.data.placeholder import DESIGNS, repeated_pictures
from tinyvlm.data.samples import rows_by_key, sheet_item
from tinyvlm.errors import ConfigError
from tinyvlm.folders import scan
from tinyvlm.images import ImageError, PictureConfig
from tinyvlm.stage import Stage
from tinyvlm.storage import address

if TYPE_CHECKING:
    from tinyvlm.data.clip import Tower
    from tinyvlm.recipes import Recipe

Dtype = Literal["float32", "bfloat16", "float16"]

IMPLAUSIBLE_SHARE = 0.15
"""More placeholders than this among pictures that arrived are more likely a wrong threshold."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Which tower, how many tokens for a picture, and what counts as a placeholder."""

    vision: str = "openai/clip-vit-large-patch14-336"
    """A CLIP checkpoint: local folder, hub id or toy:clip; a text tower in it is left out."""
    num_image_tokens: int = 64
    """Tokens that stand for one picture: a square number whose root divides the patch grid."""
    feature_width: int = 1024
    """Width of the tower's hidden states; it fixes the columns of the output, and is checked against the tower."""
    placeholder_threshold: float = 0.3
    """Cosine similarity to a reference from which a picture counts as a placeholder; above 1: none does."""
    references: tuple[str, ...] = tuple(DESIGNS)
    """Reference placeholders: names of drawn designs (placeholder.py) and picture files of one's own."""
    repeated_links: int = 0
    """A picture whose very bytes stand behind so many different links counts as a placeholder; 0: not looked at."""
    dtype: Dtype = "float16"
    """Precision of the tower; features are stored in half precision always."""
    batch_size: int = settings_of.speed(64)
    """Pictures in one forward pass."""

    def __post_init__(self) -> None:
        if not -1 <= self.placeholder_threshold <= 2:
            raise ConfigError(
                f"encode.placeholder_threshold is {self.placeholder_threshold}; a cosine lies in -1 to 1."
            )
        if self.batch_size < 1:
            raise ConfigError(f"encode.batch_size is {self.batch_size}; it must be at least 1.")
        if self.repeated_links < 0 or self.repeated_links == 1:
            raise ConfigError(f"encode.repeated_links is {self.repeated_links}; use 0 (off), or 2 and more.")
        if not self.references:
            raise ConfigError(f"encode.references is empty; name some of {', '.join(DESIGNS)}, or picture files.")


class Encode(Stage):
    """Features and placeholder similarity of finished pictures."""

    name = "encode"
    version = 2
    reads = ("preprocess",)

    def __init__(self, config: EncodeConfig, picture: PictureConfig) -> None:
        self.config, self.picture = config, picture
        self.settings = {"encode": config, "picture": picture}
        self.writes = schema.encoded(config.num_image_tokens, config.feature_width)
        self.bytes_per_row = 60_000 + 2 * config.num_image_tokens * config.feature_width

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Encode:
        """The stage with a recipe's settings."""
        return cls(recipe.encode, recipe.picture)

    def check(self) -> None:
        """The tower fits the settings, as far as can be known without loading it."""
        shape = towers.local_shape(self.config.vision, "encode.vision")
        if shape is not None:
            towers.check_size(shape, self.picture, "encode.vision")
            towers.check_width(shape, self.config.feature_width, "encode.vision")

    @cached_property
    def tower(self) -> Tower:
        """Loaded when the first rows come (so are torch and transformers)."""
        from tinyvlm.data.clip import Tower

        return Tower(self.config, self.picture)

    @cached_property
    def repeated(self) -> set[str]:
        """sha256 of the pictures that stand behind too many links of the whole input."""
        source = self.folders.get("preprocess")
        if not self.config.repeated_links or source is None:
            return set()
        return repeated_pictures(address(source), self.config.repeated_links)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("tower", "repeated")}

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map pictures to features; one that cannot be decoded any more says so."""
        size = self.config.batch_size
        parts = [self._encode(rows.slice(start, size)) for start in range(0, rows.num_rows, size)]
        return pa.concat_tables(parts).combine_chunks() if parts else self.writes.empty_table()

    def _encode(self, rows: pa.Table) -> pa.Table:
        from tinyvlm.data.clip import read_pixels

        pixels, problems = read_pixels(rows["image"].to_pylist(), self.picture)
        features, similarity, nearest = self.tower(pixels)
        judged = [
            self._judge(*each) for each in zip(problems, similarity, nearest, rows["sha256"].to_pylist(), strict=True)
        ]
        statuses = [status for status, _ in judged]
        columns = {
            **{name: rows[name] for name in ("key", "url", "caption", "meta", "image", "sha256")},
            "status": pa.array(statuses, pa.string()),
            "detail": pa.array([detail for _, detail in judged], pa.string()),
            "similarity": pa.array(similarity, mask=np.array([problem is not None for problem in problems])),
            "features": self._feature_column(features, [status != schema.OK for status in statuses]),
        }
        return pa.table([columns[name] for name in self.writes.names], schema=self.writes)

    def _judge(
        self, problem: ImageError | None, similarity: float, nearest: int, sha256: str | None
    ) -> tuple[str, str | None]:
        """Status and detail of one picture."""
        if problem:
            return problem.status, problem.detail
        if sha256 in self.repeated:
            return "placeholder.repeated", f"the same picture stands behind {self.config.repeated_links} links or more"
        if similarity >= self.config.placeholder_threshold:
            return "placeholder.clip", f"looks like the reference {self.config.references[nearest]!r}"
        return schema.OK, None

    def _feature_column(self, features: NDArray[np.float16], is_null: list[bool]) -> pa.Array:
        kind = self.writes.field("features").type
        flat = pa.array(features.reshape(-1))
        size = self.config.num_image_tokens * self.config.feature_width
        return pa.ExtensionArray.from_storage(
            kind, pa.FixedSizeListArray.from_arrays(flat, size, mask=pa.array(is_null))
        )

    def statistics(self, folder: Path) -> dict[str, Any]:
        """How similarities are spread, how many placeholders there are, and the pictures around the threshold."""
        table = pa.concat_tables([*scan(folder, ("key", "status", "detail", "similarity"))])
        measured = table.filter(pc.is_valid(table["similarity"]))
        similarity = measured["similarity"].to_numpy()
        num_dropped = int(pc.sum(pc.starts_with(table["status"], "placeholder.")).as_py() or 0)
        edges = np.linspace(-0.2, 1.0, 61)
        counts, _ = np.histogram(similarity.clip(edges[0], edges[-1]), edges)
        warnings = []
        if num_dropped > IMPLAUSIBLE_SHARE * max(1, len(similarity)):
            warnings.append(
                f"{num_dropped} of {len(similarity)} pictures count as placeholders, which is implausibly many: "
                "look at the review sheet and set encode.placeholder_threshold."
            )
        return {
            "placeholders": num_dropped,
            "placeholders_by_reason": dict(Counter(table["detail"].drop_null().to_pylist()).most_common()),
            "placeholder_threshold": self.config.placeholder_threshold,
            "warnings": warnings,
            "charts": [
                {
                    "kind": "histogram",
                    "title": f"Similarity to the nearest placeholder (threshold {self.config.placeholder_threshold:g})",
                    "edges": edges.round(3).tolist(),
                    "counts": counts.tolist(),
                    "x_label": "cosine of CLS",
                },
            ],
            "pictures": {
                "title": "Review: the nearest pictures on both sides of the threshold",
                "items": self._review(folder, measured),
            },
        }

    def _review(self, folder: Path, measured: pa.Table, each_side: int = 12) -> list[dict[str, str]]:
        """The pictures nearest to the threshold, the most placeholder-like first."""
        ordered = measured.sort_by([("similarity", "descending")])
        num_above = int(np.sum(ordered["similarity"].to_numpy() >= self.config.placeholder_threshold))
        chosen = ordered.slice(max(0, num_above - each_side), min(num_above, each_side) + each_side).to_pylist()
        rows = rows_by_key(folder, [row["key"] for row in chosen], ("image",))
        return [sheet_item(f"{row['similarity']:.3f} {row['status']}", rows[row["key"]]["image"]) for row in chosen]
