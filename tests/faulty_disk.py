"""A disk and an object store that fail at one chosen operation, and a server that runs victims on them.

    test ──one case a line──▶ server ──fork──▶ victim: a command on a FaultyDisk ──▶ how it ended

The server has one thread and imports everything once, so a victim costs milliseconds and can die as from kill -9.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from tinyvlm import object_store, storage
from tinyvlm.errors import TinyVLMError

DIED, REFUSED, FINISHED, BROKE = 9, 3, 0, 4
"""How a victim ends: killed by its disk, with a sentence, without meeting the fault, with any other exception."""

DEADLY = ("before", "after", "torn", "power")
FAILING = ("full", "io")
"""`full`: no more space, for this operation and all that follow.  `io`: this one operation fails."""


@dataclass(frozen=True)
class Case:
    """`module:function(root)` is run on a disk that fails in the way `mode` at its operation number `at`."""

    command: str
    root: str
    mode: str = ""
    at: int = -1
    log: str = ""
    """Where the names of the operations are written, one a line."""


class FaultyDisk(storage.Disk):
    """Counts what changes the disk, and fails once."""

    def __init__(self, mode: str, at: int) -> None:
        self.mode, self.at, self.names = mode, at, list[str]()
        self._unsynced: set[Path] = set()

    def make_folder(self, path: Path) -> None:
        if not path.is_dir():
            self._step("make_folder", path, lambda: super(FaultyDisk, self).make_folder(path))

    def write(self, path: Path, content: bytes | memoryview | pa.Buffer) -> None:
        self._unsynced.add(path)
        self._step("write", path, lambda: super(FaultyDisk, self).write(path, content))

    def write_table(self, path: Path, table: pa.Table, options: dict[str, Any]) -> None:
        self._unsynced.add(path)
        self._step("write", path, lambda: super(FaultyDisk, self).write_table(path, table, options))

    def sync(self, path: Path) -> None:
        self._step("sync", path, lambda: None)  # the only power that fails here is this class's
        self._unsynced.discard(path)

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename", new, lambda: super(FaultyDisk, self).rename(old, new))
        self._moved(old, new)

    def link(self, old: Path, new: Path) -> None:
        self._step("link", new, lambda: super(FaultyDisk, self).link(old, new))
        self._moved(old, new)

    def create(self, path: Path) -> None:
        self._step("create", path, lambda: super(FaultyDisk, self).create(path))

    def remove(self, path: Path) -> None:
        self._step("remove", path, lambda: super(FaultyDisk, self).remove(path))

    def remove_folder(self, path: Path) -> None:
        self._step("remove_folder", path, lambda: super(FaultyDisk, self).remove_folder(path))

    def _moved(self, old: Path, new: Path) -> None:
        if old in self._unsynced:
            self._unsynced.add(new)

    def _step(self, name: str, path: Path, operation: Callable[[], None]) -> None:
        number = len(self.names)
        self.names.append(f"{name} {path.name}")
        if number < self.at or (number > self.at and self.mode != "full") or not self.mode:
            operation()
        elif self.mode == "full":
            if name in ("write", "make_folder", "create", "link", "sync"):
                if name == "write":
                    operation()
                    _halve(path)
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            operation()
        elif self.mode == "io":
            raise OSError(errno.EIO, "Input/output error", str(path))
        else:
            if self.mode != "before":
                operation()
            if self.mode == "torn" and name == "write":
                _halve(path)
            if self.mode == "power":
                for unsynced in self._unsynced:
                    _halve(unsynced)
            os._exit(DIED)


class FaultyStore(object_store.ObjectStore):
    """The same for an object store, where a put is whole or was not."""

    def __init__(self, mode: str, at: int) -> None:
        self.mode, self.at, self.names = mode, at, list[str]()

    def put(self, path: Path, content: bytes, *, new: bool = False) -> None:
        self._step("put", path, lambda: super(FaultyStore, self).put(path, content, new=new))

    def remove(self, path: Path) -> None:
        self._step("remove", path, lambda: super(FaultyStore, self).remove(path))

    def remove_tree(self, path: Path) -> None:
        self._step("remove_tree", path, lambda: super(FaultyStore, self).remove_tree(path))

    def _step(self, name: str, path: Path, operation: Callable[[], None]) -> None:
        number = len(self.names)
        self.names.append(f"{name} {path.name}")
        if number != self.at or self.mode != "before":
            if number == self.at and self.mode == "io":
                raise OSError(errno.EIO, "the store does not answer", str(path))
            operation()
        if number == self.at and self.mode in DEADLY:
            os._exit(DIED)


def _halve(path: Path) -> None:
    if path.is_file():
        os.truncate(path, path.stat().st_size // 2)


class Victims:
    """Runs cases.  Use as a context manager."""

    def __init__(self, python: list[str]) -> None:
        self._command = [*python, "-c", "import faulty_disk; faulty_disk.serve()"]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def run(self, case: Case) -> int:
        """How the victim ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(case)) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def serve() -> None:
    """Fork a victim for each line of stdin, and tell how it ended."""
    import test_faults

    test_faults.make_quick()
    importlib.import_module("s3fs")
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _be_victim(Case(**json.loads(line)))
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _be_victim(case: Case) -> None:
    module, function = case.command.split(":")
    root = storage.address(case.root)
    place: FaultyDisk | FaultyStore
    if storage.is_object(root):
        storage.objects = place = FaultyStore(case.mode, case.at)
    else:
        storage.disk = place = FaultyDisk(case.mode, case.at)
    code = FINISHED
    try:
        getattr(importlib.import_module(module), function)(root)
    except (TinyVLMError, OSError):
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        code = BROKE
    if case.log:
        Path(case.log).write_text("\n".join(place.names))
    sys.stderr.flush()
    os._exit(code)
