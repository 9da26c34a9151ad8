"""What `prepare` reads: the line's own pictures, pictures that lie elsewhere, or the records of a dataset's files.

--input ─▶ chosen (prepare.source=auto: what it looks like) ─▶ open_prepare ─▶ rows of encode · pictures · records
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyvlm import config
from tinyvlm.data import hub
from tinyvlm.data.contamination import open_evaluation
from tinyvlm.data.pictures import PicturesConfig, find_sources, open_pictures
from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.record_files import read_rows
from tinyvlm.data.records import find_files, open_records
from tinyvlm.data.sources import FileSource, fields_of
from tinyvlm.data.sources.catalogue import SOURCES, fitting, required_fields
from tinyvlm.errors import DataError, StageError
from tinyvlm.folders import Input, find_folder
from tinyvlm.stage import open_input

_MAX_FILES_ASKED, _MAX_ROWS_ASKED = 3, 100
"""How far `auto` looks for a record that is whole."""


class _AnySource(FileSource):
    name = "auto"


log = logging.getLogger(__name__)


def chosen(settings: PrepareConfig, inputs: Sequence[Path]) -> PrepareConfig:
    """The settings with the source that `auto` stands for, which is told; others as they are.

    Raises:
        DataError: the input is of no kind that is known; with its fields, and those that were wanted.
    """
    if settings.source != "auto":
        return settings
    if _has(inputs, "encode") or _has(inputs, "preprocess"):
        name, seen = "captions", "pictures of the line"
    else:
        name, seen = _looks_like(_places(inputs), settings)
    log.info("prepare.source=auto: %s, so prepare.source=%s", seen, name)
    return config.override(settings, [f"source={name}"])


def _looks_like(places: Sequence[str], settings: PrepareConfig) -> tuple[str, str]:
    """A source that fits, and what makes it so."""
    said: list[str] = []
    for file in _record_files(places):
        try:
            rows = itertools.islice(read_rows(file, settings.columns), _MAX_ROWS_ASKED)
            record = next((record for _, record in rows if record), {})
        except DataError as error:
            said.append(str(error).rstrip("."))
            continue
        fits = fitting(record)
        if fits:
            return fits[0], f"{file} has {fields_of(record)}"
        said.append(f"{file} has {fields_of(record)}")
    try:
        for place in places:
            find_sources(place, PicturesConfig())
        return "folder", f"{', '.join(places)} holds pictures"
    except DataError as error:
        said.append(str(error).rstrip("."))
    wanted = [f"{name} ({', '.join(fields)})" for name in SOURCES if (fields := required_fields(name))]
    raise DataError(
        f"prepare.source=auto knows nothing in {', '.join(places)}: {'; '.join(said)}.  It knows pictures "
        f"with captions (folder), and records with these fields: {', '.join(wanted)}."
    )


def _record_files(places: Sequence[str]) -> list[str]:
    """A few files that may hold records."""
    try:
        return find_files(places, _AnySource())[:_MAX_FILES_ASKED]
    except DataError:  # there are none
        return []


def reading(stage: Prepare, inputs: Sequence[Path]) -> Prepare:
    """The stage over what is there: pictures that were not encoded are as good as those that were."""
    if stage.reads != ("encode",) or _has(inputs, "encode") or not _has(inputs, "preprocess"):
        return stage
    return stage.reading("preprocess")


def makes_folders(stage: Prepare) -> bool:
    """Whether `open_prepare` writes something under its root."""
    return stage.reads in (("records",), ("pictures",)) or bool(stage.config.evaluation)


def open_prepare(stage: Prepare, inputs: Sequence[Path], root: Path) -> Input:
    """The stage's input, as `Input.folders["evaluation"]` with the hashes of the evaluation's pictures.

    Raises:
        DataError, StageError: a place holds nothing that can be read.
    """
    if isinstance(stage.source, FileSource):
        rows = open_records(_places(inputs), stage.source, stage.config, root)
    elif stage.reads == ("pictures",):
        rows = open_pictures(_places(inputs), stage.pictures, root)
    else:
        rows = open_input(stage, inputs)
    if not stage.config.evaluation:
        return rows
    folder, fingerprint = open_evaluation(stage.config.evaluation, stage.picture, stage.limits, root)
    both = config.fingerprint([rows.fingerprint, fingerprint])
    return replace(rows, fingerprint=both, folders={**rows.folders, "evaluation": str(folder)})


def _places(inputs: Sequence[Path]) -> list[str]:
    """The inputs as they were typed, where that is no path."""
    return [hub.as_typed(path) for path in inputs]


def _has(inputs: Sequence[Path], stage_name: str) -> bool:
    try:
        find_folder(inputs, stage_name, "prepare")
    except StageError:
        return False
    return True
