"""Pictures that are already there → the `pictures` folder that `preprocess` reads.

    a folder of files · WebDataset tars · Parquet with a column of pictures · a dataset on the Hugging Face hub
    (files and Parquet also in an object store)
        └─ where each picture lies, and its words ─▶ {root}/pictures-{fingerprint}/data/part-00000.parquet …
                                                          └─ bodies.py, in the workers ─▶ bytes ─▶ preprocess

The folder holds places, not pictures: nothing is copied.  It is one of the line's stage folders, with rows of
`schema.PICTURES`, cut into one file for each part of the work.  Making it streams, so that a tar or a folder of any
size fits into memory, and happens once: the fingerprint covers the settings and the names, sizes and times of change
of the files (of a dataset on the hub, its commit).  A picture's key is its number in the list.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from tinyvlm import config as settings
from tinyvlm import schema, stage, storage
from tinyvlm.data import hub
from tinyvlm.data.listing import Closing, Listing, cut, make_folder
from tinyvlm.data.pictures import stores
from tinyvlm.data.pictures.folders import Folder, survey
from tinyvlm.data.pictures.found import IMAGE_SUFFIXES, PicturesConfig, Source, address
from tinyvlm.data.pictures.tables import Tables, has_images
from tinyvlm.data.pictures.tars import Tars
from tinyvlm.errors import DataError
from tinyvlm.folders import Input, is_finished, point_latest

__all__ = ["STAGE", "PicturesConfig", "find_sources", "listed", "open_pictures", "stage_given"]

STAGE = "pictures"
VERSION = 1
_ROWS_AT_A_TIME = 1_000
_IN_STORE = "a folder of picture files or Parquet with a column of pictures can be read; tars want to lie on a disk"
_MAX_BRACES = 1_000_000
_MAX_SAID = 10
"""How many damaged files are named in the log; the report has them all."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_WANTED = (
    "a root with a download (see `python -m ray_jobs.download`), a folder, tars or Parquet of pictures, or a dataset "
    "of the Hugging Face hub"
)

log = logging.getLogger(__name__)


def open_pictures(places: Sequence[str], config: PicturesConfig, root: Path) -> Input:
    """The input of `preprocess` for pictures at `places`, listed in a folder under `root` unless they are already.

    Raises:
        DataError: nothing is there, or it holds no pictures, or cannot be read; nothing is left behind that counts.
    """
    sources = [source for place in places for source in find_sources(place, config, root)]
    fingerprint = settings.fingerprint([STAGE, VERSION, config, [source.identity for source in sources]])
    listing = Listing(
        name=STAGE, version=VERSION, fingerprint=fingerprint, settings=config, inputs=[s.name for s in sources]
    )
    folder = listing.folder(root)
    if not is_finished(folder):
        make_folder(listing, root, cut(listed(sources, config), config.rows_per_part), partial(_close, sources))
    point_latest(folder.parent, STAGE, folder)
    return stage.open_input(_Reader(), [folder])


def stage_given(inputs: Sequence[Path]) -> str | None:
    """The stage whose folder `preprocess` is to read, finished or not: `download`, an older listing, or neither.

    A root that holds other stages' folders only is one where the download is missing, and no folder of pictures.
    """
    for name in ("download", STAGE):
        own = f"{name}-{'[0-9a-f]' * 12}"
        for given in inputs:
            if re.fullmatch(own, given.name) or any(given.glob(own)) or (given / "latest" / f"{name}.json").exists():
                return name
    return "download" if any(any(given.glob("latest/*.json")) for given in inputs) else None


def find_sources(place: str, config: PicturesConfig, root: Path | None = None) -> list[Source]:
    """What is at a place: a path, a pattern of paths (`*`, `{0..9}`), or an address on the hub; writes nothing.

    Raises:
        DataError: as `open_pictures`.
    """
    stored = storage.address(place)
    if storage.is_object(stored):
        return [_stored(stored, config, root)]
    path = Path(place).absolute()
    if path.is_dir():
        return [_folder(path, config, root)]
    if path.exists():
        return [_files(place, [path], config)]
    if any(mark in place for mark in "*?[{"):
        return [_files(place, _expand(place), config)]
    if hub.is_address(place):
        return [Tables(place, hub.resolve(place), config)]
    raise DataError(f"There is nothing at {place}; give {_WANTED}.")


class _Reader(stage.Stage):
    """Stands for `preprocess`, so that this road to its input and `stage.open_input` give the same fingerprint."""

    name = "preprocess"
    reads = (STAGE,)


def _stored(path: Path, config: PicturesConfig, root: Path | None) -> Source:
    """A file in an object store, or what lies under a prefix."""
    if storage.is_file(path):
        files, suffix = [str(path)], path.suffix.lower()
        if suffix == ".parquet":
            return Tables(str(path), files, config)
        raise DataError(f"{path} is no Parquet; in an object store, {_IN_STORE}.")
    seen = stores.survey(path)
    num_files = sum(seen.suffixes[suffix] for suffix in IMAGE_SUFFIXES)
    if not (num_files or (seen.tables and (config.image_column or has_images(seen.tables[0])))):
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in seen.suffixes.most_common(5))
        raise DataError(f"There are no pictures under {path} ({kinds or 'it is empty'}); there, {_IN_STORE}.")
    if root is not None and f"{root}/".startswith(f"{str(path).rstrip('/')}/"):
        raise DataError(f"The output {root} lies inside the folder of pictures {path}; give an --output beside it.")
    return stores.Store(path, config, seen) if num_files else Tables(str(path), seen.tables, config)


