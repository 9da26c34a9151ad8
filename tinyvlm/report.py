"""Reports that a person looks at: one self-contained HTML page, legible in light and dark, with no network.

    stats.json of a stage ──stage_report──▶ report.html beside it
    all of them and a summary ──run_report──▶ report.html of the whole run

Of the statistics, `statuses` become a table with their meanings, `charts` are drawn (charts.py), `pictures` are shown,
`rows` (label and text) are listed, and whatever else is there is listed as it is.  Everything is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import tinyvlm
from tinyvlm.charts import chart, number
from tinyvlm.schema import OK, STATUSES

MAX_PICTURES = 60
MAX_TABLE_ROWS = 100

_SHOWN_APART = ("stage", "rows_in", "rows_out", "statuses", "seconds", "charts", "pictures", "rows")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]*")


def stage_report(statistics: Mapping[str, Any]) -> str:
    """The report of one stage."""
    name = str(statistics.get("stage", "stage"))
    return page(name, [("", section(statistics))])


def run_report(title: str, sections: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """One page of several headings, each with statistics of its own."""
    return page(title, [(name, section(statistics)) for name, statistics in sections])


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page of (heading, HTML) sections; with more than one, links to them at the top."""
    named = [(f"s{index}", heading, body) for index, (heading, body) in enumerate(sections)]
    links = "".join(f"<a href='#{anchor}'>{escape(heading)}</a>" for anchor, heading, _ in named if heading)
    bodies = "".join(
        f"<section id='{anchor}'>{f'<h2>{escape(heading)}</h2>' if heading else ''}{body}</section>"
        for anchor, heading, body in named
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{escape(title)} · TinyVLM</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{f'<nav>{links}</nav>' if len(named) > 1 else ''}</header>"
        f"<main>{bodies}</main><footer>TinyVLM {escape(tinyvlm.__version__)}</footer></body></html>\n"
    )


def section(statistics: Mapping[str, Any]) -> str:
    """The HTML of one stage's statistics, without heading."""
    parts = [_tiles(statistics)]
    if statistics.get("rows"):
        parts.append(_table((), [(str(label), str(text)) for label, text in statistics["rows"]]))
    statuses = statistics.get("statuses") or {}
    if statuses:
        parts.append(_statuses(statuses))
    parts.append(_others({key: value for key, value in statistics.items() if key not in _SHOWN_APART}))
    charts = statistics.get("charts") or []
    if charts:
        parts.append(f"<div class='charts'>{''.join(map(_chart, charts))}</div>")
    if statistics.get("pictures"):
        parts.append(_pictures(statistics["pictures"]))
    return "".join(parts)


def _chart(content: Mapping[str, Any]) -> str:
    """A chart, or why there is none: hours of work are not thrown away for a drawing."""
    try:
        return chart(content)
    except (ValueError, KeyError, TypeError) as error:
        said = f"{content.get('title', 'a chart')} cannot be drawn ({type(error).__name__}: {error})"
        return f"<figure class='chart'><p class='empty'>{escape(said)}</p></figure>"


def _tiles(statistics: Mapping[str, Any]) -> str:
    """The few numbers to see first."""
    tiles: list[tuple[str, str]] = []
    if "rows_in" in statistics:
        tiles.append(("rows in", number(statistics["rows_in"])))
    if "rows_out" in statistics:
        tiles.append(("rows out", number(statistics["rows_out"])))
    statuses = statistics.get("statuses") or {}
    if statuses:
        tiles.append(("ok", _percent(statuses.get(OK, 0), sum(statuses.values()))))
    seconds = statistics.get("seconds")
    if seconds:
        tiles.append(("time", _duration(float(seconds))))
        if statistics.get("rows_in"):
            tiles.append(("rows / s", number(round(statistics["rows_in"] / seconds, 1))))
    items = "".join(f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for label, value in tiles)
    return f"<dl class='tiles'>{items}</dl>" if tiles else ""


def _statuses(statuses: Mapping[str, int]) -> str:
    total, highest = sum(statuses.values()), max(statuses.values())
    rows = "".join(
        f"<tr class='{'good' if status == OK else ''}'><td><code>{escape(status)}</code></td>"
        f"<td class='n'>{count:,}</td><td class='n'>{_percent(count, total)}</td>"
        f"<td class='bar'><i style='width:{100 * count / (highest or 1):.1f}%'></i></td>"
        f"<td class='meaning'>{escape(STATUSES.get(status, ''))}</td></tr>"
        for status, count in sorted(statuses.items(), key=lambda item: (item[0] != OK, -item[1]))
    )
    head = "<tr><th>status</th><th class='n'>rows</th><th class='n'>share</th><th></th><th>meaning</th></tr>"
    return f"<div class='scroll'><table class='statuses'><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


def _pictures(pictures: Mapping[str, Any]) -> str:
    items = list(pictures.get("items") or [])
    figures = "".join(
        f"<figure><img loading='lazy' alt='{escape(str(item.get('caption', '')), quote=True)}' "
        f"src='data:image/jpeg;base64,{item['jpeg_base64']}'>"
        f"<figcaption>{escape(str(item.get('caption', '')))}</figcaption></figure>"
        for item in items[:MAX_PICTURES]
        if _BASE64.fullmatch(str(item.get("jpeg_base64", "")))
    )
    title = escape(str(pictures.get("title", "Pictures")))
    return f"<h3>{title}</h3><div class='pictures'>{figures}</div>" if figures else ""


