"""Conversations out of a `prepare` folder as CSV, for other programs and for reading back.

    prepare-…/data/part-….parquet ──some rows at a time──▶ OUT.csv, a row for each conversation
                                                       └─▶ OUT.pictures/{sha256 of the file}.jpg, each once

With `prepare.source=csv` the columns of `conversations` come back as the same conversations.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyvlm import schema, storage
from tinyvlm.chat import Message, Picture
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.sources.table import PUBLISHED
from tinyvlm.errors import DataError
from tinyvlm.folders import find_folder, part_paths

CsvSchema = Literal["conversations", "published", "seed-vqa"]

COLUMNS: dict[CsvSchema, tuple[str, ...]] = {
    "conversations": (
        *("key", "status", "detail", "source_key", "source", "family", "split"),
        *("messages", "images", "sha256", "phash", "meta"),
    ),
    "published": PUBLISHED,
    "seed-vqa": ("image_id", "prompt"),
}
"""`conversations`: everything; `messages`, `images` (names of files), `sha256` and `phash` (of each picture as its
source has it) and `meta` are JSON.  `published`: one question, one answer, one picture or none.
`seed-vqa`: the published system's table of VQA v2."""

SEED_SYSTEM = "You are a useful Visual Assitant"
"""With its spelling."""
_ROWS_AT_A_TIME = 64

Cells = Mapping[str, Any]


@dataclass
class Exported:
    """What came out."""

    num_rows: int = 0
    num_pictures: int = 0
    """Files that were written; those that were there already are not counted."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → rows that are not in the CSV."""


def export(given: Path, out: Path, *, layout: CsvSchema = "conversations", all_rows: bool = False) -> Exported:
    """Write a folder of `prepare` as CSV; a file of that name is replaced as a whole, when everything is written.

    Args:
        given: the folder, or a root that holds one.
        all_rows: also those that cannot be used, with their reason.

    Raises:
        StageError: there is no such folder.
        DataError: nothing can be written there.
    """
    if all_rows and layout != "conversations":
        raise DataError(f"Rows that cannot be used have no place in {layout}; leave --all out, or take conversations.")
    storage.require_disk("tinyvlm data export", out)
    paths = part_paths(find_folder([given], "prepare", "tinyvlm data export"))
    done = Exported()
    pictures = _Pictures(out.with_name(f"{out.stem}.pictures"), done)
    cells = {"conversations": _conversation, "published": _published, "seed-vqa": _seed_vqa}[layout]
    draft = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS[layout])
            writer.writeheader()
            for row in _rows(paths, all_rows, done.left_out):
                written = cells(row, pictures)
                if isinstance(written, str):
                    done.left_out[written] += 1
                else:
                    writer.writerow(written)
                    done.num_rows += 1
        os.replace(draft, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror or error}).") from error
    finally:
        draft.unlink(missing_ok=True)
    return done


def _rows(paths: Sequence[Path], all_rows: bool, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with pq.ParquetFile(storage.readable(path)) as file:
            for batch in file.iter_batches(_ROWS_AT_A_TIME):
                rows = pa.Table.from_batches([batch])
                if not all_rows:
                    usable = pc.equal(rows["status"], schema.OK)
                    left_out.update(rows["status"].filter(pc.invert(usable)).to_pylist())
                    rows = rows.filter(usable)
                yield from rows.to_pylist()


class _Pictures:
    """The folder of the pictures."""

    def __init__(self, folder: Path, done: Exported) -> None:
        self._folder, self._done = folder, done

    def keep(self, image: bytes | None) -> str | None:
        """The name, as seen from the CSV, of a file with these bytes; None for none."""
        if image is None:
            return None
        path = self._folder / f"{hashlib.sha256(image).hexdigest()}.jpg"
        if not path.exists():  # written as a whole, so what is there is right
            storage.write_atomic(path, image, sync=False)
            self._done.num_pictures += 1
        return f"{self._folder.name}/{path.name}"


def _conversation(row: Mapping[str, Any], pictures: _Pictures) -> Cells:
    images = row["images"] or []
    return {
        **{name: row[name] for name in ("key", "status", "detail", "source_key", "source", "family", "split", "meta")},
        "messages": _json([_written(message) for message in messages_of(row["messages"])]),
        "images": _json([pictures.keep(image["bytes"]) for image in images]),
        "sha256": _json([image["sha256"] for image in images]),
        "phash": _json([image["phash"] for image in images]),
    }


def _written(message: Message) -> dict[str, Any]:
    parts = [{"image": part.index} if isinstance(part, Picture) else {"text": part} for part in message.parts]
    return {"role": message.role, "parts": parts}


def _published(row: Mapping[str, Any], pictures: _Pictures) -> Cells | str:
    """The row, or why that table has no place for it."""
    messages = messages_of(row["messages"])
    if [message.role for message in messages] != ["user", "assistant"]:
        return "not one question and one answer"
    if len(row["images"]) > 1:
        return "several pictures"
    image = pictures.keep(row["images"][0]["bytes"]) if row["images"] else ""
    return {"instruction": messages[0].text, "inputs": "", "outputs": messages[1].text, "image_path": image}


def _seed_vqa(row: Mapping[str, Any], pictures: _Pictures) -> Cells | str:
    messages, meta = messages_of(row["messages"]), json.loads(row["meta"] or "{}")
    if "image_id" not in meta or [message.role for message in messages] != ["user", "assistant"]:
        return "not one question about a picture with an image_id"
    asked, answered = (message.text for message in messages)
    prompt = f"<sys>{SEED_SYSTEM}</sys><user>{asked}</user><assist>{answered}</assist>"
    return {"image_id": meta["image_id"], "prompt": prompt}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
