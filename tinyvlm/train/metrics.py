"""The numbers of a run: `metrics.jsonl`, one line a step, only ever appended to.

    {"attempt": 1, "workers": 2, …}                  each start of the run
    {"step": 1, "loss": …, "rates": {…}, …}          each step; of those that a resume repeated, the last one counts
    {"step": 20, "held_out_loss": …}                  each evaluation

Goodput is the share of working time that advanced the plan: seconds in steps that count ÷ seconds of all attempts.
"""

from __future__ import annotations

import json
import logging
import os
import time
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
    time: float = field(default_factory=time.time)


class MetricsFile:
    """The open `metrics.jsonl` of a run."""

    def __init__(self, path: Path, workers: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._file: TextIO = path.open("a")
        self._is_full = False
        if cut_off:
            self._file.write("\n")
        attempt = len(read(path).attempts) + 1
        self._write({"attempt": attempt, "time": time.time(), "workers": workers, "pid": os.getpid()})

    def step(self, record: StepRecord) -> None:
        """Note one step."""
        self._write({name: _short(value) for name, value in asdict(record).items()})

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
    seconds: float
    """Working time of all attempts, from each one's start to its last line."""

    @property
    def step_seconds(self) -> float:
        """Time in the steps that count."""
        return float(sum(line["seconds"] for line in self.steps))

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
            "pictures_per_s": round(totals["pictures"] / seconds, 1),
            "data_wait": round(sum(line["data_wait_s"] for line in self.steps) / seconds, 4),
            "goodput": round(self.step_seconds / self.seconds, 4) if self.seconds else None,
        }


def read(path: Path) -> Metrics:
    """Read a `metrics.jsonl`; a last line that was cut off is left out."""
    steps: dict[int, dict[str, Any]] = {}
    held_out: dict[int, dict[str, Any]] = {}
    skipped: dict[int, dict[str, Any]] = {}
    attempts: list[dict[str, Any]] = []
    seconds, started, latest = 0.0, 0.0, 0.0
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "attempt" in line:
            seconds += latest - started
            started = line["time"]
            attempts.append(line)
        elif "held_out_loss" in line:
            held_out[line["step"]] = line
        elif "skipped" in line:
            skipped[line["skipped"]] = line
        else:
            steps[line["step"]] = line
        latest = line["time"]
    by_step = [steps[step] for step in sorted(steps)]
    by_held_out, by_skipped = ([lines[step] for step in sorted(lines)] for lines in (held_out, skipped))
    return Metrics(by_step, by_held_out, by_skipped, attempts, seconds + latest - started)


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) and value < 1e8 else value
