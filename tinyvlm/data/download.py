"""Stage `download`: links → pictures, or the reason why not; one outcome row for each link.

    rows of a part ─▶ all links at once, under limits (fetch.py) ─▶ bytes ─▶ threads: decode, square, JPEG ─▶ rows

`store=finished` keeps the square picture (one pass, no second decode); `store=original` keeps the bytes as they came,
after checking that they decode, and leaves the rest to `preprocess`.  `sha256` is of the bytes as they came.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from tinyvlm import images, schema
from tinyvlm.config import speed
from tinyvlm.data import download_report
from tinyvlm.data.addresses import Known
from tinyvlm.data.fetch import Answer, FetchConfig, Fetcher
from tinyvlm.stage import Stage

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
        """See download_report.py."""
        return download_report.statistics(folder)

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
