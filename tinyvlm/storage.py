"""Every file operation of the stage contract: the one place where a disk can be full, slow, or gone.

    content ─▶ Draft: under another name, flushed ──publish──▶ its name, whole      (a disk: rename)

Who writes a folder (folders.py, stage_run.py, journal.py, lease.py) goes through these functions alone, so that a test
can put a `Disk` in their way that fails at each operation in turn.
"""

from __future__ import annotations

import errno
import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
"""What file systems without hard links answer."""


Content: TypeAlias = Any
"""str, bytes, memoryview or a buffer of pyarrow."""


class Entry(NamedTuple):
    """One thing in a folder."""

    name: str
    size: int
    """Bytes; of a folder nothing in particular."""
    is_folder: bool


class Disk:
    """The operations themselves, each of them one step that happens or not."""

    def make_folder(self, path: Path) -> None:
        """With its parents; one that is there already is as good."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, content: bytes | memoryview | pa.Buffer) -> None:
        """A new file, or an old one anew; not flushed."""
        with path.open("wb") as file:
            file.write(content)

    def write_table(self, path: Path, table: pa.Table, options: dict[str, Any]) -> None:
        """A new Parquet file; not flushed."""
        pq.write_table(table, path, **options)

    def sync(self, path: Path) -> None:
        """Flush a file, or the names in a folder, to the medium."""
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)

    def rename(self, old: Path, new: Path) -> None:
        """Replaces what `new` was."""
        os.replace(old, new)

    def link(self, old: Path, new: Path) -> None:
        """Raises FileExistsError when `new` is there."""
        os.link(old, new)

    def create(self, path: Path) -> None:
        """A new empty file.  Raises FileExistsError when it is there."""
        path.open("xb").close()

    def remove(self, path: Path) -> None:
        """A file that is gone already is as good."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """An empty one."""
        with suppress(FileNotFoundError):
            path.rmdir()

    def read(self, path: Path) -> bytes:
        """A whole file."""
        return path.read_bytes()

    def entries(self, folder: Path) -> list[Entry]:
        """What lies in a folder, by name; nothing where there is no folder."""
        found = []
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed since
                    found.append(Entry(entry.name, entry.stat().st_size, entry.is_dir(follow_symlinks=False)))
        return sorted(found)

    def modified(self, path: Path) -> float:
        """When it was last written, in seconds by the file system's own clock."""
        return path.stat().st_mtime


disk = Disk()
"""What all functions below use; a test puts its own here."""


class Draft:
    """A file in the making: nobody sees it before `publish`, and then it is whole.

        with Draft(path) as draft:
            draft.write(content)
            draft.publish()

    What is not published leaves nothing behind, unless the process is killed: then a file that `folders.tidy` removes.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        """`sync`: flushed to the medium before it gets its name, so that it outlives a machine that goes down."""
        self.path, self._sync, self._is_published = path, sync, False
        self._draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> Self:
        disk.make_folder(self.path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_published:
            with suppress(OSError):  # what went wrong before is the news
                disk.remove(self._draft)

    def write(self, content: Content) -> None:
        """All of the file's content."""
        disk.write(self._draft, content.encode() if isinstance(content, str) else content)
        if self._sync:
            disk.sync(self._draft)

    def write_table(self, table: pa.Table, **options: Any) -> None:
        """All of the file's content, as Parquet; options of `pyarrow.parquet.write_table`."""
        disk.write_table(self._draft, table, options)
        if self._sync:
            disk.sync(self._draft)

    def content(self) -> AbstractContextManager[Any]:
        """What was written, as a buffer."""
        return mapped(self._draft)

    def publish(self) -> None:
        """Give it its name; what had that name before is gone."""
        disk.rename(self._draft, self.path)
        self._is_published = True

    def publish_new(self) -> None:
        """Give it its name.  Raises FileExistsError when there is a file of that name."""
        try:
            disk.link(self._draft, self.path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            disk.create(self.path)  # as exclusive; for a moment somebody may see it empty
            self.publish()


def write_atomic(path: Path, content: Content, *, sync: bool = True) -> None:
    """Replace a file as a whole: whoever reads it, and whenever this dies, sees the old content or the new."""
    with Draft(path, sync=sync) as draft:
        draft.write(content)
        draft.publish()


def create(path: Path, content: Content) -> None:
    """A new file, of several that try at the same time by one.  Raises FileExistsError for the others."""
    with Draft(path) as draft:
        draft.write(content)
        draft.publish_new()


def touch(path: Path) -> None:
    """A new empty file; its folder is there.  Raises FileExistsError."""
    disk.create(path)


def read(path: Path) -> bytes:
    """A whole file.  Raises FileNotFoundError or another OSError."""
    return disk.read(path)


@contextmanager
def mapped(path: Path) -> Iterator[Any]:
    """A whole file as a buffer, in memory only where it is looked at."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def entries(folder: Path) -> list[Entry]:
    """What lies in a folder, by name; nothing where there is no folder."""
    return disk.entries(folder)


def sizes(folder: Path) -> dict[str, int]:
    """Name → bytes of each file in a folder, by name."""
    return {entry.name: entry.size for entry in entries(folder) if not entry.is_folder}


def modified(path: Path) -> float:
    """When a file was last written, in seconds by the clock of the storage.  Raises FileNotFoundError."""
    return disk.modified(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it; one that is gone already is as good."""
    if path.is_dir() and not path.is_symlink():
        for entry in entries(path):
            remove(path / entry.name)
        disk.remove_folder(path)
    else:
        disk.remove(path)


def settle(folder: Path) -> None:
    """The names in a folder are on the medium, as the contents are: a machine that goes down forgets none of them."""
    disk.sync(folder)
