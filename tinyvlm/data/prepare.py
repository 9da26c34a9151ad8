"""The stage `prepare`: finished pictures and a source's words become conversations, one row each.

    encode's rows (ok) ──reader of `source`──▶ dialogues ──▶ key = source_key × 1000 + n
                                                             messages, the picture as JPEG bytes, split, family

Nothing is thrown away in silence: a picture that cannot be talked about leaves a row with its reason, and the
statistics account for every question of the source's own list, also for those whose picture never arrived.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tinyvlm import schema
from tinyvlm.chat import Message, Picture
from tinyvlm.data.samples import sheet_item
from tinyvlm.data.sources import FAMILIES, SPLITS, Dialogue, Source, SourceRow
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.folders import scan
from tinyvlm.stage import Stage

if TYPE_CHECKING:
    from tinyvlm.recipes import Recipe

KEYS_PER_ROW = 1000
"""How many conversations one picture may have; a conversation's key tells its picture's."""


QUESTIONS = ("vqa", "multi_turn")
"""Families in which the source's questions are asked about a picture."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is said about each picture, and what is held out."""

    source: Literal["captions", "easy_vqa"] = "captions"
    """`captions`: the link list's own words; `easy_vqa`: the questions of that package."""
    captions_per_picture: int = 1
    singles_per_picture: int = 4
    """Training conversations of a single question; test pictures always get all of theirs."""
    turns_per_conversation: int = 5
    """Most questions in one multi-turn conversation; 0: no multi-turn conversations."""
    text_only_share: float = 0.1
    """Share of pictures about which one question is also asked in words alone, 0 … 1."""
    validation_share: float = 0.001
    """Share of training pictures held out, by a hash of the picture, 0 … 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("captions_per_picture", "singles_per_picture", "turns_per_conversation"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigError(f"prepare.{name} is {getattr(self, name)}; it must lie between 0 and 100.")
        for name in ("text_only_share", "validation_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"prepare.{name} is {getattr(self, name)}; a share lies between 0 and 1.")


class Prepare(Stage):
    """Turns pictures into conversations.  `source` stands in for the configured reader in tests."""

    name = "prepare"
    reads = ("encode",)
    fan_out = True
    bytes_per_row = 60_000
    writes = schema.CONVERSATIONS

    def __init__(self, config: PrepareConfig, source: Source | None = None) -> None:
        self.settings = config
        self.source = source or open_source(config)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Prepare:
        """The stage with a recipe's settings."""
        return cls(recipe.prepare)

    def check(self) -> None:
        """The source can be read."""
        self.source.num_questions()

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map pictures to conversations, in the order of the input."""
        made: list[dict[str, Any]] = []
        wanted = rows.select(["key", "caption", "meta", "image"])
        for row in wanted.to_pylist():
            made += self._conversations(row)
        return pa.Table.from_pylist(made, schema=self.writes)

    def _conversations(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        key = int(row["key"])
        if not 0 <= key < 2**63 // KEYS_PER_ROW - 1:
            raise DataError(f"Row {key}: keys must lie between 0 and {2**63 // KEYS_PER_ROW - 1} to be talked about.")
        meta = _parse(row["meta"])
        dialogues = self.source.dialogues(SourceRow(key, row["caption"], meta))[:KEYS_PER_ROW]
        if not dialogues:
            dialogues = [Dialogue("caption", "train", (), status="bad_text", detail="the settings ask for no words")]
        picture = {"bytes": row["image"], "sha256": hashlib.sha256(row["image"]).hexdigest()}
        return [
            {
                "key": key * KEYS_PER_ROW + number,
                "status": dialogue.status,
                "detail": dialogue.detail,
                "source_key": key,
                "source": self.source.name,
                "family": dialogue.family,
                "split": dialogue.split,
                "messages": [_message(message) for message in dialogue.messages],
                "images": [picture] if any(_shows_picture(message) for message in dialogue.messages) else [],
                "meta": json.dumps(dialogue.meta, separators=(",", ":")),
            }
            for number, dialogue in enumerate(dialogues)
        ]

    def statistics(self, folder: Path) -> dict[str, Any]:
        """Conversations per family and split, the account of all questions, answers, and examples."""
        counted: Counter[tuple[str, str]] = Counter()
        answers: Counter[str] = Counter()
        ledger = Ledger(self.source.num_questions())
        num_pictures = 0
        for table in scan(folder, ("source_key", "family", "split", "messages", "meta"), only_ok=True):
            counted.update(zip(table["family"].to_pylist(), table["split"].to_pylist(), strict=True))
            num_pictures += len(pc.unique(table["source_key"]))
            ledger.enter(table["family"].to_pylist(), table["meta"].to_pylist())
            asked = pc.and_(pc.is_in(table["family"], pa.array(QUESTIONS)), pc.not_equal(table["split"], "test"))
            for column in table["messages"].filter(asked).to_pylist():
                answers.update(message.text for message in messages_of(column) if message.role == "assistant")
        present = [(family, split) for family in FAMILIES for split in SPLITS if counted[family, split]]
        return {
            "conversations": {family: {split: counted[family, split] for split in SPLITS} for family in FAMILIES},
            "num_pictures": num_pictures,
            "questions": ledger.account(),
            "charts": [
                _bars("Conversations", [(f"{family}, {split}", counted[family, split]) for family, split in present]),
                _bars("Answers in training", answers.most_common(24)),
            ],
            **_examples(folder),
        }


class Ledger:
    """Where each question of the source's own list has gone.

    Args:
        in_source: split of the data set → picture → how many questions it has.
    """

    def __init__(self, in_source: Mapping[str, Mapping[int, int]]) -> None:
        self._in_source = in_source
        self._asked: dict[str, set[int]] = {split: set() for split in in_source}
        self._arrived: dict[str, set[int]] = {split: set() for split in in_source}

    def enter(self, families: Sequence[str], metas: Sequence[str | None]) -> None:
        """Note usable conversations."""
        if not self._in_source:
            return
        for family, text in zip(families, metas, strict=True):
            meta = _parse(text)
            if meta.get("set") in self._asked:
                self._arrived[meta["set"]].add(meta["image_id"])
                if family in QUESTIONS:
                    self._asked[meta["set"]].update(meta["questions"])

    def account(self) -> dict[str, dict[str, int]]:
        """`prepared` + `not_drawn` (left out by the settings) + `picture_missing` = `in_source`, for each split."""
        told = {}
        for split, pictures in self._in_source.items():
            missing = {picture: number for picture, number in pictures.items() if picture not in self._arrived[split]}
            total, prepared = sum(pictures.values()), len(self._asked[split])
            told[split] = {
                "in_source": total,
                "prepared": prepared,
                "not_drawn": total - sum(missing.values()) - prepared,
                "picture_missing": sum(missing.values()),
                "pictures_missing": len(missing),
            }
        return told


def open_source(config: PrepareConfig) -> Source:
    """The reader that the settings name."""
    if config.source == "easy_vqa":
        from tinyvlm.data.sources.easy_vqa import EasyVQA

        return EasyVQA(config)
    from tinyvlm.data.sources.captions import Captions

    return Captions(config)


def _bars(title: str, counted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    labels, values = [name for name, _ in counted], [number for _, number in counted]
    return {"kind": "bar", "title": title, "labels": labels, "values": values}


def _examples(folder: Path, per_family: int = 6) -> dict[str, Any]:
    """A few conversations of each family: with their pictures, or as text where there is none."""
    items: list[dict[str, str]] = []
    texts: list[dict[str, str]] = []
    for table in scan(folder, ("family", "messages", "images"), only_ok=True):
        for family in FAMILIES:
            for row in table.filter(pc.equal(table["family"], family)).slice(0, per_family).to_pylist():
                words = " / ".join(message.text for message in messages_of(row["messages"]))
                if row["images"]:
                    items.append(sheet_item(f"{family}: {words}", row["images"][0]["bytes"]))
                else:
                    texts.append({"family": family, "words": words})
        break
    return {"text_examples": texts, "pictures": {"title": "Examples", "items": items}}


def messages_of(column: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The `messages` column of one row as messages."""
    return [
        Message(
            message["role"],
            tuple(part["text"] if part["image"] is None else Picture(part["image"]) for part in message["parts"]),
        )
        for message in column
    ]


def _message(message: Message) -> dict[str, Any]:
    parts = [
        {"text": None, "image": part.index} if isinstance(part, Picture) else {"text": part, "image": None}
        for part in message.parts
    ]
    return {"role": message.role, "parts": parts}


def _shows_picture(message: Message) -> bool:
    return any(isinstance(part, Picture) for part in message.parts)


def _parse(meta: str | None) -> dict[str, Any]:
    """A row's `meta` as a dictionary; anything else counts as nothing said."""
    try:
        value = json.loads(meta or "{}")
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
