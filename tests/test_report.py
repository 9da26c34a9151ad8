"""Reports: complete, self-contained, and safe whatever the statistics hold."""

from __future__ import annotations

import base64
import json
import math
import time
from html import escape
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
STACKED = {"kind": "stacked", "title": EVIL, "labels": ["a", EVIL], "series": {"ok": [1, 2], EVIL: [3, 0]}}
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
    "sections": {
        EVIL: {
            "note": EVIL,
            "measured": True,
            "charts": [STACKED, {**HISTOGRAM, "mark": {"x": 1.5, "label": EVIL}}],
            "folded": ["hosts"],
            "hosts": [{"name": EVIL, "rows": 3, "ok_share": 0.25, "sent_bytes": 1_500_000}],
            "sections": {"deeper": {"found": 4}},
        }
    },
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
    assert page.tags.count("svg") == 5
    assert page.tags.count("img") == 1, "what is no base64 is left out"
    assert page.tags.count("details") == 1
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
        "25.0 %",
        "1.5 MB",
        "measured: another run may differ",
        "deeper",
    ):
        assert words in page.words, words


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((5, None, {"ok": 3, "dead.dns": 2}), "✓ 5 rows in = 3 ok + 2 dead.dns"),
        ((2, 5, {"ok": 5}), "✓ 2 rows in → 5 rows out = 5 ok"),
        ((6, 6, {"corrupt": 2, "ok": 3}), "✗ Rows are lost: 6 in, but 5 = 3 ok + 2 corrupt"),
        ((None, None, {"ok": 0}), "✓ 0 rows out = 0 ok"),
    ],
)
def test_that_no_row_is_lost_is_said_with_the_numbers(
    counts: tuple[int | None, int | None, dict[str, int]], said: str
) -> None:
    rows_in, rows_out, statuses = counts
    statistics = {"rows_in": rows_in, "rows_out": rows_out, "statuses": statuses}
    given = {name: value for name, value in statistics.items() if value is not None}
    page = Page(report.stage_report(given))
    assert said in page.words


def test_statuses_stand_by_family() -> None:
    """The largest family first, its members below it; one that is alone has no family of its own."""
    statuses = {"timeout.read": 4, "dead.dns": 3, "ok": 1, "dead.http404": 5, EVIL: 2}
    text = report.stage_report({"rows_in": 15, "rows_out": 15, "statuses": statuses}).split("<table")[1]
    names = [piece.split("</code>")[0] for piece in text.split("<code>")[1:]]
    assert names == ["ok", "dead", "dead.http404", "dead.dns", "timeout.read", escape(EVIL)]
    assert text.index(">8<") < text.index(">5<") < text.index(">3<")


def test_nearly_all_is_not_all() -> None:
    page = Page(report.stage_report({"statuses": {"ok": 99_999, "corrupt": 1}}))
    assert "> 99.9 %" in page.words
    assert "100.0 %" not in page.words
    assert "100.0 %" in Page(report.stage_report({"statuses": {"ok": 5}})).words


def test_the_bar_of_outcomes_has_a_piece_for_each_family() -> None:
    statuses = {"ok": 50, **{f"family{index}": index + 1 for index in range(9)}}
    text = report.stage_report({"statuses": statuses}).split("class='outcomes'>")[1].split("</div>")[0]
    lengths = [int(piece.split("'")[0]) for piece in text.split("flex-grow:")[1:]]
    assert lengths == [50, 9, 8, 7, 6, 5, 1 + 2 + 3 + 4]
    assert text.startswith("<i class='good'")


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
        {"charts": [{"kind": "stacked", "title": "", "labels": [], "series": {}}]},
        {"charts": [{"kind": "stacked", "title": "", "labels": ["a"], "series": {"ok": [0]}}]},
        {"charts": [{**LINE, "y_range": [0, 0]}]},
        {"sections": {"nothing": {}}},
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
    [
        {**BAR, "values": [1]},
        {**STACKED, "series": {"ok": [1]}},
        {**STACKED, "notes": ["one"]},
        {**HISTOGRAM, "edges": [0, 1]},
        {"kind": "pie", "title": EVIL},
        {"kind": "line"},
    ],
)
def test_a_wrong_chart_is_told_in_its_place_and_the_page_stands(chart: dict[str, Any]) -> None:
    page = Page(report.stage_report({**STATISTICS, "charts": [chart, BAR]}))
    assert "cannot be drawn" in page.words
    assert page.tags.count("svg") == 3
    with pytest.raises((ValueError, KeyError)):
        charts.chart(chart)


def test_a_report_is_quick() -> None:
    started = time.perf_counter()
    report.stage_report({**json.loads(json.dumps(STATISTICS)), "charts": [LINE] * 10})
    assert time.perf_counter() - started < 1.0
