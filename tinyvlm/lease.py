"""A lease with a fencing number: keeps two drivers out of one stage folder.

    {folder}/lease-000001.json    made exclusively by whoever takes number 1; its holder alone rewrites it, to renew it
    {folder}/lease-000002.json    the next holder's: from now on whoever works under a smaller number is refused

The highest number is the lease.  Another driver takes over when the holder gave it back, when its process on this host
is dead, or when it has not renewed for `STALE_S`.  Each holder writes only its own file, so one that was suspended and
wakes up late cannot push its successor out.  Ages are differences of two times given by the folder's own file system:
the clocks of two hosts need not agree.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tinyvlm import storage
from tinyvlm.errors import StageError

RENEW_S = 5.0
STALE_S = 30.0
_NAME = re.compile(r"lease-(\d+)\.json")

log = logging.getLogger(__name__)


class Lease:
    """Use as a context manager: `with Lease.take(folder) as lease: … lease.number …`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    @classmethod
    def take(cls, folder: Path) -> Lease:
        """Take the lease of `folder`, which is made if it is not there.

        Raises:
            StageError: another living driver holds it, or the folder cannot be written.
        """
        try:
            last = _last_number(folder)
            if last:
                _refuse_if_held(folder, last)
            return cls(folder, last + 1)._claim()
        except OSError as error:
            raise StageError(f"Cannot write in {folder} ({error.strerror or error}); give another --output.") from error

    @staticmethod
    def check(folder: Path, number: int) -> None:
        """Raises StageError when the lease of `folder` has moved on from `number`."""
        last = _last_number(folder)
        if last != number:
            now = last or "none"
            raise StageError(
                f"{folder} now belongs to another driver (lease {now}, ours was {number}); nothing written."
            )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if _last_number(self.folder) == self.number:
                self._write(free=True)
        except OSError as problem:  # the work is done, or its own error is the news; this process ends soon
            log.warning("the lease of %s was not given back: %s", self.folder, problem)

    def _claim(self) -> Lease:
        """Of two drivers that want the same number one creates its file; a number that is already past is given up."""
        mine = _file(self.folder, self.number)
        try:
            storage.create(mine, self._content(free=False))
        except FileExistsError:
            raise StageError(f"{self.folder} is being taken by another driver at this moment; run again.") from None
        if _last_number(self.folder) != self.number:
            storage.remove(mine)
            raise StageError(f"{self.folder} was taken by another driver at this moment; run again.")
        for number in _numbers(self.folder):
            if number < self.number:
                storage.remove(_file(self.folder, number))
        return self

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if _last_number(self.folder) != self.number:
                    return
                self._write(free=False)
            except OSError as error:  # a full disk or a lost mount: the next round may do better
                log.warning("the lease of %s was not renewed: %s", self.folder, error)

    def _write(self, *, free: bool) -> None:
        storage.write_atomic(_file(self.folder, self.number), self._content(free=free))

    def _content(self, *, free: bool) -> str:
        return json.dumps({"number": self.number, "host": _host(), "pid": os.getpid(), "free": free})


def _file(folder: Path, number: int) -> Path:
    return folder / f"lease-{number:06d}.json"


def _numbers(folder: Path) -> list[int]:
    return [int(found[1]) for found in map(_NAME.fullmatch, storage.sizes(folder)) if found]


def _last_number(folder: Path) -> int:
    return max(_numbers(folder), default=0)


def _refuse_if_held(folder: Path, number: int) -> None:
    path = _file(folder, number)
    age_s = _age_s(folder, path)
    if age_s is None or age_s > STALE_S:
        return
    try:
        held: dict[str, Any] = json.loads(storage.read(path))
    except FileNotFoundError:
        return
    except ValueError:  # created a moment ago and not filled yet, or left so by a crash: its age decides
        held = {"free": False, "host": "an unknown host", "pid": "?"}
    if held["free"] or (held["host"] == _host() and not _is_running(int(held["pid"]))):
        return
    raise StageError(
        f"{folder} is in use by process {held['pid']} on {held['host'].split('/')[0]}; wait for it or stop it, "
        f"then run again (a lease that is not renewed ends in {STALE_S - age_s:.0f} s)."
    )


def _age_s(folder: Path, path: Path) -> float | None:
    """Seconds since `path` was written; None when it is gone, that is, when the lease has moved on."""
    probe = folder / f".lease.{uuid.uuid4().hex}.tmp"
    storage.touch(probe)
    try:
        return storage.modified(probe) - storage.modified(path)
    except FileNotFoundError:
        return None
    finally:
        storage.remove(probe)


def _host() -> str:
    """This host and, on Linux, its process namespace: containers may share a host name but not their process ids."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
