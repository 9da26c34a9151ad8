"""A small `prepare` folder of random pictures whose answer is written in their colour, for the training tests."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tinyvlm import config, schema
from tinyvlm.folders import Manifest, describe_part, point_latest

SHADES = (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255)))
QUESTIONS = ("what color is the shape?", "what shape is in the image?", "is there a red shape in the image?")


def conversation(key: int, *, split: str = "train", turns: int | None = None, pictures: int = 1) -> dict[str, Any]:
    """One row; the number of turns, the family and the colour follow from the key."""
    random = np.random.default_rng(key)
    turns = turns or int(random.integers(1, 5))
    word, shade = SHADES[key % 3]
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        parts = [{"text": None, "image": place} for place in range(pictures if turn == 0 else 0)]
        parts.append({"text": QUESTIONS[int(random.integers(3))], "image": None})
        messages.append({"role": "user", "parts": parts})
        messages.append({"role": "assistant", "parts": [{"text": word, "image": None}]})
    jpegs = [_jpeg(shade, key * 10 + place) for place in range(pictures)]
    return {
        "key": key,
        "status": schema.OK,
        "detail": None,
        "source_key": key,
        "source": "test",
        "family": "text" if not pictures else "vqa" if turns == 1 else "multi_turn",
        "split": split,
        "messages": messages,
        "images": [{"bytes": data, "sha256": hashlib.sha256(data).hexdigest()} for data in jpegs],
        "meta": "{}",
    }


def rows(number: int = 60) -> list[dict[str, Any]]:
    """Mostly one picture, some two, some none; every tenth is held out; one is unusable."""
    made = []
    for key in range(number):
        pictures = 0 if key % 7 == 3 else 1 + (key % 11 == 5)
        made.append(conversation(key, split="validation" if key % 10 == 9 else "train", pictures=pictures))
    made[0]["status"], made[0]["detail"] = "no_picture", "left out on purpose"
    return made


def prepare_folder(
    root: Path, made: list[dict[str, Any]], *, parts: int = 2, group_size: int = 8, source: str = ""
) -> Path:
    """Write rows as a finished `prepare` folder under `root`, which may have one for each source."""
    fingerprint = hashlib.sha256(json.dumps([row["key"] for row in made]).encode()).hexdigest()
    folder = root / f"prepare-{fingerprint[:12]}"
    (folder / "data").mkdir(parents=True)
    files = {}
    for part in range(parts):
        table = pa.Table.from_pylist(made[part::parts], schema=schema.CONVERSATIONS)
        path = folder / "data" / f"part-{part:05d}.parquet"
        pq.write_table(table, path, row_group_size=group_size)
        files[path.name] = describe_part(path)
    manifest = Manifest("prepare", 1, fingerprint, {}, {}, len(made), len(made), {}, files, 0.0, "", "", None)
    (folder / "manifest.json").write_text(json.dumps(config.to_dict(manifest)))
    point_latest(root, f"prepare.{source}" if source else "prepare", folder)
    return folder


def _jpeg(shade: tuple[int, int, int], seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 90, (48, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.maximum(pixels, np.array(shade, np.uint8))).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
