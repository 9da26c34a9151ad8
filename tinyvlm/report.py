"""Reports that a person looks at: one self-contained HTML page, legible in light and dark, with no network.

    stats.json of a stage ──stage_report──▶ report.html beside it
    all of them and a summary ──run_report──▶ report.html of the whole run

Of the statistics, `statuses` become a bar, a sum and a table with their meanings, `charts` are drawn (charts.py),
`pictures` are shown, `tiles` (label and text) are the few numbers to see first, else what became of rows, `rows` (label
and text) are listed, `sections` (name → statistics, with a `note` and `measured` if another run may give other numbers)
come below with a heading each, and whatever else is there is listed as it is: lists of records and mappings with equal
names as tables (behind a click where `folded` has their name), shares in per cent, bytes in kB, MB, ….  What `hidden`
names is for programs: `rows` say it in words.

Everything is escaped: host names, captions and details come from strangers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import tinyvlm
from tinyvlm.charts import chart, colours, legend, number
from tinyvlm.schema import OK, STATUSES

MAX_PICTURES = 60
MAX_TABLE_ROWS = 100

MAX_FAMILIES = 5
"""Families of statuses with a piece of their own in the bar of outcomes; the rarer ones share one."""

_SHOWN_APART = (
    *("stage", "rows_in", "rows_out", "statuses", "seconds", "charts", "pictures", "rows"),
    *("sections", "note", "measured", "folded", "hidden", "tiles"),
)
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]*")


def stage_report(statistics: Mapping[str, Any]) -> str:
    """The report of one stage."""
    name = str(statistics.get("stage", "stage"))
    return page(name, [("", section(statistics))])


def run_report(title: str, sections: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """One page of several headings, each with statistics of its own."""
    return page(title, [(name, section(statistics)) for name, statistics in sections])


def page(title: str, sections: Sequence[tuple[str, str]], style: str = "") -> str:
    """A whole page of (heading, HTML) sections; with more than one, links to them at the top.

    `style`: rules for what only these sections have.
    """
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
        f"<title>{escape(title)} · TinyVLM</title><style>{_STYLE}{style}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{f'<nav>{links}</nav>' if len(named) > 1 else ''}</header>"
        f"<main>{bodies}</main><footer>TinyVLM {escape(tinyvlm.__version__)}</footer></body></html>\n"
    )


def section(statistics: Mapping[str, Any], level: int = 3) -> str:
    """The HTML of one stage's statistics, without heading; headings inside it are of `level` and below."""
    parts = [f"<p class='note'>{escape(str(statistics['note']))}</p>" if statistics.get("note") else ""]
    parts.append(_tiles(statistics))
    if statistics.get("rows"):
        parts.append(_table((), [(str(label), str(text)) for label, text in statistics["rows"]]))
    if statistics.get("statuses"):
        parts += [_outcomes(statistics["statuses"]), _sum(statistics), _statuses(statistics["statuses"])]
    unseen = {*_SHOWN_APART, *(statistics.get("hidden") or ())}
    others = {key: value for key, value in statistics.items() if key not in unseen}
    folded = statistics.get("folded") or ()
    charts = [_chart(content) for content in statistics.get("charts") or []]
    shown = f"<div class='charts{'' if len(charts) > 1 else ' one'}'>{''.join(charts)}</div>" if charts else ""
    # Of a stage the numbers come first; under a heading of its own the picture of them does.
    numbers = _others(others, level, folded)
    parts += [numbers, shown] if level == 3 else [shown, numbers]
    if statistics.get("pictures"):
        parts.append(_pictures(statistics["pictures"], level))
    for name, content in (statistics.get("sections") or {}).items():
        tag = "<small>measured: another run may differ</small>" if content.get("measured") else ""
        heading = f"<h{level} class='part'>{_name(name)}{tag}</h{level}>"
        parts.append(f"<section class='part'>{heading}{section(content, level + 1)}</section>")
    return "".join(parts)


def _chart(content: Mapping[str, Any]) -> str:
    """A chart, or why there is none: hours of work are not thrown away for a drawing."""
    try:
        return chart(content)
    except (ValueError, KeyError, TypeError) as error:
        said = f"{content.get('title', 'a chart')} cannot be drawn ({type(error).__name__}: {error})"
        return f"<figure class='chart'><p class='empty'>{escape(said)}</p></figure>"


