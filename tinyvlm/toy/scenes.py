"""Scenes of the small world and how they are drawn; `world.py` says what is true of them in words.

A scene is a plain value: the same seed gives the same scene, and the same scene the same pixels.  Coordinates and sizes
are in pixels of a 64×64 picture.  Letters that look like shapes (O, 0, I) are not drawn.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]

SIDE = 64
"""Side of a picture in pixels."""

COLORS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 30)),
    "green": ((0, 255, 0), (0, 128, 0), (30, 190, 50)),
    "blue": ((0, 0, 255), (30, 60, 220)),
    "yellow": ((255, 255, 0), (250, 225, 40)),
    "black": ((0, 0, 0), (15, 15, 20)),
    "gray": ((128, 128, 128), (110, 112, 115)),
    "brown": ((165, 42, 42), (139, 69, 19), (150, 75, 40)),
    "teal": ((0, 128, 128), (10, 140, 135)),
    "orange": ((255, 165, 0), (255, 130, 20)),
    "purple": ((128, 0, 128), (140, 50, 190)),
    "pink": ((255, 192, 203), (255, 105, 180)),
    "white": ((255, 255, 255), (248, 250, 250)),
}
"""Colour words with their CSS values first, then values that people call by the same word."""

KINDS = ("circle", "rectangle", "triangle", "square", "star", "ring", "cross", "diamond", "letter", "digit")
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
DIGITS = "23456789"
NOTICES = (
    "no image", "not found", "no photo", "image not available", "404", "photo removed", "missing", "no picture",
    "unavailable", "error", "no longer available", "image missing", "removed", "coming soon", "no preview",
)  # fmt: skip
ICONS = ("", "", "frame", "cross", "slash", "mountain", "question")

_KIND_WEIGHTS = (6, 6, 6, 2, 2, 2, 2, 2, 2, 1)


@dataclass(frozen=True)
class Thing:
    """One object; (x, y) is its centre, `text` the character of a letter or digit, `angle` in degrees, clockwise."""

    kind: str
    color: str
    rgb: RGB
    x: float
    y: float
    width: float
    height: float
    angle: float = 0.0
    text: str = ""

    @property
    def name(self) -> str:
        """The noun: "circle", "letter A", "digit 7"."""
        return f"{self.kind} {self.text}" if self.text else self.kind

    @property
    def size(self) -> str:
        """ "small", "big" or "" (between, nothing is said)."""
        extent = max(self.width, self.height)
        return "small" if extent < 15 else "big" if extent > 26 else ""

    @property
    def place(self) -> str:
        """Where the centre lies on a 3×3 grid: "left", "top right", "center", …"""
        column = "left" if self.x < 0.38 * SIDE else "right" if self.x > 0.62 * SIDE else ""
        row = "top" if self.y < 0.38 * SIDE else "bottom" if self.y > 0.62 * SIDE else ""
        return f"{row} {column}".strip() or "center"


@dataclass(frozen=True)
class Notice:
    """What a placeholder card carries: its words, an icon from `ICONS` and the ink."""

    text: str
    icon: str
    ink: RGB


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: up to four things, or a notice card."""

    things: tuple[Thing, ...]
    background: RGB
    smooth: bool = True
    notice: Notice | None = None

    @property
    def backdrop(self) -> str:
        """ "pale", "dark" or "" (between)."""
        light = sum(self.background) / 3
        return "pale" if light > 205 else "dark" if light < 90 else ""


# Sampling


def sample_scene(rng: random.Random, num_things: int | None = None, notice: bool | None = None) -> Scene:
    """Draw a scene by lot: 70 % single things, 3 % notice cards, unless the caller fixes one of them."""
    if notice or (notice is None and num_things is None and rng.random() < 0.03):
        return _sample_notice(rng)
    background = _sample_background(rng)
    wanted = num_things if num_things is not None else rng.choices((1, 2, 3, 4), (70, 17, 8, 5))[0]
    things: list[Thing] = []
    for _ in range(40):
        if len(things) == wanted:
            break
        thing = _sample_thing(rng, crowded=wanted > 1)
        if _distance(thing.rgb, background) > 70 and not any(_overlap(thing, other) for other in things):
            things.append(thing)
    return Scene(tuple(things), background, smooth=rng.random() < 0.6) if things else sample_scene(rng, num_things)


