"""WebDataset tars: pictures by their place in the archive, nothing is unpacked.

    header · 00017.jpg · header · 00017.txt · header · 00018.jpg …      only headers and texts are read here
             └ offset, length ──▶ a worker reads these bytes, and no others

Members that stand together and share their name up to the first dot are one sample (webdataset's rule): each of its
pictures gets its texts.  The walk over headers is our own, because `tarfile` takes a damaged header for the end of the
archive, and keeps all members.  An archive that is cut off or damaged gives what lies before the tear, and one row with
the status `corrupt` that says where.  Sources of the format: POSIX.1-2017, pax; GNU tar 1.35, long names and sparse
files.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tinyvlm import config as settings
from tinyvlm.data.pictures.found import (
    IMAGE_SUFFIXES,
    MAX_WORD_BYTES,
    WORD_SUFFIXES,
    Found,
    PicturesConfig,
    address,
    is_hidden,
    open_regular,
    shown,
    suffix_of,
    words,
)
from tinyvlm.errors import DataError

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1 << 20
"""An extended header (long name, pax) that says it is longer is damaged."""
MAX_SAMPLE = 1_000
"""A sample of more members is cut: names like photo.1.jpg, photo.2.jpg … are all one sample to webdataset."""
_ZEROS = 1 << 16
"""So many zero bytes are the end of an archive; after fewer, another one may follow (`cat a.tar b.tar`)."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True)
class Member:
    """A regular file in an archive."""

    name: bytes
    offset: int
    length: int


class TornError(Exception):
    """An archive cannot be read on; the text says why, and where."""


