"""Whoever shows a run reads its folder: training itself waits for nobody who looks.

    worker 0 ──▶ metrics.jsonl ─────────┐             ┌─▶ trackers (tracking.py)
    evaluator ─▶ evaluations/step-….json ┴──Follower──┼─▶ the live line, Ray's metrics (ray_jobs/)
                                                      └─▶ …

The process that follows is the driver of a Ray job; `run_local` follows in a thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyvlm.storage import address
from tinyvlm.train import evaluations
from tinyvlm.train.evaluations import Evaluations, Job
from tinyvlm.train.run import TrainingRun
from tinyvlm.train.tracking import Tracking, named, open_tracking

EVERY_S = 1.0
"""How often the folder is looked at."""

log = logging.getLogger(__name__)

Listener = Callable[[Mapping[str, Any]], None]
"""Is told a line of metrics.jsonl (metrics.py) or an evaluation (evaluations.py)."""


class Follower:
    """Tells listeners what comes into a run's folder from now on, each thing once and in order.

    Args:
        also: called at every look, for example to start evaluations.
    """

    def __init__(self, folder: Path, listeners: Sequence[Listener], also: Callable[[], None] = lambda: None) -> None:
        self._folder, self._listeners, self._also = folder, listeners, also
        path = folder / "metrics.jsonl"
        self._offset = path.stat().st_size if path.is_file() else 0
        self._known = set(evaluations.paths(folder))
        self._looked_at = 0.0
        self._has_failed = False

    def tick(self) -> None:
        """Look, if it is time to."""
        if time.monotonic() - self._looked_at >= EVERY_S:
            self.look()

    def look(self) -> None:
        """Tell what is new.  What goes wrong is told once, and ends nothing."""
        self._looked_at = time.monotonic()
        try:
            self._also()
            self._tell()
        except Exception as error:  # a full disk, a listener's mistake: no reason to end a training
            if not self._has_failed:
                log.warning("not all of the run is shown (%s: %s)", type(error).__name__, error)
            self._has_failed = True

    def _tell(self) -> None:
        for line in [*self._new_lines(), *self._new_evaluations()]:
            for listener in self._listeners:
                listener(line)

    def _new_lines(self) -> Iterator[Mapping[str, Any]]:
        """Lines of metrics.jsonl that are whole."""
        try:
            with (self._folder / "metrics.jsonl").open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return  # not there yet
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # a line that a killed run cut off
                yield json.loads(line)

    def _new_evaluations(self) -> Iterator[Mapping[str, Any]]:
        for path in evaluations.paths(self._folder):
            if path not in self._known:
                self._known.add(path)
                yield from evaluations.read_one(path)


def to_trackers(tracking: Tracking) -> Listener:
    """Hands every line on to trackers."""

    def hand_on(line: Mapping[str, Any]) -> None:
        numbers = named(line)
        if numbers:
            tracking.log(line["step"], numbers)

    return hand_on


@contextlib.contextmanager
def shown(run: TrainingRun, evaluate: Callable[[], Job], *listeners: Listener) -> Iterator[Follower]:
    """A follower that feeds the run's trackers and has its checkpoints evaluated; call its `tick` often.

    Args:
        evaluate: begins the evaluation of the newest checkpoint.
        listeners: who else wants to know.
    """
    show = run.config.show
    tracking = open_tracking(run.folder, show.project, run.folder.name, run.recipe, show.trackers)
    checkpoints = address(run.config.checkpoints_at) / run.folder.name if run.config.checkpoints_at else None
    evaluator = Evaluations(run.folder, show, evaluate, checkpoints)
    follower = Follower(run.folder, [to_trackers(tracking), *listeners], evaluator.tick)
    try:
        yield follower
    finally:
        evaluator.stop()
        follower.look()
        tracking.close()


@contextlib.contextmanager
def followed(follower: Follower) -> Iterator[None]:
    """Follow in a thread until the end of the context."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(EVERY_S):
            follower.tick()

    thread = threading.Thread(target=follow, name="follower", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
