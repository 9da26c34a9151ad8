"""What the report of `prepare` says: conversations by source, family and split, lengths, what was set aside, examples.

parts ─▶ Tally (prepare_tally.py) ─▶ numbers, tables, charts
                      └─ places of examples ─▶ rows read again, with their pictures ─▶ sheet, long and short ones
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import schema
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.prepare_tally import COLUMNS, DULL_WORDS, LENGTH_EDGES, MOST, Tally, most_common
from tinyvlm.data.samples import rows_at, sheet_item
from tinyvlm.folders import part_paths
from tinyvlm.report import MAX_PICTURES
from tinyvlm.schema import FAMILIES, SPLITS
from tinyvlm.storage import readable

STORED = "images.list.element.bytes"
REASONS_OF_EACH = 10
"""Reasons that are listed of each status."""
CAPTION_LENGTH, TEXT_LENGTH = 160, 1200
"""Characters of an example that are shown: below a picture, and where there is none."""


def prepare_statistics(
    folder: Path, in_source: Mapping[str, Mapping[int, int]], *, is_decontaminated: bool = True
) -> dict[str, Any]:
    """Everything is counted from the rows of the folder.

    Args:
        in_source: as `PictureSource.num_questions` tells it.
        is_decontaminated: pictures were compared to those of an evaluation; False: no contamination says nothing.
    """
    paths = part_paths(folder)
    tally, stored = Tally(sum(_open(path).num_rows for path in paths), in_source), 0
    for part, path in enumerate(paths):
        table, num_bytes = _read(path)
        tally.add(part, table)
        stored += num_bytes
    shown, told = _examples(paths, tally)
    train, held_out = tally.num(split="train"), tally.num(split="validation")
    return {
        "conversations": {
            family: {split: tally.num(family=family, split=split) for split in SPLITS} for family in FAMILIES
        },
        "held_out_share": held_out / max(1, train + held_out),
        "duplicates": tally.num(status="duplicate"),
        "contaminated": tally.num(status="contaminated") if is_decontaminated else "not looked for",
        "input_rows_used": tally.num_inputs,
        "pictures_shown": tally.pictures_shown,
        "pictures_distinct": len(tally.distinct),
        "pictures_stored_bytes": stored,
        **({"questions": tally.ledger.account()} if in_source else {}),
        "by_source": list(_by_source(tally)),
        "charts": _charts(tally),
        "pictures": {"title": "Examples", "items": shown},
        "sections": {**_set_aside(tally), **_extremes(paths, tally), **told},
    }


def _open(path: Path) -> pq.FileMetaData:
    return pq.read_metadata(readable(path))


def _read(path: Path) -> tuple[pa.Table, int]:
    """The counted columns of a part, and the bytes that its pictures take in the file."""
    with pq.ParquetFile(readable(path)) as file:
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        chunks = (group.column(column) for group in groups for column in range(file.metadata.num_columns))
        stored = sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema == STORED)
        return file.read(list(COLUMNS)), stored


def _by_source(tally: Tally) -> Iterator[dict[str, Any]]:
    """A row for each source and family."""
    kinds = sorted({(source, family) for source, family, *_ in tally.counted}, key=_order)
    for source, family in kinds:
        numbers: dict[str, int] = {split: tally.num(source=source, family=family, split=split) for split in SPLITS}
        trained = numbers["train"] + numbers["validation"]
        usable = sum(numbers.values())
        row: dict[str, Any] = {"source": source, "family": family, **numbers}
        row["held_out_share"] = numbers["validation"] / trained if trained else None
        row["set_aside"] = tally.num(source=source, family=family, status="") - usable
        found = tally.measures.get((source, family))
        if found:
            row |= {"pictures": round(found.pictures / found.rows, 2), "turns": round(found.turns / found.rows, 2)}
        if found and found.tokens.num_values():
            most = int(found.tokens.maximum())
            at = {"median_tokens": 0.5, "p95": 0.95}  # quantiles are a little off, which must not lead past the longest
            row |= {name: min(round(found.tokens.at(share)), most) for name, share in at.items()}
            row["longest"] = most
        yield row


def _order(kind: tuple[str, str]) -> tuple[str, int]:
    return kind[0], FAMILIES.index(kind[1]) if kind[1] in FAMILIES else len(FAMILIES)


def _charts(tally: Tally) -> list[dict[str, Any]]:
    charts = []
    if len({source for source, *_ in tally.counted}) > 1:
        charts.append(_by_split("Conversations by source", tally, "source"))
    charts.append(_by_split("Conversations by family", tally, "family"))
    if tally.lengths.sum():
        charts.append(_lengths(tally))
    for title, counts in (("Pictures in a conversation", tally.pictures), ("Turns of a conversation", tally.turns)):
        names = [*map(str, range(MOST)), f"{MOST} or more"]
        told = [(name, number) for name, number in zip(names, counts.tolist(), strict=True) if number]
        charts.append(_bars(title, told))
    if answers := most_common(tally.answers, 24):
        charts.append(_bars("Short answers in training", answers))
    if words := most_common(tally.words, 24, DULL_WORDS):
        some = f" (one conversation in {tally.step})" if tally.step > 1 else ""
        charts.append(_bars(f"Words of answers{some}", words))
    return charts


def _by_split(title: str, tally: Tally, by: str) -> dict[str, Any]:
    """Bars in pieces: a name's conversations by split, the name with most of them first."""
    usable = Counter[str]()
    for (source, family, _, status), number in tally.counted.items():
        usable[source if by == "source" else family] += number if status == schema.OK else 0
    names = [name for name, number in usable.most_common() if number]
    series = {split: [tally.num(**{by: name}, split=split) for name in names] for split in SPLITS}
    return {
        "kind": "stacked",
        "title": title,
        "labels": names,
        "series": {split: values for split, values in series.items() if any(values)},
    }


