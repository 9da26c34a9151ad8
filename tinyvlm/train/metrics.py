"""The numbers of a run: `metrics.jsonl`, one line a step, only ever appended to.

    {"attempt": 1, "workers": 2, "device": …}         each start of the run
    {"step": 1, "loss": …, "rates": {…}, …}          each step; of those that a resume repeated, the last one counts
    {"step": 10, "split": "train", "sources": {…}}   loss of each source and family since the last such line
    {"step": 20, "held_out_loss": …}                  each held-out loss, and beside it one with "split": "held_out"

Goodput is the share of working time that advanced the plan: seconds in steps that count ÷ seconds of all attempts,
each from its start (before lengths are measured and weights loaded) to its last line.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What happened in one step, over all workers."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the supervised tokens of the step."""
    gradient_norm: float
    """Before clipping."""
    rates: dict[str, float]
    samples: int
    tokens: int
    supervised: int
    pictures: int
    seconds: float
    data_wait_s: float
    """Part of `seconds` that worker 0 waited for samples."""
    flops: dict[str, float] | None = None
    """Operations that the step needs, by part of the model (flops.py)."""
    mfu: float | None = None
    """Of the matrix rate of all workers' devices, the share that `flops` took."""
    memory_bytes: int = 0
    """Resident memory of worker 0."""
    device_bytes: int = 0
    """The most that worker 0 has had allocated on its GPU."""
    joules: float | None = None
    """Energy of worker 0's GPU since the step before, by NVML."""
    time: float = field(default_factory=time.time)


class MetricsFile:
    """The open `metrics.jsonl` of a run."""

    def __init__(
        self, path: Path, workers: int, about: Mapping[str, Any] | None = None, started: float | None = None
    ) -> None:
        """`about`: what else is to be known of this attempt; `started`: when it began, by `time.time`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._file: TextIO = path.open("a")
        self._is_full = False
        if cut_off:
            self._file.write("\n")
        before = read(path)
        self._before_s, self._useful_s = before.seconds, {line["step"]: line["seconds"] for line in before.steps}
        self._started = started or time.time()
        self._sum_s: float | None = None
        line = {"attempt": len(before.attempts) + 1, "time": self._started, "workers": workers, "pid": os.getpid()}
        self._write({**line, **(about or {})})

    def step(self, record: StepRecord) -> None:
        """Note one step."""
        if self._sum_s is None:  # the first one of this attempt: those before it count
            self._sum_s = sum(seconds for step, seconds in self._useful_s.items() if step < record.step)
        self._sum_s += record.seconds
        whole_s = self._before_s + record.time - self._started
        line = {name: _short(value) for name, value in asdict(record).items() if value is not None}
        self._write({**line, "goodput": _short(min(1.0, self._sum_s / max(whole_s, 1e-9)))})

    def sources(self, step: int, split: str, told: Mapping[str, Any]) -> None:
        """Note the loss of each source and family ("train" or "held_out"), as `LossSums.told` gives it."""
        self._write({"step": step, "split": split, **_short(told), "time": time.time()})

    def held_out(self, step: int, loss: float, seconds: float) -> None:
        """Note a held-out loss, measured after `step` steps."""
        self._write({"step": step, "held_out_loss": _short(loss), "seconds": _short(seconds), "time": time.time()})

    def skipped(self, step: int, loss: float, norm: float) -> None:
        """Note that the step after `step` steps was left out, for its loss or gradient is no finite number."""
        self._write({"skipped": step + 1, "loss": str(loss), "gradient_norm": str(norm), "time": time.time()})

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        """A line that finds the disk full waits in the file's buffer, and is tried again with the next one."""
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                log.warning("metrics.jsonl cannot be written (%s); training goes on", error.strerror or error)
            self._is_full = True


@dataclass(frozen=True)
class Metrics:
    """A run's numbers, with repeated steps counted once."""

    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    sources: dict[str, list[dict[str, Any]]]
    """Of each split, the lines with the loss of each source."""
    attempt_seconds: list[float]
    """Working time of each attempt, from its start to its last line."""

    @property
    def seconds(self) -> float:
        """Working time of all attempts."""
        return sum(self.attempt_seconds)

    @property
    def flops(self) -> dict[str, float]:
        """Operations of the steps that count, by part of the model."""
        sums: dict[str, float] = {}
        for line in self.steps:
            for part, value in line.get("flops", {}).items():
                sums[part] = sums.get(part, 0.0) + value
        return sums

    @property
    def step_seconds(self) -> float:
        """Time in the steps that count."""
        return float(sum(line["seconds"] for line in self.steps))

    @property
    def mfu(self) -> float | None:
        """Over all steps that count, each weighted by its time; None where no rate is known."""
        known = [line for line in self.steps if line.get("mfu") is not None]
        seconds = sum(line["seconds"] for line in known)
        return sum(line["mfu"] * line["seconds"] for line in known) / seconds if seconds else None

    def summary(self) -> dict[str, Any]:
        """Totals and rates."""
        seconds = self.step_seconds or 1.0
        counted = ("samples", "tokens", "supervised", "pictures")
        totals = {name: sum(line[name] for line in self.steps) for name in counted}
        return {
            "steps": len(self.steps),
            "skipped": len(self.skipped),
            "attempts": len(self.attempts),
            "first_loss": self.steps[0]["loss"] if self.steps else None,
            "last_loss": self.steps[-1]["loss"] if self.steps else None,
            "held_out_loss": self.held_out[-1]["held_out_loss"] if self.held_out else None,
            **{f"{name}_seen": total for name, total in totals.items()},
            "samples_per_s": round(totals["samples"] / seconds, 1),
            "tokens_per_s": round(totals["tokens"] / seconds, 1),
            "supervised_per_s": round(totals["supervised"] / seconds, 1),
            "pictures_per_s": round(totals["pictures"] / seconds, 1),
            "mfu": _rounded(self.mfu),
            "data_wait": round(sum(line["data_wait_s"] for line in self.steps) / seconds, 4),
            "goodput": round(self.step_seconds / self.seconds, 4) if self.seconds else None,
        }


def read(path: Path) -> Metrics:
    """Read a `metrics.jsonl`; a last line that was cut off is left out."""
    steps: dict[int, dict[str, Any]] = {}
    held_out: dict[int, dict[str, Any]] = {}
    skipped: dict[int, dict[str, Any]] = {}
    sources: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "held_out": {}}
    attempts: list[dict[str, Any]] = []
    seconds: list[float] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "attempt" in line:
            attempts.append(line)
            seconds.append(0.0)
        elif "held_out_loss" in line:
            held_out[line["step"]] = line
        elif "skipped" in line:
            skipped[line["skipped"]] = line
        elif "split" in line:
            sources[line["split"]][line["step"]] = line
        elif "rates" in line:
            steps[line["step"]] = line
        if attempts:
            seconds[-1] = line["time"] - attempts[-1]["time"]
    last = {split: _in_order(lines) for split, lines in sources.items()}
    return Metrics(_in_order(steps), _in_order(held_out), _in_order(skipped), attempts, last, seconds)


def _in_order(lines: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [lines[step] for step in sorted(lines)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _short(item) for name, item in value.items()}
    return float(f"{value:.7g}") if isinstance(value, float) and value < 1e8 else value
