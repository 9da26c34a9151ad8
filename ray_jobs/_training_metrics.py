"""A running training stage as Ray metrics, beside those of the other stages (_metrics.py).

    Follower ──line──▶ TrainingMetrics ──▶ Ray's metrics agent ──▶ http://NODE:PORT/metrics   (ray_tinyvlm_train_…)

Only the driver writes them, from what worker 0 has written down: a step costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTERS = {
    "tinyvlm_train_samples": "Samples trained on, those that a resume repeated included",
    "tinyvlm_train_tokens": "Tokens of them, image tokens included",
    "tinyvlm_train_supervised_tokens": "Tokens of them that the loss covers",
}
"""Names without Ray's prefix `ray_` and the suffix `_total`."""
GAUGES = {
    "tinyvlm_train_step": "Steps done",
    "tinyvlm_train_steps": "Steps of the plan",
    "tinyvlm_train_loss": "Of the last step, per supervised token",
    "tinyvlm_train_gradient_norm": "Before clipping",
    "tinyvlm_train_step_seconds": "Of the last step",
    "tinyvlm_train_mfu": "Share of the devices' matrix rate that the model's operations take, 0 to 1",
    "tinyvlm_train_data_wait": "Share of the last step that waited for data, 0 to 1",
    "tinyvlm_train_goodput": "Share of the working time that was in steps that count, 0 to 1",
    "tinyvlm_train_memory_bytes": "Resident memory of worker 0",
    "tinyvlm_train_device_bytes": "The most that worker 0 has had allocated on its GPU",
    "tinyvlm_train_held_out_loss": "Per supervised token, at its last measurement",
}
TAGGED = {
    "tinyvlm_train_learning_rate": ("module", "Of each module that learns"),
    "tinyvlm_train_source_loss": ("source", "Per supervised token, over the last steps"),
    "tinyvlm_train_held_out_source_loss": ("source", "Per supervised token, at its last measurement"),
    "tinyvlm_train_bleu": ("order", "Of held-out captions, 0 to 1, for the orders 1 to 4"),
}
"""Gauges with a tag besides the stage."""
SECONDS_LEFT = "tinyvlm_seconds_left"


class TrainingMetrics:
    """The metrics of one training stage; wants a process that is connected to Ray."""

    def __init__(self, stage: str, metrics: Any = None) -> None:
        """`metrics`: stands in for `ray.util.metrics`."""
        if metrics is None:
            from ray.util import metrics
        self._stage = {"stage": stage}
        self._counters = {name: metrics.Counter(name, told, tag_keys=("stage",)) for name, told in COUNTERS.items()}
        left = {SECONDS_LEFT: "At the present speed; 0 at the end"}
        self._gauges = {
            name: metrics.Gauge(name, told, tag_keys=("stage",)) for name, told in {**GAUGES, **left}.items()
        }
        self._tagged = {
            name: metrics.Gauge(name, told, tag_keys=("stage", tag)) for name, (tag, told) in TAGGED.items()
        }

    def take(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, or an evaluation."""
        if "rates" in line:
            self._step(line)
        elif "held_out_loss" in line:
            self._set("held_out_loss", line["held_out_loss"])
        elif "split" in line:
            name = "source_loss" if line["split"] == "train" else "held_out_source_loss"
            self._set_each(name, {source: told["loss"] for source, told in line["sources"].items()})
        elif "bleu" in line:
            self._set_each("bleu", {str(order): score for order, score in enumerate(line["bleu"], 1)})

    def show(self, num_steps: int, seconds_left: float) -> None:
        """How far the stage is."""
        self._set("steps", num_steps)
        self._gauges[SECONDS_LEFT].set(seconds_left, self._stage)

    def _step(self, line: Mapping[str, Any]) -> None:
        for name, field in (("samples", "samples"), ("tokens", "tokens"), ("supervised_tokens", "supervised")):
            if line[field]:  # Ray refuses to count nothing
                self._counters[f"tinyvlm_train_{name}"].inc(line[field], self._stage)
        for name in ("step", "loss", "gradient_norm", "mfu", "goodput", "memory_bytes", "device_bytes"):
            if line.get(name) is not None:
                self._set(name, line[name])
        self._set("step_seconds", line["seconds"])
        self._set("data_wait", line["data_wait_s"] / max(line["seconds"], 1e-9))
        self._set_each("learning_rate", line["rates"])

    def _set(self, name: str, value: float) -> None:
        self._gauges[f"tinyvlm_train_{name}"].set(value, self._stage)

    def _set_each(self, name: str, values: Mapping[str, float]) -> None:
        whole = f"tinyvlm_train_{name}"
        tag = TAGGED[whole][0]
        for key, value in values.items():
            in_ascii = key.encode("ascii", "replace").decode()  # Ray raises on other letters
            self._tagged[whole].set(value, {**self._stage, tag: in_ascii})
