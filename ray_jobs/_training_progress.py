"""What a running training stage says of itself: a plain line every two seconds, and progress.json in its folder.

    Follower ──line──▶ TrainingProgress ──┬─▶ log, progress.json (the demo's screen shows it)
    plan.json, warnings.log ──▶           └─▶ Ray's metrics (_training_metrics.py)

It is told what worker 0 writes (`metrics.jsonl`), and reads the plan and what the workers warn of, so it needs no word
from them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tinyvlm.data import mixture
from tinyvlm.folders import write_atomic
from tinyvlm.train.run import WARNINGS_FILE

if TYPE_CHECKING:
    from ray_jobs._training_metrics import TrainingMetrics

EVERY_S = 2.0
QUIET_S = 20.0
"""A line is repeated after so long without news, as a sign of life."""

log = logging.getLogger(__name__)


class TrainingProgress:
    """Use as a context manager; hand it lines with `take`, and call `tick` often."""

    def __init__(self, stage: str, folder: Path, metrics: TrainingMetrics | None = None) -> None:
        self.stage, self.folder = stage, folder
        self.state, self.last = "running", dict[str, Any]()
        self.num_steps = 0
        self._metrics = metrics
        self._warned = _size(folder / WARNINGS_FILE)
        self._started = self._wrote_at = self._said_at = time.monotonic()
        self._said_step, self._first_step = -1, 0
        self._tokens, self._seconds, self._mfu_seconds = 0, 0.0, 0.0

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self.state = "done" if kind is None else "stopped"
        self._write()
        log.info("%s", self.line())

    def tick(self) -> None:
        """Look, and say something if two seconds have passed and there is news."""
        now = time.monotonic()
        if now - self._wrote_at < EVERY_S:
            return
        self._wrote_at = now
        self._look()
        self._write()
        step = self.last.get("step", 0)
        if step != self._said_step or now - self._said_at > QUIET_S:
            log.info("%s", self.line())
            self._said_step, self._said_at = step, now

    def line(self) -> str:
        """`sft step 120/300 · loss 0.412 · 9,300 tokens/s · MFU 41% · 0:21 left`."""
        if not self.last:
            return f"{self.stage} starting"
        step = self.last["step"]
        words = [f"{self.stage} step {step}/{self.num_steps or '?'}", f"loss {self.last['loss']:.4f}"]
        if self._seconds:
            words.append(f"{self._tokens / self._seconds:,.0f} tokens/s")
        if self._mfu_seconds and self._seconds:
            words.append(f"MFU {self._mfu_seconds / self._seconds:.0%}")
        left_s = self._left_s()
        if left_s:
            hours, minutes = divmod(int(left_s) // 60, 60)
            words.append(f"{f'{hours}:{minutes:02d}' if hours else minutes}:{int(left_s) % 60:02d} left")
        return " · ".join(words)

    def content(self) -> dict[str, Any]:
        """What progress.json says."""
        return {
            "stage": self.stage,
            "state": self.state,
            "text": self.line().removeprefix(f"{self.stage} "),
            "step": self.last.get("step", 0),
            "steps": self.num_steps,
            "loss": self.last.get("loss"),
            "mfu": self.last.get("mfu"),
            "seconds": round(time.monotonic() - self._started, 2),
            "time": time.time(),
        }

    def _left_s(self) -> float:
        done = self.last["step"] - self._first_step
        return (self.num_steps - self.last["step"]) * self._seconds / done if done and self._seconds else 0.0

    def _look(self) -> None:
        self._read_plan()
        self._pass_warnings_on()

    def _read_plan(self) -> None:
        """Once it is there, say what will be seen."""
        if self.num_steps:
            return
        try:
            plan = json.loads((self.folder / "plan.json").read_text())
        except (OSError, ValueError):
            return  # not there yet
        self.num_steps = int(plan["steps"])
        for line in mixture.lines(plan["mixture"], plan["remarks"]):
            log.info("%s mixture · %s", self.stage, line)

    def _pass_warnings_on(self) -> None:
        """What the workers have warned of since the last look."""
        try:
            with (self.folder / WARNINGS_FILE).open("rb") as file:
                file.seek(self._warned)
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._warned += len(whole)
        for line in whole.splitlines():
            log.warning("%s: %s", self.stage, line.decode(errors="replace").rpartition("\t")[2])

    def take(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, or an evaluation."""
        if self._metrics is not None:
            self._metrics.take(line)
        if "rates" not in line:
            return
        if not self.last or line["step"] <= self.last["step"]:  # the first step, or a restart from a checkpoint
            self._first_step, self._tokens, self._seconds, self._mfu_seconds = line["step"] - 1, 0, 0.0, 0.0
        self.last = dict(line)
        self._tokens += line["tokens"]
        self._seconds += line["seconds"]
        self._mfu_seconds += line["seconds"] * (line.get("mfu") or 0.0)

    def _write(self) -> None:
        if self._metrics is not None and self.last:
            self._metrics.show(self.num_steps, self._left_s() if self.state == "running" else 0.0)
        try:
            write_atomic(self.folder / "progress.json", json.dumps(self.content()))
        except OSError as error:  # it is only for looking at
            log.debug("progress.json was not written: %s", error)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
