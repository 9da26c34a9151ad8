"""The stage `explore`: what is in the pictures, by zero-shot labels.  A leaf of the line: nothing reads it but people.

labels/{name}.json ──descriptions──▶ text tower ──┐
448² JPEG ──────────────────────▶ vision tower ──┴─ softmax(scale · cosine) ──▶ best label, category, confidence
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tinyvlm import config as settings_of
from tinyvlm import schema
from tinyvlm.data import towers
from tinyvlm.data.encode import Dtype
from tinyvlm.data.samples import rows_by_key, sheet_item
from tinyvlm.errors import ConfigError
from tinyvlm.folders import scan
from tinyvlm.images import PictureConfig
from tinyvlm.labels import Label, load_labels
from tinyvlm.stage import Stage
from tinyvlm.storage import address

if TYPE_CHECKING:
    from tinyvlm.data.clip import Labeller
    from tinyvlm.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Which CLIP, and which labels it chooses from."""

    model: str = "openai/clip-vit-large-patch14-336"
    """A CLIP checkpoint with both towers: local folder, hub id or toy:clip."""
    labels: str = "base"
    """Name of a packaged label file (base, toy) or the path of one's own."""
    template: str = "a photo of {description}"
    """What the text tower reads for a label; `{label}`, `{description}` and `{category}` are filled in."""
    low_confidence: float = 0.2
    """Below this share of the softmax a label counts as a guess in the statistics."""
    dtype: Dtype = "float16"
    """Precision of both towers."""
    batch_size: int = settings_of.speed(64)
    """Pictures in one forward pass."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"explore.batch_size is {self.batch_size}; it must be at least 1.")
        try:
            self.text_of(Label("label", "description", "category"))
        except (KeyError, IndexError, ValueError):
            raise ConfigError(
                f"explore.template is {self.template!r}; it may use {{label}}, {{description}} and {{category}}."
            ) from None

    def text_of(self, label: Label) -> str:
        """What the text tower reads for a label."""
        return self.template.format(label=label.name, description=label.description, category=label.category)


class Explore(Stage):
    """The best label of each picture."""

    name = "explore"
    version = 2
    reads = ("preprocess",)
    writes = schema.EXPLORED

    def __init__(self, config: ExploreConfig, picture: PictureConfig) -> None:
        self.config, self.picture = config, picture
        label_file = load_labels(config.labels)
        self.labels = label_file.labels
        self.settings = {"explore": config, "picture": picture, "label_file": label_file.fingerprint}

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Explore:
        """The stage with a recipe's settings."""
        return cls(recipe.explore, recipe.picture)

    def check(self) -> None:
        """The towers fit the settings, as far as can be known without loading them."""
        shape = towers.local_shape(self.config.model, "explore.model")
        if shape is not None:
            towers.check_size(shape, self.picture, "explore.model")

    @cached_property
    def labeller(self) -> Labeller:
        """Loaded when the first rows come (so are torch and transformers)."""
        from tinyvlm.data.clip import Labeller

        return Labeller(self.config, self.picture, [self.config.text_of(label) for label in self.labels])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "labeller"}

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map pictures to labels; a picture that cannot be decoded any more says so and shifts no other's label."""
        size = self.config.batch_size
        parts = [self._label(rows.slice(start, size)) for start in range(0, rows.num_rows, size)]
        return pa.concat_tables(parts).combine_chunks() if parts else self.writes.empty_table()

    def _label(self, rows: pa.Table) -> pa.Table:
        from tinyvlm.data.clip import read_pixels

        pixels, problems = read_pixels(rows["image"].to_pylist(), self.picture)
        best, confidence = self.labeller(pixels)
        chosen = [None if problem else self.labels[index] for problem, index in zip(problems, best, strict=True)]
        columns = {
            "key": rows["key"],
            "status": [problem.status if problem else schema.OK for problem in problems],
            "detail": [problem.detail if problem else None for problem in problems],
            "label": [label.name if label else None for label in chosen],
            "category": [label.category if label else None for label in chosen],
            "confidence": pa.array(confidence, mask=np.array([problem is not None for problem in problems])),
        }
        return pa.table(columns, schema=self.writes)

    def statistics(self, folder: Path) -> dict[str, Any]:
        """The thirty commonest labels, categories, how sure the labels are, and pictures with their labels."""
        table = pa.concat_tables([*scan(folder, ("key", "label", "category", "confidence"), only_ok=True)])
        labels, categories = Counter(table["label"].to_pylist()), Counter(table["category"].to_pylist())
        confidence = table["confidence"].to_numpy()
        edges = np.linspace(0, 1, 21)
        return {
            "labels_seen": len(labels),
            "labels_offered": len(self.labels),
            "categories": dict(categories.most_common()),
            "low_confidence_share": round(float(np.mean(confidence < self.config.low_confidence)), 4)
            if len(table)
            else 0.0,
            "mean_confidence": round(float(confidence.mean()), 4) if len(table) else 0.0,
            "charts": [
                _bars("The thirty commonest labels", labels.most_common(30)),
                _bars("Categories", categories.most_common()),
                {
                    "kind": "histogram",
                    "title": "Confidence of the label",
                    "edges": edges.round(2).tolist(),
                    "counts": np.histogram(confidence.clip(0, 1), edges)[0].tolist(),
                    "x_label": "share of the softmax",
                },
            ],
            "pictures": {"title": "Pictures and their labels", "items": self._sheet(table)},
        }

    def _sheet(self, table: pa.Table, num_pictures: int = 24) -> list[dict[str, str]]:
        """Pictures evenly spread over the data; they are fetched from the stage that was read."""
        places = np.linspace(0, max(0, table.num_rows - 1), min(num_pictures, table.num_rows)).astype(int)
        chosen = table.take(places).to_pylist()
        source = self.folders.get("preprocess")
        rows = rows_by_key(address(source), [row["key"] for row in chosen], ("image",)) if source else {}
        return [
            sheet_item(f"{row['label']} {row['confidence']:.2f}", rows.get(row["key"], {}).get("image"))
            for row in chosen
        ]


def _bars(title: str, counted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    return {
        "kind": "bar",
        "title": title,
        "labels": [name for name, _ in counted],
        "values": [number for _, number in counted],
    }
