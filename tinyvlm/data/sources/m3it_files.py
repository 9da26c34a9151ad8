"""What the paths of M3IT's files say, and which of the files are read.

    data/vqa/vqav2/train.jsonl                          ─▶ vqa-v2, vqa, training
    data/classification/mocheg/mocheg_val.jsonl         ─▶ mocheg, classification, the data set's own test
    data/vqa/okvqa/train_v2.jsonl                       ─▶ okvqa, knowledge_vqa, training, instead of train.jsonl
    data/generation/visual_dialog/train_2023-10-09.jsonl ─▶ visual-dialog, the same rows with other answers

Names as in the repository MMInstruction/M3IT, whose folders are not always called as the data sets are, and whose task
folders are not always the task (okvqa lies under `vqa`, winoground under `classification`): so the family comes from
the data set's name, as its card groups them, and from the folder only where the name is not known.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from tinyvlm.errors import ConfigError, DataError
from tinyvlm.schema import Family, Split

_ENGLISH: dict[Family, str] = {
    "caption": "coco textcap image-paragraph-captioning",
    "classification": "coco-goi coco-text imagenet coco-itm snli-ve mocheg iqa",
    "vqa": "vqa-v2 shapes docvqa ocr-vqa st-vqa text-vqa gqa",
    "knowledge_vqa": "okvqa a-okvqa science-qa viquae",
    "reasoning": "clevr nlvr vcr visual-mrc winoground",
    "generation": "vist visual-dialog multi30k",
}
SUBSETS: dict[str, Family] = {name: family for family, names in _ENGLISH.items() for name in names.split()}
"""The English data sets of pictures that the published recipe takes, each with its family."""
_OTHER = {
    "Chinese": "coco-cn flickr8k-cn fm-iqa chinese-food mmchat",
    "video": "ss ivqa msvd-qa activitynet-qa msrvtt msrvtt-qa",
    "other": "vsr refcoco",
}
OTHERS = {name: kind for kind, names in _OTHER.items() for name in names.split()}
"""What else lies in the repository; read only when `prepare.subsets` names it."""
TASKS: dict[str, Family] = {
    "captioning": "caption",
    "classification": "classification",
    "vqa": "vqa",
    "kvqa": "knowledge_vqa",
    "knowledge-vqa": "knowledge_vqa",
    "knowledgeable-vqa": "knowledge_vqa",
    "reasoning": "reasoning",
    "generation": "generation",
}
_CALLED = {"vqav2": "vqa-v2", "itm": "coco-itm", "esnlive": "snli-ve", "chinesefoodnet-10": "chinese-food"}
_SPLITS: dict[str, Split] = {"train": "train", **dict.fromkeys(("val", "validation", "valid", "dev", "test"), "test")}
_VERSION = re.compile(r"new|v\d+")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


@dataclass(frozen=True)
class Located:
    """What a file's path says."""

    subset: str
    """"": the path does not say it."""
    family: Family
    split: Split
    is_known: bool
    """The family comes from the data set's name, not from a folder or from nowhere."""


@functools.cache
def located(file: str) -> Located:
    """What <task>/<data set>/<split>.jsonl says; the split may also be a folder, and the name say the data set."""
    path = PurePosixPath(file)
    folders = list(reversed(path.parts[:-1]))
    of_split = _split(folders[0]) if folders and not subset_name(folders[0]).replace("partial", "") else None
    split = _SPLITS[_split(path.stem) or of_split or "train"]
    name, task, *_ = [*map(subset_name, folders[1 if of_split else 0 :]), "", ""]
    subset = next((known for known in (subset_name(path.stem), name) if known in SUBSETS or known in OTHERS), "")
    if subset in SUBSETS:
        return Located(subset, SUBSETS[subset], split, True)
    if task in TASKS:
        return Located(subset or name, TASKS[task], split, False)
    return Located(subset, TASKS.get(name, "instruction"), split, False)


