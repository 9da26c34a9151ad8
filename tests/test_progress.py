"""What a running stage says of itself: in words, in progress.json, on a terminal and as Ray metrics."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_jobs import _progress
from ray_jobs._metrics import COUNTERS, GAUGES, StageMetrics
from ray_jobs._progress import Progress, clock
from tinyvlm.folders import Part, PartResult

PARTS = [Part(index, "links.parquet", index * 1000, 1000) for index in range(12)]


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hands = Clock()
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=hands, time=time.time))
    return hands


def result(index: int, rows_in: int = 1000, num_bytes: int = 7, **counts: int) -> PartResult:
    named = {name.replace("__", "."): count for name, count in counts.items()}
    return PartResult(index, rows_in, named or {"ok": rows_in}, num_bytes)


def test_a_line_says_the_most_important_first(tmp_path: Path, hands: Clock) -> None:
    progress = Progress("download", tmp_path, PARTS)
    assert progress.line() == "download 0/12,000 rows · 0/12 parts"
    hands.now += 10
    progress.add(result(4, ok=700, timeout__read=100, timeout__total=80, dead__dns=90, bad_url=20, blocked__403=10))
    assert progress.line() == (
        "download 1,000/12,000 rows · 1:50 left · 100 rows/s, 70 ok/s · 700 ok · "
        "300 failed: timeout 180, dead 90, bad_url 20 · 1/12 parts"
    )
    assert progress.content()["text"] == progress.line().removeprefix("download ")


def test_the_speed_is_that_of_the_last_half_minute(tmp_path: Path, hands: Clock) -> None:
    progress = Progress("download", tmp_path, PARTS)
    for second in range(1, 101):  # a thousand seconds of 1 row/s, then 20 rows/s
        hands.now += 10
        progress.partial(0, {"ok": 10 * second})
    assert progress.rows_per_s == pytest.approx(1, rel=0.05)
    for second in range(1, 46):
        hands.now += 1
        progress.partial(1, {"ok": 20 * second})
    assert progress.rows_per_s == pytest.approx(20, rel=0.05)
    assert progress.seconds_left == pytest.approx((12_000 - 1900) / 20, rel=0.05)


def test_large_parts_do_not_make_the_speed_jump(tmp_path: Path, hands: Clock) -> None:
    """A part each two minutes: in between nothing is news, and yet the speed is known."""
    progress = Progress("encode", tmp_path, PARTS)
    seen = []
    for index in range(4):
        for _ in range(12):
            hands.now += 10
            progress.partial(11, {})
            seen.append(progress.rows_per_s)
        progress.add(result(index))
    assert seen[:12] == [0] * 12, "nothing is known yet"
    assert all(1000 / 240 - 0.01 <= speed <= 1000 / 120 for speed in seen[12:])


def test_rows_of_parts_in_work_count_until_the_part_is_done(tmp_path: Path, hands: Clock) -> None:
    progress = Progress("download", tmp_path, PARTS)
    hands.now += 5
    progress.partial(0, {"ok": 300, "throttled": 100})
    progress.partial(1, {"ok": 50})
    assert (progress.rows_done, progress.rows_in_work, progress.counts["ok"]) == (450, 450, 350)
    progress.partial(0, {"ok": 20})  # its worker died, and it is done again
    assert (progress.rows_done, progress.counts["throttled"]) == (70, 0)
    progress.add(result(0, ok=900, throttled=100))
    content = progress.content()
    assert (content["rows"], content["rows_done"], content["rows_in_work"]) == (1000, 1050, 50)
    assert content["statuses"] == {"ok": 950, "throttled": 100}
    progress.partial(99, {"ok": 5})  # no part of this stage
    progress.partial(1, {"ok": 2000, "corrupt": 1})  # a stage that fans out
    assert progress.rows_done == 2000, "never more than the part has rows"


def test_what_an_earlier_run_did_counts_but_not_for_the_speed(tmp_path: Path, hands: Clock) -> None:
    progress = Progress("download", tmp_path, PARTS, [result(0, ok=600, dead__dns=400), result(1)])
    assert progress.line() == "download 2,000/12,000 rows · 1,600 ok · 400 failed: dead 400 · 2/12 parts"
    hands.now += 10
    progress.add(result(2))
    assert progress.rows_per_s == pytest.approx(100)
    assert progress.seconds_left == pytest.approx(90)


def test_rows_that_a_stage_before_rejected_are_told_apart(tmp_path: Path, hands: Clock) -> None:
    progress = Progress("preprocess", tmp_path, PARTS[:2])
    hands.now += 1
    progress.add(result(0, rows_in=640))
    progress.add(result(1, rows_in=650))
    progress.state = "done"
    assert (
        progress.line()
        == "preprocess 2,000/2,000 rows · 2,000 rows/s, 1,290 ok/s · 1,290 ok · 710 rejected before · 2/2 parts"
    )


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (750, "12:30"), (11_110, "3:05:10")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_while_it_runs_a_file_says_the_same_and_the_log_has_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_progress, "EVERY_S", 0.02)
    counts: dict[int, Mapping[str, int]] = {}
    with (
        caplog.at_level(logging.INFO, "ray_jobs"),
        Progress("download", tmp_path, PARTS, poll=lambda: counts) as progress,
    ):
        counts[3] = {"ok": 123}
        deadline = time.monotonic() + 10
        while "123/12,000 rows" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        content = json.loads((tmp_path / "progress.json").read_text())
        assert (content["state"], content["rows_done"], content["parts"]) == ("running", 123, 12)
        counts[4] = None  # type: ignore[assignment]  # what is asked may break; the work goes on
        time.sleep(0.1)
        progress.add(result(3))
    last = json.loads((tmp_path / "progress.json").read_text())
    assert (last["state"], last["rows_done"], last["parts_done"]) == ("done", 1000, 1)
    assert caplog.messages[-1].startswith("download 1,000/12,000 rows")
    assert "\x1b" not in caplog.text


def test_a_long_run_says_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An hour with news every two seconds."""
    hands = Clock()
    progress = Progress("download", tmp_path, PARTS)

    def wait(seconds: float) -> bool:
        hands.now += seconds
        progress.partial(0, {"ok": int(hands.now) % 1000})
        return hands.now > 1000 + 3600

    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=hands, time=time.time))
    monkeypatch.setattr(progress, "_started", hands.now)
    monkeypatch.setattr(progress, "_stop", SimpleNamespace(wait=wait))
    monkeypatch.setattr(progress, "_tell", lambda: None)
    with caplog.at_level(logging.INFO, "ray_jobs"):
        progress._watch()
    assert 60 <= len(caplog.messages) <= 150


