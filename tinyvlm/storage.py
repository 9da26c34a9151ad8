"""Where folders lie: on a disk or an object store; every file operation of the stage contract goes through here.

    content ─▶ draft ──publish──▶ its name, whole          a disk: under another name, flushed, renamed
                                                           an object store: in memory, put

Who writes a folder (folders.py, stage_run.py, journal.py, lease.py) uses these functions alone: it need not know where
the folder lies, and a test can put a `Disk` in the way that fails at each operation in turn.

A place on a disk is a `pathlib.Path`.  Anything with `://` (s3, gs, …) is a `upath.UPath` over fsspec, which has the
methods of one; here it is annotated as `Path` too.  An object store has no rename, so a file that a slow worker may
still put needs a name of its own there (`Part.name_in`); no folders, they are prefixes; and who is first is decided by
a conditional put.  Credentials and endpoints come from the environment, as the store's own client reads it.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm.errors import ConfigError
from tinyvlm.object_store import Entry, ObjectStore

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
"""What file systems without hard links answer."""


_AT_ONCE = 32
"""Requests to an object store."""

T = TypeVar("T")
R = TypeVar("R")
Content = str | bytes | memoryview
"""Or any other buffer, as Arrow's."""


class Disk:
    """The operations themselves, each of them one step that happens or not."""

    def make_folder(self, path: Path) -> None:
        """With its parents; one that is there already is as good."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """A new file, or an old one anew; not flushed."""
        with path.open("wb") as file:
            file.write(content)

    def write_table(self, path: Path, table: pa.Table, options: dict[str, Any]) -> None:
        """A new Parquet file; not flushed."""
        write_parquet(path, table, **options)

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


disk, objects = Disk(), ObjectStore()
"""What all functions below use; a test puts its own here."""


def address(text: str | Path) -> Path:
    """A place as a person or a manifest names it: a path, or the address of an object store.

    Raises:
        ConfigError: nobody here speaks to that kind of store.
    """
    scheme, mark, rest = str(text).partition("://")
    if not mark:
        return Path(text)
    if scheme == "file":
        return Path(rest)
    if scheme == "hf":  # the hub's datasets: read by data/hub.py, never written
        return Path(text)
    remedy = "pip install 'tinyvlm[s3]'" if scheme == "s3" else "install universal-pathlib and fsspec's package for it"
    try:
        from upath import UPath

        place = UPath(str(text), use_listings_cache=False)  # others write there too
        place.fs  # noqa: B018 (imports what speaks to the store)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{text} cannot be used here ({error}); {remedy}, or give a folder on a disk.") from None
    return cast(Path, place)


def is_object(path: Path) -> bool:
    """It lies in an object store."""
    return not isinstance(path, Path)


def is_object_address(text: str) -> bool:
    """`address` would give a place in an object store."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme not in ("file", "hf")


def require_disk(reader: str, *paths: Path) -> None:
    """Raises ConfigError when one of the paths lies in an object store, which `reader` does not work on."""
    for path in paths:
        if is_object(path):
            raise ConfigError(
                f"{reader} works on disks alone, and {path} lies in an object store; copy the folder to a disk that "
                "all nodes see, and give that."
            )


def draft(path: Path, *, sync: bool = True) -> Draft:
    """A new content for `path`, which has it from `publish` on.

    `sync`: on a disk, flushed to the medium before it gets its name, so that it outlives a machine that goes down.
    """
    return ObjectDraft(path) if is_object(path) else Draft(path, sync=sync)


class Draft:
    """A file in the making: nobody sees it before `publish`, and then it is whole.

        with storage.draft(path) as draft:
            draft.write(content)
            draft.publish()

    What is not published leaves nothing behind, unless the process is killed: then a file that `upkeep.tidy` removes.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
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
        """All of the file's content, as Parquet; see `write_parquet`."""
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


