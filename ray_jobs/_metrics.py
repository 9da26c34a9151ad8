"""A running stage as Ray metrics: on every node's metrics port, so in Prometheus, and from there in the dashboard.

    Progress ──add · show──▶ StageMetrics ──▶ Ray's metrics agent ──▶ http://NODE:PORT/metrics   (ray_tinyvlm_…)

Only the driver writes them, once a part or every two seconds: a row costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinyvlm.folders import PartResult

if TYPE_CHECKING:
    from ray_jobs._progress import Progress

COUNTERS = {
    "tinyvlm_rows": "Rows of finished parts, by stage and status (schema.STATUSES)",
    "tinyvlm_bytes_written": "Bytes of finished parts",
}
"""Names without Ray's prefix `ray_` and the suffix `_total`."""
GAUGES = {
    "tinyvlm_input_rows": "Rows that the stage reads, all in all",
    "tinyvlm_input_rows_done": "Those that are through, also in parts that are not written yet",
    "tinyvlm_rows_in_flight": "Rows finished in parts that are not written yet",
    "tinyvlm_parts": "Parts of the stage",
    "tinyvlm_parts_done": "Parts that are written",
    "tinyvlm_rows_per_second": "Speed over the last half minute",
    "tinyvlm_seconds_left": "At that speed; 0 at the end",
}


class StageMetrics:
    """The metrics of one stage; wants a process that is connected to Ray."""

    def __init__(self, stage: str, metrics: Any = None) -> None:
        """`metrics`: stands in for `ray.util.metrics`."""
        if metrics is None:
            from ray.util import metrics
        self.stage = stage
        self._counters = {
            name: metrics.Counter(
                name, description, tag_keys=("stage", "status") if name == "tinyvlm_rows" else ("stage",)
            )
            for name, description in COUNTERS.items()
        }
        self._gauges = {
            name: metrics.Gauge(name, description, tag_keys=("stage",)) for name, description in GAUGES.items()
        }

    def add(self, result: PartResult) -> None:
        """One more part is written."""
        for status, count in result.counts.items():
            if count:  # Ray refuses to count nothing
                self._counters["tinyvlm_rows"].inc(count, {"stage": self.stage, "status": status})
        if result.num_bytes:
            self._counters["tinyvlm_bytes_written"].inc(result.num_bytes, {"stage": self.stage})

    def show(self, progress: Progress) -> None:
        """How far the stage is."""
        values = (
            *(progress.num_rows, progress.rows_done, progress.rows_in_work, progress.num_parts, progress.num_done),
            *(progress.rows_per_s if progress.state == "running" else 0.0, progress.seconds_left or 0.0),
        )
        for gauge, value in zip(self._gauges.values(), values, strict=True):
            gauge.set(value, {"stage": self.stage})
