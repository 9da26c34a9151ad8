"""What a person wants to know of a download: what came, what did not and why, from whom, and how fast.

    parts ─scan─▶ batches ─▶ tallies (bounded memory, tallies.py) ─▶ stats.json, and from it report.html

One pass over the outcome columns, and a few pictures.  What is taken from measured columns (time, attempts) stands in
sections marked `measured`; two equal runs agree in everything else.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from tinyvlm import images
from tinyvlm.data.sites import hosts_of, site_of, top_level_domain_of
from tinyvlm.data.tallies import ACCURACY, Curve, Groups, Quantiles, Timeline
from tinyvlm.folders import part_paths, scan
from tinyvlm.schema import OK, STATUSES
from tinyvlm.storage import readable

BATCH_ROWS = 50_000
"""Rows counted at a time: parts are small, and so are the tables made of them."""

NUM_LISTED = 15
"""Hosts, sites and top-level domains in a list."""

MIN_ROWS_TO_JUDGE = 20
"""Rows that a name must have to be among those with the lowest success; fewer in a small download."""

NUM_EXAMPLES = 3
"""Failed links shown of each status."""

NUM_PICTURES, PICTURE_SIDE, PICTURE_QUALITY = 12, 224, 80
SHEET_LIMITS = images.LimitConfig(max_pixels=16_000_000)
"""Larger pictures are left out of the sheet, for the memory that they would take."""

_COLUMNS = (
    *("key", "status", "detail", "url", "bytes", "http_status", "width", "height", "duplicate_of"),
    *("attempts", "milliseconds", "finished_at"),
)
_STATUSES = list(STATUSES)
_FAMILIES = list(dict.fromkeys(status.split(".")[0] for status in _STATUSES))
_FAMILY_OF = np.array([_FAMILIES.index(status.split(".")[0]) for status in _STATUSES])

_OUTCOMES = (OK, "throttled", "blocked", "dead", "failed otherwise")
"""What is told apart for each host."""
_OUTCOME_OF = np.array([_OUTCOMES.index(name) if name in _OUTCOMES else len(_OUTCOMES) - 1 for name in _FAMILIES])[
    _FAMILY_OF
]

_MEGAPIXELS = [0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000]
_MILLISECONDS = [0, *(2**power for power in range(21))]


def statistics(folder: Path) -> dict[str, Any]:
    """Everything for stats.json and report.html, from the finished parts of a download folder.

    Memory is bounded whatever the number of rows and hosts; `by_host` says whether its counts are exact.
    """
    tally = _Tally()
    for rows in _batches(scan(folder, _COLUMNS)):
        tally.add(rows)
    content = tally.content()
    content["image_bytes"] = _stored_bytes(folder)
    content["pictures"] = {"title": "Some of what came", "items": _sample_pictures(folder)}
    return content


class _Tally:
    """Takes in the rows of a download, and tells what they come to."""

    def __init__(self) -> None:
        self.statuses = np.zeros(len(_STATUSES), np.int64)
        self.http_statuses: dict[int, int] = {}
        self.attempts: dict[int, int] = {}
        self.hosts, self.sites, self.domains = (Groups(len(_OUTCOMES)) for _ in range(3))
        self.latency = Quantiles(len(_FAMILIES))
        self.milliseconds = np.zeros(len(_MILLISECONDS) - 1, np.int64)
        self.megapixels = np.zeros(len(_MEGAPIXELS) - 1, np.int64)
        self.timeline = Timeline(len(_FAMILIES))
        self.num_bodies = self.sent_bytes = self.num_duplicates = 0
        self.examples: dict[int, list[dict[str, Any]]] = {}

    def add(self, rows: pa.Table) -> None:
        """Count some more rows."""
        codes = pc.index_in(rows["status"], pa.array(_STATUSES)).to_numpy().astype(np.int64)
        families = _FAMILY_OF[codes]
        self.statuses += np.bincount(codes, minlength=len(_STATUSES))
        self._add_hosts(rows["url"], _OUTCOME_OF[codes])
        for counts, name in ((self.http_statuses, "http_status"), (self.attempts, "attempts")):
            for item in rows[name].value_counts().to_pylist():
                value = item["values"] or 0
                counts[value] = counts.get(value, 0) + item["counts"]
        self.num_bodies += rows.num_rows - rows["bytes"].null_count
        self.sent_bytes += pc.sum(rows["bytes"]).as_py() or 0
        self.num_duplicates += rows.num_rows - rows["duplicate_of"].null_count
        sized = rows.select(["width", "height"]).drop_null()
        pixels = sized["width"].to_numpy().astype(np.float64) * sized["height"].to_numpy() / 1e6
        self.megapixels += _histogram_counts(pixels, _MEGAPIXELS)
        spent = rows["milliseconds"].to_numpy()
        self.latency.add(families, spent)
        self.milliseconds += _histogram_counts(spent[~np.isnan(spent)], _MILLISECONDS)
        moments = rows["finished_at"].combine_chunks()
        known = pc.is_valid(moments).to_numpy(zero_copy_only=False)
        self.timeline.add(moments.drop_null().cast(pa.int64()).to_numpy() // 1000, families[known])
        self._keep_examples(rows, codes)

    def _add_hosts(self, urls: pa.ChunkedArray, outcomes: NDArray[np.int64]) -> None:
        hosts = hosts_of(urls)
        counted = (
            pa.table({"host": hosts, "outcome": outcomes}).group_by(["host", "outcome"]).aggregate([([], "count_all")])
        )
        names, kinds, counts = (counted[name] for name in ("host", "outcome", "count_all"))
        names, kinds, counts = names.to_pylist(), kinds.to_numpy(), counts.to_numpy()
        self.hosts.add(names, kinds, counts)
        self.sites.add([site_of(name) for name in names], kinds, counts)
        self.domains.add([top_level_domain_of(name) for name in names], kinds, counts)

    def _keep_examples(self, rows: pa.Table, codes: NDArray[np.int64]) -> None:
        for code in np.unique(codes).tolist():
            kept = self.examples.setdefault(code, [])
            if _STATUSES[code] != OK and len(kept) < NUM_EXAMPLES:
                places = np.flatnonzero(codes == code)[: NUM_EXAMPLES - len(kept)]
                kept += rows.select(["key", "url", "detail"]).take(places).to_pylist()

    def content(self) -> dict[str, Any]:
        """What was counted, as JSON types."""
        num_rows, num_ok = int(self.statuses.sum()), int(self.statuses[_STATUSES.index(OK)])
        codes = dict(sorted(self.http_statuses.items(), key=lambda item: (-item[1], item[0])))
        http_statuses = {str(code) if code else "no answer": count for code, count in codes.items()}
        mean = self.sent_bytes / max(1, self.num_bodies)
        return {
            "downloaded": num_ok,
            "failed": num_rows - num_ok,
            "success_rate": round(num_ok / max(1, num_rows), 4),
            "answered_by_another_row": self.num_duplicates,
            "files_sent": self.num_bodies,
            "sent_bytes": self.sent_bytes,
            "mean_sent_bytes": round(mean),
            "http_statuses": http_statuses,
            "charts": [
                {
                    "kind": "bar",
                    "title": "HTTP statuses",
                    "labels": list(http_statuses)[:12],
                    "values": list(http_statuses.values())[:12],
                },
                _histogram("Size of the pictures as sent", _MEGAPIXELS, self.megapixels, "megapixels"),
            ],
            "sections": {
                "by_host": _by_name(self.hosts, "hosts"),
                "by_site": _by_name(self.sites, "sites"),
                "by_top_level_domain": _by_name(self.domains, "top-level domains"),
                "success_over_time": self._over_time(self.timeline.curve()),
                "time_on_the_network": self._latencies(),
                "examples_of_failures": {"a_few_of_each_status": self._examples()},
            },
        }

    def _over_time(self, curve: Curve) -> dict[str, Any]:
        per = next(item for item in _UNITS if curve.seconds < item[0] * 120 or item is _UNITS[-1])
        x = ((curve.starts_s + curve.widths_s / 2) / per[0]).round(3).tolist()
        totals, ok = curve.counts.sum(axis=1), curve.counts[:, _FAMILIES.index(OK)]
        largest = [i for i in np.argsort(-curve.counts.sum(axis=0), kind="stable") if _FAMILIES[i] != OK][:4]
        shown = [_FAMILIES.index(OK), *(i for i in largest if curve.counts[:, i].any())]

        def line(values: NDArray[np.floating]) -> dict[str, Any]:
            known = [None if math.isnan(value) else round(value, 3) for value in values.tolist()]
            return {"x": x, "y": known}

        # A share of nothing is nothing that could be drawn.
        shares = curve.counts * 100 / np.where(totals, totals, np.nan)[:, None]
        label = f"{per[1]} of work"
        pauses = f"; time in which nothing was finished is left out ({curve.num_pauses} ×)" if curve.num_pauses else ""
        return {
            "measured": True,
            "note": f"By the time at which each row was finished{pauses}.",
            "working_seconds": round(curve.seconds),
            "rows_per_second": round(float(totals.sum()) / max(1.0, curve.seconds), 2),
            "charts": [
                {
                    "kind": "line",
                    "title": "Share of outcomes, %",
                    "x_label": label,
                    "y_label": "% of rows",
                    "y_range": [0, 100],
                    "series": {_FAMILIES[i]: line(shares[:, i]) for i in shown},
                },
                {
                    "kind": "line",
                    "title": "Rows a second",
                    "x_label": label,
                    "y_label": "rows / s",
                    "y_range": [0, max(1.0, float((totals / np.maximum(1e-9, curve.widths_s)).max(initial=0)))],
                    "series": {OK: line(ok / curve.widths_s), "all": line(totals / curve.widths_s)},
                },
            ],
        }

    def _latencies(self) -> dict[str, Any]:
        names: list[tuple[int | None, str]] = [(None, "all"), *enumerate(_FAMILIES)]
        records: list[dict[str, Any]] = [
            {
                "family": name,
                "rows": self.latency.num_values(group),
                **{f"p{share}_ms": round(self.latency.at(share / 100, group), 1) for share in (10, 50, 90, 99)},
                "max_ms": round(self.latency.maximum(group), 1),
            }
            for group, name in names
            if self.latency.num_values(group)
        ]
        records.sort(key=lambda record: -record["rows"])
        attempts = {f"{number} attempt{'s' * (number != 1)}": count for number, count in sorted(self.attempts.items())}
        return {
            "measured": True,
            "note": f"Of each link, all attempts together.  Quantiles are within {100 * ACCURACY:g} %.",
            "rows_by_attempts": attempts,
            "milliseconds": records,
            "charts": [
                _histogram("Time on the network for each link", _MILLISECONDS, self.milliseconds, "milliseconds")
            ],
        }

    def _examples(self) -> list[dict[str, Any]]:
        order = sorted(self.examples, key=lambda code: -self.statuses[code])
        return [
            {
                "status": _STATUSES[code],
                "key": row["key"],
                "link": shown_link(row["url"]),
                "detail": shown_link(row["detail"]),
            }
            for code in order
            for row in self.examples[code]
        ]


_UNITS = ((1, "seconds"), (60, "minutes"), (3600, "hours"))


def shown_link(url: str | None, length: int = 100) -> str:
    """A link for a report, without the password that some carry."""
    return shortened(re.sub(r"//[^/?#]*@", "//…@", url or ""), length)


def shortened(text: str | None, length: int = 100) -> str:
    """For a table: one line of printable letters, its middle left out where it is long."""
    shown = "".join(letter if letter.isprintable() else "·" for letter in text or "")
    return shown if len(shown) <= length else f"{shown[: length * 2 // 3]} … {shown[-(length // 3 - 3) :]}"


def _by_name(groups: Groups, things: str) -> dict[str, Any]:
    """The largest, and those with the lowest success, as lists and as bars."""
    names, counts = groups.names, groups.counts
    totals, ok = counts.sum(axis=1), counts[:, 0]
    judged = np.flatnonzero(totals >= min(MIN_ROWS_TO_JUDGE, max(1, int(totals.sum()) // 100)))
    judged = judged[ok[judged] < totals[judged]]

    def listed(places: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "name": shortened(names[place], 60),
                "rows": int(totals[place]),
                **dict(zip(_OUTCOMES, counts[place].tolist(), strict=True)),
                "ok_share": round(float(ok[place] / totals[place]), 4),
            }
            for place in places
        ]

    # By name where numbers are equal, so that two equal runs list the same.
    largest = sorted(range(len(names)), key=lambda place: (-totals[place], names[place]))[:NUM_LISTED]
    worst = sorted(judged.tolist(), key=lambda place: (ok[place] / totals[place], -totals[place], names[place]))
    if groups.undercount:
        exact = f"There are too many to count each: these may be up to {groups.undercount:,} rows too low, and "
        exact += f"{int(groups.others.sum()):,} rows belong to rare ones."
    else:
        exact = f"{len(names):,} {things}, every one counted exactly."
    lists = {"largest": listed(largest), "lowest_success": listed(worst[:NUM_LISTED])}
    titles = (f"Largest {things}", f"{things.capitalize()} with the lowest success")
    charts = [_host_bars(title, rows) for title, rows in zip(titles, lists.values(), strict=True) if rows]
    return {"note": exact, "charts": charts, "folded": list(lists), **lists}


def _host_bars(title: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kind": "stacked",
        "title": title,
        "labels": [row["name"] for row in rows],
        "series": {outcome: [row[outcome] for row in rows] for outcome in _OUTCOMES},
        "notes": [f"{100 * row['ok_share']:.0f} % of {row['rows']:,}" for row in rows],
    }


def _histogram_counts(values: NDArray[np.floating], edges: Sequence[float]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)[0]
    return counts


def _histogram(title: str, edges: Sequence[float], counts: NDArray[np.int64], x_label: str) -> dict[str, Any]:
    """Without the empty bins at the end."""
    last = max(np.flatnonzero(counts).tolist(), default=0) + 1
    return {
        "kind": "histogram",
        "title": title,
        "edges": list(edges[: last + 1]),
        "counts": counts[:last].tolist(),
        "x_label": x_label,
    }


def _batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer tables."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(item.num_rows for item in waiting) >= BATCH_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _stored_bytes(folder: Path) -> int:
    """Size of the image column, from the files' footers."""
    total = 0
    for path in part_paths(folder):
        footer = pq.read_metadata(readable(path))
        column = footer.schema.to_arrow_schema().get_field_index("image")
        groups = (footer.row_group(group) for group in range(footer.num_row_groups))
        total += sum(group.column(column).total_uncompressed_size for group in groups)
    return total