def _folder(path: Path, config: PicturesConfig, root: Path | None) -> Source:
    """What a folder holds decides what it is; what lies beside tars and picture files is not asked for pictures."""
    seen = survey(path)
    num_files = sum(seen.suffixes[suffix] for suffix in IMAGE_SUFFIXES)
    if not (seen.tars or num_files or (seen.tables and (config.image_column or has_images(address(seen.tables[0]))))):
        there = Counter({suffix or "without suffix": count for suffix, count in seen.suffixes.items()}) + seen.left_out
        kinds = ", ".join(f"{count} {what}" for what, count in there.most_common(5))
        raise DataError(f"The folder {path} holds no pictures ({kinds or 'it is empty'}); give {_WANTED}.")
    if root is not None and Path(os.path.realpath(root)).is_relative_to(os.path.realpath(path)):
        raise DataError(f"The output {root} lies inside the folder of pictures {path}; give an --output beside it.")
    if seen.tars and num_files:
        raise DataError(
            f"{path} holds both {len(seen.tars)} tars and {num_files} picture files; "
            "give them one by one, each as its own --input."
        )
    if seen.tars:
        return Tars(str(path), seen.tars, config)
    if num_files:
        return Folder(path, config, seen)
    return Tables(str(path), [address(file) for file in seen.tables], config)


def _files(name: str, paths: list[Path], config: PicturesConfig) -> Source:
    """Tars or Parquet files that were named."""
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".tar"}:
        return Tars(name, paths, config)
    if suffixes == {".parquet"}:
        return Tables(name, [address(path) for path in paths], config)
    wrong = next(path for path in paths if path.suffix.lower() != ".tar")
    if wrong.name.lower().endswith(_COMPRESSED):
        raise DataError(f"{wrong} is compressed; unpack it to a plain .tar first, or into a folder.")
    if len(suffixes) > 1:
        raise DataError(f"{name} names files of several kinds ({', '.join(sorted(suffixes))}); give them one by one.")
    raise DataError(f"{wrong} is neither .tar nor .parquet; give {_WANTED}.")


def _expand(pattern: str) -> list[Path]:
    """The files that a pattern names, in order; each alternative of a brace must be there."""
    paths: list[Path] = []
    for one in _braces(pattern):
        found = sorted(glob.glob(one)) if glob.has_magic(one) else [one] * os.path.exists(one)
        if not found:
            raise DataError(f"There is nothing at {one}, which --input {pattern} asks for.")
        paths += [Path(path).absolute() for path in found]
    return paths


def _braces(pattern: str) -> Iterator[str]:
    """`a{0..2}.tar` → a0.tar, a1.tar, a2.tar, with the zeros of `{000..231}`; `{a,b}`; several of them."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, names = match.groups()
    if names is None and not 0 <= int(last) - int(first) < _MAX_BRACES:
        raise DataError(f"The range {match.group()} in {pattern} wants to rise, over at most {_MAX_BRACES:,} files.")
    inner = names.split(",") if names is not None else map(str, range(int(first), int(last) + 1))
    for text in inner:
        filled = text if names is not None else text.zfill(len(first))
        yield from _braces(pattern[: match.start()] + filled + pattern[match.end() :])


def listed(sources: Sequence[Source], config: PicturesConfig) -> Iterator[pa.Table]:
    """Rows of `schema.PICTURES`, a little at a time."""
    found = itertools.islice(itertools.chain.from_iterable(sources), config.limit)
    names = [name for name in schema.PICTURES.names if name != "key"]
    keys = itertools.count()
    while chunk := list(itertools.islice(found, _ROWS_AT_A_TIME)):
        columns: dict[str, Any] = {name: [getattr(one, name) for one in chunk] for name in names}
        columns["key"] = list(itertools.islice(keys, len(chunk)))
        yield pa.table({name: columns[name] for name in schema.PICTURES.names}, schema=schema.PICTURES)


def _close(sources: Sequence[Source], num_rows: int, statuses: Counter[str]) -> Closing:
    """Statistics of a listing, and its last checks."""
    names = ", ".join(source.name for source in sources)
    for source in sources:
        if source.measure() != source.identity:
            raise DataError(f"{source.name} changed while it was listed; run the same command again.")
    damaged = [said for source in sources for said in source.damaged]
    if not statuses[schema.OK]:
        raise DataError(f"There are no pictures in {names}{f' ({damaged[0]})' if damaged else ''}; give {_WANTED}.")
    for said in damaged[:_MAX_SAID]:
        log.warning("pictures: %s", said)
    left_out = sum((source.left_out for source in sources), Counter[str]())
    if left_out:
        log.info("pictures: not used: %s", ", ".join(f"{count} {what}" for what, count in left_out.most_common()))
    return Closing(
        statistics={
            "sources": [source.name for source in sources],
            "damaged": damaged,
            "left_out": dict(left_out.most_common()),
        }
    )
