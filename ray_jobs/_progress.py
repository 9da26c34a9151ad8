"""What a running stage says of itself: a plain line every two seconds, and progress.json in its folder."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tinyvlm.folders import PartResult, write_atomic
from tinyvlm.schema import OK

EVERY_S = 2.0
QUIET_S = 20.0
"""A line is repeated after so long without news, as a sign of life."""

log = logging.getLogger(__name__)


class Progress:
    """Use as a context manager around the work; `add` each part's result."""

    def __init__(self, stage: str, folder: Path, num_parts: int, num_done: int) -> None:
        self.stage, self.folder = stage, folder
        self.num_parts, self.num_done = num_parts, num_done
        self.rows, self.counts = 0, Counter[str]()
        self.state = "running"
        self._started = self._said_at = time.monotonic()
        self._said = (num_done, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.state = "done" if kind is None else "stopped"
        self._write()
        log.info("%s", self.line())

    def add(self, result: PartResult) -> None:
        """Count one more part."""
        self.num_done += 1
        self.rows += result.rows_in
        self.counts.update(result.counts)

    def line(self) -> str:
        """`download 12/31 parts · 3,072 rows · 2,100 ok · 410 rows/s`, of this run's parts."""
        seconds = max(time.monotonic() - self._started, 1e-3)
        speed = self.rows / seconds
        words = [f"{self.stage} {self.num_done}/{many(self.num_parts, 'part')}"]
        if self.rows:
            words += [f"{self.rows:,} rows", f"{self.counts[OK]:,} ok", f"{speed:,.{0 if speed >= 10 else 1}f} rows/s"]
        return " · ".join(words)

    def content(self) -> dict[str, Any]:
        """What progress.json says."""
        seconds = time.monotonic() - self._started
        return {
            "stage": self.stage,
            "state": self.state,
            "text": self.line().removeprefix(f"{self.stage} "),
            "parts_done": self.num_done,
            "parts": self.num_parts,
            "rows": self.rows,
            "statuses": dict(self.counts),
            "rows_per_s": round(self.rows / max(seconds, 1e-3), 2),
            "seconds": round(seconds, 2),
            "time": time.time(),
        }

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._write()
            now = (self.num_done, self.rows)  # the speed changes all the time and is no news
            if now != self._said or time.monotonic() - self._said_at > QUIET_S:
                log.info("%s", self.line())
                self._said, self._said_at = now, time.monotonic()

    def _write(self) -> None:
        try:
            write_atomic(self.folder / "progress.json", json.dumps(self.content()))
        except OSError as error:  # it is only for looking at
            log.debug("progress.json was not written: %s", error)


def many(count: int, thing: str) -> str:
    """`1 part`, `1,200 parts`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
