"""Four kinds of chart as inline SVG text: horizontal bars, bars in pieces, a histogram, lines.

    {"kind": "bar", "title", "labels": […], "values": […]}
    {"kind": "stacked", "title", "labels": […], "series": {name: [a value for each label]}, "notes": [text, …]}
    {"kind": "histogram", "title", "edges": [n + 1 numbers], "counts": [n numbers], "x_label", "mark": {"x", "label"}}
    {"kind": "line", "title", "x_label", "y_label", "series": {name: {"x": […], "y": […]}}, "y_range": [low, high]}

`notes` (what stands behind each bar, else its sum), `mark` (a threshold, as an upright line) and `y_range` may be left
out.  A `y` of None is a gap in the line.  What is the same on every chart ("ok", families of statuses)
has the same colour.

Drawn by hand, because then a chart costs no import and takes its colours from the page's style sheet, in light and in
dark.  The classes used here are styled in report.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tinyvlm.schema import OK

WIDTH, HEIGHT = 560, 260
"""Size of a histogram or line chart, in SVG units; bars are as high as they need."""

MAX_BARS, MAX_LABEL = 30, 26
MAX_TICK = 5
"""Characters of a number beside an axis."""
MAX_POINTS = 300
"""Points drawn of one line: more cannot be told apart at this width."""

NUM_COLOURS = 6
_COLOUR_OF = {
    **{OK: "good", "throttled": "c1", "blocked": "c2", "dead": "c3", "broken": "c4", "timeout": "c5"},
    **{"failed otherwise": "rest", "others": "rest"},
}
"""Style classes of series that mean the same on every chart."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 42


def chart(content: Mapping[str, Any]) -> str:
    """One chart as a `<figure>`.

    Raises:
        ValueError: an unknown kind, or lists whose lengths do not fit.
    """
    kinds = {"bar": _bars, "stacked": _stacked, "histogram": _histogram, "line": _lines}
    draw = kinds.get(content["kind"])
    if draw is None:
        raise ValueError(f"A chart's kind is one of {', '.join(kinds)}, not {content['kind']!r}.")
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


def _short_numbers(values: Sequence[float]) -> list[str]:
    """As `number` writes them; all of them with exponents where one would run into the name of its axis."""
    texts = [number(value) for value in values]
    if max(map(len, texts), default=0) <= MAX_TICK or max(map(abs, values)) >= 1:
        return texts
    return ["0" if value == 0 else _exponent(value) for value in values]


def _exponent(value: float) -> str:
    factor, _, power = f"{value:.1e}".partition("e")
    return f"{factor.removesuffix('.0')}e{int(power)}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def colours(names: Sequence[str]) -> list[str]:
    """The style class of each series of a chart: its own where it has one, else one that no other here has."""
    taken = {_COLOUR_OF.get(name) for name in names}
    free = [f"c{index}" for index in range(NUM_COLOURS) if f"c{index}" not in taken] or ["rest"]
    others = itertools.cycle(free)
    return [_COLOUR_OF.get(name) or next(others) for name in names]


def legend(labels: Sequence[str], names: Sequence[str] = ()) -> str:
    """Series with their colours; nothing for a single one.  `names`: of the series, where the labels say more."""
    if len(labels) < 2:
        return ""
    series = zip(labels, colours(names or labels), strict=True)
    items = "".join(f"<li><i class='{own}'></i>{escape(label)}</li>" for label, own in series)
    return f"<ul class='legend'>{items}</ul>"


def _bars(content: Mapping[str, Any]) -> str:
    bars = [
        _Bar(str(label), [("fill", _plain(value))], number(_plain(value)))
        for label, value in zip(content["labels"], content["values"], strict=True)
    ]
    return _draw_bars(bars, note_width=72)


def _stacked(content: Mapping[str, Any]) -> str:
    labels, series = [str(label) for label in content["labels"]], content["series"]
    columns = [[_plain(value) for value in values] for values in series.values()]
    totals = [sum(values) for values in zip(*columns, strict=True)] if columns else [0.0] * len(labels)
    notes = [str(note) for note in content.get("notes") or map(number, totals)]
    names = [str(name) for name in series]
    classes = [f"piece {own}" for own in colours(names)]
    bars = [
        _Bar(label, list(zip(classes, values, strict=True)), note)
        for label, note, *values in zip(labels, notes, *columns, strict=True)
    ]
    return legend(names) + _draw_bars(bars, note_width=16 + 7 * max(map(len, notes), default=0))


@dataclass(frozen=True)
class _Bar:
    label: str
    pieces: list[tuple[str, float]]
    """Style class and length of each, from left to right."""
    note: str
    """What stands behind the bar."""

    @property
    def length(self) -> float:
        return sum(value for _, value in self.pieces if math.isfinite(value) and value > 0)


