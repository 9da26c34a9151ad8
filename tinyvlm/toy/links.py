"""The demo's list of links: each easy-VQA picture once, among trouble in the proportions that the web has in 2026.

A third of all rows is dead and 3 % lead to "image not available" pictures.  404 and 410, 403, dead host names and
undecodable files keep the shares that CC12M's links had in 2026 (12.0, 8.3, 6.2 and 3.7 % of all rows); slow, refused,
endless, circular and forbidden links fill up the third.  `web_server.py` answers these addresses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm.errors import ConfigError, DataError

CLOSED_PORT = 1
"""A port on which nothing ever listens on an ordinary machine."""


@dataclass(frozen=True)
class Kind:
    """One sort of link."""

    address: str
    """With {base}, {closed} (a port), {n} (a number), {split} and {image_id} to fill in."""
    share: float
    """Of the live rows for live kinds, of all rows for the others."""
    status: str
    """What the download stage should say of it; one of `schema.STATUSES`."""


LIVE = {
    "picture": Kind("{base}/pictures/{split}/{image_id}.png", 0.95, "ok"),
    "moved": Kind("{base}/moved/{split}/{image_id}.png", 0.03, "ok"),
    "busy_503": Kind("{busy}/busy-503/{split}/{image_id}.png", 0.01, "ok"),
    "busy_429": Kind("{busy}/busy-429/{split}/{image_id}.png", 0.01, "ok"),
}
PLACEHOLDER = {"placeholder": Kind("{base}/placeholder/{n}.png", 0.03, "ok")}
DEAD = {
    "not_found": Kind("{base}/404/{n}.jpg", 0.105, "dead.http404"),
    "gone": Kind("{base}/410/{n}.jpg", 0.015, "dead.http404"),
    "forbidden": Kind("{base}/403/{n}.jpg", 0.083, "blocked.403"),
    "no_host": Kind("http://images-{n}.example.invalid/{n}.jpg", 0.062, "dead.dns"),
    "html": Kind("{base}/html/{n}.jpg", 0.014, "not_image"),
    "empty": Kind("{base}/empty/{n}.jpg", 0.004, "not_image"),
    "truncated": Kind("{base}/truncated/{n}.jpg", 0.015, "corrupt"),
    "bomb": Kind("{base}/bomb/{n}.png", 0.004, "bomb"),
    "refused": Kind("http://127.0.0.1:{closed}/{n}.jpg", 0.0083, "dead.refused"),
    "reset": Kind("{base}/reset/{n}.jpg", 0.002, "broken.reset"),
    "silent": Kind("{base}/silent/{n}.jpg", 0.006, "timeout.read"),
    "drip": Kind("{base}/drip/{n}.jpg", 0.003, "timeout.total"),
    "endless": Kind("{base}/endless/{n}.jpg", 0.003, "too_large"),
    "loop": Kind("{base}/loop/{n}/a", 0.004, "dead.redirects"),
    "broken": Kind("{base}/500/{n}.jpg", 0.002, "broken.http5xx"),
    "opted_out": Kind("{base}/opted-out/{n}.png", 0.002, "optout.header"),
    "private": Kind("http://169.254.169.254/latest/{n}", 0.001, "private_address"),
}
KINDS = LIVE | PLACEHOLDER | DEAD
LIVE_SHARE = 1 - sum(kind.share for kind in (PLACEHOLDER | DEAD).values())


def find_pictures(folder: Path | None = None) -> dict[str, dict[int, Path]]:
    """split → image id → file; easy-VQA's own pictures, or `folder`/{train,test}/{id}.png.

    Raises:
        ConfigError: easy-VQA is not installed.
        DataError: `folder` has no such pictures.
    """
    if folder is not None:
        found = {split: {int(p.stem): p for p in (folder / split).glob("*.png")} for split in ("train", "test")}
        if not any(found.values()):
            raise DataError(f"The toy web wants pictures as {folder}/train/<number>.png and …/test, but found none.")
    else:
        try:
            import easy_vqa
        except ModuleNotFoundError:
            raise ConfigError(
                "The toy web serves the pictures of easy-VQA, which is not installed; run: pip install easy-vqa==1.0"
            ) from None
        paths = {"train": easy_vqa.get_train_image_paths(), "test": easy_vqa.get_test_image_paths()}
        found = {split: {int(image_id): Path(p) for image_id, p in by_id.items()} for split, by_id in paths.items()}
    return {split: dict(sorted(by_id.items())) for split, by_id in found.items()}


def write_links(
    path: Path,
    base_url: str,
    *,
    closed_port: int = CLOSED_PORT,
    seed: int = 0,
    num_pictures: int | None = None,
    folder: Path | None = None,
) -> dict[str, int]:
    """Write the list to `path` (Parquet) and return how many rows of each kind it has.

    Columns: key, image_url, caption, split and image_id (null where there is no picture), and kind, which is for
    statistics and tests only.  `num_pictures` makes a small list of about that many live rows, with at least one row
    of each kind of trouble.
    """
    # A host of its own: one that asks for a pause is not asked at all in the meantime.
    busy_url = base_url.replace("127.0.0.1", "localhost")
    rng = random.Random(seed)
    rows = _live_rows(_choose(find_pictures(folder), num_pictures), rng)
    num_all = round(len(rows) / LIVE_SHARE)
    for name, kind in (PLACEHOLDER | DEAD).items():
        for _ in range(max(1, round(kind.share * num_all))):
            rows.append({"kind": name, "split": None, "image_id": None, "caption": f"picture {rng.randrange(5000)}"})
    rng.shuffle(rows)
    for key, row in enumerate(rows):
        address = KINDS[str(row["kind"])].address
        row["key"] = key
        row["image_url"] = address.format(
            base=base_url, busy=busy_url, closed=closed_port, n=key, split=row["split"], image_id=row["image_id"]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)
    return {name: sum(row["kind"] == name for row in rows) for name in KINDS}


_SCHEMA = pa.schema(
    {
        "key": pa.int64(),
        "image_url": pa.string(),
        "caption": pa.string(),
        "split": pa.string(),
        "image_id": pa.int64(),
        "kind": pa.string(),
    }
)


def _choose(pictures: dict[str, dict[int, Path]], num_pictures: int | None) -> list[tuple[str, int]]:
    """(split, image id) of the pictures to link: all, or the first of each split, in the splits' own proportion."""
    total = sum(len(by_id) for by_id in pictures.values())
    share = 1.0 if num_pictures is None else min(1.0, num_pictures / total)
    return [
        (split, image_id) for split, by_id in pictures.items() for image_id in list(by_id)[: round(share * len(by_id))]
    ]


def _live_rows(chosen: list[tuple[str, int]], rng: random.Random) -> list[dict[str, str | int | None]]:
    kinds = [name for name, kind in LIVE.items() for _ in range(max(1, round(kind.share * len(chosen))))]
    kinds += ["picture"] * max(0, len(chosen) - len(kinds))
    # The rarer kinds come last in LIVE: cut surplus plain ones, so that miniature lists keep some of each.
    kinds = kinds[len(kinds) - len(chosen) :]
    rng.shuffle(kinds)
    return [
        {"kind": kind, "split": split, "image_id": image_id, "caption": f"picture {image_id}"}
        for kind, (split, image_id) in zip(kinds, chosen, strict=True)
    ]
