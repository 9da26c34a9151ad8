"""The whole line on a miniature budget, through a real local Ray: links in, answers out, and the same command again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ray_jobs._local_cluster import MARKER, free_port
from ray_jobs.demo import STAGES

ROOT = Path(__file__).parent.parent
SMALL = (
    *("--pictures", "150"),
    *("--set", "links.rows_per_part=100"),
)


def run_demo(output: Path, *more: str, ports: tuple[int, int, int]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    options = ("--dashboard-port", str(ports[0]), "--port", str(ports[1]), "--web-port", str(ports[2]))
    command = [sys.executable, "-m", "ray_jobs.demo", "--exit", "--output", str(output), *options, *SMALL, *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def leftovers() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if MARKER in process.environ():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whole_line_and_again(tmp_path: Path) -> None:
    output, ports = tmp_path / "demo", (free_port(), free_port(), free_port())
    first = run_demo(output, ports=ports)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["minutes_by_stage"]) == {"start", *STAGES}
    assert 0 <= summary["accuracy"] <= 1
    assert summary["peak_memory_gib"] > 0
    assert len(summary["asked"]) == 5
    report = (output / "report.html").read_text()
    assert all(stage in report for stage in STAGES if stage != "serve")
    assert "http://" not in report.replace("http://www.w3.org", "").split("<body>")[0]
    manifests = {path: path.stat().st_mtime_ns for path in output.glob("*/manifest.json")}
    assert len(manifests) == len(STAGES), "all but serve, and the list of links"

    started = time.monotonic()
    second = run_demo(output, ports=ports)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/manifest.json")} == manifests
    assert second.stdout.count("finished before") == len(STAGES) - 1
    assert time.monotonic() - started < 300
    assert leftovers() == []


def test_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        ports = (free_port(), held.getsockname()[1], free_port())
        done = run_demo(tmp_path / "demo", ports=ports)
    assert done.returncode == 2
    assert f"Port {ports[1]}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "demo").exists()


def test_wrong_setting_is_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    ports = (free_port(), free_port(), free_port())
    done = run_demo(tmp_path / "demo", "--set", "sft.epoch=3", ports=ports)
    assert done.returncode == 2
    assert "sft.epochs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "demo").exists()
