"""Pictures that only say "there is no picture here": what gives them away.

    repeated_pictures    the same bytes behind many different links             (cheap: only the columns sha256 and url)
    reference_pictures   drawn cards; the vision tower tells how near to one a picture comes       (clip.py, encode.py)

The references are drawn by this code, so they carry nobody's rights; users add their own as files.  How near is too
near depends on the tower and on the pictures, and has to be measured (see the encode stage's review sheet).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tinyvlm.errors import ConfigError
from tinyvlm.folders import part_paths
from tinyvlm.images import LimitConfig, PictureConfig, decode, square
from tinyvlm.storage import readable

SIDE = 448
"""Side of a reference as drawn, px; it is scaled to whatever the tower reads."""

_WHITE, _PALE, _GREY, _DARK = (255, 255, 255), (225, 226, 228), (160, 163, 168), (96, 99, 104)


def reference_pictures(names: Sequence[str]) -> list[Image.Image]:
    """References by the name of a drawn design, or by the path of a picture file; all square RGB.

    Raises:
        ConfigError: there is no such design and no readable picture of that name.
    """
    return [_draw(DESIGNS[name]) if name in DESIGNS else _read(name) for name in names]


def repeated_pictures(folder: Path, min_links: int) -> set[str]:
    """The sha256 of pictures that stand behind at least `min_links` different links of a stage folder."""
    parts = part_paths(folder)
    # Eight bytes of each hash find the candidates in little memory; whole hashes and links then decide.
    starts = [_hash_starts(pq.read_table(readable(path), columns=["sha256"])["sha256"]) for path in parts]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *starts]), return_counts=True)
    often = values[counts >= min_links]
    links: dict[str, set[str]] = {}
    for path, start in zip(parts, starts, strict=True):
        places = np.flatnonzero(np.isin(start, often))
        if len(places):
            table = pq.read_table(readable(path), columns=["sha256", "url"])
            known = table.filter(pc.is_valid(table["sha256"])).take(places)
            for digest, url in zip(known["sha256"].to_pylist(), known["url"].to_pylist(), strict=True):
                links.setdefault(digest, set()).add(url)
    return {digest for digest, urls in links.items() if len(urls) >= min_links}


def _hash_starts(hashes: pa.ChunkedArray) -> NDArray[np.uint64]:
    known = hashes.drop_null().to_pylist()
    return np.array([int(digest[:16], 16) for digest in known], np.uint64)


def _read(path: str) -> Image.Image:
    try:
        image = decode(Path(path).read_bytes(), LimitConfig())
    except Exception as error:
        raise ConfigError(
            f"encode.references names {path!r}, which is neither a readable picture ({error}) nor a drawn one: "
            f"{', '.join(DESIGNS)}."
        ) from None
    return square(image, PictureConfig(size=SIDE))[0]


def _draw(design: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), _WHITE)
    design(ImageDraw.Draw(picture))
    return picture


def _card(pen: ImageDraw.ImageDraw, color: tuple[int, int, int]) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), fill=color)


def _write(pen: ImageDraw.ImageDraw, lines: str, y: int, size: int, ink: tuple[int, int, int]) -> None:
    """Centred lines, the block's middle at height y."""
    font = ImageFont.load_default(size)
    pen.multiline_text((SIDE / 2, y), lines, fill=ink, font=font, anchor="mm", align="center", spacing=size // 3)


def _landscape(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
    """The usual picture icon: a frame with two hills and a sun."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    pen.rounded_rectangle(box, radius=wide // 14, outline=ink, width=wide // 18)
    ground = bottom - high // 7
    pen.polygon(
        [
            (left + wide // 7, ground),
            (left + 3 * wide // 8, top + 3 * high // 8),
            (left + wide // 2, top + high // 2),
            (left + 2 * wide // 3, top + high // 3),
            (right - wide // 7, ground),
        ],
        fill=ink,
    )
    sun = wide // 14
    center = (left + wide // 4, top + high // 4)
    pen.ellipse((center[0] - sun, center[1] - sun, center[0] + sun, center[1] + sun), fill=ink)


def _no_image(pen: ImageDraw.ImageDraw) -> None:
    _card(pen, _PALE)
    _write(pen, "NO IMAGE", 224, 78, _GREY)


def _not_available(pen: ImageDraw.ImageDraw) -> None:
    _write(pen, "Image\nnot available", 224, 62, _DARK)


def _crossed_icon(pen: ImageDraw.ImageDraw) -> None:
    _card(pen, (200, 202, 205))
    _landscape(pen, (114, 134, 334, 314), _DARK)
    pen.line((96, 336, 352, 112), fill=_DARK, width=16)


def _icon_and_words(pen: ImageDraw.ImageDraw) -> None:
    _card(pen, _PALE)
    _landscape(pen, (144, 84, 304, 224), _GREY)
    _write(pen, "no photo", 310, 62, _GREY)


def _torn_page(pen: ImageDraw.ImageDraw) -> None:
    """A sheet with a folded corner and a crack across it, as browsers mark a broken picture."""
    pen.polygon([(124, 64), (274, 64), (334, 124), (334, 384), (124, 384)], fill=_PALE, outline=_GREY, width=8)
    pen.polygon([(274, 64), (274, 124), (334, 124)], fill=_GREY)
    pen.line([(124, 270), (186, 218), (226, 268), (274, 208), (334, 250)], fill=_WHITE, width=26)
    pen.line([(124, 250), (186, 198), (226, 248), (274, 188), (334, 230)], fill=_GREY, width=8)


def _error_number(pen: ImageDraw.ImageDraw) -> None:
    _card(pen, (238, 238, 238))
    _write(pen, "404", 190, 150, _GREY)
    _write(pen, "not found", 310, 52, _GREY)


def _camera(pen: ImageDraw.ImageDraw) -> None:
    _card(pen, _GREY)
    pen.rounded_rectangle((94, 154, 354, 324), radius=24, fill=_PALE)
    pen.rectangle((184, 124, 264, 160), fill=_PALE)
    pen.ellipse((164, 174, 284, 294), fill=_GREY)
    pen.ellipse((190, 200, 258, 268), fill=_PALE)
    pen.line((84, 354, 364, 104), fill=_DARK, width=14)


def _removed(pen: ImageDraw.ImageDraw) -> None:
    _card(pen, _DARK)
    _write(pen, "this photo was\nremoved", 224, 54, _PALE)


def _question_mark(pen: ImageDraw.ImageDraw) -> None:
    _card(pen, _PALE)
    pen.rounded_rectangle((124, 84, 324, 284), radius=20, outline=_GREY, width=12)
    _write(pen, "?", 184, 150, _GREY)
    _write(pen, "image missing", 340, 50, _GREY)


def _coming_soon(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((24, 24, 424, 424), outline=_GREY, width=6)
    _write(pen, "photo\ncoming\nsoon", 224, 76, _GREY)


DESIGNS: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "no_image": _no_image,
    "not_available": _not_available,
    "crossed_icon": _crossed_icon,
    "icon_and_words": _icon_and_words,
    "torn_page": _torn_page,
    "error_number": _error_number,
    "camera": _camera,
    "removed": _removed,
    "question_mark": _question_mark,
    "coming_soon": _coming_soon,
}
"""The drawn references by name."""