def _tiles(statistics: Mapping[str, Any]) -> str:
    """The few numbers to see first: those given, else what becomes of rows."""
    tiles: list[tuple[str, str]] = [(str(label), str(text)) for label, text in statistics.get("tiles") or ()]
    if tiles:
        return _drawn_tiles(tiles)
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
    return _drawn_tiles(tiles)


def _drawn_tiles(tiles: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in tiles)
    return f"<dl class='tiles'>{items}</dl>" if tiles else ""


def _families(statuses: Mapping[str, int]) -> list[tuple[str, dict[str, int]]]:
    """Statuses by family: ok first, then the largest; inside a family too."""
    families: dict[str, dict[str, int]] = {}
    for status, count in sorted(statuses.items(), key=lambda item: -item[1]):
        families.setdefault(status.split(".")[0], {})[status] = count
    return sorted(families.items(), key=lambda item: (item[0] != OK, -sum(item[1].values())))


def _outcomes(statuses: Mapping[str, int]) -> str:
    """One bar of success and failure."""
    counts = {family: sum(members.values()) for family, members in _families(statuses)}
    shown = dict(list(counts.items())[: MAX_FAMILIES + 1])
    if len(counts) > len(shown):
        shown["others"] = sum(counts.values()) - sum(shown.values())
    total = sum(counts.values())
    pieces = "".join(
        f"<i class='{own}' style='flex-grow:{count}' "
        f"title='{escape(name, quote=True)}: {count:,}, {_percent(count, total)}'></i>"
        for own, (name, count) in zip(colours(list(shown)), shown.items(), strict=True)
        if count
    )
    names = [f"{name} {_percent(count, total)}" for name, count in shown.items()]
    return f"<div class='outcomes'>{pieces}</div>{legend(names, list(shown))}"


def _sum(statistics: Mapping[str, Any]) -> str:
    """That no row is lost, with the numbers."""
    statuses = statistics["statuses"]
    total, rows_in = sum(statuses.values()), statistics.get("rows_in")
    ordered = [(status, count) for _, members in _families(statuses) for status, count in members.items()]
    terms = " + ".join(f"{count:,} {status}" for status, count in ordered)
    if rows_in in (None, total):
        said, kept = f"{total:,} rows {'out' if rows_in is None else 'in'} = {terms}", True
    elif statistics.get("rows_out") == total:
        said, kept = f"{rows_in:,} rows in → {total:,} rows out = {terms}", True
    else:
        said, kept = f"Rows are lost: {rows_in:,} in, but {total:,} = {terms}", False
    return f"<p class='sum{'' if kept else ' lost'}'>{'✓' if kept else '✗'} {escape(said)}</p>"


def _statuses(statuses: Mapping[str, int]) -> str:
    families = _families(statuses)
    total = sum(statuses.values())
    highest = max(sum(members.values()) for _, members in families) or 1
    rows: list[str] = []

    def add(name: str, count: int, style: str, meaning: str) -> None:
        rows.append(
            f"<tr class='{style}'><td><code>{escape(name)}</code></td>"
            f"<td class='n'>{count:,}</td><td class='n'>{_percent(count, total)}</td>"
            f"<td class='bar'><i style='width:{100 * count / highest:.1f}%'></i></td>"
            f"<td class='meaning'>{escape(meaning)}</td></tr>"
        )

    for family, members in families:
        if len(members) > 1:
            add(family, sum(members.values()), "family", "")
        for status, count in members.items():
            style = "good" if status == OK else "member" if len(members) > 1 else ""
            add(status, count, style, STATUSES.get(status, ""))
    head = (
        "<tr><th>status</th><th class='n'>rows</th><th class='n'>share</th><th class='bar'></th><th>meaning</th></tr>"
    )
    body = f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class='scroll'><table class='statuses'>{body}</table></div>"


