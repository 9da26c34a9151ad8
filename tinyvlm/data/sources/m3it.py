"""M3IT: instruction, inputs and answer about one or several pictures, from some thirty data sets (arXiv 2306.04387).

    {"instruction", "inputs", "outputs", "image_base64_str": ["iVBORw0…", …]}      as the data set's own loader gives it
    {"question", "answer", "image_str": "iVBORw0…"} + instructions.json            as the repository's files have it
    {"instruction", "inputs", "outputs", "image": {"bytes", "path"}}               the Parquet copy, one picture each
        └─ user: pictures, instruction, line break, inputs   assistant: outputs ─▶ one conversation for each answer

The order of the words is that of the authors' own model (Ying-VLM) and the same for all rows: where the instruction
stands is nothing to learn.  The repository's files have each data set's own fields and no instruction: that is drawn
from the list in the file's folder, by a hash of the row.  (Its loader, which did so, is a script; `datasets` 4 and
later run none.)

The Parquet copy does not say from which data set a row is: its rows are of the family `instruction`, unless the
repository's instructions.json files are given with it, by whose sentences rows are then told apart where they can be.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from tinyvlm import storage
from tinyvlm.chat import Message, Part, Picture
from tinyvlm.data import hub
from tinyvlm.data.given_images import Unreadable, from_base64
from tinyvlm.data.record_files import open_file, read_file
from tinyvlm.data.sources import Dialogue, FileSource, GivenImage, Outline, RowReader, drawn, text_of
from tinyvlm.data.sources.m3it_files import SUBSETS, TASKS, choose, is_instructions, located, subset_name
from tinyvlm.errors import DataError
from tinyvlm.schema import Family

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

log = logging.getLogger(__name__)

INPUTS = ("inputs", "input", "question")
OUTPUTS = ("outputs", "output", "answer", "caption", "sentences", "targets")
"""`targets`: several captions of a picture; `sentences`: those of one story."""
IMAGES = ("image_base64_str", "image_str", "img_str", "images", "image")
"""Base64, bytes, or {"bytes", "path"}: one or a list of them."""
_IN_META = frozenset(("instruction", "inputs", "image_base64_str", "targets"))
"""Fields that some files have under `meta`: the rephrased ones, and coco its captions."""
_NAMES = ("dataset", "subset", "config", "task")
"""Columns in which a Parquet file may say from where a row is."""
_BARE = frozenset("shapes vqa-v2 docvqa ocr-vqa st-vqa text-vqa gqa okvqa viquae clevr nlvr".split())
"""Their files have answers of a word or two, of which the loader makes a sentence."""
_ASKING = frozenset(name for name, family in SUBSETS.items() if family in ("vqa", "knowledge_vqa", "reasoning"))
_ASKING |= frozenset(("coco-itm", "snli-ve", "mocheg", "visual-dialog", "multi30k"))
"""Their rows are nothing without a question or sentence of their own: without such a field a file is not understood."""
_WITHOUT_PICTURES = frozenset(("science-qa",))
"""Has questions about words alone; of the others a row without a picture asks about nothing."""
_MARK = re.compile(r"\n*<image>\n*")
_LFS = b"version https://git-lfs"
_POINTER = "is a pointer of Git LFS, not the file: `git lfs pull` in the clone fetches it."
_MAX_META_CHARS = 100


class M3IT(FileSource):
    """The reader."""

    name = "m3it"
    suffixes = (".jsonl", ".json", ".parquet")
    required: tuple[str, ...] = ("instruction", "inputs", "outputs")
    """Of the loader's form; the repository's files have other fields, for which `records` asks itself."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self.required = ()
        self._passed: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._instructions: dict[str, list[str]] = {}
        """Folder → the instructions that its rows share."""
        self._said_in: dict[str, set[str]] = {}
        """Instruction → the data sets that have it in their lists."""

    def choose(self, files: Sequence[str]) -> Sequence[str]:
        """The lists of instructions, then the training files of the wanted data sets."""
        rows, self._passed = choose(files, self.config.subsets)
        if self._passed:
            log.warning("m3it: files passed over: %s", ", ".join(f"{n} {why}" for why, n in self._passed.items()))
        unknown = sorted({place.subset for place in map(located, rows) if not place.is_known} - {""})
        if unknown:
            log.warning("m3it: not a data set of M3IT, so of the family of its folder: %s", ", ".join(unknown))
        lists = [file for file in files if is_instructions(file)]
        lone = {_folder(file) for file in rows if not hub.is_pinned(file)} - {_folder(file) for file in lists}
        for folder in sorted(lone):
            beside = (storage.address(folder) / f"{name}.json" for name in ("instructions", "instruction"))
            lists += [str(file) for file in beside if storage.exists(file)]
        return [*lists, *rows]

    def records(self, files: Sequence[str], rows: RowReader) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
        """All rows of the wanted data sets.

        Raises:
            DataError: the first row of some file is not understood (all such files are named), or a list of
                instructions is none.
        """
        for file in filter(is_instructions, files):
            self._learn(file)
        files = [file for file in files if not is_instructions(file)]
        of_a_kind = {re.sub(r"\d+", "", file): file for file in reversed(files)}
        wrong = [self._lacks(file, rows) for file in of_a_kind.values()]
        if any(wrong):
            raise DataError(
                f"{' '.join(filter(None, wrong))} A field with another name is told by, for example, "
                '--set prepare.columns=\'{"outputs": "its name"}\'; prepare.subsets names the data sets to read.'
            )
        for file in files:
            for place, record in rows(file):
                subset = self._about(record, file)["subset"]
                if self.config.subsets and subset not in self.config.subsets:
                    if not subset:
                        raise DataError(f"{file} does not say of which data set its rows are: no prepare.subsets.")
                    continue
                self._rows[subset] += 1
                yield file, place, record

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        """Where it is from, an instruction for each answer if it has none, and which other rows equal it."""
        about = self._about(record, file)
        given = _given(record)
        digests = [_digest(image) for image in given]
        instruction, inputs = _instruction(record), _inputs(record, about["subset"])
        answers = _answers(record, about["subset"])
        words = [instruction, inputs, *answers]
        known = self._instructions.get(_folder(file), [])
        if known and not instruction:
            places = (drawn("instruction", *digests, *words, number) % len(known) for number in range(len(answers)))
            about["instructions"] = [known[place] for place in places]
        return Outline(
            together=digests[0] if digests else None,
            pictures=[] if None in given else digests,
            same="\x1f".join([about["split"], *digests, *words]),
            about=about,
        )

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        """One conversation for each answer."""
        subset = str(about["subset"])
        images = [_image(image) for image in _given(record)]
        inputs, answers = _inputs(record, subset), _answers(record, subset) or [""]
        instructions = about.get("instructions") or [_instruction(record)] * len(answers)
        status, detail = _trouble(images, instructions[0] or inputs)
        if status == "ok" and not images and subset in SUBSETS and subset not in _WITHOUT_PICTURES:
            status, detail = "no_picture", f"a row of {subset} without a picture"
        family: Family = about["family"] if images else "text"
        good = tuple(image for image in images if not isinstance(image, Unreadable))
        told = []
        for instruction, answer in zip(instructions, answers, strict=True):
            asked = with_pictures("\n".join(filter(None, (instruction, inputs))), len(images))
            messages = (Message("user", asked), Message("assistant", (answer,)))
            told.append(Dialogue(family, about["split"], messages, good, _meta(record), status, detail, subset))
        return told

    def account(self) -> Mapping[str, Any]:
        """Rows of each data set, and files that were not read."""
        return {"rows_of": dict(sorted(self._rows.items())), "files_passed_over": dict(self._passed)}

    def _about(self, record: Mapping[str, Any], file: str) -> dict[str, Any]:
        place = located(file)
        subset, family = place.subset, place.family
        if not subset:
            names = {subset_name(text_of(record.get(column))) for column in _NAMES}
            fitting = names & set(SUBSETS) or self._said_in.get(_instruction(record), set())
            families = {SUBSETS[name] for name in fitting} or {TASKS[name] for name in names & set(TASKS)}
            subset = next(iter(fitting)) if len(fitting) == 1 else ""
            family = next(iter(families)) if len(families) == 1 else family
        return {"subset": subset, "family": family, "split": place.split}

    def _learn(self, file: str) -> None:
        """Read a list of instructions."""
        text = read_file(file)
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        sentences = [text_of(line) for line in value if text_of(line)] if isinstance(value, list) else []
        if not sentences:
            wrong = _POINTER if text.startswith(_LFS) else "an array of sentences was wanted."
            raise DataError(f"{file} holds no instructions: {wrong}")
        self._instructions[_folder(file)] = sentences
        subset = located(file).subset
        for sentence in sentences if subset in SUBSETS else ():
            self._said_in.setdefault(sentence, set()).add(subset)

    def _lacks(self, file: str, rows: RowReader) -> str:
        """A sentence about what the rows of a file lack; "" if nothing."""
        record = next((record for _, record in itertools.islice(rows(file), 100) if record), {})
        if not record:
            with open_file(file) as raw:
                return f"{file} {_POINTER}" if raw.read(len(_LFS)) == _LFS else ""
        has_instruction = _has(record, "instruction") or _folder(file) in self._instructions
        asks = located(file).subset in _ASKING
        wanted = [
            "" if not asks or any(_has(record, name) for name in INPUTS) else f"{INPUTS[0]} ({', '.join(INPUTS[1:])})",
            "" if has_instruction else "instruction (nor is there an instructions.json beside it)",
            "" if any(_has(record, name) for name in OUTPUTS) else f"{OUTPUTS[0]} ({', '.join(OUTPUTS[1:])})",
            "" if any(_has(record, name) for name in IMAGES) else f"{IMAGES[0]} ({', '.join(IMAGES[1:])})",
        ]
        missing = ", ".join(filter(None, wanted))
        return f"{file} has no field {missing}; it has {', '.join(map(str, record))}." if missing else ""