class Tars:
    """Tars, one after the other."""

    def __init__(self, name: str, paths: Sequence[Path], config: PicturesConfig) -> None:
        self.name, self.paths, self.config = name, paths, config
        self.left_out: Counter[str] = Counter()
        self.damaged: list[str] = []
        for path in paths:
            self._refuse_compressed(path)
        self.identity = self.measure()

    def measure(self) -> str:
        """Of names, sizes and times of change: reading 100 GB twice to know them better is not worth it."""
        stats = [(path, path.stat()) for path in self.paths]
        return settings.fingerprint([[address(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats])

    def __iter__(self) -> Iterator[Found]:
        self.left_out.clear()
        for path in self.paths:
            with open_regular(os.fsencode(path)) as file:
                yield from self._pictures(path, file)

    def _pictures(self, path: Path, file: BinaryIO) -> Iterator[Found]:
        stat = os.fstat(file.fileno())
        sample: list[Member] = []
        torn = None
        try:
            for member in members(file, stat.st_size, self.left_out):
                if any(is_hidden(step) for step in member.name.split(b"/") if step not in (b".", b"..")):
                    self.left_out["hidden"] += 1
                elif suffix_of(member.name) not in (*IMAGE_SUFFIXES, *WORD_SUFFIXES):
                    self.left_out[f"{suffix_of(member.name) or 'no suffix'}"] += 1
                else:
                    if sample and (key_of(sample[0].name) != key_of(member.name) or len(sample) == MAX_SAMPLE):
                        yield from self._sample(path, file, stat.st_mtime_ns, sample)
                        sample = []
                    sample.append(member)
        except TornError as error:
            torn = str(error)
        yield from self._sample(path, file, stat.st_mtime_ns, sample)
        if torn:
            where = address(path)
            self.damaged.append(f"{path}: {torn}")
            yield Found(where, where, 0, stat.st_size, stat.st_mtime_ns, status="corrupt", detail=torn)

    def _sample(self, path: Path, file: BinaryIO, modified: int, sample: list[Member]) -> Iterator[Found]:
        pictures = [member for member in sample if suffix_of(member.name) in IMAGE_SUFFIXES]
        texts = [member for member in sample if member not in pictures]
        if texts and not pictures:
            self.left_out["texts that stand apart from their picture"] += len(texts)
        for picture in pictures:
            # Of several pictures each has the texts of its own name, then those of the whole sample's.
            stems = [key_of(picture.name), os.path.splitext(picture.name)[0]]
            own = [text for stem in stems for text in texts if os.path.splitext(text.name)[0] == stem]
            read = {suffix_of(text.name): self._text(file, text) for text in (own if len(pictures) > 1 else texts)}
            caption, meta = words(read, self.config)
            url = address(path, picture.name)
            yield Found(url, address(path), picture.offset, picture.length, modified, caption=caption, meta=meta)

    def _text(self, file: BinaryIO, member: Member) -> bytes:
        if member.length > MAX_WORD_BYTES:
            self.left_out["texts that are too long"] += 1
            return b""
        file.seek(member.offset)
        return file.read(member.length)

    def _refuse_compressed(self, path: Path) -> None:
        with open_regular(os.fsencode(path)) as file:
            start = file.read(8)
        form = next((form for mark, form in _COMPRESSED.items() if start.startswith(mark)), None)
        if form:
            raise DataError(
                f"{path} is compressed ({form}), so that its pictures cannot be read from their places; "
                "unpack it to a plain .tar first (pictures do not get smaller by it)."
            )


def key_of(name: bytes) -> bytes:
    """What the members of one sample have in common: folder and name up to the first dot."""
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.split(b".", 1)[0]


def members(file: BinaryIO, num_bytes: int, left_out: Counter[str]) -> Iterator[Member]:
    """The regular files of an archive of `num_bytes`, in their order; counts in `left_out` what is none.

    Raises:
        TornError: it is no tar, or damaged, or cut off.
    """
    at, ended = 0, False
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while at + BLOCK <= num_bytes:
        file.seek(at)
        header = file.read(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            ended, after = True, _after_zeros(file, at)
            if after is None:
                return
            at = after
            continue
        except tarfile.HeaderError as error:
            said = "not a tar" if at == 0 else f"damaged header at byte {at}"
            raise TornError(f"{said} ({error})") from None
        ended = False
        size = int(pax[b"size"]) if pax.get(b"size", b"").isdigit() else info.size
        name = long_name or pax.get(b"path") or os.fsencode(info.name)
        data = at + BLOCK
        if info.type == tarfile.GNUTYPE_SPARSE:
            data = _after_sparse_headers(file, header, data)
        length = 0 if info.type in _WITHOUT_DATA else size
        if length < 0 or data + length > num_bytes:
            raise TornError(f"cut off in {shown(name)}: {length} bytes from {data}, of {num_bytes}")
        at = data + -(-length // BLOCK) * BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            extended = _extended(file, data, length)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = extended.split(b"\0", 1)[0]
            elif info.type == tarfile.XHDTYPE:
                pax = _pax(extended)
            continue
        if info.type in _REGULAR and not any(key.startswith(b"GNU.sparse") for key in pax):
            if not (info.type == tarfile.AREGTYPE and name.endswith(b"/")):  # a folder, to tars before POSIX
                yield Member(name, data, length)
        elif info.type != tarfile.DIRTYPE:
            left_out["links, devices, sparse files"] += 1
        long_name, pax = None, {}
    if not ended:
        raise TornError(f"cut off at byte {num_bytes}: the end mark is missing" if num_bytes else "an empty file")


def _after_zeros(file: BinaryIO, at: int) -> int | None:
    """Where the first block after zero blocks begins; None at the end."""
    file.seek(at)
    zeros = file.read(_ZEROS)
    used = len(zeros) - len(zeros.lstrip(b"\0"))
    return at + used // BLOCK * BLOCK if used < len(zeros) else None


def _after_sparse_headers(file: BinaryIO, header: bytes, at: int) -> int:
    more = header[482]
    while more:
        file.seek(at)
        block = file.read(BLOCK)
        at, more = at + BLOCK, block[504] if len(block) == BLOCK else 0
    return at


def _extended(file: BinaryIO, at: int, length: int) -> bytes:
    if length > MAX_HEADER_BYTES:
        raise TornError(f"damaged header at byte {at - BLOCK} (an extended header of {length} bytes)")
    file.seek(at)
    return file.read(length)


def _pax(records: bytes) -> dict[bytes, bytes]:
    """Records of the form `length key=value` and a line's end."""
    found: dict[bytes, bytes] = {}
    while records:
        number, _, _ = records.partition(b" ")
        if not number.isdigit() or not 0 < int(number) <= len(records):
            break
        key, _, value = records[len(number) + 1 : int(number) - 1].partition(b"=")
        found[key] = value
        records = records[int(number) :]
    return found
