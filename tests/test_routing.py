"""Links of a host come together, copies of a link stay together, giants are spread, nothing is lost."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pytest

from tinyvlm import schema
from tinyvlm.data import routing
from tinyvlm.data.routing import Router, SortedParts
from tinyvlm.data.sites import NO_HOST, hosts_of


def links_table(urls: list[str | None]) -> pa.Table:
    rows = [{"key": key, "url": url, "caption": f"c{key}", "meta": "{}"} for key, url in enumerate(urls)]
    return pa.Table.from_pylist(rows, schema=schema.LINKS)


def routed(
    urls: list[str | None], folder: Path, rows_per_part: int, batch: int = 1000
) -> tuple[list[pa.Table], Router]:
    router, rows = Router(rows_per_part), links_table(urls)
    for start in range(0, len(urls), batch):
        router.count(rows["url"].slice(start, batch))
    with SortedParts(folder / "sorting", schema.LINKS, num_bytes=rows.nbytes) as parts:
        for start in range(0, len(urls), batch):
            part = rows.slice(start, batch)
            parts.add(part, router.routes(part))
        return list(parts.parts(rows_per_part)), router


@pytest.fixture
def urls() -> list[str | None]:
    lot = random.Random(0)
    small = [f"http://host{lot.randrange(900)}.example/{lot.randrange(10**6)}.jpg" for _ in range(4000)]
    giant = [f"https://Giant.example:8080/{number}.jpg" for number in range(3000)]
    copies = lot.choices(small + giant, k=1500)
    all_of_them = [*small, *giant, *copies, None, "", "no link", "http://"]
    lot.shuffle(all_of_them)
    return all_of_them


def test_hosts_and_copies_stay_together_and_giants_are_spread(urls: list[str | None], tmp_path: Path) -> None:
    parts, router = routed(urls, tmp_path, rows_per_part=500)
    assert router.giants == {"giant.example"}
    together = pa.concat_tables(parts)
    assert together.sort_by("key").equals(links_table(urls)), "every row is there once"
    assert all(part["key"].to_pylist() == sorted(part["key"].to_pylist()) for part in parts)
    assert all(500 <= part.num_rows <= 700 for part in parts[:-1])
    places: defaultdict[str, set[int]] = defaultdict(set)
    for number, part in enumerate(parts):
        for url, host in zip(part["url"].to_pylist(), hosts_of(part["url"]).to_pylist(), strict=True):
            if host not in {NO_HOST, *router.giants}:
                places[host].add(number)
            elif host != NO_HOST:
                places[url].add(number)
    assert {len(numbers) for numbers in places.values()} == {1}
    giants = Counter(number for url, numbers in places.items() if "Giant" in url for number in numbers)
    assert len(giants) == len(parts)
    assert min(giants.values()) > 100, "and evenly"


def test_sorting_through_many_files_changes_nothing(
    urls: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, _ = routed(urls, tmp_path / "a", rows_per_part=300, batch=10**6)
    monkeypatch.setattr(routing, "_BYTES_PER_BUCKET", 40_000)
    monkeypatch.setattr(routing, "_WAITING_BYTES", 60_000)
    in_pieces, _ = routed(urls, tmp_path / "b", rows_per_part=300, batch=170)
    assert [part.to_pylist() for part in in_pieces] == [part.to_pylist() for part in at_once]


def test_a_link_with_very_many_copies_and_links_to_nowhere_fill_no_memory(tmp_path: Path) -> None:
    parts, _ = routed(["http://a/1"] * 1000 + [None] * 1000, tmp_path, rows_per_part=50)
    assert max(part.num_rows for part in parts) <= 200
    assert sum(part.num_rows for part in parts) == 2000


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://A.b/c", "a.b"),
        ("  HTTPS://a.b:80/", "a.b"),
        ("http://user:secret@a.b/x@y", "a.b"),
        ("//a.b/c.jpg", "a.b"),
        ("http://[::1]:80/", "[::1]"),
        ("http://a.b?x=//c", "a.b"),
        ("ftp://a.b/c", "a.b"),
        ("nothing", NO_HOST),
        (None, NO_HOST),
    ],
)
def test_hosts(url: str | None, host: str) -> None:
    assert hosts_of(pa.chunked_array([pa.array([url], pa.string())])).to_pylist() == [host]