def _sample_pictures(folder: Path) -> list[dict[str, str]]:
    """About a dozen pictures from parts all over the folder, shrunk: originals may be megabytes each."""
    paths = part_paths(folder)
    num_chosen = min(NUM_PICTURES, len(paths))
    items: list[dict[str, str]] = []
    for index in range(num_chosen):
        path = paths[index * len(paths) // num_chosen]
        wanted = -(-(NUM_PICTURES - len(items)) // (num_chosen - index))
        items += [item for row in _first_pictures(path, 2 * wanted) if (item := _sheet_item(row))][:wanted]
    return items


def _first_pictures(path: Path, count: int) -> list[dict[str, Any]]:
    """The first ok rows of a part; read page by page, as a row group of originals may be hundreds of megabytes."""
    columns = ["status", "url", "image", "width", "height", "format"]
    found: list[dict[str, Any]] = []
    with pq.ParquetFile(readable(path), buffer_size=1 << 20, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=32, columns=columns):
            usable = pc.and_(pc.equal(batch["status"], OK), pc.is_valid(batch["image"]))
            found += batch.filter(usable).to_pylist()
            if len(found) >= count:
                break
    return found[:count]


def _sheet_item(row: dict[str, Any]) -> dict[str, str] | None:
    try:
        image = images.decode(row["image"], SHEET_LIMITS)
    except images.ImageError:
        return None
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
    jpeg = images.to_jpeg(image, PICTURE_QUALITY)
    caption = f"{row['width']}×{row['height']} {row['format']}, {shown_link(row['url'], 60)}"
    return {"caption": caption, "jpeg_base64": base64.b64encode(jpeg).decode()}
