"""Three kinds of chart as inline SVG text: horizontal bars, a histogram, lines.

    {"kind": "bar", "title", "labels": […], "values": […]}
    {"kind": "histogram", "title", "edges": [n + 1 numbers], "counts": [n numbers], "x_label"}
    {"kind": "line", "title", "x_label", "y_label", "series": {name: {"x": […], "y": […]}}}

Drawn by hand, because then a chart costs no import and takes its colours from the page's style sheet, in light and in
dark.  The classes used here are styled in report.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 560, 260
"""Size of a histogram or line chart, in SVG units; bars are as high as they need."""

MAX_BARS, MAX_LABEL = 30, 26
MAX_POINTS = 300
"""Points drawn of one line: more cannot be told apart at this width."""

NUM_COLOURS = 6
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 42


def chart(content: Mapping[str, Any]) -> str:
    """One chart as a `<figure>`.

    Raises:
        ValueError: an unknown kind, or lists whose lengths do not fit.
    """
    draw = {"bar": _bars, "histogram": _histogram, "line": _lines}.get(content["kind"])
    if draw is None:
        raise ValueError(f"A chart's kind is bar, histogram or line, not {content['kind']!r}.")
    title = escape(str(content.get("title", "")))
    return f"<figure class='chart'><figcaption>{title}</figcaption>{draw(content)}</figure>"


def number(value: float) -> str:
    """A number as a person writes it: 12,345 · 0.0321 · 1.5 M."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e7:
        for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
            if abs(value) >= size:
                return f"{value / size:,.3g} {unit}"
    if float(value).is_integer():
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _bars(content: Mapping[str, Any]) -> str:
    pairs = [(str(a), _plain(b)) for a, b in zip(content["labels"], content["values"], strict=True)]
    more = len(pairs) - MAX_BARS
    pairs = pairs[:MAX_BARS]
    widest = max((min(len(label), MAX_LABEL) for label, _ in pairs), default=0)
    left, row = 12 + 7 * widest, 24
    highest = max((value for _, value in pairs if math.isfinite(value)), default=0) or 1
    room = WIDTH - left - 72
    parts: list[str] = []
    for index, (label, value) in enumerate(pairs):
        y = index * row + 4
        width = max(1.0, room * value / highest) if value > 0 else 1.0
        shown = label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"
        parts.append(
            f"<g><title>{escape(label)}: {number(value)}</title>"
            f"<text class='label' x='{left - 8}' y='{y + 13}' text-anchor='end'>{escape(shown)}</text>"
            f"<rect class='fill' x='{left}' y='{y + 1}' width='{width:.1f}' height='16' rx='2'/>"
            f"<text class='value' x='{left + width + 6:.1f}' y='{y + 13}'>{number(value)}</text></g>"
        )
    if more > 0:
        parts.append(f"<text class='tick' x='{left}' y='{len(pairs) * row + 16}'>and {more} more</text>")
    return _svg(parts, len(pairs) * row + (28 if more > 0 else 6))


