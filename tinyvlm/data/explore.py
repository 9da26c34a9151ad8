"""The stage `explore`: what is in the pictures, by zero-shot labels.  A leaf of the line: nothing reads it but people.

labels/{name}.json ──name: description──▶ text tower, once ──┐
448² JPEG ─────────────────────────────▶ vision tower ───────┴─ softmax(scale · cosine) ──▶ label, confidence, top k
                                                                                            └─▶ _Survey ──▶ report
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

NUM_COMMON = 30
"""Labels in the chart and the table."""
NUM_SHOWN, NUM_EXAMPLES, NUM_UNSURE = 12, 4, 12
"""On the sheet: pictures of each of the commonest labels, and those whose label is least sure."""


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Which CLIP, and which labels it chooses from."""

    model: str = "openai/clip-vit-large-patch14-336"
    """A CLIP checkpoint with both towers: local folder, hub id or toy:clip."""
    labels: str = "base"
    """Name of a packaged label file (base, toy) or the path of one's own."""
    template: str = "a photo of {label}: {description}"
    """What the text tower reads for a label; `{label}`, `{description}` and `{category}` are filled in."""
    top_k: int = 5
    """How many of the likeliest labels a row keeps."""
    low_confidence: float = 0.2
    """Below this share of the softmax a label counts as a guess in the statistics."""
    dtype: Dtype = "float16"
    """Precision of both towers."""
    batch_size: int = settings_of.speed(64)
    """Pictures in one forward pass."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"explore.{name} is {getattr(self, name)}; it must be at least 1.")
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
    """The likeliest labels of each picture."""

    name = "explore"
    version = 3
    reads = ("preprocess",)
    writes = schema.EXPLORED

    def __init__(self, config: ExploreConfig, picture: PictureConfig) -> None:
        self.config, self.picture = config, picture
        label_file = load_labels(config.labels)
        self.labels, self.label_version = label_file.labels, label_file.version
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
        likeliest, shares = self.labeller(pixels, self.config.top_k)
        # Every picture, readable or not, has its place in these lists: nothing is left out, so nothing can shift.
        top = [
            None if problem else [(self.labels[index], share) for index, share in zip(indices, row, strict=True)]
            for problem, indices, row in zip(problems, likeliest.tolist(), shares.tolist(), strict=True)
        ]
        columns = {
            "key": rows["key"],
            "status": [problem.status if problem else schema.OK for problem in problems],
            "detail": [problem.detail if problem else None for problem in problems],
            "label": [likely[0][0].name if likely else None for likely in top],
            "category": [likely[0][0].category if likely else None for likely in top],
            "confidence": [likely[0][1] if likely else None for likely in top],
            "top": [[(label.name, share) for label, share in likely] if likely else None for likely in top],
        }
        return pa.table(columns, schema=self.writes)

    def statistics(self, folder: Path) -> dict[str, Any]:
        """The commonest labels, categories, how sure the labels are, and pictures to judge them by."""
        survey = _Survey(self.config.low_confidence)
        for table in scan(folder, ("key", "label", "category", "confidence"), only_ok=True):
            survey.add(table)
        category_of = {label.name: label.category for label in self.labels}
        categories = Counter[str]()
        for name, number in survey.labels.items():
            categories[category_of[name]] += number
        common = survey.common()
        return {
            "label_file": f"{self.config.labels}, version {self.label_version}",
            "labels_offered": len(self.labels),
            "labels_seen": len(survey.labels),
            "mean_confidence": round(sum(survey.confidence.values()) / (survey.num_rows or 1), 4),
            "low_confidence_share": round(survey.num_low / (survey.num_rows or 1), 4),
            "categories": dict(categories.most_common()),
            "commonest_labels": [
                {
                    "label": name,
                    "category": category_of[name],
                    "pictures": number,
                    "share": round(number / survey.num_rows, 4),
                    "mean_confidence": round(survey.confidence[name] / number, 4),
                }
                for name, number in common
            ],
            "charts": [
                _bars("The thirty commonest labels", common),
                _bars("Categories", categories.most_common()),
                {
                    "kind": "histogram",
                    "title": "Confidence of the label",
                    "edges": _EDGES.round(2).tolist(),
                    "counts": survey.histogram.tolist(),
                    "x_label": "share of the softmax",
                },
            ],
            "pictures": {
                "title": f"Some pictures of each of the {NUM_SHOWN} commonest labels; then those least sure of theirs",
                "items": self._sheet(survey),
            },
        }

    def _sheet(self, survey: _Survey) -> list[dict[str, str]]:
        """Pictures grouped by label; they are fetched from the stage that was read."""
        chosen = [
            (f"{name} {confidence:.2f}", key)
            for name, _ in survey.common()[:NUM_SHOWN]
            for _, key, confidence in survey.examples[name]
        ]
        chosen += [(f"least sure: {name} {confidence:.2f}", key) for confidence, key, name in survey.unsure]
        source = self.folders.get("preprocess")
        rows = rows_by_key(address(source), [key for _, key in chosen], ("image",)) if source else {}
        return [sheet_item(caption, rows.get(key, {}).get("image")) for caption, key in chosen]


_EDGES = np.linspace(0, 1, 21)


class _Survey:
    """Labelled rows, added up part by part; what it holds grows with the number of labels, not with that of rows."""

    def __init__(self, low_confidence: float) -> None:
        self.low_confidence = low_confidence
        self.num_rows = self.num_low = 0
        self.labels = Counter[str]()
        """Pictures by label."""
        self.confidence = Counter[str]()
        """Sum of the confidences by label."""
        self.histogram = np.zeros(len(_EDGES) - 1, np.int64)
        self.examples: dict[str, list[tuple[int, int, float]]] = {}
        """By label: draw, key and confidence of the pictures that were drawn."""
        self.unsure: list[tuple[float, int, str]] = []
        """Confidence, key and label of the least sure."""

    def add(self, table: pa.Table) -> None:
        """Columns key, label and confidence."""
        keys, confidence = table["key"].to_numpy(), table["confidence"].to_numpy()
        encoded = table["label"].combine_chunks().dictionary_encode()
        codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        self.num_rows += table.num_rows
        self.num_low += int((confidence < self.low_confidence).sum())
        self.histogram += np.histogram(confidence.clip(0, 1), _EDGES)[0]
        numbers = np.bincount(codes, minlength=len(names))
        sums = np.bincount(codes, weights=confidence, minlength=len(names))
        # Lots are drawn by a hash of the key: neither the first nor the surest are favoured, and however the rows are
        # cut into parts, the same ones win.  The multiplier is 2^64 over the golden ratio (Knuth, TAOCP 6.4).
        draws = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        order, ends = np.lexsort((draws, codes)), np.cumsum(numbers)
        for name, number, total, end in zip(names, numbers.tolist(), sums.tolist(), ends.tolist(), strict=True):
            self.labels[name] += number
            self.confidence[name] += total
            won = order[end - number : end][:NUM_EXAMPLES]
            drawn = zip(draws[won].tolist(), keys[won].tolist(), confidence[won].tolist(), strict=True)
            self.examples[name] = sorted([*self.examples.get(name, ()), *drawn])[:NUM_EXAMPLES]
        least = np.lexsort((keys, confidence))[:NUM_UNSURE]
        found = [(confidence[at].item(), keys[at].item(), names[codes[at]]) for at in least]
        self.unsure = sorted([*self.unsure, *found])[:NUM_UNSURE]

    def common(self) -> list[tuple[str, int]]:
        """The commonest labels and their numbers; names decide between equals."""
        return sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))[:NUM_COMMON]


def _bars(title: str, counted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    return {
        "kind": "bar",
        "title": title,
        "labels": [name for name, _ in counted],
        "values": [number for _, number in counted],
    }