def _pictures(pictures: Mapping[str, Any], level: int) -> str:
    items = list(pictures.get("items") or [])
    figures = "".join(
        f"<figure><img loading='lazy' alt='{escape(str(item.get('caption', '')), quote=True)}' "
        f"src='data:image/jpeg;base64,{item['jpeg_base64']}'>"
        f"<figcaption>{escape(str(item.get('caption', '')))}</figcaption></figure>"
        for item in items[:MAX_PICTURES]
        if _BASE64.fullmatch(str(item.get("jpeg_base64", "")))
    )
    title = escape(str(pictures.get("title", "Pictures")))
    return f"<h{level}>{title}</h{level}><div class='pictures'>{figures}</div>" if figures else ""


def _others(statistics: Mapping[str, Any], level: int, folded: Sequence[str]) -> str:
    """Numbers and words as one table; each list of records as a table of its own."""
    plain: list[tuple[str, str]] = []
    tables: list[str] = []
    for name, value in statistics.items():
        heading = f"<h{level}>{_name(name)}</h{level}>"
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            table = _records(value)
            fold = f"<details><summary>{_name(name)}, as numbers</summary>{table}</details>"
            tables.append(fold if name in folded else heading + table)
        elif isinstance(value, Mapping) and _is_matrix(value):
            tables.append(heading + _records([{"": str(key).replace("_", " "), **row} for key, row in value.items()]))
        elif isinstance(value, Mapping) and value and any(isinstance(item, Mapping) for item in value.values()):
            flat = {f"{key} · {inner}": v for key, item in value.items() for inner, v in _items(item)}
            tables.append(heading + _table((), [(key, _text(item)) for key, item in flat.items()]))
        else:
            plain.append((str(name).replace("_", " "), _text(value, str(name))))
    return (_table((), plain) if plain else "") + "".join(tables)


def _is_matrix(value: Mapping[Any, Any]) -> bool:
    """Rows of plain values under the same names."""
    rows = list(value.values())
    return (
        bool(rows)
        and all(isinstance(row, Mapping) and row and list(row) == list(rows[0]) for row in rows)
        and not any(isinstance(item, (Mapping, list, tuple)) for row in rows for item in row.values())
    )


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else [("", value)]


def _records(records: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for record in records for key in record))
    numeric = [all(isinstance(record.get(key), (int, float, type(None))) for record in records) for key in columns]
    rows = [[_text(record.get(key), str(key)) for key in columns] for record in records]
    return _table([str(key).replace("_", " ") for key in columns], rows, numeric)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool] = ()) -> str:
    """With a head: columns.  Without: names and values."""

    def cell(text: str, index: int, tag: str) -> str:
        return f"<{tag}{' class=n' if any(numeric[index : index + 1]) else ''}>{escape(text)}</{tag}>"

    def line(row: Sequence[str]) -> str:
        if not head:
            row, first = row[1:], f"<th scope='row'>{escape(row[0])}</th>"
        else:
            first = ""
        return f"<tr>{first}{''.join(cell(text, index, 'td') for index, text in enumerate(row))}</tr>"

    top = "".join(cell(name, index, "th") for index, name in enumerate(head))
    lines = [line(row) for row in rows[:MAX_TABLE_ROWS]]
    if len(rows) > MAX_TABLE_ROWS:
        lines.append(f"<tr><td colspan='9'>and {len(rows) - MAX_TABLE_ROWS} more</td></tr>")
    body = f"<tbody>{''.join(lines)}</tbody>"
    return f"<div class='scroll'><table>{f'<thead><tr>{top}</tr></thead>' if head else ''}{body}</table></div>"


def _name(name: object) -> str:
    return escape(str(name).replace("_", " "))


def _text(value: Any, name: str = "") -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)):
        if name.endswith(("_share", "success_rate")):
            return _percent(value, 1)
        return size(value) if name.endswith("_bytes") else number(value)
    if isinstance(value, Mapping):
        return (
            " · ".join(f"{str(key).replace('_', ' ')}: {_text(item, str(key))}" for key, item in value.items()) or "–"
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value) or "–"
    return str(value)


