"""What people look at after `encode`: how similarities are spread, how well the threshold tells, pictures around it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tinyvlm import storage
from tinyvlm.data.calibrate import Calibration
from tinyvlm.data.samples import rows_by_key, sheet_item
from tinyvlm.errors import StageError
from tinyvlm.folders import scan
from tinyvlm.schema import OK, TAKEN_DOWN

CALIBRATION_FILE = "calibration.json"

IMPLAUSIBLE_SHARE = 0.15
"""More placeholders than this among pictures that arrived are more likely a wrong threshold."""
EACH_SIDE = 12
"""Pictures of the review sheet on each side of the threshold."""

_EDGES = np.linspace(-0.2, 1.0, 61)


def read_calibration(folders: Sequence[Path]) -> Calibration | None:
    """The first of the folders' calibrations."""
    for folder in folders:
        if storage.is_file(folder / CALIBRATION_FILE):
            return Calibration(**json.loads(storage.read(folder / CALIBRATION_FILE)))
    return None


def statistics(
    folder: Path, threshold: float, calibration: Calibration | None, *, is_measured: bool, is_packed: bool
) -> dict[str, Any]:
    """Numbers, charts and the review sheet of an encode folder, in one pass over its light columns.

    `is_measured`: the threshold comes from the calibration.  `is_packed`: features are stored in eight bits.

    Raises:
        StageError: the rows were encoded with different weights.
    """
    seen = _Seen(threshold)
    columns = (
        "key",
        "status",
        "detail",
        "sha256",
        "similarity",
        "encoder",
        *(("feature_error", "feature_cosine") if is_packed else ()),
    )
    for rows in scan(folder, columns):
        seen.add(rows)
    if len(seen.encoders) > 1:
        raise StageError(
            f"{folder} holds features of several encoders ({', '.join(sorted(seen.encoders))}): the weights changed "
            "while it was made; remove it and encode again."
        )
    counts = seen.histogram
    return {
        "placeholders": seen.num_placeholders,
        "placeholders_by_reason": dict(seen.reasons.most_common()),
        "placeholder_threshold": threshold,
        "threshold_from": "calibration" if is_measured else "settings",
        **_calibration(calibration, threshold),
        "encoder": next(iter(seen.encoders), None),
        **seen.storage(),
        "warnings": _warnings(seen, threshold, calibration),
        "charts": [
            {
                "kind": "histogram",
                "title": f"Similarity to the nearest placeholder (threshold {threshold:g})",
                "edges": _EDGES.round(3).tolist(),
                "counts": counts.tolist(),
                "x_label": "cosine of CLS",
                "mark": {"x": threshold, "label": "threshold"},
            },
            *([_calibration_chart(calibration, counts, threshold)] if calibration else []),
        ],
        "pictures": {
            "title": "Review: the nearest pictures on both sides of the threshold",
            "items": _review(folder, seen.around),
        },
    }


