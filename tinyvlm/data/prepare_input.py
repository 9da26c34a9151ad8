"""What `prepare` reads: the line's own pictures, or the records of a dataset's files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyvlm import config, storage
from tinyvlm.data import hub
from tinyvlm.data.contamination import open_evaluation
from tinyvlm.data.prepare import Prepare
from tinyvlm.data.records import open_records
from tinyvlm.data.sources import FileSource
from tinyvlm.errors import StageError
from tinyvlm.folders import Input, find_folder
from tinyvlm.stage import open_input


def reading(stage: Prepare, inputs: Sequence[Path]) -> Prepare:
    """The stage over what is there: pictures that were not encoded are as good as those that were."""
    if isinstance(stage.source, FileSource) or _has(inputs, "encode") or not _has(inputs, "preprocess"):
        return stage
    return stage.reading("preprocess")


def makes_folders(stage: Prepare) -> bool:
    """Whether `open_prepare` writes something under its root."""
    return isinstance(stage.source, FileSource) or bool(stage.config.evaluation)


def open_prepare(stage: Prepare, inputs: Sequence[Path], root: Path) -> Input:
    """The stage's input, as `Input.folders["evaluation"]` with the hashes of the evaluation's pictures.

    Raises:
        DataError, StageError: a place holds nothing that can be read.
    """
    if isinstance(stage.source, FileSource):
        places = [str(path) if storage.is_object(path) else hub.as_typed(path) for path in inputs]
        rows = open_records([os.fspath(place) for place in places], stage.source, stage.config, root)
    else:
        rows = open_input(stage, inputs)
    if not stage.config.evaluation:
        return rows
    folder, fingerprint = open_evaluation(stage.config.evaluation, stage.picture, stage.limits, root)
    both = config.fingerprint([rows.fingerprint, fingerprint])
    return replace(rows, fingerprint=both, folders={**rows.folders, "evaluation": str(folder)})


def _has(inputs: Sequence[Path], stage_name: str) -> bool:
    try:
        find_folder(inputs, stage_name, "prepare")
    except StageError:
        return False
    return True
