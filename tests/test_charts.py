"""Charts: what stands where on them."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from test_report import HISTOGRAM, LINE

from tinyvlm import charts


def numbers(text: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf" {name}='([-0-9.]+)'", text)]


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


@pytest.mark.parametrize(
    ("edges", "x", "share"),
    [
        ([0, 0.5, 1], 0.6, 0.6),
        ([0, 0.5, 1], 0.5, 0.5),
        ([0, 1], 1, 1.0),
        ([1, 10, 100, 1000], 55, 1.5 / 3),  # bins that grow are drawn equally wide: halfway through the second
    ],
)
def test_a_mark_stands_at_its_value(edges: list[float], x: float, share: float) -> None:
    chart = {**HISTOGRAM, "edges": edges, "counts": [1] * (len(edges) - 1), "mark": {"x": x, "label": "a limit"}}
    text = charts.chart(chart).split("class='mark'>")[1]
    place = charts._LEFT + share * (charts.WIDTH - charts._LEFT - charts._RIGHT)
    assert numbers(text, "x1") == numbers(text, "x2") == [pytest.approx(place, abs=0.1)]
    assert ">a limit<" in text
    label = numbers(text, "x")[0]
    assert (label < place) == (place > charts.WIDTH / 2), "on the side that has room"


def test_a_mark_off_the_axis_is_left_out() -> None:
    assert "mark" not in charts.chart({**HISTOGRAM, "mark": {"x": 99, "label": "far"}})
    assert "mark" not in charts.chart(HISTOGRAM)


def stacked(**changes: Any) -> str:
    series = {"ok": [60, 5, 0], "throttled": [20, 0, 0], "odd": [20, 5, 10]}
    content = {"kind": "stacked", "title": "Hosts", "labels": ["a", "b", "c"], "series": series}
    return charts.chart({**content, **changes})


def test_pieces_of_a_bar_join_and_are_as_long_as_their_values() -> None:
    text = stacked()
    pieces = re.findall(r"<rect class='piece (\w+)' x='([0-9.]+)' y='(\d+)' width='([0-9.]+)'", text)
    rows = [
        [(own, float(x), float(width)) for own, x, y, width in pieces if int(y) == 5 + 24 * row] for row in range(3)
    ]
    assert [[own for own, _, _ in row] for row in rows] == [["good", "c1", "c0"], ["good", "c0"], ["c0"]]
    (_, x, ok), (_, y, throttled), (_, z, odd) = rows[0]
    assert (y, z) == (pytest.approx(x + ok, abs=0.15), pytest.approx(y + throttled, abs=0.15))
    assert ok == pytest.approx(3 * throttled, abs=0.2)
    assert odd == pytest.approx(2 * rows[2][0][2], abs=0.2)
    assert all(row[0][1] == x for row in rows)
    assert z + odd < charts.WIDTH
    assert re.findall(r"class='value'[^>]*>([^<]*)<", text) == ["100", "10", "10"]
    assert re.findall(r"class='value'[^>]*>([^<]*)<", stacked(notes=["60 %", "x", "y"])) == ["60 %", "x", "y"]


def test_series_of_one_name_have_one_colour_and_others_none_of_theirs() -> None:
    assert charts.colours(["ok", "dead", "others"]) == ["good", "c3", "rest"]
    assert charts.colours(["a", "throttled", "b", "ok"]) == ["c0", "c1", "c2", "good"]
    many = charts.colours(["ok", "throttled", *"abcde"])
    assert len(set(many[:7])) == 7
    assert charts.colours([str(index) for index in range(20)])[6] == "c0", "again from the start"


def test_a_line_has_gaps_where_it_has_no_values() -> None:
    text = charts.chart({**LINE, "series": {"ok": {"x": range(6), "y": [1, 2, None, 3, math.nan, 4]}}})
    assert [len(piece.split("'")[0].split()) for piece in text.split("points='")[1:]] == [2, 1, 1]
    assert text.count("<circle") == 4


def test_a_range_fixes_the_axis() -> None:
    text = charts.chart({**LINE, "series": {"ok": {"x": [0, 1], "y": [50, 60]}}, "y_range": [0, 100]})
    base, top = charts.HEIGHT - charts._BOTTOM, charts._TOP
    assert numbers(text, "cy") == [(base + top) / 2, base - 0.6 * (base - top)]
    assert ">100</text>" in text
