"""What a command costs, with everything that it starts: seconds, CPU seconds, peak memory.

    python -m tinyvlm.bench.measure OUT.json -- COMMAND …

Runs between the bench and the command as its "subreaper" (prctl(2), PR_SET_CHILD_SUBREAPER): whatever the command
leaves behind, Ray's daemons among it, stays below this process, is counted, and is ended here.  CPU time is looked up
many times a second in every process: Ray's daemons throw away what the kernel would add up for children that ended.
Memory is the sum of the proportional set sizes, in which shared pages count once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tinyvlm.errors import DataError

EVERY_S, EVERY_PSS_S = 0.25, 1.0
"""How often CPU times and memory are looked up; the last quarter of a second of a process that ends is not seen."""


@dataclass(frozen=True)
class Cost:
    """Of one command and all that it started."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int


def measure(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end; its output goes to `log`.

    Raises:
        DataError: it failed.
    """
    out = log.with_suffix(".cost.json")
    wrapped = [sys.executable, "-m", "tinyvlm.bench.measure", str(out), "--", *command]
    with log.open("wb") as file:
        subprocess.run(wrapped, stdout=file, stderr=file, env={**os.environ, **(environment or {})}, check=False)
    cost = Cost(**json.loads(out.read_text()))
    if cost.code:
        raise DataError(f"{' '.join(command[:4])} … ended with code {cost.code}; see {log}.")
    return cost


def main(argv: Sequence[str]) -> int:
    """What the drawing above shows."""
    out, command = Path(argv[0]), list(argv[2:])
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    watch = _Watch()
    started = time.perf_counter()
    with watch:
        code = subprocess.Popen(command).wait()
        seconds = time.perf_counter() - started
    _end_what_is_left()
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = max(watch.cpu_seconds, waited.ru_utime + waited.ru_stime)
    out.write_text(json.dumps(asdict(Cost(seconds, cpu_seconds, watch.peak_bytes, code))))
    return code


class _Watch:
    """Watches all descendants."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._spent: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def cpu_seconds(self) -> float:
        """Of all that were seen, user and system."""
        return sum(self._spent.values())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        looked = 0.0
        while not self._stop.wait(EVERY_S):
            children = psutil.Process().children(recursive=True)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    self._spent[child.pid, child.create_time()] = times.user + times.system
            if time.monotonic() - looked > EVERY_PSS_S:
                looked = time.monotonic()
                self.peak_bytes = max(self.peak_bytes, sum(proportional_bytes(child.pid) for child in children))


def proportional_bytes(pid: int) -> int:
    """Pss of a process; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _end_what_is_left() -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.send_signal(signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
