"""A lease with a fencing number: keeps two drivers out of one stage folder.

The holder renews `lease.json` while it works.  Another driver takes over when the lease was given back, is stale, or its
holder's process on this host is dead, and raises the number; writers of the old number are then refused.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tinyvlm.errors import StageError

RENEW_S = 5.0
STALE_S = 30.0


class Lease:
    """Use as a context manager: `with Lease.take(folder) as lease: … lease.number …`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    @classmethod
    def take(cls, folder: Path) -> Lease:
        """Take the lease of `folder`.

        Raises:
            StageError: another living driver holds it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        held = _read(folder)
        if held is not None and _is_alive(held):
            raise StageError(
                f"{folder} is in use by process {held['pid']} on {held['host']}; wait for it or stop it, then run again."
            )
        lease = cls(folder, (held["number"] if held else 0) + 1)
        lease._claim()
        return lease

    @staticmethod
    def check(folder: Path, number: int) -> None:
        """Raises StageError when the lease of `folder` has moved on from `number`."""
        held = _read(folder)
        if held is None or held["number"] != number:
            now = held["number"] if held else "none"
            raise StageError(f"{folder} now belongs to another driver (lease {now}, ours was {number}); nothing written.")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        held = _read(self.folder)
        if held is not None and held["number"] == self.number:
            self._write(free=True)

    def _claim(self) -> None:
        """One file for each number, made exclusively: of two drivers that want the same number, one gets it."""
        claim = self.folder / f".lease-{self.number}"
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            if time.time() - claim.stat().st_mtime < STALE_S and _read(self.folder) is None:
                raise StageError(f"{self.folder} is being taken by another driver at this moment; run again.") from None
        self._write(free=False)
        for old in self.folder.glob(".lease-*"):
            if old != claim:
                old.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            held = _read(self.folder)
            if held is None or held["number"] != self.number:
                return
            self._write(free=False)

    def _write(self, *, free: bool) -> None:
        content = {
            "number": self.number,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "free": free,
        }
        temporary = self.folder / f".lease.{os.getpid()}.{threading.get_ident()}.tmp"
        temporary.write_text(json.dumps(content))
        os.replace(temporary, self.folder / "lease.json")


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((folder / "lease.json").read_text())
        return content
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _is_alive(held: dict[str, Any]) -> bool:
    if held["free"] or time.time() - float(held["time"]) > STALE_S:
        return False
    if held["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(held["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