def _draw_bars(bars: Sequence[_Bar], note_width: float) -> str:
    more = len(bars) - MAX_BARS
    bars = bars[:MAX_BARS]
    widest = max((min(len(bar.label), MAX_LABEL) for bar in bars), default=0)
    left, row = 12 + 7 * widest, 24
    scale = (WIDTH - left - note_width) / (max((bar.length for bar in bars), default=0) or 1)
    parts: list[str] = []
    for index, bar in enumerate(bars):
        y = index * row + 4
        shown = bar.label if len(bar.label) <= MAX_LABEL else bar.label[: MAX_LABEL - 1] + "…"
        said = " · ".join(number(value) for _, value in bar.pieces)
        parts.append(
            f"<g><title>{escape(bar.label)}: {said}</title>"
            f"<text class='label' x='{left - 8}' y='{y + 13}' text-anchor='end'>{escape(shown)}</text>"
        )
        x = float(left)
        for style, value in bar.pieces:
            width = max(1.0, scale * value) if value > 0 else 0.0
            if width or len(bar.pieces) == 1:
                parts.append(
                    f"<rect class='{style}' x='{x:.1f}' y='{y + 1}' width='{max(1.0, width):.1f}' height='16' rx='2'/>"
                )
            x += width
        parts.append(f"<text class='value' x='{x + 6:.1f}' y='{y + 13}'>{escape(bar.note)}</text></g>")
    if more > 0:
        parts.append(f"<text class='tick' x='{left}' y='{len(bars) * row + 16}'>and {more} more</text>")
    return _svg(parts, len(bars) * row + (28 if more > 0 else 6))


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
    if content.get("mark"):
        parts.append(_mark(frame, content["mark"], edges, places))
    return _svg(parts, HEIGHT)


def _mark(frame: _Frame, mark: Mapping[str, Any], edges: Sequence[float], places: Sequence[float]) -> str:
    """An upright line at a value, with its label on the side that has room; nothing where it is off the axis."""
    value = _plain(mark["x"])
    bins = [i for i, (low, high) in enumerate(itertools.pairwise(edges)) if low <= value <= high and high > low]
    if not bins:
        return ""
    low, high = edges[bins[-1]], edges[bins[-1] + 1]
    share = (value - low) / (high - low)
    x = frame.x(places[bins[-1]] + share * (places[bins[-1] + 1] - places[bins[-1]]))
    on_left = x > WIDTH / 2
    place = f"x='{x + (-6 if on_left else 6):.1f}' y='{_TOP + 10}' text-anchor='{'end' if on_left else 'start'}'"
    label = str(mark.get("label", number(value)))
    return (
        f"<g class='mark'><line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP - 4}' y2='{HEIGHT - _BOTTOM}'/>"
        f"<text {place}>{escape(label)}</text></g>"
    )


def _lines(content: Mapping[str, Any]) -> str:
    series = {str(name): _points(line["x"], line["y"]) for name, line in content["series"].items()}
    points = [point for line in series.values() for piece in line for point in piece]
    if not points:
        return "<p class='empty'>no values</p>"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    # A curve that stays away from zero is read by its shape, one near zero by its distance from it.
    low = 0.0 if 0 <= min(ys) <= 0.5 * max(ys) else min(ys)
    low, high = content.get("y_range") or (low, max(ys))
    frame = _Frame(min(xs), max(xs), float(low), float(high))
    parts = frame.axes(str(content.get("x_label", "")), str(content.get("y_label", "")))
    for own, (name, pieces) in zip(colours(list(series)), series.items(), strict=True):
        style = f"line {own}"
        for line in pieces:
            place = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line)
            parts.append(f"<polyline class='{style}' points='{place}'><title>{escape(name)}</title></polyline>")
            marks = line if len(line) <= 40 else line[-1:]
            parts += [
                f"<circle class='{style}' cx='{frame.x(x):.1f}' cy='{frame.y(y):.1f}' r='2.5'>"
                f"<title>{escape(name)}: {number(y)} at {number(x)}</title></circle>"
                for x, y in marks
            ]
    return legend(list(series)) + _svg(parts, HEIGHT)


def _points(xs: Sequence[Any], ys: Sequence[Any]) -> list[list[tuple[float, float]]]:
    """The pieces of a line between its gaps, thinned out to what can be told apart."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        point = (_plain(x), _plain(y))
        if all(map(math.isfinite, point)):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    step = -(-sum(map(len, pieces)) // MAX_POINTS)
    return [p[::step] + ([p[-1]] if (len(p) - 1) % step else []) for p in pieces if p]


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
        heights = ticks(self.y_low, self.y_high, 4)
        for value, text in zip(heights, _short_numbers(heights), strict=True):
            y = self.y(value)
            parts.append(f"<line class='grid' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
            parts.append(f"<text class='tick' x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{text}</text>")
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
