"""Stage `download`: links → pictures, or the reason why not; one outcome row for each link.

    rows of a part ─▶ all links at once, under limits (fetch.py) ─▶ bytes ─▶ threads: decode, square, JPEG ─▶ rows

`store=finished` keeps the square picture (one pass, no second decode); `store=original` keeps the bytes as they came,
after checking that they decode, and leaves the rest to `preprocess`.  `sha256` is of the bytes as they came.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import images, schema
from tinyvlm.config import speed
from tinyvlm.data.addresses import Known
from tinyvlm.data.fetch import Answer, FetchConfig, Fetcher
from tinyvlm.stage import Stage, scan

if TYPE_CHECKING:
    from tinyvlm.recipes import Recipe

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What is fetched and what is kept."""

    store: Literal["finished", "original"] = "finished"
    """Keep the finished square picture, or the bytes as they came."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode_threads: int = speed(2)
    """Pictures decoded at a time in one worker."""


@dataclass
class _Outcome:
    """The columns that a link's answer and picture fill."""

    answer: Answer
    image: bytes | None = None
    sha256: str | None = None
    phash: int | None = None
    bytes: int | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    finished_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Download(Stage):
    """Fetches and checks the pictures of a part's links, all at the same time."""

    name = "download"
    version = 2
    reads = ("links",)
    writes = schema.DOWNLOADED

    def __init__(self, config: DownloadConfig, picture: images.PictureConfig, limits: images.LimitConfig) -> None:
        self.config, self.picture, self.limits = config, picture, limits
        self.settings: dict[str, Any] = {"download": config, "limits": limits}
        self.bytes_per_row = 50_000
        if config.store == "finished":  # originals do not depend on what the finished picture looks like
            self.settings["picture"] = picture.stored
            self.bytes_per_row = picture.size**2 // 4
        self._dns_cache: dict[str, Known] = {}

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Download:
        """The stage with a recipe's settings."""
        return cls(recipe.download, recipe.picture, recipe.limits)

    def select(self, rows: pa.Table) -> pa.Table:
        """Every link: a list of links has no statuses yet."""
        return rows

    def __call__(self, rows: pa.Table) -> pa.Table:
        images.quiet_pillow()
        outcomes = asyncio.run(self._run(rows["url"].to_pylist()))
        answers = [outcome.answer for outcome in outcomes]
        columns: dict[str, Any] = {name: rows[name] for name in ("key", "url", "caption", "meta")}
        for name in ("status", "detail", "http_status", "final_url", "attempts", "milliseconds"):
            columns[name] = [getattr(answer, name) for answer in answers]
        for name in ("image", "sha256", "phash", "bytes", "format", "width", "height"):
            columns[name] = [getattr(outcome, name) for outcome in outcomes]
        columns["duplicate_of"] = [None] * rows.num_rows
        columns["finished_at"] = [outcome.finished_at for outcome in outcomes]
        return pa.table({name: columns[name] for name in schema.DOWNLOADED.names}, schema=schema.DOWNLOADED)

    def statistics(self, folder: Path) -> dict[str, Any]:
        """Counts, HTTP statuses, stored bytes and how long links took."""
        statuses: Counter[str] = Counter()
        http_statuses: Counter[str] = Counter()
        spent: list[Any] = []
        for table in scan(folder, ["status", "http_status", "milliseconds"]):
            statuses.update(table["status"].to_pylist())
            http_statuses.update(str(code) if code else "no answer" for code in table["http_status"].to_pylist())
            spent.append(table["milliseconds"].to_numpy())
        milliseconds = np.concatenate(spent) if spent else np.zeros(1, np.float32)
        num_ok, num_rows = statuses[schema.OK], statuses.total()
        quantiles = {f"p{q}": round(float(np.quantile(milliseconds, q / 100)), 1) for q in (50, 90, 99)}
        return {
            "downloaded": num_ok,
            "failed": num_rows - num_ok,
            "success_rate": round(num_ok / max(1, num_rows), 4),
            "image_bytes": _stored_bytes(folder),
            "http_statuses": dict(http_statuses.most_common()),
            "milliseconds": {**quantiles, "max": round(float(milliseconds.max()), 1)},
            "charts": [
                _bar("Links", {"downloaded": num_ok, "failed": num_rows - num_ok}),
                _bar("Why links failed", {s: n for s, n in statuses.most_common() if s != schema.OK}),
                _bar("HTTP statuses", dict(http_statuses.most_common(12))),
                _latencies(milliseconds),
            ],
        }

    async def _run(self, urls: Sequence[str | None]) -> list[_Outcome]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(self.config.decode_threads, thread_name_prefix="decode") as threads:
            async with Fetcher(self.config.fetch, self.limits, self._dns_cache) as fetcher:

                async def one(url: str | None) -> _Outcome:
                    answer = await fetcher.fetch(url or "")
                    if answer.body is None:
                        return _Outcome(answer)
                    return await loop.run_in_executor(threads, self._keep, answer)

                return await asyncio.gather(*(one(url) for url in urls))

    def _keep(self, answer: Answer) -> _Outcome:
        """Decode the body and keep what the settings say; runs in a thread."""
        body, answer.body = answer.body or b"", None
        outcome = _Outcome(answer, sha256=hashlib.sha256(body).hexdigest(), bytes=len(body))
        try:
            outcome.format, image = images.decode_as(body, self.limits)
            outcome.width, outcome.height = image.size
            outcome.phash = images.perceptual_hash(image)
            if self.config.store == "finished":
                body = images.to_jpeg(images.square(image, self.picture)[0], self.picture.jpeg_quality)
            outcome.image = body
        except images.ImageError as error:
            answer.status, answer.detail = error.status, error.detail[:200]
        except Exception as error:  # a bug of ours, or no memory: costs a row, not the run
            _log.exception("cannot decode %s", answer.final_url)
            answer.status, answer.detail = "internal_error", f"{type(error).__name__}: {error}"[:200]
        return outcome


def _stored_bytes(folder: Path) -> int:
    """Size of the image column, from the files' footers."""
    total = 0
    for path in (folder / "data").glob("part-*.parquet"):
        footer = pq.read_metadata(path)
        column = footer.schema.to_arrow_schema().get_field_index("image")
        groups = (footer.row_group(group) for group in range(footer.num_row_groups))
        total += sum(group.column(column).total_uncompressed_size for group in groups)
    return total


def _bar(title: str, counts: dict[str, int]) -> dict[str, Any]:
    return {"kind": "bar", "title": title, "labels": list(counts), "values": list(counts.values())}


def _latencies(milliseconds: Any) -> dict[str, Any]:
    """Histogram with edges that double: 1, 2, 4 … ms."""
    edges = [0, *(2**power for power in range(17))]
    counts, _ = np.histogram(np.clip(milliseconds, 0, edges[-1]), bins=edges)
    last = max((index for index, count in enumerate(counts) if count), default=0) + 1
    return {
        "kind": "histogram",
        "title": "Time on the network for each link",
        "edges": edges[: last + 1],
        "counts": counts[:last].tolist(),
        "x_label": "milliseconds",
    }
