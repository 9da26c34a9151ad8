"""Checkpoints: everything that the loop needs to go on, or nothing at all.

    {folder}/checkpoints/step-00000020/state.pt    weights, optimizer, random state, step, plan fingerprint
                                       done.json   written last; without it the checkpoint does not exist

A checkpoint is written in a folder of another name, which is then renamed.  Reading takes the newest that is complete
and readable.  The sample order needs no state: it is the plan, and the step says where.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinyvlm.errors import CheckpointError

State = dict[str, Any]


def save(folder: Path, step: int, state: State, *, keep: int, before_rename: Callable[[], None] = lambda: None) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`.  `before_rename` may refuse by raising."""
    root = folder / "checkpoints"
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    with (temporary / "state.pt").open("wb") as file:
        torch.save({"step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    size = (temporary / "state.pt").stat().st_size
    (temporary / "done.json").write_text(json.dumps({"step": step, "bytes": size}))
    before_rename()
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path.parent for path in (folder / "checkpoints").glob("step-*/done.json")]
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))


def load_newest(folder: Path, plan_fingerprint: str, on_skip: Callable[[str], None]) -> State | None:
    """The newest readable checkpoint, or None; those that cannot be read are skipped, and `on_skip` is told.

    Raises:
        CheckpointError: a checkpoint belongs to another plan.
    """
    for path in reversed(complete(folder)):
        try:
            state: State = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            on_skip(f"The checkpoint {path} cannot be read ({reason}); going on from the one before it.")
            continue
        if state["plan"] != plan_fingerprint:
            raise CheckpointError(f"The checkpoint {path} belongs to another plan; delete {folder} and run again.")
        return state
    return None


def clear(folder: Path) -> None:
    """Delete what interrupted writers left behind."""
    for path in (folder / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