def with_pictures(words: str, num_images: int) -> tuple[Part, ...]:
    """Pictures and words: each picture where an `<image>` stands if there are as many of those, else in front."""
    pieces = _MARK.split(words)
    if num_images and len(pieces) - 1 == num_images:
        parts = [part for number, piece in enumerate(pieces) for part in (Picture(number - 1), piece)][1:]
        return tuple(part for part in parts if part != "")
    return (*(Picture(number) for number in range(num_images)), *filter(None, [words]))


def _folder(file: str) -> str:
    return str(PurePosixPath(file).parent)


def _has(record: Mapping[str, Any], name: str) -> bool:
    meta = record.get("meta")
    return name in record or (name in _IN_META and isinstance(meta, dict) and name in meta)


def _field(record: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """Name and value of the first of the fields that the record has; ("", None) without any."""
    name = next((name for name in names if _has(record, name)), "")
    return name, (record[name] if name in record else record["meta"][name]) if name else None


def _instruction(record: Mapping[str, Any]) -> str:
    return text_of(_field(record, ["instruction"])[1])


def _inputs(record: Mapping[str, Any], subset: str) -> str:
    name, value = _field(record, INPUTS)
    text = text_of(value)
    return f"{text}?" if subset == "shapes" and name == "question" and text else text


def _answers(record: Mapping[str, Any], subset: str) -> list[str]:
    """All answers, each once."""
    name, value = _field(record, OUTPUTS)
    values = value if isinstance(value, list) else [value]
    texts = [text for text in map(text_of, values) if text]
    if name == "sentences":
        texts = [" ".join(texts)] if texts else []
    if subset in _BARE and name in ("answer", "output"):
        texts = [_as_sentence(text, subset) for text in texts]
    return list(dict.fromkeys(texts))


def _as_sentence(answer: str, subset: str) -> str:
    """As the data set's own loader words a bare answer."""
    if subset == "shapes":
        answer = {"true": "yes", "false": "no"}.get(answer.lower(), answer)
    return answer if answer[-1] in ".!?" else f"The answer is {answer}."


def _given(record: Mapping[str, Any]) -> list[Any]:
    """The pictures, however given, in order; None where one of several is missing, none if all are."""
    value = _field(record, IMAGES)[1]
    images = [_unwrapped(image) for image in (value if isinstance(value, list) else [value])]
    return images if any(image is not None for image in images) else []


def _unwrapped(image: Any) -> Any:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    missing = image is None or image in ("", b"") or (isinstance(image, float) and math.isnan(image))
    return None if missing else image


def _digest(image: Any) -> str:
    body = image if isinstance(image, bytes) else str(image).encode("utf-8", "replace")
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def _image(image: Any) -> GivenImage | Unreadable:
    """Bytes, a `data:` address or, as base64 has no dot, a file's name."""
    if image is None:
        return Unreadable("no_picture", "one of the pictures is missing")
    if isinstance(image, bytes) or (isinstance(image, str) and (image[:5].lower() == "data:" or "." in image[:300])):
        return image
    return from_base64(image)


def _trouble(images: Sequence[GivenImage | Unreadable], asked: str) -> tuple[str, str | None]:
    """Status and detail of a row."""
    for image in images:
        if isinstance(image, Unreadable):
            return image.status, image.detail
    return ("ok", None) if asked else ("bad_text", "neither instruction nor inputs")


def _meta(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record says of itself (its numbers in the data set that it comes from)."""
    meta = record.get("meta", record.get("Meta Data"))
    short = meta.items() if isinstance(meta, dict) else ()
    return {
        str(name): value
        for name, value in short
        if name not in _IN_META and isinstance(value, (str, int)) and len(str(value)) <= _MAX_META_CHARS
    }