def size(num_bytes: float) -> str:
    """Bytes as a person writes them: 1.5 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def _percent(count: float, total: float) -> str:
    if not total:
        return "–"
    share = 100 * count / total
    if share > 99.9 and count < total:  # nearly all is not all
        return "> 99.9 %"
    return f"{share:.1f} %" if share >= 0.1 or not count else "< 0.1 %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


_STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--ink:#1d1f21;--soft:#62666d;--rule:#e3e3df;--good:#1c8a5a;
--c0:#2f6fd6;--c1:#d56a0b;--c2:#0f8ba6;--c3:#8457cf;--c4:#c93f73;--c5:#7a7313;--rest:#8b9098}
@media(prefers-color-scheme:dark){:root{--page:#15171a;--card:#1d2024;--ink:#e8e9ea;--soft:#9ca1a8;--rule:#32363c;
--good:#45c48b;--c0:#6aa2f7;--c1:#f0994a;--c2:#4cc3d9;--c3:#b294f2;--c4:#f27da5;--c5:#cdc35a;--rest:#858b94}}
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
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:8px;
margin:16px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 14px;border-bottom:1px solid var(--rule);vertical-align:baseline}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:500;font-size:13px}
th[scope=row]{font-weight:500;color:var(--soft);white-space:nowrap;width:1%;padding-right:24px}
td{white-space:pre-wrap}td.n,th.n{text-align:right;white-space:nowrap}
td.bar{width:22%;min-width:90px;vertical-align:middle}
td.bar i{display:block;height:9px;min-width:2px;border-radius:2px;background:var(--c1)}
tr.good td.bar i{background:var(--good)}tr.family td,tr.family code{font-weight:600}
tr.member td:first-child{padding-left:30px}tr.member td.bar i{opacity:.5}
td.meaning{color:var(--soft)}code{font:13px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
.charts{columns:2 440px;column-gap:16px;margin:16px 0 0}.charts .chart{break-inside:avoid;margin-bottom:16px}
.charts.one{columns:auto;max-width:558px}
figure{margin:0}.chart{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 16px}
.chart figcaption{font-weight:600;font-size:14px;margin-bottom:8px}.chart svg{display:block;width:100%;height:auto;
overflow:visible}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}svg .label,svg .value{fill:var(--ink)}
svg .grid{stroke:var(--rule);stroke-width:1}svg .axis{stroke:var(--soft);stroke-width:1}svg .fill{fill:var(--c0)}
svg g:hover .fill,svg rect.fill:hover{opacity:.75}
.good{--own:var(--good)}.c0{--own:var(--c0)}.c1{--own:var(--c1)}.c2{--own:var(--c2)}.c3{--own:var(--c3)}
.c4{--own:var(--c4)}.c5{--own:var(--c5)}.rest{--own:var(--rest)}
svg .line{fill:none;stroke:var(--own);stroke-width:2;stroke-linejoin:round}svg circle.line{fill:var(--own)}
svg rect.piece{fill:var(--own)}.legend i,.outcomes i{background:var(--own)}
svg .mark line{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:5 3}
svg .mark text{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:4px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:0 0 6px;padding:0;
font-size:13px;color:var(--soft)}
.legend i{display:inline-block;width:12px;height:8px;border-radius:2px;margin-right:6px}
.outcomes{display:flex;gap:2px;height:26px;margin:20px 0 8px}.outcomes i{min-width:2px;border-radius:3px}
.sum{font-size:13.5px;color:var(--soft);margin:10px 0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.sum.lost{color:var(--c1);font-weight:600}.note{color:var(--soft);font-size:13.5px;max-width:80ch;margin:6px 0}
h3.part,h4.part{font-size:17px;margin:36px 0 6px}h3.part small{font-weight:400;font-size:12.5px;color:var(--soft);
border:1px solid var(--rule);border-radius:9px;padding:1px 9px;margin-left:10px;white-space:nowrap}
h3::first-letter,h4::first-letter,summary::first-letter{text-transform:uppercase}
summary{cursor:pointer;color:var(--c0);font-size:13.5px;margin:10px 0}
h4{font-size:14px;margin:20px 0 6px}h4+.scroll{margin-top:6px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:14px}
.pictures img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--card);border:1px solid var(--rule);
border-radius:6px;image-rendering:auto}
.pictures figcaption{font-size:12.5px;line-height:1.35;color:var(--soft);margin-top:4px;overflow-wrap:anywhere}
@media(max-width:700px){body{padding:20px 14px}td.bar,th.bar{display:none}td.meaning{min-width:270px}}
.empty,footer{color:var(--soft);font-size:13px}footer{margin-top:40px}
"""