def subset_name(text: str) -> str:
    """How the data set is called that a file or folder of that name has."""
    words = [word for word in _words(text) if word not in _SPLITS]
    name = "-".join(words)
    if name not in SUBSETS:  # vqa-v2 is no edition
        name = "-".join(word for word in words if not _VERSION.fullmatch(word))
    return _CALLED.get(name, name)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", _DATE.sub(" ", text.lower()))


def _split(text: str) -> str | None:
    return next((word for word in _words(text) if word in _SPLITS), None)


def is_instructions(file: str) -> bool:
    """Whether it holds no rows but the instructions that the rows of its folder share."""
    return PurePosixPath(file).stem.lower() in ("instructions", "instruction")


def choose(files: Sequence[str], subsets: Collection[str]) -> tuple[list[str], Counter[str]]:
    """The files with rows to read, in order, and how many are passed over for each reason.

    Of several editions of a file the newest is read (`_v2`, `_new`); of dated ones (the same rows with rephrased
    answers) none where there is another.  Files of validation and test are read only where no file is for training.

    Args:
        subsets: names of data sets; none: all English ones of pictures, and those that are not known.

    Raises:
        ConfigError, DataError: a name that is none; nothing is left.
    """
    passed: Counter[str] = Counter()
    rows = [file for file in files if not is_instructions(file)]
    _check_names(subsets, {located(file).subset for file in rows})

    def keep(kept: list[str], reason: str) -> list[str]:
        passed[reason] += len(rows) - len(kept)
        return kept

    if subsets:  # files that say nothing are looked into when other files do not have it all
        wanted = {*subsets} | ({""} if {*subsets} - {located(file).subset for file in rows} else set())
        rows = keep([file for file in rows if located(file).subset in wanted], "not in prepare.subsets")
    for kind in () if subsets else _OTHER:
        rows = keep([file for file in rows if OTHERS.get(located(file).subset) != kind], kind)
    training = [file for file in rows if located(file).split == "train"]
    rows = keep(training or rows, "validation or test")
    undated = {_place(file) for file in rows if not _is_dated(file)}
    rows = keep([file for file in rows if not _is_dated(file) or _place(file) not in undated], "rephrased")
    newest = {_edition(file)[0]: file for file in sorted(rows, key=lambda file: _edition(file)[1])}
    rows = keep([file for file in rows if newest[_edition(file)[0]] == file], "older edition")
    if not rows:
        reasons = ", ".join(f"{number} {reason}" for reason, number in passed.items() if number)
        raise DataError(
            f"None of the files is one of M3IT's to read ({reasons or 'there are only instructions'}); "
            "prepare.subsets names data sets."
        )
    return rows, +passed


def _is_dated(file: str) -> bool:
    return _DATE.search(PurePosixPath(file).stem) is not None


def _place(file: str) -> tuple[str, str | None]:
    path = PurePosixPath(file)
    return str(path.parent), _split(path.stem)


def _edition(file: str) -> tuple[tuple[str, ...], str]:
    """What editions of one file have in common, and what grows from one edition to the next."""
    path = PurePosixPath(file)
    words = path.stem.lower().replace("_", ".").split(".")
    common = [word for word in words if not _VERSION.fullmatch(word) and not _DATE.fullmatch(word)]
    return (str(path.parent), *common), ".".join(word for word in words if word not in common)


def _check_names(subsets: Collection[str], found: Collection[str]) -> None:
    known = [*SUBSETS, *OTHERS, *sorted(set(found) - {"", *SUBSETS, *OTHERS})]
    for name in subsets:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ConfigError(f"prepare.subsets: there is no {name!r}; did you mean {near!r}? ({', '.join(known)})")
        if name not in found and "" not in found:
            there = ", ".join(sorted(found)) or "none"
            raise DataError(f"prepare.subsets: there are no files of {name!r} at the given places; there are {there}.")