def _sample_thing(rng: random.Random, crowded: bool) -> Thing:
    kind = rng.choices(KINDS, _KIND_WEIGHTS)[0]
    color = rng.choice(tuple(COLORS))
    base = rng.choice(COLORS[color])
    jitter = rng.choice((0, 0, 6, 14))
    rgb = (_jitter(rng, base[0], jitter), _jitter(rng, base[1], jitter), _jitter(rng, base[2], jitter))
    least = 8 if kind in ("circle", "rectangle", "triangle", "square") else 14 if kind in ("letter", "digit") else 11
    width = least + (24 - least if crowded else 44 - least) * rng.random() ** 1.6
    height = width
    if kind == "rectangle":
        height = least + (24 - least if crowded else 44 - least) * rng.random() ** 1.6
        width = width if abs(width - height) > 2 else height * rng.choice((0.7, 1.4))
    elif kind in ("triangle", "diamond"):
        height = width * rng.choice((0.87, 0.87, 1.0, rng.uniform(0.75, 1.3)))
    angle = 0.0
    if kind == "triangle" and rng.random() < 0.3:
        angle = rng.choice((180.0, 90.0, 270.0, rng.uniform(-25, 25)))
    elif kind in ("star", "cross") and rng.random() < 0.4:
        angle = rng.uniform(-20, 20)
    beyond = 0.3 if rng.random() < 0.12 else 0.5  # 0.5: the whole thing inside; 0.3: up to a fifth of it cut off
    x = rng.uniform(min(beyond * width, SIDE / 2), max(SIDE - beyond * width, SIDE / 2))
    y = rng.uniform(min(beyond * height, SIDE / 2), max(SIDE - beyond * height, SIDE / 2))
    text = rng.choice(LETTERS) if kind == "letter" else rng.choice(DIGITS) if kind == "digit" else ""
    return Thing(kind, color, rgb, round(x, 1), round(y, 1), round(width, 1), round(height, 1), round(angle, 1), text)


def _sample_background(rng: random.Random) -> RGB:
    style = rng.random()
    if style < 0.1:
        return (255, 255, 255)
    low, high = (224, 255) if style < 0.72 else (150, 235) if style < 0.84 else (10, 90) if style < 0.94 else (0, 255)
    return (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))


def _sample_notice(rng: random.Random) -> Scene:
    light = rng.randint(110, 250)
    tint = rng.choice((0, 0, 0, 8))
    background = (_jitter(rng, light, tint), _jitter(rng, light, tint), _jitter(rng, light, tint))
    ink = max(0, light - rng.randint(50, 200)) if light > 160 else min(255, light + rng.randint(50, 150))
    return Scene((), background, True, Notice(rng.choice(NOTICES), rng.choice(ICONS), (ink, ink, ink)))


def _jitter(rng: random.Random, value: int, amount: int) -> int:
    return max(0, min(255, value + rng.randint(-amount, amount)))


def _distance(a: RGB, b: RGB) -> float:
    return math.dist(a, b)


def _overlap(a: Thing, b: Thing) -> bool:
    gap = 2
    too_wide = abs(a.x - b.x) < (a.width + b.width) / 2 + gap
    return too_wide and abs(a.y - b.y) < (a.height + b.height) / 2 + gap


def cell_things(scene: Scene, grid: int = 4) -> list[Thing | None]:
    """For each cell of a grid×grid raster, row by row, the thing that covers most of it.

    A thing counts from a tenth of the cell, or from a quarter of itself.
    """
    step = SIDE / grid
    found: list[Thing | None] = []
    for cell in range(grid * grid):
        top, left = cell // grid * step, cell % grid * step
        best, winner = 0.0, None
        for thing in scene.things:
            wide = min(left + step, thing.x + thing.width / 2) - max(left, thing.x - thing.width / 2)
            high = min(top + step, thing.y + thing.height / 2) - max(top, thing.y - thing.height / 2)
            area = max(wide, 0.0) * max(high, 0.0)
            if area > best and area > min(0.1 * step**2, 0.25 * thing.width * thing.height):
                best, winner = area, thing
        found.append(winner)
    return found


