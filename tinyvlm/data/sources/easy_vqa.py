"""easy-VQA: 5,000 pictures of one coloured shape each, with 48,248 questions that have thirteen answers (MIT).

    package's questions ──(split, image_id) of the row's `meta`──▶ questions of this picture
        training pictures:  captions · single questions · multi-turn talks over all questions · text-only rows
        test pictures:      every question once, and one caption with all its wordings as references

Captions are made by rules from the set's own answers: what a picture shows is inferred from its questions alone
(`read_facts`), so a picture whose questions never give away its shape or its colour gets no caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from tinyvlm.chat import Message, Picture
from tinyvlm.data.sources import CAPTION_PROMPTS, Dialogue, SourceRow, drawn, share
from tinyvlm.errors import ConfigError
from tinyvlm.schema import Split

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

COLORS = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")
SHAPES = ("circle", "triangle", "rectangle")

CAPTIONS = (
    "the image shows {thing}.",
    "there is {thing} in the image.",
    "this is a picture of {thing}.",
    "the picture contains {thing}.",
    "we can see {thing} here.",
    "the shape in the image is {thing}.",
    "{thing} is shown in the picture.",
    "in this image there is {thing}.",
)
"""Wordings of a caption; a held-out caption is judged against all of them."""

SCENES = (
    "The image shows {thing}.",
    "Imagine a picture of {thing}.",
    "Somebody drew {thing} and nothing else.",
    "A picture contains {thing}.",
)
"""How a text-only row tells what there is to see."""


@dataclass(frozen=True)
class Question:
    """One question of the set; `number` is its position in the set's own file."""

    number: int
    text: str
    answer: str

    @property
    def answer_type(self) -> str:
        """ "yes/no", "shape" or "color"."""
        return "yes/no" if self.answer in ("yes", "no") else "color" if self.answer in COLORS else "shape"

    @property
    def form(self) -> str:
        """The wording with the named shape and colour left out."""
        return _form(self.text)


@dataclass(frozen=True)
class Facts:
    """What a picture's questions give away; None where they do not."""

    color: str | None
    shape: str | None

    @property
    def thing(self) -> str | None:
        """ "a red circle", when both are known."""
        return f"a {self.color} {self.shape}" if self.color and self.shape else None


def read_facts(questions: Iterable[Question]) -> Facts:
    """Infer colour and shape: from answers, from what questions take for granted, and by exclusion."""
    known: list[str | None] = []
    asked = [(question, _words(question.text)) for question in questions]
    for words in (COLORS, SHAPES):
        left = set(words)
        for question, said in asked:
            named = said.intersection(words)
            if question.answer in words:
                left &= {question.answer}
            elif named:
                left = left & named if _affirms(question) else left - named
        known.append(left.pop() if len(left) == 1 else None)
    return Facts(*known)


def _affirms(question: Question) -> bool:
    """Whether what a question names is true of its picture ("what is the red shape?" takes red for granted)."""
    if question.answer not in ("yes", "no"):
        return True
    is_denial = not _words(question.text).isdisjoint(("not", "no"))
    return (question.answer == "yes") != is_denial


@lru_cache(maxsize=4096)  # the set asks a few hundred different questions
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


@lru_cache(maxsize=4096)
def _form(text: str) -> str:
    text = re.sub(rf"\b({'|'.join(COLORS)})\b", "<color>", text)
    return re.sub(rf"\b({'|'.join(SHAPES)})\b", "<shape>", text)


