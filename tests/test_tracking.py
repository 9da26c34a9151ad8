"""Numbers reach TensorBoard's files and wandb's offline run; trackers that hang or fail cost the training nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tinyvlm.train import tracking
from tinyvlm.train.tracking import Tracking, open_tracking


class Kept:
    def __init__(self) -> None:
        self.lines: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.lines.append((step, numbers))

    def close(self) -> None:
        self.closed = True


class Broken(Kept):
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        raise ConnectionError("the service is down")


class Hanging(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.go_on.wait()


def test_both_get_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracks = open_tracking(tmp_path, "tinyvlm", "pretrain-0123456789ab", {"seed": 1})
    for step in range(1, 4):
        tracks.log(step, {"loss": 1.0 / step})
    tracks.close()
    events = list((tmp_path / "tensorboard").glob("events.*"))
    assert len(events) == 1
    assert events[0].read_bytes().count(b"loss") == 3
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    until = time.monotonic() + 60  # its writer is a process of its own
    while runs[0].stat().st_size <= 100 and time.monotonic() < until:
        time.sleep(0.1)
    assert runs[0].stat().st_size > 100


def test_tensorboard_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    board = tracking.TensorBoard(tmp_path)
    for step in (1, 2, 3, 2, 3):
        board.log(step, {"train/loss": 1.0})
        board.log(max(1, step - 1), {"held_out/bleu_4": 0.1})  # comes late, and hides nothing
    board.close()
    again = tracking.TensorBoard(tmp_path)
    again.log(3, {"train/loss": 1.0})
    again.close()
    found = [restarts(path) for path in (tmp_path / "tensorboard").glob("events.*")]
    assert sorted(step for steps in found for step in steps) == [2, 3]


def restarts(path: Path) -> list[int]:
    """Steps from which on an event file hides what others say: TFRecords of (length, checksum, event, checksum)."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    content, place, steps = path.read_bytes(), 0, list[int]()
    while place < len(content):
        length = int.from_bytes(content[place : place + 8], "little")
        event = Event.FromString(content[place + 12 : place + 12 + length])
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            steps.append(event.step)
        place += 16 + length
    return steps


def test_without_a_key_wandb_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking._mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking._mode() == "online"


def test_one_that_fails_is_told_about_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    good = Kept()
    with caplog.at_level(logging.WARNING):
        tracks = Tracking({"broken": Broken, "good": lambda: good})
        for step in range(5):
            tracks.log(step, {"loss": 1.0})
        tracks.close()
    assert [step for step, _ in good.lines] == list(range(5))
    assert good.closed
    assert caplog.text.count("going on without broken") == 1


def test_one_that_hangs_does_not_hold_training_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CLOSE_S", 0.2)
    hanging = Hanging()
    tracks = Tracking({"hanging": lambda: hanging})
    started = time.perf_counter()
    for step in range(2 * tracking.MAX_WAITING):
        tracks.log(step, {"loss": 1.0})
    tracks.close()
    assert time.perf_counter() - started < 5
    assert tracks.dropped > 0
    hanging.go_on.set()