CODE = """
    import logging, sys, time
    from pathlib import Path
    from ray_jobs import _cli, _progress
    from tinyvlm.folders import Part, PartResult
    _cli._set_up_logging()
    _progress.EVERY_S = 0.1
    parts = [Part(i, "x", 0, 1000) for i in range(3)]
    with _progress.Progress("download", Path(sys.argv[1]), parts) as progress:
        progress.add(PartResult(0, 1000, {"ok": 900, "dead.dns": 100}, 1))
        time.sleep(1.2)
        logging.getLogger("tinyvlm").warning("beside it")
        time.sleep(0.6)
"""


def run_at_terminal(code: str, *arguments: str) -> str:
    """What a program writes to a terminal of 100 columns."""
    outer, inner = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=environment,
    ) as process:
        os.close(inner)
        written = b""
        while True:
            try:
                piece = os.read(outer, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            written += piece
    os.close(outer)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_on_a_terminal_a_table_is_renewed_in_place(tmp_path: Path) -> None:
    written = run_at_terminal(CODE, str(tmp_path))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "33% 1,000/3,000 rows" in plain
    assert "100 failed: dead 100" in plain
    assert "\x1b[" in written
    assert re.search(r"\d\d:\d\d:\d\d beside it", plain), "a log line stands above the table"
    lines = [line for line in plain.splitlines() if re.match(r"\d\d:\d\d:\d\d download", line.strip())]
    assert len(lines) == 1, "only the last word is a line of the log"


def test_off_a_terminal_there_are_no_control_characters(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"},
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stderr
    assert 2 <= len(done.stderr.splitlines()) <= 8


# --- Ray's metrics


class Recorder:
    """Stands in for ray.util.metrics: keeps what it is told."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}

    def _make(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        assert description

        def place(tags: dict[str, str]) -> tuple[str, str]:
            assert set(tags) == set(tag_keys)
            return name, tags.get("status", "")

        def inc(value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray raises"
            self.values[place(tags)] = self.values.get(place(tags), 0) + value

        def put(value: float, tags: dict[str, str]) -> None:
            self.values[place(tags)] = value

        return SimpleNamespace(inc=inc, set=put)

    Counter = Gauge = _make


def test_metrics_say_what_the_line_says(tmp_path: Path, hands: Clock) -> None:
    recorder = Recorder()
    with Progress("download", tmp_path, PARTS, metrics=StageMetrics("download", recorder)) as progress:
        hands.now += 10
        progress.add(result(0, ok=900, dead__dns=100, corrupt=0, num_bytes=5000))
        progress.add(result(1, num_bytes=0))
        progress.partial(2, {"ok": 30})
        progress._tell()
        values = {name: value for (name, _), value in recorder.values.items()}
        assert recorder.values["tinyvlm_rows", "ok"] == 1900
        assert recorder.values["tinyvlm_rows", "dead.dns"] == 100
        assert values["tinyvlm_bytes_written"] == 5000
        assert (values["tinyvlm_input_rows"], values["tinyvlm_input_rows_done"]) == (12_000, 2030)
        assert (values["tinyvlm_rows_in_flight"], values["tinyvlm_parts_done"], values["tinyvlm_parts"]) == (30, 2, 12)
        assert values["tinyvlm_rows_per_second"] == pytest.approx(progress.rows_per_s)
        assert values["tinyvlm_seconds_left"] == pytest.approx(progress.seconds_left)
    assert recorder.values["tinyvlm_seconds_left", ""] == 0
    assert recorder.values["tinyvlm_rows_per_second", ""] == 0
    assert {name for name, _ in recorder.values} == {*COUNTERS, *GAUGES}


@pytest.mark.ray
def test_metrics_are_on_the_nodes_port(quick_metrics: Any, tmp_path: Path) -> None:
    node = quick_metrics.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with Progress("download", tmp_path, PARTS, metrics=StageMetrics("download")) as progress:
        progress.add(result(0, ok=900, dead__dns=100))
        progress._tell()
        deadline, text = time.monotonic() + 60, ""
        wanted = ("ray_tinyvlm_rows_total", "ray_tinyvlm_seconds_left", "ray_tinyvlm_parts_done")
        while time.monotonic() < deadline and not all(name in text for name in wanted):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(address, timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                continue
    samples = [line for line in text.splitlines() if line.startswith("ray_tinyvlm_")]
    ok = [line for line in samples if line.startswith("ray_tinyvlm_rows_total") and 'status="ok"' in line]
    assert len(ok) == 1, text[:2000]
    assert 'stage="download"' in ok[0]
    assert float(ok[0].split()[-1]) == 900
    assert {line.split("{")[0].removesuffix("_total") for line in samples} >= {
        f"ray_{name}" for name in (*COUNTERS, *GAUGES)
    }
