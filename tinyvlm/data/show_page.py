"""Conversations as the model sees them, on a page of their own: pictures where they stand, every token to point at.

Everything is escaped: the words come from strangers.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tinyvlm import chat, report
from tinyvlm.data.show import Piece, Shown, View, visible

_FORMATS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}


def page(shown: Sequence[tuple[Path, Sequence[View]]]) -> str:
    """The page of (folder, conversations out of it)."""
    key = (
        "<p class='note'><span class='talk'><b>supervised</b></span>: the loss counts it · <span class='talk'>"
        "<i>special token</i></span> · point at a word to see its token's number</p>"
    )
    sections = [(folder.name, "".join(map(_card, views))) for folder, views in shown]
    return report.page("What the model sees", [("", key), *sections], STYLE)


def _card(view: View) -> str:
    row, problem = view.row, view.set_aside
    names = "".join(
        f"<span>{escape(visible(str(row.get(name))))}</span>" for name in ("source", "family", "split") if row.get(name)
    )
    pictures = "".join(
        f"<figure>{_image(one)}<figcaption>picture {place}: {escape(line)}</figcaption></figure>"
        for place, (one, line) in enumerate(zip(view.pictures, view.picture_lines, strict=True))
    )
    said = _talk(view) if view.pieces else _raw(view)
    return (
        f"<article class='seen'><header><h3>{escape(str(row.get('key')))}</h3>{names}"
        f"<small>{escape(view.lengths)}</small></header>"
        + (f"<p class='aside'>Set aside: {escape(problem)}</p>" if problem else "")
        + f"<div class='both'>{f'<div class=shown>{pictures}</div>' if pictures else ''}{said}</div>{_meta(view)}"
        "</article>"
    )


def _talk(view: View) -> str:
    """Piece by piece; a picture's tokens as the picture."""
    parts: list[str] = []
    pictures = iter(view.pictures)
    for piece in view.pieces:
        if piece.is_special and chat.IMAGE_TOKEN in piece.text:
            small = next((_image(one) for one in pictures), "")
            parts.append(f"<i class='image'>{small}{len(piece.ids)}×{escape(chat.IMAGE_TOKEN)}</i>")
        else:
            parts.append(_piece(piece))
    return f"<div class='talk'>{''.join(parts)}</div>"


def _piece(piece: Piece) -> str:
    tag = "i" if piece.is_special else "b" if piece.supervised else "s"
    own = " class='learned'" if piece.is_special and piece.supervised else ""
    numbers = " ".join(map(str, piece.ids))
    return f"<{tag}{own} title='{numbers}'>{escape(visible(piece.text))}</{tag}>"


def _raw(view: View) -> str:
    turns = "".join(f"<p><span>{escape(role)}</span> {escape(words)}</p>" for role, words in view.raw)
    return f"<div class='talk raw'>{turns or '<p>no words</p>'}</div>"


def _meta(view: View) -> str:
    if not view.meta:
        return ""
    try:
        told = visible(json.dumps(json.loads(str(view.row["meta"])), indent=1, ensure_ascii=False))
    except ValueError:
        told = view.meta
    return f"<details><summary>meta</summary><pre>{escape(told)}</pre></details>"


def _image(one: Shown) -> str:
    kind = next((name for start, name in _FORMATS.items() if one.body and one.body.startswith(start)), "")
    if not kind or not one.body:
        return "<span class='none'>not stored</span>"
    return f"<img alt='' src='data:image/{kind};base64,{base64.b64encode(one.body).decode()}'>"


STYLE = """
.seen{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 18px;margin:0 0 18px}
.seen header{display:flex;flex-wrap:wrap;align-items:baseline;gap:4px 10px;margin-bottom:10px}
.seen h3{margin:0;font-size:16px;font-variant-numeric:tabular-nums}
.seen header span{font-size:13px;border:1px solid var(--rule);border-radius:9px;padding:1px 9px;color:var(--soft)}
.seen header small{font-size:13px;color:var(--soft);margin-left:auto}
.seen .aside{margin:0 0 10px;color:var(--c1);font-weight:600;font-size:14px;overflow-wrap:anywhere}
.seen .both{display:flex;gap:18px;align-items:flex-start}
.seen .shown{flex:0 0 180px;display:grid;gap:10px}
.seen .shown img{display:block;width:100%;border-radius:6px;border:1px solid var(--rule)}
.seen figcaption{font-size:12px;line-height:1.35;color:var(--soft);margin-top:4px;overflow-wrap:anywhere}
.seen .none{display:grid;place-items:center;height:90px;border:1px dashed var(--rule);border-radius:6px;
font-size:12.5px;color:var(--soft)}
.talk{font:14px/1.65 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;min-width:0;flex:1}
.talk s,.talk b,.talk i{text-decoration:none;font-style:normal;font-weight:400;border-radius:2px;
box-shadow:inset -1px 0 0 color-mix(in srgb,var(--rule) 80%,transparent)}
.talk s:hover,.talk b:hover,.talk i:hover{outline:1px solid var(--c0)}
.talk b{color:var(--good);background:color-mix(in srgb,var(--good) 13%,transparent);font-weight:600}
.talk i{color:var(--soft);font-size:12px;background:color-mix(in srgb,var(--soft) 10%,transparent)}
.talk i.learned{color:var(--good);background:color-mix(in srgb,var(--good) 13%,transparent)}
.talk i.image{color:var(--c3);background:color-mix(in srgb,var(--c3) 13%,transparent);white-space:nowrap}
.talk i.image img{height:28px;width:28px;object-fit:cover;vertical-align:middle;border-radius:3px;
margin:2px 5px 2px 2px}
.talk i.image .none{display:inline;padding:2px 5px;margin-right:5px}
.raw p{margin:0 0 8px}.raw span{color:var(--soft)}
.seen pre{font-size:12.5px;overflow-x:auto;margin:4px 0 0}.seen summary{margin:10px 0 0}
@media(max-width:700px){.seen .both{flex-direction:column}.seen .shown{flex:none;grid-template-columns:
repeat(auto-fill,minmax(120px,1fr));width:100%}.seen{padding:12px 14px}.seen header small{margin-left:0}.talk{flex:none;
width:100%}}
"""
