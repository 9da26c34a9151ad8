"""The operations of storage.py on an object store, through fsspec and whatever client it has for that store."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa


class Entry(NamedTuple):
    """One thing in a folder."""

    name: str
    size: int
    """Bytes; of a folder nothing in particular."""
    is_folder: bool
    version: str = ""
    """Of an object: what changes when it is put again, where the store tells it in its lists."""


class ObjectStore:
    """The same operations, as far as an object store has them.  Whatever its client raises comes as an OSError."""

    def put(self, path: Path, content: bytes, *, new: bool = False) -> None:
        """An object, whole or not at all.  `new`: raises FileExistsError when it is there (If-None-Match: *)."""
        with _as_os_error(path):
            _fs(path).pipe_file(_key(path), content, mode="create" if new else "overwrite")

    def remove(self, path: Path) -> None:
        """An object that is gone already is as good."""
        with suppress(FileNotFoundError), _as_os_error(path):
            _fs(path).rm_file(_key(path))

    def remove_tree(self, path: Path) -> None:
        """All objects under a prefix."""
        with suppress(FileNotFoundError), _as_os_error(path):
            _fs(path).rm(_key(path), recursive=True)

    def read(self, path: Path) -> bytes:
        """A whole object."""
        with _as_os_error(path):
            content: bytes = _fs(path).cat_file(_key(path))
            return content

    def open(self, path: Path) -> pa.NativeFile:
        """An object of which parts can be read; each read is a request, so Arrow should choose how much."""
        with _as_os_error(path):
            return pa.PythonFile(_fs(path).open(_key(path), "rb", cache_type="none"), "r")

    @contextmanager
    def writing(self, path: Path) -> Iterator[Any]:
        """An object that is sent in parts; it is there when this is over, and not at all when it is cut short."""
        with _as_os_error(path):
            stream = _fs(path).open(_key(path), "wb")
            try:
                yield stream
            except BaseException:
                with suppress(Exception):
                    stream.discard()
                raise
            stream.close()

    def entries(self, folder: Path) -> list[Entry]:
        """What lies under a prefix, by name."""
        found: list[dict[str, Any]] = []
        with suppress(FileNotFoundError, NotADirectoryError), _as_os_error(folder):
            found = _fs(folder).ls(_key(folder), detail=True)
        named = [(str(info["name"]).rstrip("/").rpartition("/"), info) for info in found]
        return sorted(
            Entry(name, int(info["size"] or 0), info["type"] == "directory", _version(info))
            for (parent, _, name), info in named
            if parent.strip("/") == _key(folder).strip("/")
        )

    def is_file(self, path: Path) -> bool:
        """There is such an object; fsspec's own `isfile` takes any failure for a no."""
        with suppress(FileNotFoundError), _as_os_error(path):
            return bool(_fs(path).info(_key(path))["type"] == "file")
        return False

    def modified(self, path: Path) -> float:
        """When it was last put, in seconds by the store's own clock."""
        with _as_os_error(path):
            return float(_fs(path).modified(_key(path)).timestamp())


def _version(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in ("ETag", "etag", "LastModified", "mtime") if info.get(name)), "")


def _fs(path: Path) -> Any:
    return cast(Any, path).fs


def _key(path: Path) -> str:
    return str(cast(Any, path).path)


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None and error.filename is None:  # s3fs leaves out which object it is about
            raise type(error)(
                errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO, str(error), str(path)
            ) from error
        raise
    except Exception as error:  # each client has classes of its own: no credentials, no connection, no such bucket
        said = " ".join(str(error).split())
        raise OSError(errno.EIO, f"{type(error).__name__}: {said}", str(path)) from error
