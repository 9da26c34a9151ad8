"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard's files, and wandb.

    a line of metrics.jsonl, an evaluation ──named──▶ numbers ──queue──▶ a thread
        ──▶ {folder}/tensorboard/events.…      (tensorboardX)
        └─▶ wandb: online with a key, else {folder}/wandb/offline-run-…

One process feeds them, the one that follows the run (follow.py), not the workers.  The names of numbers, which stay:

    train/loss · train/loss/{source} · train/family_loss/{family} · train/gradient_norm · train/learning_rate/{module}
    held_out/loss · held_out/loss/{source} · held_out/family_loss/{family} · held_out/bleu_{1…4}
    speed/{tokens,samples,supervised,pictures}_per_s · speed/step_s · speed/data_wait · speed/mfu · speed/goodput
    memory/process_bytes · memory/device_bytes

Nothing of this may slow or stop training: a full queue drops lines, a tracker that fails is told about once and left
out, and closing waits for a limited time.  Neither package is needed; one that is missing is left out too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tinyvlm.train.shown import TRACKERS

log = logging.getLogger(__name__)

MAX_WAITING = 1000
"""Lines that wait for the thread."""
CLOSE_S = 30.0
"""How long the end of training waits for the trackers."""
INIT_TIMEOUT_S = 20.0


class Tracker(Protocol):
    """Something that shows numbers over steps."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers after `step` steps."""

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """Event files that TensorBoard reads.  Steps that a resume repeats hide those of the first time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._last_step = folder / "tensorboard", 0
        self._writer = self._open(None)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One scalar for each number."""
        if "train/loss" in numbers:
            is_first, self._last_step, last = self._last_step == 0, step, self._last_step
            if step <= last or (is_first and step > 1):
                self._writer.close()
                self._writer = self._open(step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._writer.close()

    def _open(self, first_step: int | None) -> Any:
        from tensorboardX import SummaryWriter

        # Its own names are those of the second, and two of one second would be one file.
        suffix = f".{time.time_ns()}"
        return SummaryWriter(str(self._folder), purge_step=first_step, filename_suffix=suffix)


class Wandb:
    """A run of wandb, whose id is the training run's, so that a resumed run goes on where it was.

    Numbers are drawn over `step`, a number like the others: wandb's own count of lines only grows, and would drop steps
    that a resume repeats and evaluations that come late.
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=name,
            id=name,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            mode=_mode(),
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S, silent=True, console="off", x_disable_stats=False),
        )

        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One line."""
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _mode() -> Any:
    """What WANDB_MODE says; else online where there is a key, offline where there is none."""
    given = os.environ.get("WANDB_MODE")
    if given:
        return given
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    if not has_key:
        with contextlib.suppress(OSError):
            has_key = "api.wandb.ai" in Path("~/.netrc").expanduser().read_text()
    return "online" if has_key else "offline"


class Tracking:
    """All trackers of a run, behind one queue.

    Args:
        openers: name of each tracker → what opens it; opened in the thread, where waiting costs nothing.
    """

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]]) -> None:
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._openers = dict(openers)
        self._trackers: dict[str, Tracker] = {}
        self.dropped = 0
        """Lines that came while the queue was full."""
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand numbers over; never waits."""
        try:
            self._waiting.put_nowait((step, dict(numbers)))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Let the trackers finish, for at most `CLOSE_S`."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive() or self.dropped:
            log.warning("tracking: %d lines were dropped; all of them are in metrics.jsonl", self.dropped)

    def _work(self) -> None:
        for name, opener in self._openers.items():
            self._guarded(name, lambda name=name, opener=opener: self._trackers.update({name: opener()}))  # type: ignore[misc]
        while (line := self._waiting.get()) is not None:
            for name, tracker in list(self._trackers.items()):
                self._guarded(name, lambda tracker=tracker, line=line: tracker.log(*line))  # type: ignore[misc]
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except ImportError as error:
            log.info("tracking: no %s (%s)", name, error)
            self._trackers.pop(name, None)
        except Exception as error:  # somebody else's service must not end a training
            log.warning("tracking: going on without %s (%s: %s)", name, type(error).__name__, error)
            self._trackers.pop(name, None)


def open_tracking(
    folder: Path, project: str, name: str, config: Mapping[str, Any], trackers: Sequence[str] = TRACKERS
) -> Tracking:
    """The named trackers for a run's folder."""
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder),
        "wandb": lambda: Wandb(folder, project, name, config),
    }
    return Tracking({tracker: openers[tracker] for tracker in trackers})


def named(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, or of an evaluation, under the names that trackers show."""
    if "split" in line:
        kinds = (("loss", line["sources"]), ("family_loss", line["families"]))
        return {f"{line['split']}/{word}/{name}": told["loss"] for word, names in kinds for name, told in names.items()}
    if "held_out_loss" in line:
        return {"held_out/loss": line["held_out_loss"]}
    if "bleu" in line:
        return {f"held_out/bleu_{order}": score for order, score in enumerate(line["bleu"], 1)}
    return _of_step(line) if "rates" in line else {}


def _of_step(line: Mapping[str, Any]) -> dict[str, float]:
    seconds = line["seconds"] or 1e-9
    told = {
        "train/loss": line["loss"],
        "train/gradient_norm": line["gradient_norm"],
        **{f"train/learning_rate/{module}": rate for module, rate in line["rates"].items()},
        **{f"speed/{name}_per_s": line[name] / seconds for name in ("tokens", "samples", "supervised", "pictures")},
        "speed/step_s": line["seconds"],
        "speed/data_wait": line["data_wait_s"] / seconds,
        "speed/mfu": line.get("mfu"),
        "speed/goodput": line.get("goodput"),
        "memory/process_bytes": line.get("memory_bytes"),
        "memory/device_bytes": line.get("device_bytes"),
    }
    return {name: float(value) for name, value in told.items() if value is not None}