class EasyVQA:
    """The reader; `questions` (split → (text, answer, image_id) triples) stands in for the package in tests."""

    name = "easy_vqa"
    reads = "encode"

    def __init__(
        self, config: PrepareConfig, questions: Mapping[str, Sequence[tuple[str, str, int]]] | None = None
    ) -> None:
        self.config = config
        self._given = questions

    @cached_property
    def pictures(self) -> Mapping[tuple[str, int], Sequence[Question]]:
        """The questions of each picture by (split, image_id).

        Raises:
            ConfigError: the package is not installed.
        """
        found: dict[tuple[str, int], list[Question]] = {}
        for split, triples in (self._given or _read_package()).items():
            for number, (text, answer, image_id) in enumerate(triples):
                found.setdefault((split, image_id), []).append(Question(number, text, answer))
        return found

    def num_questions(self) -> Mapping[str, Mapping[int, int]]:
        """Split → image_id → how many questions the set has about that picture."""
        counts: dict[str, dict[int, int]] = {}
        for (split, image_id), questions in self.pictures.items():
            counts.setdefault(split, {})[image_id] = len(questions)
        return counts

    def dialogues(self, row: SourceRow) -> Sequence[Dialogue]:
        """All talks about one picture, in a fixed order."""
        split, image_id = str(row.meta.get("split")), row.meta.get("image_id")
        if not isinstance(image_id, int) or (split, image_id) not in self.pictures:
            detail = f"easy-VQA has no questions about picture {image_id!r} of split {split!r}"
            return [Dialogue("vqa", "test" if split == "test" else "train", (), status="bad_text", detail=detail)]
        questions = self.pictures[split, image_id]
        place = {"set": split, "image_id": image_id}
        if split == "test":
            made = [*self._singles(questions, "test"), *self._captions(read_facts(questions).thing, "test", image_id)]
        else:
            made = list(self._training(questions, image_id))
        return [replace(one, meta={**place, **one.meta}, held_out_by=str(image_id)) for one in made]

    def _training(self, questions: Sequence[Question], image_id: int) -> Iterator[Dialogue]:
        """A training picture's talks; whole pictures are held out (by `prepare`), never single questions."""
        config = self.config
        split: Split = "train"
        mixed = sorted(questions, key=lambda question: drawn(config.seed, "order", image_id, question.number))
        thing = read_facts(questions).thing
        yield from self._captions(thing, split, image_id)
        yield from self._singles(mixed[: config.singles_per_picture], split)
        yield from self._talks(mixed, split)
        if thing and share(config.seed, "text only", image_id) < config.text_only_share:
            question = mixed[drawn(config.seed, "asked in text", image_id) % len(mixed)]
            scene = SCENES[drawn(config.seed, "scene", image_id) % len(SCENES)].format(thing=thing)
            yield Dialogue("text", split, _turn(f"{scene} {question.text}", question.answer), meta=_meta([question]))

    def _singles(self, questions: Sequence[Question], split: Split) -> Iterator[Dialogue]:
        for question in questions:
            messages = _turn(question.text, question.answer, with_picture=True)
            yield Dialogue("vqa", split, messages, meta=_meta([question]))

    def _talks(self, questions: Sequence[Question], split: Split) -> Iterator[Dialogue]:
        """All questions once, in talks of nearly equal length, at most `turns_per_conversation` turns each."""
        most = self.config.turns_per_conversation
        num_talks = -(-len(questions) // most) if most else 0
        for talk in range(num_talks):
            asked = questions[talk::num_talks]
            turns = [_turn(q.text, q.answer, with_picture=position == 0) for position, q in enumerate(asked)]
            yield Dialogue("multi_turn", split, tuple(m for turn in turns for m in turn), meta=_meta(asked))

    def _captions(self, thing: str | None, split: Split, image_id: int) -> Iterator[Dialogue]:
        for number in range(1 if split == "test" else self.config.captions_per_picture):
            if thing is None:
                detail = "the picture's own questions do not tell both its shape and its color"
                yield Dialogue("caption", split, (), status="bad_text", detail=detail)
                continue
            chosen = (drawn("caption", split, image_id, self.config.seed) + number) % len(CAPTIONS)
            prompt = CAPTION_PROMPTS[drawn("prompt", split, image_id, self.config.seed, number) % len(CAPTION_PROMPTS)]
            references = [wording.format(thing=thing) for wording in CAPTIONS]
            meta = {"references": references} if split == "test" else {}
            yield Dialogue("caption", split, _turn(prompt, references[chosen], with_picture=True), meta=meta)


def _turn(asked: str, answered: str, *, with_picture: bool = False) -> tuple[Message, ...]:
    return (Message("user", (Picture(0), asked) if with_picture else (asked,)), Message("assistant", (answered,)))


def _meta(questions: Sequence[Question]) -> dict[str, list[str] | list[int]]:
    """What statistics and evaluation want to know of each turn."""
    return {
        "questions": [question.number for question in questions],
        "forms": [question.form for question in questions],
        "answer_types": [question.answer_type for question in questions],
    }


def _read_package() -> dict[str, list[tuple[str, str, int]]]:
    try:
        import easy_vqa
    except ImportError:
        raise ConfigError(
            "prepare.source=easy_vqa reads the package easy-vqa, which is not installed; "
            "run `pip install easy-vqa==1.0` (it is in the extra `demo`)."
        ) from None
    readers = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}
    return {split: list(zip(*read(), strict=True)) for split, read in readers.items()}
