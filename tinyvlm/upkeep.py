"""Looking after a stage folder: check it, drop what is damaged, remove what nobody needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tinyvlm import storage, takedown
from tinyvlm.errors import DataError, StageError
from tinyvlm.folders import Manifest, part_of
from tinyvlm.lease import STALE_S, Lease


def verify(folder: Path) -> list[str]:
    """Differences between a folder's files and its manifest, in words; empty when all is well.

    Raises:
        DataError: the folder is not finished.
    """
    problems: list[str] = []
    try:
        manifest = Manifest.read(folder)
    except StageError as error:
        raise DataError(str(error)) from None
    for name, entry in manifest.files.items():
        path = folder / name if "/" in name else folder / "data" / name
        if not storage.is_file(path):
            problems.append(f"{name} is missing")
        elif storage.sha256(path) != entry["sha256"]:
            problems.append(f"{name} has changed")
    return problems


def discard_damaged(folder: Path) -> list[str]:
    """Remove the data files that are missing or not as the manifest says, and the manifest; gives their names.

    The same command then does those parts again, and no others.

    Raises:
        DataError: the folder is not finished, or a driver works in it.
    """
    damaged = [problem.split(" ")[0] for problem in verify(folder)]
    if not damaged:
        return []
    with Lease.take(folder):
        # Without a manifest the newest generation of a part counts: there must be none left of these.
        indices = {part[0] for name in damaged if (part := part_of(name))}
        for name in storage.sizes(folder / "data"):
            part = part_of(name)
            if part and part[0] in indices:
                storage.remove(folder / "data" / name)
        for name in damaged:
            storage.remove(folder / name if "/" in name else folder / "data" / name)
        # Last, so that a folder that lacks them is not taken for one that was merely interrupted.
        storage.remove(folder / "manifest.json")
    return damaged


def tidy(folder: Path) -> list[Path]:
    """Remove half-written files that killed workers left; a lease file in the making may be another driver's."""
    return [
        path
        for place in (folder, folder / "data")
        for path in _remove_entries(place, lambda name: name.startswith(".") and name.endswith(".tmp"))
    ]


def _remove_entries(folder: Path, chosen: Callable[[str], bool]) -> list[Path]:
    removed = []
    for entry in storage.entries(folder):
        path = folder / entry.name
        in_the_making = path.name.startswith(".lease") and not _is_old(path)
        if chosen(entry.name) and not in_the_making:
            (storage.remove_tree if entry.is_folder else storage.remove)(path)
            removed.append(path)
    return removed


def _is_old(path: Path) -> bool:
    try:
        return time.time() - storage.modified(path) > STALE_S
    except FileNotFoundError:
        return False


def clean(folder: Path) -> list[Path]:
    """Remove what the manifest of a finished folder does not name: older generations, journals, half-written files.

    Raises:
        DataError: the folder is not finished, or a driver works in it.
    """
    Manifest.read(folder)
    with Lease.take(folder):
        manifest = Manifest.read(folder)
        pointers, pointer = folder.parent / "latest", f".{manifest.stage}.json."
        lists = folder.parent / takedown.FOLDER
        return [
            *_remove_entries(folder / "data", lambda name: name not in manifest.files),
            *_remove_entries(pointers, lambda name: name.startswith(pointer) and _is_old(pointers / name)),
            *_remove_entries(lists, lambda name: name.startswith(".") and _is_old(lists / name)),
            *tidy(folder),
        ]