class _Seen:
    """What is counted while the parts go by."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.reasons: Counter[str] = Counter()
        self.encoders: set[str] = set()
        self.num_placeholders = self.num_measured = self.num_like = 0
        self.histogram: NDArray[np.int64] = np.zeros(len(_EDGES) - 1, np.int64)
        self.around: list[dict[str, Any]] = []
        """The rows nearest to the threshold among those that it decides about, the most placeholder-like first."""
        self._losses: list[tuple[float, ...]] = []

    def add(self, rows: pa.Table) -> None:
        """Count one part."""
        is_placeholder = pc.starts_with(rows["status"], "placeholder.")
        self.num_placeholders += int(pc.sum(is_placeholder).as_py() or 0)
        self.reasons.update(rows["detail"].filter(pc.not_equal(rows["status"], TAKEN_DOWN)).drop_null().to_pylist())
        self.encoders.update(pc.unique(rows["encoder"].drop_null()).to_pylist())
        measured = rows.filter(pc.is_valid(rows["similarity"]))
        similarity = measured["similarity"].to_numpy()
        self.num_measured += len(similarity)
        self.num_like += int(np.sum(similarity >= np.float32(self.threshold)))
        self.histogram += np.histogram(similarity.clip(_EDGES[0], _EDGES[-1]), _EDGES)[0]
        is_open = pc.is_in(measured["status"], pa.array([OK, "placeholder.clip"]))
        self._keep_nearest(measured.select(["key", "status", "sha256", "similarity"]).filter(is_open))
        if "feature_error" in rows.column_names and measured.num_rows:
            error, cosine = measured["feature_error"].to_numpy(), measured["feature_cosine"].to_numpy()
            losses = (float(value) for value in (error.sum(), error.max(), cosine.sum(), cosine.min()))
            self._losses.append((*losses, len(error)))

    def storage(self) -> dict[str, Any]:
        """What eight bits lose; nothing is said of half precision."""
        if not self._losses:
            return {}
        total = sum(number for *_, number in self._losses)
        return {
            "feature_storage_error": {
                "relative L2, mean": round(sum(loss[0] for loss in self._losses) / total, 6),
                "relative L2, worst": round(max(loss[1] for loss in self._losses), 6),
                "cosine, mean": round(sum(loss[2] for loss in self._losses) / total, 6),
                "cosine, worst": round(min(loss[3] for loss in self._losses), 6),
            }
        }

    def _keep_nearest(self, rows: pa.Table) -> None:
        ordered = sorted([*self.around, *_near(rows, self.threshold)], key=lambda row: (-row["similarity"], row["key"]))
        ordered = list({row["sha256"] or row["key"]: row for row in reversed(ordered)}.values())[::-1]
        num_above = sum(row["similarity"] >= np.float32(self.threshold) for row in ordered)
        self.around = ordered[max(0, num_above - EACH_SIDE) : num_above + EACH_SIDE]


def _near(rows: pa.Table, threshold: float) -> list[dict[str, Any]]:
    """A part's few rows on each side of the threshold."""
    ordered = rows.sort_by([("similarity", "descending"), ("key", "ascending")])
    num_above = int(np.sum(ordered["similarity"].to_numpy() >= np.float32(threshold)))
    chosen = ordered.slice(max(0, num_above - EACH_SIDE), min(num_above, EACH_SIDE) + EACH_SIDE)
    near: list[dict[str, Any]] = chosen.to_pylist()
    return near


def _review(folder: Path, around: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    rows = rows_by_key(folder, [row["key"] for row in around], ("image",))
    return [sheet_item(f"{row['similarity']:.3f} {row['status']}", rows[row["key"]]["image"]) for row in around]


def _calibration(calibration: Calibration | None, threshold: float) -> dict[str, Any]:
    if calibration is None:
        return {}
    by_threshold = {"used": threshold, "measured for this tower": calibration.threshold}
    told = [
        {"threshold": name, "similarity": value, "precision": round(precision, 4), "recall": round(recall, 4)}
        for name, value in by_threshold.items()
        for precision, recall in [calibration.precision_recall(value)]
    ]
    return {"calibration": told, "calibration_sets": calibration.table(threshold)}


def _calibration_chart(calibration: Calibration, counts: NDArray[np.int64], threshold: float) -> dict[str, Any]:
    """How each set is spread, in percent of it, and all of the input; the threshold as an upright line."""
    middles = ((_EDGES[1:] + _EDGES[:-1]) / 2).round(3).tolist()
    series: dict[str, Any] = {}
    highest = 0.0
    for name, values in calibration.sets.items():
        if values:
            share = np.histogram(np.clip(values, _EDGES[0], _EDGES[-1]), _EDGES)[0] * (100 / len(values))
            series[name] = {"x": middles, "y": share.round(2).tolist()}
            highest = max(highest, float(share.max()))
    share = counts * (100 / max(1, counts.sum()))
    series["all of the input"] = {"x": middles, "y": share.round(2).tolist()}
    highest = max(highest, float(share.max()))
    series["threshold"] = {"x": [threshold, threshold], "y": [0, round(highest, 2)]}
    title = "What the threshold was measured on"
    return {"kind": "line", "title": title, "x_label": "cosine of CLS", "y_label": "% of the set", "series": series}


def _warnings(seen: _Seen, threshold: float, calibration: Calibration | None) -> list[str]:
    warnings = []
    if seen.num_placeholders > IMPLAUSIBLE_SHARE * max(1, seen.num_measured):
        by_similarity = f"{seen.num_like} by similarity alone" if threshold <= 1 else "none by similarity"
        warnings.append(
            f"{seen.num_placeholders} of {seen.num_measured} pictures count as placeholders ({by_similarity}), which "
            "is implausibly many: look at the review sheet and set encode.placeholder_threshold."
        )
    if calibration is not None and calibration.precision < 0.9:
        warnings.append(
            f"This tower tells placeholders badly apart (precision {calibration.precision:.2f}, recall "
            f"{calibration.recall:.2f} on the drawn ones): add references of your own, or rely on the cheap signs."
        )
    return warnings
