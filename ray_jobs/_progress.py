"""What a running stage says of itself while it works.

    parts done ──add──▶ Progress ─┬─ a terminal: a live table           (a person at the keyboard)
    parts in work ─partial─▶      ├─ else: plain lines, ever more rarely (the log of a Ray job)
                                  ├─ progress.json in the folder        (the demo's screen, any script)
                                  └─ Ray's metrics (_metrics.py)        (dashboard, Prometheus)

Rows are counted as the input has them: those that a stage before rejected pass through without a status.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ray_jobs._progress_screen import live_table
from tinyvlm.folders import Part, PartResult, write_atomic
from tinyvlm.schema import OK

if TYPE_CHECKING:
    from ray_jobs._metrics import StageMetrics

EVERY_S = 2.0
"""How often progress.json and metrics are renewed, and a terminal's table at least."""
LONGEST_PAUSE_S = 60.0
QUIET_S = 20.0
"""A line is repeated after so long without news, as a sign of life; later in a long run after `LONGEST_PAUSE_S`."""
WINDOW_S = 30.0
"""The speed is that of the last half minute, or since the last but one news where those come more rarely."""
NEWS_S = 0.5
"""News that come closer together count as one."""
MAX_FAMILIES = 3
"""Families of failures that a line names."""

log = logging.getLogger(__name__)


class Progress:
    """Use as a context manager around the work; `add` each part's result, and tell of parts in work with `partial`.

    `parts`: all of the stage; `done`: results that an earlier run left behind.  `poll`, if given, is asked every two
    seconds for the counts by status of parts in work (part index → counts).  All methods may be called by any thread.
    """

    def __init__(
        self,
        stage: str,
        folder: Path,
        parts: Sequence[Part],
        done: Iterable[PartResult] = (),
        *,
        poll: Callable[[], Mapping[int, Mapping[str, int]]] | None = None,
        metrics: StageMetrics | None = None,
    ) -> None:
        self.stage, self.folder, self.state = stage, folder, "running"
        self.num_parts, self.num_rows = len(parts), sum(part.num_rows for part in parts)
        self.num_done = self.rows_in = 0
        self._sizes = {part.index: part.num_rows for part in parts}
        self._finished_rows, self._counts = 0, Counter[str]()
        self._in_work: dict[int, dict[str, int]] = {}
        self._poll, self._metrics = poll, metrics
        self._lock = threading.RLock()
        for result in done:
            self._take(result)
        self._rows_before = self.rows_done
        self._started = time.monotonic()
        self._speed = _Speed(self._started, self.rows_done, self.counts[OK])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> Self:
        self._tell()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.state = "done" if kind is None else "stopped"
        self._tell()
        log.info("%s", self.line())

    def add(self, result: PartResult) -> None:
        """Count one more part; what was said of it while it was in work is forgotten."""
        with self._lock:
            self._take(result)
            self._note_speed()
        if self._metrics:
            self._metrics.add(result)

    def partial(self, part_index: int, counts: Mapping[str, int]) -> None:
        """Rows by status that a part in work has finished so far (all of them, not since the last call)."""
        with self._lock:
            if part_index in self._sizes:
                self._in_work[part_index] = dict(counts)
                self._note_speed()

    @property
    def rows_in_work(self) -> int:
        """Rows finished in parts that are not written yet."""
        with self._lock:
            return sum(min(sum(counts.values()), self._sizes[part]) for part, counts in self._in_work.items())

    @property
    def rows_done(self) -> int:
        """Input rows that are through, of finished parts and of those in work."""
        with self._lock:
            return self._finished_rows + self.rows_in_work

    @property
    def counts(self) -> Counter[str]:
        """Rows by status, of finished parts and of those in work."""
        with self._lock:
            return sum((Counter(counts) for counts in self._in_work.values()), Counter(self._counts))

    @property
    def rows_per_s(self) -> float:
        """Of the last half minute; at the end, of the whole run."""
        return self._speeds()[0]

    @property
    def seconds_left(self) -> float | None:
        """None while nothing is known of the speed."""
        left, speed = self.num_rows - self.rows_done, self.rows_per_s
        return left / speed if speed > 0 and self.state == "running" else None

    def line(self) -> str:
        """The stage's name and what is known, the most important first."""
        return f"{self.stage} {' · '.join(self.words())}"

    def words(self) -> list[str]:
        """`3,072/12,000 rows`, `0:22 left`, `410 rows/s`, `2,100 ok`, `972 failed: timeout 700, …`, `3/12 parts`."""
        with self._lock:
            counts = self.counts
            words = [f"{self.rows_done:,}/{many(self.num_rows, 'row')}"]
            if (left_s := self.seconds_left) is not None:
                words.append(f"{clock(left_s)} left")
            if self.rows_done > self._rows_before:
                speed, ok_speed = self._speeds()
                words.append(f"{_rounded(speed)} rows/s, {_rounded(ok_speed)} ok/s")
            if counts:
                words.append(f"{counts[OK]:,} ok")
            if failed := counts.total() - counts[OK]:
                largest = families(counts).most_common(MAX_FAMILIES)
                words.append(f"{failed:,} failed: {', '.join(f'{name} {count:,}' for name, count in largest)}")
            if skipped := self._finished_rows - self.rows_in:
                words.append(f"{skipped:,} rejected before")
            return [*words, f"{self.num_done}/{many(self.num_parts, 'part')}"]

    def content(self) -> dict[str, Any]:
        """What progress.json says.  `rows`: mapped in finished parts; `rows_done` of `rows_total`: input rows."""
        with self._lock:
            counts, left_s = self.counts, self.seconds_left
            return {
                "stage": self.stage,
                "state": self.state,
                "text": " · ".join(self.words()),
                "parts_done": self.num_done,
                "parts": self.num_parts,
                "rows": self.rows_in,
                "rows_done": self.rows_done,
                "rows_total": self.num_rows,
                "rows_in_work": self.rows_in_work,
                "ok": counts[OK],
                "failed": dict(families(counts).most_common()),
                "statuses": dict(counts),
                "rows_per_s": round(self.rows_per_s, 2),
                "seconds_left": None if left_s is None else round(left_s, 1),
                "seconds": round(time.monotonic() - self._started, 2),
                "time": time.time(),
            }

    def _speeds(self) -> tuple[float, float]:
        """Rows and ok rows a second."""
        with self._lock:
            of = self._speed.lately if self.state == "running" else self._speed.overall
            return of(time.monotonic())

    def _take(self, result: PartResult) -> None:
        self.num_done += 1
        self.rows_in += result.rows_in
        self._finished_rows += self._sizes.get(result.index, result.rows_in)
        self._counts.update(result.counts)
        self._in_work.pop(result.index, None)

    def _note_speed(self) -> None:
        self._speed.note(time.monotonic(), self.rows_done, self.counts[OK])

    def _watch(self) -> None:
        with live_table(self) as is_shown:
            said, said_at = (self.num_done, self.rows_done), self._started
            while not self._stop.wait(EVERY_S):
                self._ask()
                self._tell()
                now, at = time.monotonic(), (self.num_done, self.rows_done)  # a changed speed alone is no news
                pause = min(LONGEST_PAUSE_S, max(EVERY_S, (now - self._started) / 20))
                if not is_shown and now - said_at >= (pause if at != said else max(QUIET_S, pause)):
                    log.info("%s", self.line())
                    said, said_at = at, now

    def _ask(self) -> None:
        if self._poll is None:
            return
        try:
            for part, counts in self._poll().items():
                self.partial(part, counts)
        except Exception as error:  # the run does not end because nobody knows how far it is
            log.debug("parts in work could not be asked: %s", error)

    def _tell(self) -> None:
        try:
            write_atomic(self.folder / "progress.json", json.dumps(self.content()))
        except OSError as error:  # it is only for looking at
            log.debug("progress.json was not written: %s", error)
        if self._metrics:
            self._metrics.show(self)


