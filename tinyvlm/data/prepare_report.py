"""What the report of `prepare` says: conversations by source, family and split, lengths, what was set aside."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tinyvlm import schema
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.samples import sheet_item
from tinyvlm.folders import scan
from tinyvlm.schema import FAMILIES, SPLITS

QUESTIONS = ("vqa", "multi_turn")
"""Families in which easy-VQA's questions are asked about a picture."""
COLUMNS = (
    *("status", "detail", "source_key", "source", "family", "split", "messages", "tokens", "meta"),
    "images.list.element.sha256",
)
MAX_REFUSED = 5
"""Rows of each status that are shown with their reasons."""
LENGTH_EDGES = (0, 16, 32, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 1 << 31)
"""Edges of the bins of tokens a conversation."""


def prepare_statistics(folder: Path, in_source: Mapping[str, Mapping[int, int]]) -> dict[str, Any]:
    """Everything is counted from the rows of the folder.

    Args:
        in_source: as `PictureSource.num_questions` tells it.
    """
    counted: Counter[tuple[str, str, str]] = Counter()
    set_aside: Counter[tuple[str, str]] = Counter()
    answers: Counter[str] = Counter()
    lengths = np.zeros(len(LENGTH_EDGES) - 1, np.int64)
    shown, distinct = 0, set[str]()
    ledger = Ledger(in_source)
    told_about: set[int] = set()
    refused: list[dict[str, Any]] = []
    for table in scan(folder, COLUMNS):
        usable = pc.equal(table["status"], schema.OK)
        bad, table = table.filter(pc.invert(usable)), table.filter(usable)
        refused += _refused(bad, Counter(one["status"] for one in refused))
        set_aside.update(zip(bad["source"].to_pylist(), bad["status"].to_pylist(), strict=True))
        counted.update(
            zip(table["source"].to_pylist(), table["family"].to_pylist(), table["split"].to_pylist(), strict=True)
        )
        told_about.update(table["source_key"].to_pylist())
        hashes = [image["sha256"] for images in table["images"].to_pylist() for image in images or ()]
        shown += len(hashes)
        distinct.update(hashes)
        lengths += np.histogram(table["tokens"].drop_null().to_numpy(), bins=LENGTH_EDGES)[0]
        ledger.enter(table["family"].to_pylist(), table["meta"].to_pylist())
        asked = pc.not_equal(table["split"], "test")
        for column in table["messages"].filter(asked).to_pylist():
            answers.update(message.text for message in messages_of(column) if message.role == "assistant")
    return {
        "conversations": {
            family: {split: _sum(counted, family=family, split=split) for split in SPLITS} for family in FAMILIES
        },
        "sources": {
            source: {
                "usable": _sum(counted, source=source),
                "families": {family: number for family in FAMILIES if (number := _sum(counted, source, family))},
                "set_aside": {status: n for (name, status), n in sorted(set_aside.items()) if name == source},
            }
            for source in sorted({name for name, *_ in counted} | {name for name, _ in set_aside})
        },
        "num_pictures": len(told_about),
        "pictures_shown": shown,
        "pictures_distinct": len(distinct),
        "questions": ledger.account(),
        "set_aside_examples": sorted(refused, key=lambda one: (one["status"], one["source_key"])),
        "charts": _charts(counted, set_aside, answers, lengths),
        **_examples(folder),
    }


def _sum(counted: Mapping[tuple[str, str, str], int], source: str = "", family: str = "", split: str = "") -> int:
    return sum(
        number
        for (of_source, of_family, of_split), number in counted.items()
        if source in ("", of_source) and family in ("", of_family) and split in ("", of_split)
    )


def _charts(
    counted: Mapping[tuple[str, str, str], int],
    set_aside: Mapping[tuple[str, str], int],
    answers: Counter[str],
    lengths: Any,
) -> list[dict[str, Any]]:
    present = [(f"{f}, {s}", number) for f in FAMILIES for s in SPLITS if (number := _sum(counted, family=f, split=s))]
    reasons: Counter[str] = Counter()
    for (_, status), number in set_aside.items():
        reasons[status] += number
    charts = [_bars("Conversations", present), _bars("Answers in training", answers.most_common(24))]
    if len({source for source, *_ in counted}) > 1:
        by_source = Counter({source: _sum(counted, source=source) for source, *_ in counted})
        charts.insert(0, _bars("Conversations by source", by_source.most_common(40)))
    if reasons:
        charts.append(_bars("Set aside", reasons.most_common()))
    if lengths.sum():
        last = int(np.flatnonzero(lengths)[-1])
        names = [f"{first:,}-{after - 1:,}" for first, after in itertools.pairwise(LENGTH_EDGES)]
        charts.append(_bars("Tokens of a conversation", list(zip(names, lengths.tolist(), strict=True))[: last + 1]))
    return charts


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


def _bars(title: str, counted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    labels, values = [name for name, _ in counted], [number for _, number in counted]
    return {"kind": "bar", "title": title, "labels": labels, "values": values}


def _refused(bad: pa.Table, told: Counter[str]) -> list[dict[str, Any]]:
    """Rows that were set aside, and why: of each status the first few that are not among those told already."""
    found: list[dict[str, Any]] = []
    for status in pc.unique(bad["status"]).to_pylist():
        of_it = bad.filter(pc.equal(bad["status"], status)).slice(0, max(0, MAX_REFUSED - told[status]))
        found += of_it.select(["status", "source", "source_key", "detail"]).to_pylist()
    return found


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


def _parse(meta: str | None) -> dict[str, Any]:
    try:
        value = json.loads(meta or "{}")
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