def _lengths(tally: Tally) -> dict[str, Any]:
    first, last = np.flatnonzero(tally.lengths)[[0, -1]]
    edges = list(LENGTH_EDGES[first : last + 2])
    if last == len(tally.lengths) - 1:
        edges[-1] = max(edges[-2] + 1, *(int(found.tokens.maximum()) + 1 for found in tally.measures.values()))
    counts = tally.lengths[first : last + 1].tolist()
    return {
        "kind": "histogram",
        "title": "Tokens of a conversation",
        "edges": edges,
        "counts": counts,
        "x_label": "tokens, image tokens included",
    }


def _bars(title: str, counted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    labels, values = [name for name, _ in counted], [number for _, number in counted]
    return {"kind": "bar", "title": title, "labels": labels, "values": values}


def _set_aside(tally: Tally) -> dict[str, Any]:
    """What is kept out of training: the commonest reasons, and how many rows of each source."""
    counts = Counter[tuple[str, str]]()
    for (source, _, _, status), number in tally.counted.items():
        if status != schema.OK:
            counts[source, status] += number
    if not counts:
        return {}
    by_source = []
    statuses = sorted({status for _, status in counts})
    for source in sorted({source for source, _ in counts}):
        row = {status: counts[source, status] for status in statuses}
        share = sum(row.values()) / tally.num(source=source, status="")
        by_source.append({"source": source, "set_aside_share": share, **row})
    note = (
        "Rows stay in the folder with their status and reason. Reasons that differ only in numbers and in names of "
        "files count together; the key is of one of them."
    )
    return {"set_aside": {"note": note, "commonest_reasons": _reasons(tally), "by_source": by_source}}


def _reasons(tally: Tally) -> list[dict[str, Any]]:
    """Why rows were set aside: of each status the commonest reasons, with a row that has it."""
    told = Counter[str]()
    reasons = []
    for name, number in most_common(tally.reasons, len(tally.reasons.names)):
        status, source, _ = name.split("\t", 2)
        told[status] += 1
        if told[status] <= REASONS_OF_EACH and name in tally.reason_examples:
            key, detail = tally.reason_examples[name]
            reasons.append(
                {"rows": number, "status": status, "source": source, "key": str(key), "detail": _clip(detail, 200)}
            )
    return reasons


def _examples(paths: Sequence[Path], tally: Tally) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """A few conversations of each source and family: pictures with captions, and those that have none."""
    places = sorted(tally.drawn.mixed(MAX_PICTURES))
    found = rows_at(paths, places, ("key", "source", "family", "tokens", "messages", "images")).values()
    items: list[dict[str, str]] = []
    texts: list[dict[str, Any]] = []
    for row in sorted(found, key=lambda row: (_order((row["source"], row["family"])), row["key"])):
        words = _words(row)
        if row["images"]:
            more = f" (1 of {len(row['images'])})" if len(row["images"]) > 1 else ""
            caption = f"{row['source']}, {row['family']}{more}: {_clip(words, CAPTION_LENGTH)} #{row['key']}"
            items.append(sheet_item(caption, row["images"][0]["bytes"]))
        else:
            texts.append(_in_words(row))
    return items, {"examples_without_pictures": {"conversations": texts}} if texts else {}


def _extremes(paths: Sequence[Path], tally: Tally) -> dict[str, Any]:
    """The longest and the shortest conversations."""
    told = {}
    for name, extreme in (("longest", tally.longest), ("shortest", tally.shortest)):
        found = rows_at(paths, extreme.places, ("key", "source", "family", "tokens", "messages"))
        told[name] = [_in_words(found[place]) for place in extreme.places]
    if not any(told.values()):
        return {}
    return {"longest_and_shortest": {"note": "`tinyvlm data show FOLDER --key KEY` shows one whole.", **told}}


def _in_words(row: Mapping[str, Any]) -> dict[str, Any]:
    about = {"tokens": row["tokens"], "key": str(row["key"]), "source": row["source"], "family": row["family"]}
    return {**about, "words": _clip(_words(row), TEXT_LENGTH)}


def _words(row: Mapping[str, Any]) -> str:
    return " / ".join(message.text.strip() for message in messages_of(row["messages"]))


def _clip(text: str, length: int) -> str:
    """The text, or its beginning and its end."""
    return text if len(text) <= length else f"{text[: length * 3 // 4]} … {text[-length // 4 :]}"