class _Speed:
    """Rows a second over the last `WINDOW_S`: what a person wants to know, and what the time left follows from.

    News come in lumps where parts are large.  So at least two of them are kept: the first lump is measured from the
    start, and between lumps the speed sinks slowly instead of falling to nothing.
    """

    def __init__(self, now: float, rows: int, num_ok: int) -> None:
        self._start = (now, rows, num_ok)
        self._news = deque([self._start])

    def note(self, now: float, rows: int, num_ok: int) -> None:
        last = self._news[-1]
        if len(self._news) > 1 and (now - last[0] < NEWS_S or rows == last[1]):
            now = self._news.pop()[0]
        if rows != self._news[-1][1]:
            self._news.append((now, rows, num_ok))

    def lately(self, now: float) -> tuple[float, float]:
        """Rows and ok rows a second."""
        while len(self._news) > 2 and self._news[1][0] <= now - WINDOW_S:
            self._news.popleft()
        return self._between(self._news[0], now)

    def overall(self, now: float) -> tuple[float, float]:
        """Since the start."""
        return self._between(self._start, now)

    def _between(self, first: tuple[float, int, int], now: float) -> tuple[float, float]:
        seconds, last = max(now - first[0], 1e-3), self._news[-1]
        # A part that is done again, as its worker died, takes back what it had told.
        return max(0, last[1] - first[1]) / seconds, max(0, last[2] - first[2]) / seconds


def families(counts: Mapping[str, int]) -> Counter[str]:
    """Rows that failed, by family of status."""
    failed = Counter[str]()
    for status, count in counts.items():
        if status != OK:
            failed[status.split(".")[0]] += count
    return failed


def many(count: int, thing: str) -> str:
    """`1 part`, `1,200 parts`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rounded(speed: float) -> str:
    return f"{speed:,.{0 if speed >= 10 else 1}f}"