def _others(statistics: Mapping[str, Any]) -> str:
    """Numbers and words as one table; each list of records as a table of its own."""
    plain: list[tuple[str, str]] = []
    tables: list[str] = []
    for name, value in statistics.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            columns = list(dict.fromkeys(key for item in value for key in item))
            body = [tuple(_text(item.get(column)) for column in columns) for item in value]
            tables.append(f"<h3>{_name(name)}</h3>{_table(columns, body)}")
        elif isinstance(value, Mapping) and value and any(isinstance(item, Mapping) for item in value.values()):
            flat = {f"{key} · {inner}": v for key, item in value.items() for inner, v in _items(item)}
            tables.append(f"<h3>{_name(name)}</h3>{_table((), [(key, _text(item)) for key, item in flat.items()])}")
        else:
            plain.append((_name(name), _text(value)))
    return (_table((), plain, escaped_names=True) if plain else "") + "".join(tables)


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else [("", value)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, escaped_names: bool = False) -> str:
    top = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    lines = []
    for row in rows[:MAX_TABLE_ROWS]:
        first = row[0] if escaped_names else escape(row[0])
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        lines.append(f"<tr><th scope='row'>{first}</th>{cells}</tr>" if not head else _cells(row))
    if len(rows) > MAX_TABLE_ROWS:
        lines.append(f"<tr><td colspan='9'>and {len(rows) - MAX_TABLE_ROWS} more</td></tr>")
    body = f"<tbody>{''.join(lines)}</tbody>"
    return f"<div class='scroll'><table>{f'<thead><tr>{top}</tr></thead>' if head else ''}{body}</table></div>"


def _cells(row: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"


def _name(name: object) -> str:
    return escape(str(name).replace("_", " "))


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, Mapping):
        return " · ".join(f"{key} {_text(item)}" for key, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value) or "–"
    return str(value)


def _percent(count: float, total: float) -> str:
    if not total:
        return "–"
    share = 100 * count / total
    return f"{share:.1f} %" if share >= 0.1 or not count else "< 0.1 %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


_STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--ink:#1d1f21;--soft:#62666d;--rule:#e3e3df;--good:#1c8a5a;
--c0:#2f6fd6;--c1:#d56a0b;--c2:#1f9367;--c3:#8457cf;--c4:#c93f73;--c5:#7a7313}
@media(prefers-color-scheme:dark){:root{--page:#15171a;--card:#1d2024;--ink:#e8e9ea;--soft:#9ca1a8;--rule:#32363c;
--good:#45c48b;--c0:#6aa2f7;--c1:#f0994a;--c2:#45c48b;--c3:#b294f2;--c4:#f27da5;--c5:#cdc35a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:32px 24px 48px;max-width:1180px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:27px;line-height:1.2;margin:0 0 10px;letter-spacing:-.01em}
h2{font-size:20px;margin:40px 0 12px;padding-top:18px;border-top:1px solid var(--rule)}
h3{font-size:15px;margin:24px 0 8px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px}
nav a{color:var(--c0);text-decoration:none}
nav a:hover{text-decoration:underline}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:10px 18px;min-width:110px}
dt{color:var(--soft);font-size:13px}dd{margin:0;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:8px;margin:16px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 14px;border-bottom:1px solid var(--rule);vertical-align:baseline}
tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:500;font-size:13px}
th[scope=row]{font-weight:500;color:var(--soft);white-space:nowrap;width:1%;padding-right:24px}
td{white-space:pre-wrap}td.n,th.n{text-align:right;white-space:nowrap}
td.bar{width:22%;min-width:90px;vertical-align:middle}
td.bar i{display:block;height:9px;min-width:2px;border-radius:2px;background:var(--c1)}
tr.good td.bar i{background:var(--good)}
td.meaning{color:var(--soft)}code{font:13px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
.charts{columns:2 440px;column-gap:16px;margin:16px 0 0}.charts .chart{break-inside:avoid;margin-bottom:16px}
figure{margin:0}.chart{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 16px}
.chart figcaption{font-weight:600;font-size:14px;margin-bottom:8px}.chart svg{display:block;width:100%;height:auto;
overflow:visible}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}svg .label,svg .value{fill:var(--ink)}
svg .grid{stroke:var(--rule);stroke-width:1}svg .axis{stroke:var(--soft);stroke-width:1}svg .fill{fill:var(--c0)}
svg g:hover .fill,svg rect.fill:hover{opacity:.75}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}
svg .c0{stroke:var(--c0)}svg .c1{stroke:var(--c1)}svg .c2{stroke:var(--c2)}
svg .c3{stroke:var(--c3)}svg .c4{stroke:var(--c4)}svg .c5{stroke:var(--c5)}
svg circle.c0{fill:var(--c0)}svg circle.c1{fill:var(--c1)}svg circle.c2{fill:var(--c2)}
svg circle.c3{fill:var(--c3)}svg circle.c4{fill:var(--c4)}svg circle.c5{fill:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:0 0 6px;padding:0;
font-size:13px;color:var(--soft)}
.legend i{display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle}
.legend .c0{background:var(--c0)}.legend .c1{background:var(--c1)}.legend .c2{background:var(--c2)}
.legend .c3{background:var(--c3)}.legend .c4{background:var(--c4)}.legend .c5{background:var(--c5)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:14px}
.pictures img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--card);border:1px solid var(--rule);
border-radius:6px;image-rendering:auto}
.pictures figcaption{font-size:12.5px;line-height:1.35;color:var(--soft);margin-top:4px;overflow-wrap:anywhere}
.empty,footer{color:var(--soft);font-size:13px}footer{margin-top:40px}
"""
