"""VQA v2: questions about COCO's pictures with ten people's answers (CC BY 4.0), from the official files.

    v2_OpenEnded_mscoco_{train,val}2014_questions.json ─┐ joined on (question_id, image_id)
    v2_mscoco_{train,val}2014_annotations.json ─────────┴─▶ sentences (rules, or an endpoint) ─▶ conversations

The published seven steps: read questions, read annotations, join, see what fits nothing, count and sum up, make the
answers sentences, give the roles; Parquet is this stage's own output, and CSV comes of `tinyvlm data export`.
Questions are kept in memory while the annotations, four times their size, stream past.
Format: https://visualqa.org/download.html.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ijson

from tinyvlm.chat import Message, Picture
from tinyvlm.data.record_files import open_file, read_items, renamed
from tinyvlm.data.rewriting import Rewriter
from tinyvlm.data.sources import Dialogue, FileSource, Outline, RowReader, require_fields, text_of
from tinyvlm.data.sources.sentences import to_sentence
from tinyvlm.errors import DataError
from tinyvlm.schema import Split

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

log = logging.getLogger(__name__)

QUESTION_FIELDS = ("question_id", "image_id", "question")
ANNOTATION_FIELDS = ("question_id", "image_id", "question_type", "answer_type", "multiple_choice_answer", "answers")
NUM_NAMED = 10
"""How many of the questions that fit nothing are named in the report."""
_REWRITTEN_TOGETHER = 2_000

Item = dict[str, Any]


class VQAv2(FileSource):
    """The reader."""

    name = "vqa_v2"
    suffixes = (".json",)

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self._account: dict[str, Any] = {}
        self._passed_over: dict[str, str] = {}

    def choose(self, files: Sequence[str]) -> Sequence[str]:
        """Questions and annotations of each part, by turns."""
        found: dict[tuple[str, str], str] = {}
        for file in files:
            kind, part = kind_and_part(file)
            if not kind:
                self._passed_over[file] = "neither questions nor annotations"
            elif not part:
                raise DataError(f"{file} tells neither in its name nor as data_subtype what it is of (train2014, …).")
            elif (part, kind) in found:
                raise DataError(f"{file} and {found[part, kind]} both hold the {kind} of {part}; give one of them.")
            else:
                found[part, kind] = file
        pairs: list[str] = []
        for part in sorted({part for part, _ in found}):
            pair = found.get((part, "questions")), found.get((part, "annotations"))
            if pair[0] and pair[1]:
                pairs += [pair[0], pair[1]]
            elif part.startswith("test") and pair[0]:
                self._passed_over[pair[0]] = "questions without answers"
            else:
                missing = "annotations" if pair[0] else "questions"
                raise DataError(f"{pair[0] or pair[1]} is here, but the {missing} of {part} are not; give both files.")
        for file, why in self._passed_over.items():
            log.info("%s is passed over: %s", Path(file).name, why)
        if not pairs:
            raise DataError(
                "prepare.source=vqa_v2 wants v2_OpenEnded_mscoco_train2014_questions.json, "
                f"v2_mscoco_train2014_annotations.json and the like; there are {', '.join(files)}."
            )
        return pairs

    def records(self, files: Sequence[str], rows: RowReader) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
        """One record for each conversation: the questions that it asks, with all that is known about them."""
        for asking, answering in zip(files[::2], files[1::2], strict=True):
            part = kind_and_part(asking)[1]
            items = self._joined(part, asking, answering)
            is_trained_on = self._split(part) == "train"
            if is_trained_on and self.config.answer_form == "rewritten":
                items = self._rewritten(items)
            most = self.config.questions_per_conversation if is_trained_on else 1
            for asked in _conversations(items, most):
                yield asking, None, {"part": part, "asked": asked}

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        """Questions about a picture lie together."""
        return Outline(together=f"{record['part']}/{record['asked'][0].get('image_id')}")

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        """One conversation."""
        part, asked = str(record["part"]), record["asked"]
        split, first = self._split(part), asked[0]
        family: Any = "vqa" if len(asked) == 1 else "multi_turn"
        if "problem" in first:
            known = {name: value for name, value in first.items() if name != "problem"}
            return [Dialogue(family, split, (), (), known, "bad_record", first["problem"], subset=part)]
        messages: list[Message] = []
        for number, item in enumerate(asked):
            words = (Picture(0), item["question"]) if number == 0 else (item["question"],)
            messages += [Message("user", words), Message("assistant", (self._answer(item),))]
        image = f"{part}/COCO_{part}_{first['image_id']:012d}.jpg"
        return [Dialogue(family, split, tuple(messages), (image,), _meta(part, asked), subset=part)]

    def account(self) -> Mapping[str, Any]:
        """Counts and checksums of each part."""
        return {"vqa_v2": {"parts": self._account, "passed_over": self._passed_over}}

    def _split(self, part: str) -> Split:
        return "train" if part.startswith(self.config.train_on) else "test"

    def _answer(self, item: Item) -> str:
        if self.config.answer_form == "short":
            return str(item["answer"])
        return str(item.get("sentence") or to_sentence(item["question"], item["answer"]))

    def _joined(self, part: str, questions: str, annotations: str) -> Iterator[Item]:
        """Questions with their annotations in the annotations' order, then those that have none."""
        account: dict[str, Any] = {"complete": False}
        self._account[part] = account
        sums = [hashlib.sha256() for _ in range(3)]
        waiting: dict[tuple[int, int], str] = {}
        num_questions = 0
        for record in self._read(questions, "questions.item", QUESTION_FIELDS, sums[0]):
            num_questions += 1
            key = _key(record)
            if key is None:
                yield {"problem": f"a question without question_id and image_id: {str(record)[:120]}"}
            elif key in waiting:
                yield {**_named(key), "problem": "the question stands twice in its file"}
            else:
                waiting[key] = text_of(record.get("question"))
        num_annotations = num_joined = num_unmatched = 0
        unmatched: list[Any] = []
        for record in self._read(annotations, "annotations.item", ANNOTATION_FIELDS, sums[1]):
            num_annotations += 1
            key = _key(record)
            question = waiting.pop(key, None) if key is not None else None
            if key is None or question is None:
                num_unmatched += 1
                unmatched += [record.get("question_id")] if len(unmatched) < NUM_NAMED else []
                continue
            num_joined += 1
            item = {**_named(key), "question": question, **_annotated(record)}
            sums[2].update(f"{key[0]}\t{key[1]}\t{question}\t{item['answer']}\n".encode("utf-8", "replace"))
            yield item
        account |= {
            "complete": True,
            "questions": num_questions,
            "annotations": num_annotations,
            "joined": num_joined,
            "questions_unmatched": len(waiting),
            "annotations_unmatched": num_unmatched,
            "first_questions_unmatched": [key[0] for key in itertools.islice(waiting, NUM_NAMED)],
            "first_annotations_unmatched": unmatched,
            **dict(zip(("questions_sha256", "annotations_sha256", "joined_sha256"), _digests(sums), strict=True)),
        }
        log.info("%s: %s", part, ", ".join(f"{name} {value}" for name, value in account.items()))
        for key in waiting:
            yield {**_named(key), "problem": f"question {key[0]} about picture {key[1]} has no annotation"}

    def _read(self, file: str, prefix: str, fields: Sequence[str], checksum: Any) -> Iterator[Item]:
        is_first = True
        for record in read_items(file, prefix, checksum):
            record = renamed(record, self.config.columns)
            if is_first:
                require_fields(record, fields, file)
            is_first = False
            yield record
        if is_first:
            raise DataError(f"{file} has nothing in its array {prefix.split('.')[0]!r}.")

    def _rewritten(self, items: Iterable[Item]) -> Iterator[Item]:
        rewriter = Rewriter(self.config.rewrite)
        waiting = iter(items)
        while some := list(itertools.islice(waiting, _REWRITTEN_TOGETHER)):
            usable = [item for item in some if _is_usable(item)]
            said = rewriter.sentences([(item["question"], item["answer"]) for item in usable])
            for item, sentence in zip(usable, said, strict=True):
                if sentence is not None:
                    item["sentence"] = sentence
            self._account["rewritten"] = dict(rewriter.counts)
            yield from some
        log.info("rewritten: %s", ", ".join(f"{name} {count}" for name, count in rewriter.counts.items()))


