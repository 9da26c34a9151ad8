"""Reports: complete, self-contained, and safe whatever the statistics hold."""

from __future__ import annotations

import base64
import json
import math
import time
from html.parser import HTMLParser
from typing import Any

import pytest

from tinyvlm import charts, report
from tinyvlm.schema import STATUSES

EVIL = "<script>alert('&\"')</script>"
BAR = {"kind": "bar", "title": "Hosts", "labels": ["a", EVIL], "values": [3, 0.5]}
HISTOGRAM = {"kind": "histogram", "title": "Times", "edges": [0, 1, 2, 4], "counts": [5, 0, 2], "x_label": EVIL}
LINE = {
    "kind": "line",
    "title": "Loss",
    "x_label": "step",
    "y_label": "nats",
    "series": {
        "train": {"x": list(range(5000)), "y": [3 / (x + 1) for x in range(5000)]},
        EVIL: {"x": [0, 1, 2], "y": [None, math.nan, 1.0]},
    },
}
STATISTICS: dict[str, Any] = {
    "stage": "download",
    "rows_in": 12_345,
    "rows_out": 12_345,
    "statuses": {"ok": 12_000, "timeout.read": 343, "throttled": 2},
    "seconds": 83.0,
    "mean_ms": 12.3456,
    "nested": {"one": {"a": 1}, "two": 2},
    "records": [{"name": EVIL, "rows": 1}, {"name": "b", "share": 0.5}],
    "charts": [BAR, HISTOGRAM, LINE],
    "pictures": {
        "title": EVIL,
        "items": [
            {"caption": EVIL, "jpeg_base64": base64.b64encode(b"jpeg").decode()},
            {"caption": "forged", "jpeg_base64": "x' onerror='alert(1)"},
        ],
    },
    "rows": [("accuracy", EVIL)],
}


class Page(HTMLParser):
    """Checks that tags close, and keeps what a page would load."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.loaded, self.words = list[str](), list[str](), list[str](), ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "circle") or self.open[-1] == tag:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_stage_report_shows_everything_and_loads_nothing() -> None:
    page = Page(report.stage_report(STATISTICS))
    assert "script" not in page.tags
    assert all(target.startswith(("data:image/jpeg;base64,", "#")) for target in page.loaded)
    assert page.tags.count("svg") == 3
    assert page.tags.count("img") == 1, "what is no base64 is left out"
    for words in (
        "12,345",
        "97.2 %",
        "< 0.1 %",
        "1 min 23 s",
        "12.35",
        STATUSES["timeout.read"],
        EVIL,
        "mean ms",
        "one · a",
    ):
        assert words in page.words, words


def test_a_run_report_has_a_heading_for_each_section() -> None:
    page = Page(report.run_report("TinyVLM demo", [("Summary", {"rows": [("a", "b")]}), ("download", STATISTICS)]))
    assert page.tags.count("h2") == 2
    assert [target for target in page.loaded if target.startswith("#")] == ["#s0", "#s1"]


@pytest.mark.parametrize(
    "statistics",
    [
        {},
        {"stage": "x", "statuses": {}, "charts": [], "pictures": None, "seconds": 0},
        {"charts": [{**BAR, "labels": [], "values": []}]},
        {"charts": [{**BAR, "values": [math.nan, 0]}]},
        {"charts": [{**HISTOGRAM, "edges": [0], "counts": []}]},
        {"charts": [{**HISTOGRAM, "edges": [0, 0], "counts": [0]}]},
        {"charts": [{**LINE, "series": {}}]},
        {"charts": [{**LINE, "series": {"one": {"x": [1], "y": [5]}}}]},
        {"charts": [{**LINE, "series": {"flat": {"x": [1, 2], "y": [-5, -5]}}}]},
    ],
)
def test_thin_statistics_make_a_page_too(statistics: dict[str, Any]) -> None:
    text = report.stage_report(statistics)
    Page(text)
    assert "nan" not in text.split("</style>")[1].lower().replace("tinyvlm", "")
    assert "cannot be drawn" not in text


@pytest.mark.parametrize(
    "chart",
    [{**BAR, "values": [1]}, {**HISTOGRAM, "edges": [0, 1]}, {"kind": "pie", "title": EVIL}, {"kind": "line"}],
)
def test_a_wrong_chart_is_told_in_its_place_and_the_page_stands(chart: dict[str, Any]) -> None:
    page = Page(report.stage_report({**STATISTICS, "charts": [chart, BAR]}))
    assert "cannot be drawn" in page.words
    assert page.tags.count("svg") == 1
    with pytest.raises((ValueError, KeyError)):
        charts.chart(chart)


def test_bins_that_grow_are_drawn_equally_wide_with_their_own_edges() -> None:
    text = charts.chart({**HISTOGRAM, "edges": [1, 10, 100, 1000], "counts": [1, 2, 3]})
    assert len({piece.split("'")[0] for piece in text.split(" width='")[1:]}) == 1
    assert all(f">{edge}</text>" in text for edge in ("1", "10", "100", "1,000"))


def test_a_line_is_drawn_with_few_points_and_keeps_its_last() -> None:
    text = charts.chart(LINE)
    points = text.split("points='")[1].split("'")[0].split()
    assert len(points) <= charts.MAX_POINTS + 1
    assert points[-1].startswith(f"{charts.WIDTH - 14:.1f},")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (13, 87, [20, 40, 60, 80]), (5, 5, [5])],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1,234,567"), (0.00001234, "1.23e-05"), (12.3456, "12.35"), (2.5e9, "2.5 G"), (math.inf, "–")],
)
def test_numbers_read_as_a_person_writes_them(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_a_report_is_quick() -> None:
    started = time.perf_counter()
    report.stage_report({**json.loads(json.dumps(STATISTICS)), "charts": [LINE] * 10})
    assert time.perf_counter() - started < 1.0