class ObjectDraft(Draft):
    """The same in an object store: in memory until it is put."""

    def __init__(self, path: Path) -> None:
        self.path, self._content = path, pa.py_buffer(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._content = pa.py_buffer(b"")

    def write(self, content: Content) -> None:
        """All of the object's content."""
        self._content = pa.py_buffer(content.encode() if isinstance(content, str) else content)

    def write_table(self, table: pa.Table, **options: Any) -> None:
        """All of the object's content, as Parquet; see `write_parquet`."""
        sink = pa.BufferOutputStream()
        write_parquet(sink, table, **options)
        self._content = sink.getvalue()

    def content(self) -> AbstractContextManager[Any]:
        """What was written, as a buffer."""
        return nullcontext(self._content)

    def publish(self) -> None:
        """Put it; what had that name before is gone."""
        objects.put(self.path, self._content.to_pybytes())

    def publish_new(self) -> None:
        """Put it.  Raises FileExistsError when there is an object of that name."""
        objects.put(self.path, self._content.to_pybytes(), new=True)


def write_parquet(
    sink: Any, table: pa.Table, *, row_groups: Sequence[int] = (), row_group_size: int = 1024, **options: Any
) -> None:
    """A Parquet file; `options` of `pyarrow.parquet.ParquetWriter`.

    Args:
        row_groups: how many rows each row group has; () cuts them at `row_group_size`.
    """
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        start = 0
        for size in row_groups:
            writer.write_table(table.slice(start, size), row_group_size=max(1, size))
            start += size
        if not row_groups:
            writer.write_table(table, row_group_size=row_group_size)


@contextmanager
def writing(path: Path) -> Iterator[Any]:
    """A new file too large for memory, open for writing from its start to its end; on a disk, flushed to the medium.

    It has its name from the start, so nothing may speak of it before this is over.
    """
    if is_object(path):
        with objects.writing(path) as stream:
            yield stream
        return
    disk.make_folder(path.parent)
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, content: Content, *, sync: bool = True) -> None:
    """Replace a file as a whole: whoever reads it, and whenever this dies, sees the old content or the new."""
    with draft(path, sync=sync) as new:
        new.write(content)
        new.publish()


def create(path: Path, content: Content) -> None:
    """A new file, of several that try at the same time by one.  Raises FileExistsError for the others."""
    with draft(path) as new:
        new.write(content)
        new.publish_new()


def touch(path: Path) -> None:
    """A new empty file.  Raises FileExistsError."""
    if is_object(path):
        objects.put(path, b"", new=True)
    else:
        disk.make_folder(path.parent)
        disk.create(path)


def read(path: Path) -> bytes:
    """A whole file.  Raises FileNotFoundError or another OSError."""
    return objects.read(path) if is_object(path) else disk.read(path)


def readable(path: Path) -> Any:
    """What pyarrow's readers take to read a file, or parts of it."""
    return objects.open(path) if is_object(path) else path


@contextmanager
def mapped(path: Path) -> Iterator[Any]:
    """A whole file as a buffer; on a disk, in memory only where it is looked at."""
    if is_object(path):
        yield objects.read(path)
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def sha256(path: Path) -> str:
    """Of a whole file, in hexadecimal digits."""
    if is_object(path):
        return hashlib.sha256(objects.read(path)).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_file(path: Path) -> bool:
    """There is such a file.  An object store that does not answer raises OSError instead."""
    return objects.is_file(path) if is_object(path) else path.is_file()


def exists(path: Path) -> bool:
    """There is such a file or folder; in an object store, something under that prefix."""
    return is_file(path) or bool(entries(path)) if is_object(path) else path.exists()


def entries(folder: Path) -> list[Entry]:
    """What lies in a folder, by name; nothing where there is no folder."""
    return objects.entries(folder) if is_object(folder) else disk.entries(folder)


def sizes(folder: Path) -> dict[str, int]:
    """Name → bytes of each file in a folder, by name."""
    return {entry.name: entry.size for entry in entries(folder) if not entry.is_folder}


def modified(path: Path) -> float:
    """When a file was last written, in seconds by the clock of the storage.  Raises FileNotFoundError."""
    return objects.modified(path) if is_object(path) else disk.modified(path)


def remove(path: Path) -> None:
    """Remove a file; one that is gone already is as good."""
    if is_object(path):
        objects.remove(path)
    else:
        disk.remove(path)


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it; one that is gone already is as good."""
    if is_object(path):
        objects.remove_tree(path)
        return
    for entry in entries(path):
        (remove_tree if entry.is_folder else remove)(path / entry.name)
    disk.remove_folder(path)


def each(function: Callable[[T], R], items: Iterable[T], place: Path) -> list[R]:
    """What `function` gives for each item; many at a time where every answer of `place` takes a while to come."""
    if not is_object(place):
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="storage") as threads:
        return list(threads.map(function, items))


def settle(folder: Path) -> None:
    """The names in a folder are on the medium, as the contents are: a machine that goes down forgets none of them."""
    if not is_object(folder):
        with suppress(FileNotFoundError):  # a training stage has no such folder
            disk.sync(folder)