def kind_and_part(file: str) -> tuple[str, str]:
    """("questions" or "annotations", "train2014"), by the file's name or else by what it holds; "": neither says."""
    name = Path(file).name.lower()
    kind = next((word for word in ("questions", "annotations") if word in name), "")
    part = re.search(r"(?<![a-z])(?:train|val|test)(?:-dev)?(?:\d{4})?(?![a-z])", name)
    if kind and part:
        return kind, part[0]
    found_kind, found_part = "", ""
    try:
        with open_file(file) as raw:
            for prefix, event, value in ijson.parse(raw):
                if not prefix and event != "start_map" and event != "map_key":
                    break
                if prefix in ("questions", "annotations") and event == "start_array":
                    found_kind = prefix
                elif prefix == "data_subtype" and event == "string":
                    found_part = value
                if found_kind and found_part:
                    break
    except (ijson.JSONError, UnicodeDecodeError):
        return "", ""
    return found_kind, (part[0] if part and found_kind else found_part)


def _conversations(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Neighbours about the same picture together; what cannot be used spoils no others."""
    asked: list[Item] = []
    for item in items:
        joins = asked and _is_usable(item) and _is_usable(asked[0]) and item["image_id"] == asked[0]["image_id"]
        if asked and not (joins and len(asked) < most):
            yield asked
            asked = []
        asked.append(item)
    if asked:
        yield asked


def _is_usable(item: Item) -> bool:
    return "problem" not in item and bool(item["question"]) and bool(item["answer"])


def _key(record: Mapping[str, Any]) -> tuple[int, int] | None:
    key = record.get("question_id"), record.get("image_id")
    return key if type(key[0]) is int and type(key[1]) is int else None  # type: ignore[return-value]


def _named(key: tuple[int, int]) -> Item:
    return {"question_id": key[0], "image_id": key[1]}


def _annotated(record: Mapping[str, Any]) -> Item:
    answers = record.get("answers")
    given = answers if isinstance(answers, list) else []
    return {
        "question_type": text_of(record.get("question_type")),
        "answer_type": text_of(record.get("answer_type")),
        "answer": text_of(record.get("multiple_choice_answer")),
        "answers": [text_of(one.get("answer")) for one in given if isinstance(one, dict)],
    }


def _meta(part: str, asked: Sequence[Item]) -> Item:
    """As evaluation wants it; of several questions `answer` and `answers` are lists with one entry for each."""
    meta = {
        "set": part,
        "image_id": asked[0]["image_id"],
        "questions": [item["question_id"] for item in asked],
        "question_types": [item["question_type"] for item in asked],
        "answer_types": [item["answer_type"] for item in asked],
    }
    own = [{"answer": item["answer"], "answers": item["answers"]} for item in asked]
    return {**meta, **(own[0] if len(own) == 1 else {name: [one[name] for one in own] for name in own[0]})}


def _digests(sums: Iterable[Any]) -> list[str]:
    return [one.hexdigest() for one in sums]
