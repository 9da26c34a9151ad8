"""Checkpoints: whole or not there, written behind training's back, and lost only together with the disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tinyvlm import storage
from tinyvlm.errors import CheckpointError, StageError
from tinyvlm.train import checkpoint
from tinyvlm.train.checkpoint import Keep, Writer, complete, load, load_newest, save


def state(step: int, value: float = 0.0, loss: float | None = None) -> checkpoint.State:
    weights = {"a": torch.full((300,), value), "b": torch.arange(6).reshape(2, 3)}
    return {"steps_done": step, "plan": "p", "weights": weights, "held_out_loss": loss, "list": [torch.ones(2), "x"]}


def names(root: Path) -> list[str]:
    return [place.name for place in complete(root)]


def equal(left: Any, right: Any) -> bool:
    """Same structure, same types, same bits."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and left == right


def tensors(value: Any) -> list[torch.Tensor]:
    """All of them, wherever they are."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in inside for tensor in tensors(one)]


@pytest.fixture(params=["disk", "object store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "run" if request.param == "disk" else request.getfixturevalue("bucket") / "run"


def test_what_is_read_is_what_was_written(root: Path) -> None:
    for step in (1, 2, 3):
        save(root, step, state(step, step), keep=2)
    assert names(root) == ["step-00000002", "step-00000003"]
    newest = load_newest(root, "p", pytest.fail)
    assert newest is not None
    assert equal(newest, state(3, 3))
    with pytest.raises(CheckpointError, match="another plan"):
        load_newest(root, "q", pytest.fail)


@pytest.mark.parametrize("damage", ["cut off", "one bit", "gone", "done.json"])
def test_one_that_is_damaged_gives_way_to_the_one_before(root: Path, damage: str) -> None:
    for step in (1, 2):
        save(root, step, state(step, step), keep=2)
    place = complete(root)[-1]
    path = place / json.loads(storage.read(place / "done.json"))["file"]
    content = bytearray(storage.read(path))
    content[len(content) // 2] ^= 1
    if damage == "gone":
        storage.remove(path)
    elif damage == "done.json":
        storage.write_atomic(place / "done.json", "{")
    else:
        storage.write_atomic(path, content[:-100] if damage == "cut off" else bytes(content))
    said: list[str] = []
    older = load_newest(root, "p", said.append)
    assert older is not None
    assert older["steps_done"] == 1
    assert "step-00000002 cannot be read" in said[0]
    assert "the one before" in said[0]
    save(root, 2, state(2, 5), keep=2)
    assert load(place)["weights"]["a"][0] == 5
    assert len(storage.entries(place)) == 2, "what was damaged is gone"


def test_the_best_are_kept_besides_the_newest(root: Path) -> None:
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 4.0, None)):
        save(root, step, state(step, loss=loss), keep=Keep(newest=1, best=2))
    assert names(root) == ["step-00000001", "step-00000002", "step-00000005"]


def test_what_a_killed_writer_left_is_no_checkpoint(root: Path) -> None:
    save(root, 1, state(1))
    storage.write_atomic(root / "step-00000002" / "state-abc.pt", b"half")
    assert names(root) == ["step-00000001"]
    checkpoint.clear(root)
    assert [entry.name for entry in storage.entries(root)] == ["step-00000001"]


def test_the_copy_does_not_change_under_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training changes the weights in place while they are written; and a second save waits for the first."""
    begun, may_go_on, write = threading.Event(), threading.Event(), checkpoint._write

    def slow(path: Path, given: checkpoint.State) -> tuple[str, int]:
        begun.set()
        assert may_go_on.wait(10)
        return write(path, given)

    monkeypatch.setattr(checkpoint, "_write", slow)
    writer, live = Writer(tmp_path, Keep(newest=5)), state(1, 1.0)
    writer.save(1, live)
    assert begun.wait(10)
    live["weights"]["a"].fill_(2.0)
    live["list"][0].fill_(7.0)
    second = threading.Thread(target=writer.save, args=(2, {**live, "steps_done": 2}))
    second.start()
    second.join(0.1)
    assert second.is_alive(), "one at a time"
    may_go_on.set()
    second.join(10)
    live["weights"]["a"].fill_(3.0)
    writer.finish()
    first, then = (load(place) for place in complete(tmp_path))
    assert (first["weights"]["a"][0], first["list"][0][0], then["weights"]["a"][0]) == (1.0, 1.0, 2.0)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_costs_the_new_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, in_background: bool
) -> None:
    writer = Writer(tmp_path, Keep(newest=1), in_background=in_background)
    writer.save(1, state(1))
    writer.finish()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        writer.save(2, state(2))
        assert not writer.finish()
    assert names(tmp_path) == ["step-00000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert writer.lost == 1
    assert "step 2 could not be written (No space left on device" in caplog.text
    assert "the newest one is step-00000001" in caplog.text
    with monkeypatch.context() as patch:  # full in the middle of the file
        patch.setattr(storage, "writing", _full_after(500))
        writer.save(3, state(3))
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    writer.save(4, state(4))
    assert writer.finish()
    assert names(tmp_path) == ["step-00000004"]


@pytest.mark.parametrize("in_background", [True, False])
def test_another_error_is_raised_at_the_next_save_or_the_end(tmp_path: Path, in_background: bool) -> None:
    def refuse() -> None:
        raise StageError("now belongs to another driver")

    writer = Writer(tmp_path, Keep(), in_background=in_background, before_done=refuse)
    if in_background:
        writer.save(1, state(1))
    with pytest.raises(StageError, match="another driver"):
        writer.finish() if in_background else writer.save(1, state(1))
    writer.finish()
    assert names(tmp_path) == []


def test_eight_bit_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    eight_bit = pytest.importorskip("bitsandbytes.optim")
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(100, 100)), torch.nn.Parameter(torch.randn(30))]

    def step(some: list[torch.nn.Parameter], optimizer: Any, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for parameter in some:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()

    optimizer = eight_bit.AdamW8bit(parameters, lr=1e-2)
    for seed in range(3):
        step(parameters, optimizer, seed)
    kept = {"plan": "p", "optimizer": optimizer.state_dict(), "weights": [p.detach() for p in parameters]}
    assert {tensor.dtype for tensor in tensors(kept["optimizer"])} >= {torch.uint8, torch.float32}
    save(tmp_path, 3, kept)
    again = load(complete(tmp_path)[0])
    others = [torch.nn.Parameter(weights.clone()) for weights in again["weights"]]
    restored = eight_bit.AdamW8bit(others, lr=1e-2)
    restored.load_state_dict(again["optimizer"])
    assert equal(restored.state_dict()["state"], optimizer.state_dict()["state"])
    step(parameters, optimizer, 9)
    step(others, restored, 9)
    assert equal(restored.state_dict()["state"], optimizer.state_dict()["state"])
    assert all(map(torch.equal, parameters, others))


def _full_after(size: int) -> Any:
    """`storage.writing` on a disk that has so much room."""

    @contextmanager
    def writing(path: Path) -> Iterator[Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:

            def write(data: Any) -> None:
                if file.tell() + len(data) > size:
                    raise OSError(28, "No space left on device")
                file.write(data)

            yield SimpleNamespace(write=write, flush=file.flush)

    return writing
