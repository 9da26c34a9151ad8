"""Stage `download`: links → pictures, or the reason why not; one outcome row for each link.

    rows of a part ─▶ each different link once (downloader.py) ─▶ journal ─▶ an outcome row for every input row

`store=finished` keeps the square picture (one pass, no second decode); `store=original` keeps the bytes as they came,
after checking that they decode, and leaves the rest to `preprocess`.  `sha256` is of the bytes as they came.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyvlm import images, schema
from tinyvlm.config import speed
from tinyvlm.data.downloader import Downloader, Outcome
from tinyvlm.data.fetch import FetchConfig
from tinyvlm.errors import ConfigError
from tinyvlm.folders import part_paths, scan
from tinyvlm.journal import Journal
from tinyvlm.stage import Stage
from tinyvlm.storage import readable

if TYPE_CHECKING:
    from tinyvlm.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What is fetched and what is kept."""

    store: Literal["finished", "original"] = "finished"
    """Keep the finished square picture, or the bytes as they came."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode_threads: int = speed(2)
    """Pictures decoded at a time in one worker."""
    parts_at_once: int = speed(8)
    """Parts that a worker has in hand at a time, so that slow links of one do not hold up the others."""

    def __post_init__(self) -> None:
        for name in ("decode_threads", "parts_at_once"):
            if getattr(self, name) < 1:
                raise ConfigError(f"download.{name} wants at least 1, but got {getattr(self, name)}.")


class Download(Stage):
    """Fetches and checks the pictures of a part's links, all at the same time."""

    name = "download"
    version = 3
    reads = ("links",)
    writes = schema.DOWNLOADED

    def __init__(self, config: DownloadConfig, picture: images.PictureConfig, limits: images.LimitConfig) -> None:
        self.config, self.picture, self.limits = config, picture, limits
        self.settings: dict[str, Any] = {"download": config, "limits": limits}
        self.bytes_per_row = 50_000
        if config.store == "finished":  # originals do not depend on what the finished picture looks like
            self.settings["picture"] = picture.stored
            self.bytes_per_row = picture.size**2 // 4
        self.parts_at_once = config.parts_at_once
        self._running: Downloader | None = None
        self._lock = threading.Lock()

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
        tables = [journal.read() if journal else self.writes.empty_table()]
        kept = set(tables[0]["key"].to_pylist())
        asked = [place for place in sorted(set(leaders)) if keys[place] not in kept]
        for batch in self._downloader().outcomes([links[place] for place in asked]):
            table = self._table(rows.take([asked[at] for at, _ in batch]), [outcome for _, outcome in batch])
            if journal:
                journal.append(table)
            tables.append(table)
        done = pa.concat_tables(tables)
        places = {key: place for place, key in enumerate(done["key"].to_pylist())}
        answers = done.take([places[keys[leader]] for leader in leaders])
        duplicates = [keys[leader] if leader != place else None for place, leader in enumerate(leaders)]
        return self._with(answers, rows, {"duplicate_of": duplicates})

    def close(self) -> None:
        """End the worker's event loop and decoders."""
        with self._lock:
            if self._running is not None:
                self._running.close()
            self._running = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_running", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _running=None, _lock=threading.Lock())

    def _downloader(self) -> Downloader:
        """One for all threads of this worker."""
        with self._lock:
            if self._running is None:
                self._running = Downloader(self.config, self.picture, self.limits)
            return self._running

    def _table(self, rows: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
        columns: dict[str, Any] = {"duplicate_of": [None] * len(outcomes)}
        for name in ("status", "detail", "http_status", "final_url", "attempts", "milliseconds"):
            columns[name] = [getattr(outcome.answer, name) for outcome in outcomes]
        for name in ("image", "sha256", "phash", "bytes", "format", "width", "height", "finished_at"):
            columns[name] = [getattr(outcome, name) for outcome in outcomes]
        return self._with(None, rows, columns)

    def _with(self, answers: pa.Table | None, rows: pa.Table, columns: dict[str, Any]) -> pa.Table:
        """A table of this stage: what `rows` say of the links, then `columns`, the rest from `answers`."""
        columns |= {name: rows[name] for name in ("key", "url", "caption", "meta")}
        chosen = {name: columns[name] if name in columns else answers[name] for name in self.writes.names}
        return pa.table(chosen, schema=self.writes)

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


def _stored_bytes(folder: Path) -> int:
    """Size of the image column, from the files' footers."""
    total = 0
    for path in part_paths(folder):
        footer = pq.read_metadata(readable(path))
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