def _histogram(content: Mapping[str, Any]) -> str:
    edges, counts = [_plain(v) for v in content["edges"]], [_plain(v) for v in content["counts"]]
    if len(edges) != len(counts) + 1:
        raise ValueError(f"A histogram of {len(counts)} counts has {len(counts) + 1} edges, not {len(edges)}.")
    if not counts:
        return "<p class='empty'>no values</p>"
    # Bins that grow (1, 2, 4, …) are drawn equally wide, each with its own edges below it.
    widths = [high - low for low, high in itertools.pairwise(edges)]
    even = max(widths) - min(widths) <= 0.01 * (edges[-1] - edges[0])
    places = edges if even else [float(index) for index in range(len(edges))]
    frame = _Frame(places[0], places[-1], 0.0, max(counts) or 1.0)
    step = -(-len(places) // 9)
    marks = None if even else list(zip(places, edges, strict=True))[::step]
    parts = frame.axes(str(content.get("x_label", "")), str(content.get("y_label", "")), marks)
    for index, count in enumerate(counts):
        x, y = frame.x(places[index]), frame.y(count)
        width = frame.x(places[index + 1]) - x
        parts.append(
            f"<rect class='fill' x='{x + 0.5:.1f}' y='{y:.1f}' width='{max(0.6, width - 1):.1f}' "
            f"height='{frame.y(0) - y:.1f}'>"
            f"<title>{number(edges[index])} – {number(edges[index + 1])}: {number(count)}</title></rect>"
        )
    return _svg(parts, HEIGHT)


def _lines(content: Mapping[str, Any]) -> str:
    series = {str(name): _points(line["x"], line["y"]) for name, line in content["series"].items()}
    points = [point for line in series.values() for point in line]
    if not points:
        return "<p class='empty'>no values</p>"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    # A curve that stays away from zero is read by its shape, one near zero by its distance from it.
    low = 0.0 if 0 <= min(ys) <= 0.5 * max(ys) else min(ys)
    frame = _Frame(min(xs), max(xs), low, max(ys))
    parts = frame.axes(str(content.get("x_label", "")), str(content.get("y_label", "")))
    for index, (name, line) in enumerate(series.items()):
        colour = f"line c{index % NUM_COLOURS}"
        place = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line)
        parts.append(f"<polyline class='{colour}' points='{place}'><title>{escape(name)}</title></polyline>")
        marks = line if len(line) <= 40 else line[-1:]
        parts += [
            f"<circle class='{colour}' cx='{frame.x(x):.1f}' cy='{frame.y(y):.1f}' r='2.5'>"
            f"<title>{escape(name)}: {number(y)} at {number(x)}</title></circle>"
            for x, y in marks
        ]
    return _legend(list(series)) + _svg(parts, HEIGHT)


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = "".join(f"<li><i class='c{i % NUM_COLOURS}'></i>{escape(name)}</li>" for i, name in enumerate(names))
    return f"<ul class='legend'>{items}</ul>"


def _points(xs: Sequence[Any], ys: Sequence[Any]) -> list[tuple[float, float]]:
    pairs = [(_plain(x), _plain(y)) for x, y in zip(xs, ys, strict=True)]
    pairs = [pair for pair in pairs if math.isfinite(pair[0]) and math.isfinite(pair[1])]
    step = -(-len(pairs) // MAX_POINTS)
    return pairs[::step] + ([pairs[-1]] if (len(pairs) - 1) % step else []) if pairs else []


def _plain(value: Any) -> float:
    return math.nan if value is None else float(value)


class _Frame:
    """The place of data coordinates in the drawing."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self.x_low, self.x_high = (x_low, x_high) if x_high > x_low else (x_low - 0.5, x_low + 0.5)
        self.y_low, self.y_high = (y_low, y_high) if y_high > y_low else (y_low - 0.5, y_low + 0.5)

    def x(self, value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * (value - self.y_low) / (self.y_high - self.y_low)

    def axes(self, x_label: str, y_label: str, marks: Sequence[tuple[float, float]] | None = None) -> list[str]:
        """Grid, axis, numbers and names; `marks` are (place, number) where the numbers below are no round ones."""
        parts = []
        for value in ticks(self.y_low, self.y_high, 4):
            y = self.y(value)
            parts.append(f"<line class='grid' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
            parts.append(f"<text class='tick' x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{number(value)}</text>")
        base = HEIGHT - _BOTTOM
        parts.append(f"<line class='axis' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{base}' y2='{base}'/>")
        for place, value in marks or [(value, value) for value in ticks(self.x_low, self.x_high, 6)]:
            x = self.x(place)
            parts.append(f"<text class='tick' x='{x:.1f}' y='{base + 17}' text-anchor='middle'>{number(value)}</text>")
        middle_x, middle_y = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + base) / 2
        parts.append(
            f"<text class='name' x='{middle_x}' y='{HEIGHT - 6}' text-anchor='middle'>{escape(x_label)}</text>"
            f"<text class='name' transform='translate(12 {middle_y}) rotate(-90)' text-anchor='middle'>"
            f"{escape(y_label)}</text>"
        )
        return parts


def _svg(parts: Sequence[str], height: float) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {height:.0f}' role='img'>{''.join(parts)}</svg>"
