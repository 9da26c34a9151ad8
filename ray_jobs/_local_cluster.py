"""A local Ray with dashboard for the demo: started, measured and ended by its own processes, never by `ray stop`.

Every process that descends from `LocalCluster.start` carries a marker in its environment.  That is how memory is summed
and how leftovers are found, whatever they are called and whoever adopted them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tinyvlm.errors import ClusterError

MARKER = "TINYVLM_LOCAL_CLUSTER"
LOGICAL_CPUS = 8
"""More than a laptop has: stages ask for fractions, and fixed pools must fit beside drivers and Train workers."""
OBJECT_STORE_BYTES = 512 * 1024**2
START_TIMEOUT_S = 90.0


def local_environment(marker: str) -> dict[str, str]:
    """Environment of `ray start` and of every process that talks to it."""
    binaries = str(Path(sys.executable).parent)
    return {
        **os.environ,
        MARKER: marker,
        "PATH": binaries + os.pathsep + os.environ.get("PATH", ""),
        # A cluster and a driver that disagree about token authentication hang Ray Data without a word.
        "RAY_AUTH_MODE": "disabled",
        # Keeps every listener on 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_enable_metrics_collection": os.environ.get("RAY_enable_metrics_collection", "1"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    """A port on 127.0.0.1 that nobody holds at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def require_port(port: int, what: str, option: str) -> None:
    """Raises ClusterError when `port` is taken."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            raise ClusterError(
                f"Port {port}, wanted for {what}, is in use; stop what holds it or choose another with {option}."
            ) from None


def start_beside(command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one, also when this one is killed outright (on Linux)."""
    with log_path.open("wb") as log:
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent's thread ends; see prctl(2), PR_SET_PDEATHSIG."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class LocalCluster:
    """One Ray head on this machine.  Use as a context manager."""

    def __init__(self, dashboard_port: int, log_path: Path) -> None:
        self.marker = uuid.uuid4().hex
        self.dashboard_port, self.log_path = dashboard_port, log_path
        self.dashboard_url = f"http://127.0.0.1:{dashboard_port}"
        self.environment = local_environment(self.marker)
        self.address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None

    def __enter__(self) -> LocalCluster:
        require_port(self.dashboard_port, "Ray's dashboard", "--dashboard-port")
        # The path of Ray's sockets must stay under 107 bytes, so this cannot live in the output folder.
        self._folder = tempfile.mkdtemp(prefix="tinyvlm-ray-")
        port = self.address.rsplit(":", 1)[1]
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"),
            *(f"--port={port}", f"--num-cpus={LOGICAL_CPUS}", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            *(f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
            # 0: let the system choose; Ray's fixed range would clash with a dashboard port inside it.
            *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={self._folder}"),
        ]
        self._process = start_beside(command, self.environment, self.log_path)
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_up(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ClusterError(f"Ray did not start: {_last_words(self.log_path)} (its log: {self.log_path}).")
            with contextlib.suppress(urllib.error.URLError, OSError):
                with urllib.request.urlopen(f"{self.dashboard_url}/api/jobs/", timeout=2) as answer:
                    if answer.status == 200:
                        return
            time.sleep(0.25)
        raise ClusterError(
            f"Ray's dashboard did not answer at {self.dashboard_url} in {START_TIMEOUT_S:.0f} s; see {self.log_path}."
        )

    def processes(self) -> list[psutil.Process]:
        """Every living process of this cluster, its jobs and their workers."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if f"{MARKER}={self.marker}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
        return found

    def stop(self) -> None:
        """End the head, then whatever of ours is left."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=15)
        mine = os.getpid()
        for send in (psutil.Process.terminate, psutil.Process.kill):
            left = [process for process in self.processes() if process.pid != mine]
            for process in left:
                with contextlib.suppress(psutil.Error):
                    send(process)
            psutil.wait_procs(left, timeout=5)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _last_words(log_path: Path) -> str:
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


class MemoryMeter:
    """Peak memory of everything together: the proportional set sizes (shared pages counted once) of all processes."""

    def __init__(self, cluster: LocalCluster, every_s: float = 2.0) -> None:
        self.cluster, self.every_s = cluster, every_s
        self.peak_bytes = self.now_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory-meter")

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.now_bytes = sum(_proportional_bytes(p.pid) for p in (psutil.Process(), *self.cluster.processes()))
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)
            self._stop.wait(self.every_s)


def _proportional_bytes(pid: int) -> int:
    """Pss of a process from /proc; its resident size where the system has no such file (macOS); 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
    return 0
