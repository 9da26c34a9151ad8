"""A download folder of any size whose links were never asked: a web of hosts with habits, for looking and for timing.

Rows have `schema.DOWNLOADED`; a `clock` other than 0 changes the measured columns and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from tinyvlm import images, schema

HOSTILE = "http://<script>alert(1)</script>.test/'\"><img src=x onerror=alert(2)>"
START_S = 1_750_000_000
HABITS = {
    "good": {"ok": 93, "dead.http404": 4, "timeout.read": 1, "corrupt": 1, "not_image": 1},
    "old": {"ok": 45, "dead.http404": 40, "dead.redirects": 3, "placeholder.redirect": 10, "too_small": 2},
    "gone": {"dead.dns": 97, "broken.dns": 3},
    "shut": {"blocked.403": 90, "blocked.401": 4, "ok": 6},
    "busy": {"ok": 55, "throttled": 38, "broken.http5xx": 7},
    "slow": {"ok": 60, "timeout.total": 12, "timeout.connect": 16, "timeout.read": 9, "broken.reset": 3},
    "shy": {"optout.header": 80, "optout.robots": 15, "ok": 5},
}
SHARES = {"good": 50, "old": 14, "gone": 15, "shut": 7, "busy": 6, "slow": 6, "shy": 2}
ENDINGS = ("com", "com", "com", "net", "org", "de", "co.uk", "ru", "com.br", "jp", "fr", "pl", "io", "it")
CODES = {
    **{"ok": 200, "corrupt": 200, "not_image": 200, "too_small": 200, "placeholder.redirect": 200, "throttled": 429},
    **{"dead.http404": 404, "dead.redirects": 302, "blocked.403": 403, "blocked.401": 401, "broken.http5xx": 500},
    "optout.header": 200,
}


def write_download(
    folder: Path,
    num_rows: int,
    *,
    rows_per_part: int = 1000,
    num_hosts: int = 2000,
    num_pictures: int = 16,
    clock: int = 0,
) -> Path:
    """`folder`, filled with parts of a download."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    habits = rng.choice(list(SHARES), num_hosts, p=np.array(list(SHARES.values())) / sum(SHARES.values()))
    habits[:4] = ("good", "busy", "good", "shut")
    hosts = [
        f"{'img' if n % 3 else 'cdn'}{n % 7}.{_word(n // 3)}.{ENDINGS[n % len(ENDINGS)]}" for n in range(num_hosts)
    ]
    weights = 1 / np.arange(1, num_hosts + 1) ** 0.8
    sheet = [_picture(n) for n in range(num_pictures)]
    for index, start in enumerate(range(0, num_rows, rows_per_part)):
        size = min(rows_per_part, num_rows - start)
        at = rng.choice(num_hosts, size, p=weights / weights.sum())
        table = _rows(rng, np.random.default_rng([clock, index]), start, at, habits, hosts, sheet, start / num_rows)
        pq.write_table(table, folder / "data" / f"part-{index:05d}.parquet", compression="zstd", row_group_size=1024)
    return folder


def _rows(
    rng: Any, watch: Any, start: int, at: Any, habits: Any, hosts: list[str], sheet: list[Any], share: float
) -> pa.Table:
    size = len(at)
    statuses = np.empty(size, object)
    for habit, outcomes in HABITS.items():
        mine = habits[at] == habit
        statuses[mine] = rng.choice(list(outcomes), mine.sum(), p=np.array(list(outcomes.values())) / 100)
    if 0.55 < share < 0.62:  # the resolver was overloaded for a while
        statuses[rng.random(size) < 0.5] = "broken.dns"
    urls = [f"https://{hosts[host]}/{rng.integers(1 << 32):x}/photo-{start + i}.jpg" for i, host in enumerate(at)]
    if start == 0:
        for place, url in enumerate(
            (HOSTILE, None, "data:image/png;base64,xx", "https://u:p@127.0.0.1:8/a", "http://[::1]/b")
        ):
            if place < size:
                urls[place], statuses[place] = url, "bad_url" if place < 3 else "private_address"
    ok = statuses == "ok"
    body = np.isin(statuses, ("ok", "corrupt", "not_image", "too_small", "placeholder.redirect"))
    which = rng.integers(len(sheet), size=size)
    slow = np.array(["timeout" in status for status in statuses])
    times = np.where(slow, 10_000, 180) * watch.lognormal(0, np.where(slow, 0.05, 0.9), size)
    times[np.isin(statuses, ("bad_url", "private_address"))] = 0
    # Ten million rows take a day; the run stood still for three hours in the middle.
    seconds = START_S + (start + np.arange(size)) / 115 + watch.random(size) * 5 + (10_800 if share > 0.4 else 0)
    columns = {
        "key": np.arange(start, start + size),
        "status": statuses,
        "detail": [None if status == "ok" else f"said {status} <b>& more</b>" for status in statuses],
        "url": urls,
        "caption": ["a picture"] * size,
        "meta": ["{}"] * size,
        "image": [sheet[n][0] if good else None for n, good in zip(which, ok, strict=True)],
        "sha256": [f"{n:064x}" if some else None for n, some in zip(which, body, strict=True)],
        "phash": pa.array(which.astype(np.uint64), mask=~ok),
        "format": ["JPEG" if good else None for good in ok],
        "width": pa.array([sheet[n][1] for n in which], pa.int32(), mask=~ok),
        "height": pa.array([sheet[n][2] for n in which], pa.int32(), mask=~ok),
        "bytes": pa.array(rng.lognormal(11.5, 1, size).astype(np.int64), mask=~body),
        "http_status": pa.array([CODES.get(status) for status in statuses], pa.int32()),
        "final_url": urls,
        "duplicate_of": pa.array(np.zeros(size, np.int64), mask=rng.random(size) > 0.02),
        "attempts": pa.array(1 + (statuses == "throttled") * 3 + (watch.random(size) < 0.02), pa.int32()),
        "milliseconds": pa.array(times, pa.float32()),
        "finished_at": pa.array((seconds * 1000).astype("datetime64[ms]"), pa.timestamp("ms", "UTC")),
    }
    return pa.table({name: columns[name] for name in schema.DOWNLOADED.names}, schema=schema.DOWNLOADED)


def _word(number: int) -> str:
    return "".join("bdfgklmnprstvz"[number // 14**k % 14] + "aeiou"[(number + k) % 5] for k in range(4))


def _picture(number: int) -> tuple[bytes, int, int]:
    """JPEG, and the size that it is said to have had."""
    width, height = ((320, 240), (240, 320), (400, 180), (256, 256))[number % 4]
    image = Image.new("RGB", (width, height), tuple(int(40 + (number * step) % 200) for step in (37, 61, 89)))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, width - 40, height - 40), fill=tuple(int((number * step) % 256) for step in (97, 41, 23)))
    return images.to_jpeg(image, 70), width * (1 + number % 9), height * (1 + number % 9)
