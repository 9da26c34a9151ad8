"""Stage `download`: links → pictures, or the reason why not; one outcome row for each link.

    rows of a part ─▶ each different link once (downloader.py) ─▶ journal ─▶ an outcome row for every input row

`store=finished` keeps the square picture (one pass, no second decode); `store=original` keeps the bytes as they came,
after checking that they decode, and leaves the rest to `preprocess`.  `sha256` is of the bytes as they came.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from tinyvlm import images, schema
from tinyvlm.config import speed
from tinyvlm.data import download_report
from tinyvlm.data.downloader import Downloader, Outcome
from tinyvlm.data.fetch import FetchConfig
from tinyvlm.errors import ConfigError, NetworkError
from tinyvlm.folders import Manifest
from tinyvlm.journal import Journal
from tinyvlm.stage import Stage
from tinyvlm.storage import address
from tinyvlm.takedown import Takedown

if TYPE_CHECKING:
    from tinyvlm.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What is fetched and what is kept."""

    store: Literal["finished", "original"] = "finished"
    """Keep the finished square picture, or the bytes as they came."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode_processes: int = speed(1)
    """Decoder processes of each worker; 0: threads in the worker itself, which a bad picture may then kill."""
    decode_timeout_s: float = speed(20.0)
    """How long a decoder may take over one picture, s."""
    parts_at_once: int = speed(8)
    """Parts that a worker has in hand at a time, so that slow links of one do not hold up the others."""

    def __post_init__(self) -> None:
        if self.parts_at_once < 1 or self.decode_processes < 0 or self.decode_timeout_s <= 0:
            raise ConfigError(
                "download wants parts_at_once from 1, decode_processes from 0 and decode_timeout_s above 0, but got "
                f"{self.parts_at_once}, {self.decode_processes} and {self.decode_timeout_s}."
            )


SUSPECT = schema.statuses_of(("dead.dns", "dead.host", "dead.refused", "broken", "timeout.connect"))
"""What a network that breaks says of links before the breaker sees that it is the network."""


class Download(Stage):
    """Fetches and checks the pictures of a part's links, all at the same time."""

    name = "download"
    version = 3
    reads = ("links",)
    writes = schema.DOWNLOADED

    def __init__(self, config: DownloadConfig, picture: images.PictureConfig, limits: images.LimitConfig) -> None:
        self.config, self.picture, self.limits = config, picture, limits
        # Perceptual hashes depend on the resizer whatever is stored.
        self.settings: dict[str, Any] = {"download": config, "limits": limits, "resizer": images.resizer()}
        self.bytes_per_row = 50_000
        if config.store == "finished":  # originals do not depend on what the finished picture looks like
            self.settings["picture"] = picture.stored
            self.bytes_per_row = picture.size**2 // 4
        self.parts_at_once = config.parts_at_once
        self._running: Downloader | None = None
        self._lock, self._assembling = threading.Lock(), threading.Lock()

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Download:
        """The stage with a recipe's settings."""
        return cls(recipe.download, recipe.picture, recipe.limits)

    def select(self, rows: pa.Table) -> pa.Table:
        """Every link: a list of links has no statuses yet."""
        return rows

    def __call__(self, rows: pa.Table) -> pa.Table:
        try:
            return self.map_part(rows, None)
        finally:
            self.close()

    def map_part(self, rows: pa.Table, journal: Journal | None) -> pa.Table:
        """Ask for each different link once; outcomes that the journal has are not asked for again."""
        images.quiet_pillow()
        keys = rows["key"].to_pylist()
        links = [(url or "").strip() for url in rows["url"].to_pylist()]
        first: dict[str, int] = {}
        leaders = [first.setdefault(link, place) if link else place for place, link in enumerate(links)]
        kept = set(journal.read()["key"].to_pylist()) if journal else set()
        asked = [place for place in sorted(set(leaders)) if keys[place] not in kept]
        tables: list[pa.Table] = []
        try:
            for batch in self._downloader().outcomes([links[place] for place in asked]):
                table = self._table(rows.take([asked[at] for at, _ in batch]), [outcome for _, outcome in batch])
                if journal:
                    journal.append(table)  # and nowhere else: pictures of many parts would fill the memory
                else:
                    tables.append(table)
        except NetworkError:
            if journal:
                journal.forget(SUSPECT)
            raise
        with self._assembling:
            done = journal.read() if journal else pa.concat_tables([self.writes.empty_table(), *tables])
            places = {key: place for place, key in enumerate(done["key"].to_pylist())}
            answers = done.take([places[keys[leader]] for leader in leaders])
        duplicates = [keys[leader] if leader != place else None for place, leader in enumerate(leaders)]
        columns = {name: answers[name] for name in self.writes.names}
        return self._with(rows, {**columns, "duplicate_of": duplicates})

    def close(self) -> None:
        """End the worker's event loop and decoders."""
        with self._lock:
            if self._running is not None:
                self._running.close()
            self._running = None

    def __getstate__(self) -> dict[str, Any]:
        stays = ("_running", "_lock", "_assembling")
        return {name: value for name, value in self.__dict__.items() if name not in stays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _running=None, _lock=threading.Lock(), _assembling=threading.Lock())

    def _downloader(self) -> Downloader:
        """One for all threads of this worker."""
        with self._lock:
            if self._running is None:
                takedown = Takedown.of(self.folder.parent) if self.folder else None
                self._running = Downloader(
                    self.config, self.picture, self.limits, self._giants(), self.num_workers, takedown
                )
            return self._running

    def _giants(self) -> list[str]:
        """Hosts with so many links that all workers share them."""
        if "links" not in self.folders:
            return []
        found: list[str] = Manifest.read(address(self.folders["links"])).extra.get("giants", [])
        return found

    def _table(self, rows: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
        columns: dict[str, Any] = {"duplicate_of": [None] * len(outcomes)}
        for name in ("status", "detail", "http_status", "final_url", "attempts", "milliseconds"):
            columns[name] = [getattr(outcome.answer, name) for outcome in outcomes]
        for name in ("image", "bytes", "finished_at"):
            columns[name] = [getattr(outcome, name) for outcome in outcomes]
        for name in ("sha256", "phash", "format", "width", "height"):
            columns[name] = [getattr(outcome.decoded, name, None) for outcome in outcomes]
        return self._with(rows, columns)

    def _with(self, rows: pa.Table, columns: dict[str, Any]) -> pa.Table:
        """A table of this stage: what `rows` say of the links, and `columns`."""
        columns |= {name: rows[name] for name in ("key", "url", "caption", "meta")}
        return pa.table({name: columns[name] for name in self.writes.names}, schema=self.writes)

    def statistics(self, folder: Path) -> dict[str, Any]:
        """See download_report.py."""
        return download_report.statistics(folder)
