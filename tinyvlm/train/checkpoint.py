"""Checkpoints: everything that the loop needs to go on, or nothing at all.

    loop ──state──▶ copy in main memory ──a thread──▶ {root}/step-00000020/state-….pt     flushed
         goes on                                      {root}/step-00000020/done.json      names it, with size and sha256

`done.json` comes last and whole; without it the checkpoint does not exist.  No file is renamed or written twice, so the
root may lie on a disk or in an object store (storage.py).  Reading takes the newest that is complete and is what was
written.  The order of samples needs no state: it is the plan, and the step says where; nor do random numbers
(seeds.py).

    state: steps_done, skipped, plan (fingerprint), world, seed, weights, optimizer, held_out_loss (where measured)
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tinyvlm import storage
from tinyvlm.errors import CheckpointError

State = dict[str, Any]

_STEP = re.compile(r"step-\d{8}")
DONE = "done.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay."""

    newest: int = 1
    best: int = 0
    """Of those whose held-out loss was measured, so many with the smallest."""


def root_of(folder: Path, elsewhere: str = "") -> Path:
    """Where the checkpoints of a run lie: in its folder, or under its name at another address."""
    return storage.address(elsewhere) / folder.name if elsewhere else folder / "checkpoints"


def save(
    root: Path, step: int, state: State, *, keep: Keep | int = 1, before_done: Callable[[], None] = lambda: None
) -> Path:
    """Write the checkpoint of `step`, then delete what `keep` (a number: so many of the newest) does not name.

    `before_done` may refuse by raising.  What fails leaves the older checkpoints as they were.

    Raises:
        OSError: it cannot be written; a disk without room for it is not even begun to be filled.
    """
    keep = Keep(newest=keep) if isinstance(keep, int) else keep
    place = place_of(root, step)
    name = f"state-{uuid.uuid4().hex[:12]}.pt"
    try:
        _require_room(place, num_bytes(state))
        digest, size = _write(place / name, state)
        done = {
            "step": step,
            "file": name,
            "bytes": size,
            "sha256": digest,
            "held_out_loss": state.get("held_out_loss"),
        }
        before_done()
        storage.write_atomic(place / DONE, json.dumps(done))
    except BaseException:
        storage.remove(place / name)
        if not storage.entries(place):
            storage.remove_tree(place)
        raise
    stay = _stay(root, keep) | {place}
    for old in (path for path in complete(root) if path not in stay):
        storage.remove(old / DONE)
        storage.remove_tree(old)
    for entry in storage.entries(place):
        if entry.name not in (name, DONE):
            storage.remove(place / entry.name)
    return place


def place_of(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` steps done lies."""
    return root / f"step-{step:08d}"


def complete(root: Path) -> list[Path]:
    """The complete checkpoints below a root, oldest first."""
    places = [root / entry.name for entry in storage.entries(root) if _STEP.fullmatch(entry.name)]
    return sorted((place for place in places if storage.is_file(place / DONE)), key=lambda place: place.name)


def load_newest(root: Path, plan_fingerprint: str, on_skip: Callable[[str], None]) -> State | None:
    """The newest readable checkpoint, or None; those that cannot be read are skipped, and `on_skip` is told.

    Raises:
        CheckpointError: a checkpoint belongs to another plan.
    """
    for place in reversed(complete(root)):
        try:
            state = load(place)
        except CheckpointError as error:
            on_skip(f"{error} Going on from the one before it.")
            continue
        if state["plan"] != plan_fingerprint:
            raise CheckpointError(f"The checkpoint {place} belongs to another plan; delete its run and run again.")
        return state
    return None


def load(place: Path) -> State:
    """One checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is not what was written.
    """
    try:
        done = json.loads(storage.read(place / DONE))
        if storage.sha256(place / done["file"]) != done["sha256"]:
            raise ValueError("its content is not what was written")
        with (place / done["file"]).open("rb") as file:
            state: State = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"The checkpoint {place} cannot be read ({reason}).") from None
    return state


def clear(root: Path) -> None:
    """Delete what interrupted writers left behind."""
    whole = complete(root)
    for entry in storage.entries(root):
        if _STEP.fullmatch(entry.name) and root / entry.name not in whole:
            storage.remove_tree(root / entry.name)


def num_bytes(state: Any) -> int:
    """Of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(num_bytes, values))


def copied(state: Any, old: Any = None) -> Any:
    """A state with all tensors copied to main memory: what the loop does next does not reach them.

    `old`: an earlier copy whose memory is used again where it fits; page-locked memory is slow to get.
    """
    if isinstance(state, Tensor):
        fits = isinstance(old, Tensor) and old.shape == state.shape and old.dtype == state.dtype
        place = old if fits else torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return place.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        before = old if isinstance(old, dict) else {}
        return {key: copied(value, before.get(key)) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        befores = old if isinstance(old, (list, tuple)) and len(old) == len(state) else [None] * len(state)
        return type(state)(copied(value, before) for value, before in zip(state, befores, strict=True))
    return state


class Writer:
    """Saves checkpoints while training goes on, one at a time.

    A checkpoint that cannot be written (a full disk) is told and given up: the ones before it stay, and the next one is
    tried.  Whatever else goes wrong is raised by the next `save`, or by `finish`.
    """

    def __init__(
        self, root: Path, keep: Keep, *, in_background: bool = True, before_done: Callable[[], None] = lambda: None
    ) -> None:
        self._root, self._keep, self._in_background, self._before_done = root, keep, in_background, before_done
        self._copy: State | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.lost = 0
        """Checkpoints that could not be written."""
        self._lost_last = False

    def save(self, step: int, state: State) -> None:
        """Take a copy and write it, after the one before is written."""
        self.finish()
        if not self._in_background:
            self._write(step, state)
            self.finish()
            return
        self._copy = copied(state, self._copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._write, args=(step, self._copy), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Wait until nothing is being written; whether the last checkpoint is there.  Raises what else went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return not self._lost_last

    def _write(self, step: int, state: State) -> None:
        try:
            save(self._root, step, state, keep=self._keep, before_done=self._before_done)
            self._lost_last = False
        except OSError as error:
            self.lost, self._lost_last = self.lost + 1, True
            kept = complete(self._root)
            log.warning(
                "the checkpoint of step %d could not be written (%s); training goes on, and the newest one is %s",
                *(step, error.strerror or error, kept[-1].name if kept else "none"),
            )
        except BaseException as error:  # it is another thread's to raise
            self._failure = error


class _Hashing:
    """A file that is only written to, from its start to its end, and what went through it."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _write(path: Path, state: State) -> tuple[str, int]:
    """sha256 and size of a new file that holds a state; on a disk, flushed to the medium."""
    with storage.writing(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(state, cast(Any, hashing))
        except RuntimeError as error:  # what torch makes of any error in the middle of a file
            raise hashing.failure or error from None
    return hashing.digest.hexdigest(), hashing.size


def _require_room(place: Path, wanted: int) -> None:
    if storage.is_object(place):
        return
    storage.disk.make_folder(place)
    free = shutil.disk_usage(place).free
    if free < wanted:
        said = f"{wanted >> 20} MiB wanted, {free >> 20} MiB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {said}", str(place))


def _stay(root: Path, keep: Keep) -> set[Path]:
    """The checkpoints that are kept."""
    whole = complete(root)
    measured = []
    for place in whole if keep.best else []:
        loss = json.loads(storage.read(place / DONE)).get("held_out_loss")
        if loss is not None:
            measured.append((loss, place.name, place))
    return {*whole[-keep.newest :], *(place for *_, place in sorted(measured)[: keep.best])}