# Drawing


def draw(scene: Scene, side: int = SIDE) -> Image.Image:
    """The picture of a scene, `side`×`side` RGB; smooth scenes are drawn three times as large and averaged."""
    fold = 3 if scene.smooth else 1
    picture = Image.new("RGB", (side * fold, side * fold), scene.background)
    pen = ImageDraw.Draw(picture)
    scale = side * fold / SIDE
    if scene.notice:
        _draw_notice(pen, scene.notice, scale)
    for thing in scene.things:
        _draw_thing(pen, thing, scale)
    return picture.reduce(fold) if fold > 1 else picture


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, scale: float) -> None:
    x, y, half_w, half_h = (scale * value for value in (thing.x, thing.y, thing.width / 2, thing.height / 2))
    box = (x - half_w, y - half_h, x + half_w, y + half_h)
    if thing.kind == "circle":
        pen.ellipse(box, fill=thing.rgb)
    elif thing.kind == "ring":
        pen.ellipse(box, outline=thing.rgb, width=max(1, round(0.36 * half_w)))
    elif thing.kind in ("rectangle", "square"):
        pen.rectangle(box, fill=thing.rgb)
    elif thing.text:
        pen.text((x, y), thing.text, fill=thing.rgb, font=_font(round(1.35 * 2 * half_h)), anchor="mm")
    else:
        cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
        corners = [(px * half_w, py * half_h) for px, py in _outline(thing.kind)]
        pen.polygon([(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in corners], fill=thing.rgb)


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners in the square -1 … 1, y downwards."""
    if kind == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if kind == "diamond":
        return [(0, -1), (1, 0), (0, 1), (-1, 0)]
    if kind == "star":
        radii = [1.08 if corner % 2 == 0 else 0.44 for corner in range(10)]
        turns = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
        return [(radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in zip(radii, turns, strict=True)]
    assert kind == "cross", kind
    arm = 0.32
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    return [point for k in range(4) for point in [_quarter_turn(corner, k) for corner in quarter]]


def _quarter_turn(point: tuple[float, float], times: int) -> tuple[float, float]:
    for _ in range(times):
        point = (-point[1], point[0])
    return point


def _draw_notice(pen: ImageDraw.ImageDraw, notice: Notice, scale: float) -> None:
    words = notice.text.split()
    lines = [" ".join(words[start : start + 2]) for start in range(0, len(words), 2)]
    size = min(17.0, 100 / max(len(line) for line in lines))
    middle = 46.0 if notice.icon else 32.0
    for row, line in enumerate(lines):
        at = (32 * scale, (middle + size * (row - (len(lines) - 1) / 2)) * scale)
        pen.text(at, line, fill=notice.ink, font=_font(round(size * scale)), anchor="mm")
    box = (20 * scale, 8 * scale, 44 * scale, 32 * scale)
    stroke = round(2 * scale)
    if notice.icon == "question":
        pen.text((32 * scale, 20 * scale), "?", fill=notice.ink, font=_font(round(28 * scale)), anchor="mm")
    elif notice.icon:
        pen.rectangle(box, outline=notice.ink, width=stroke)
    if notice.icon in ("cross", "slash"):
        pen.line(box, fill=notice.ink, width=stroke)
    if notice.icon == "cross":
        pen.line((box[0], box[3], box[2], box[1]), fill=notice.ink, width=stroke)
    if notice.icon == "mountain":
        peaks = ((21, 31), (27, 20), (32, 27), (36, 22), (43, 31))
        pen.polygon([(x * scale, y * scale) for x, y in peaks], fill=notice.ink)


@lru_cache(maxsize=512)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(4, size))
