"""From which similarity a picture counts as a placeholder: measured for each tower, on pictures whose answer is known.

    drawn placeholders  ─┐                                                     ┌─▶ threshold
    drawn scenes         ├─▶ similarity to the nearest reference ──choose──────┼─▶ precision and recall on them
    pictures of the input┘                                                     └─▶ how each set is spread

The placeholders drawn here share no design with the references (placeholder.py), so the measure is of unseen ones:
words of several languages, icons, frames and colours by lot.  Scenes are shapes on plain grounds, the nearest that real
pictures come to a card.  Pictures of the input count as real, though a few will be placeholders; those that a cheap
sign gave away are left out.  Everything is drawn by seed, and the input's are taken at even distances: the same
tower and input give the same threshold.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tinyvlm import schema
from tinyvlm.folders import part_paths, read_rows
from tinyvlm.images import PictureConfig, square

RGB = tuple[int, int, int]

BETA = 0.5
"""Of the F measure that the threshold maximises: a real picture lost weighs more than a placeholder kept."""

WORDS = (
    "No image available", "Image not found", "No photo", "Photo unavailable", "NO IMAGE", "image unavailable",
    "This image is no longer available", "Picture not available", "Content unavailable", "No preview available",
    "Photo coming soon", "Image coming soon", "404", "Error 404", "Access denied", "Image removed", "Deleted",
    "Hotlinking not allowed", "Bandwidth limit exceeded", "File not found", "no picture", "Photo not available",
    "Kein Bild", "Kein Bild vorhanden", "Image non disponible", "Sin imagen", "Imagen no disponible",
    "Immagine non disponibile", "Geen afbeelding", "Sem imagem", "Brak zdjęcia", "N/A",
)  # fmt: skip
SHAPES = ((1.0, 1.0), (1.0, 1.0), (4 / 3, 1.0), (1.5, 1.0), (1.0, 4 / 3), (16 / 9, 1.0))
"""Width and height of a card, as multiples of its side."""


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it was chosen from."""

    encoder: str
    """Fingerprint of the tower."""
    threshold: float
    precision: float
    """Share of placeholders among the pictures at or above the threshold."""
    recall: float
    """Share of the placeholders that are at or above it."""
    sets: dict[str, list[float]]
    """Name of a set of pictures → their similarities, rising."""

    def precision_recall(self, threshold: float) -> tuple[float, float]:
        """Of what counts as a placeholder at a threshold, how much is one; and how many of them do count."""
        pictures = np.array([*self.sets[SCENES], *self.sets[INPUT]])
        return precision_recall(np.array(self.sets[PLACEHOLDERS]), pictures, threshold)

    def table(self, threshold: float) -> list[dict[str, object]]:
        """One record for each set: how many pictures, how many at or above a threshold, and where they lie."""
        return [
            {
                "set": name,
                "pictures": len(values),
                "at or above the threshold": above,
                "share": round(above / len(values), 4),
                "lowest": values[0],
                "median": round(float(np.median(values)), 4),
                "highest": values[-1],
            }
            for name, values in self.sets.items()
            for above in [int(np.sum(np.array(values) >= threshold))]
            if values
        ]


PLACEHOLDERS, SCENES, INPUT = "drawn placeholders", "drawn scenes", "pictures of the input"


def calibrate(
    similarity: Callable[[Sequence[Image.Image]], NDArray[np.float32]],
    encoder: str,
    num_pictures: int,
    sample: Sequence[Image.Image],
    picture: PictureConfig,
) -> Calibration:
    """Measure the three sets, `num_pictures` of each that is drawn, and choose the threshold between them."""
    images = {
        PLACEHOLDERS: drawn_placeholders(num_pictures, picture),
        SCENES: drawn_scenes(num_pictures, picture.size),
        INPUT: list(sample),
    }
    sets = {name: np.sort(similarity(some)) if some else np.empty(0, np.float32) for name, some in images.items()}
    placeholders, pictures = sets[PLACEHOLDERS], np.concatenate([sets[SCENES], sets[INPUT]])
    threshold = choose_threshold(placeholders, pictures)
    precision, recall = precision_recall(placeholders, pictures, threshold)
    kept = {name: [round(float(value), 4) for value in values] for name, values in sets.items()}
    return Calibration(encoder, threshold, round(precision, 4), round(recall, 4), kept)


def choose_threshold(placeholders: NDArray[np.floating], pictures: NDArray[np.floating]) -> float:
    """The threshold with the best F measure, in the middle of the gap in which it does not change, to 4 digits.

    Of several equally good gaps the widest is taken.
    """
    values = np.unique(np.concatenate([placeholders, pictures]))
    middles = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2])
    gaps = np.concatenate([[0.0], np.diff(values)])
    scores = np.array([_f_measure(*precision_recall(placeholders, pictures, float(middle))) for middle in middles])
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    return round(float(middles[best[gaps[best].argmax()]]), 4)


def precision_recall(
    placeholders: NDArray[np.floating], pictures: NDArray[np.floating], threshold: float
) -> tuple[float, float]:
    """Of what counts as a placeholder at this threshold, how much is one; and how many of them do count."""
    found, wrong = int(np.sum(placeholders >= threshold)), int(np.sum(pictures >= threshold))
    return found / max(1, found + wrong), found / max(1, len(placeholders))


def _f_measure(precision: float, recall: float) -> float:
    weighted = BETA**2 * precision + recall
    return (1 + BETA**2) * precision * recall / weighted if weighted else 0.0


def sample_pictures(folder: Path, count: int) -> list[dict[str, Any]]:
    """About `count` usable rows of a folder of preprocessed pictures, at even distances, the same on every call."""
    columns = [name for name in schema.PREPROCESSED.names if name not in ("detail", "caption", "meta")]
    paths = part_paths(folder)
    chosen = [paths[index * len(paths) // min(count, len(paths))] for index in range(min(count, len(paths)))]
    each = -(-count // max(1, len(chosen)))
    rows: list[dict[str, Any]] = []
    for path in chosen:
        table = read_rows(str(path), 0, 4 * each, columns)
        usable = [row for row in table.to_pylist() if row["status"] == schema.OK]
        rows += usable[:each]
    return rows[:count]


def drawn_scenes(count: int, side: int) -> list[Image.Image]:
    """Shapes on plain grounds, `side` px square."""
    from tinyvlm.toy.scenes import draw, sample_scene

    rng = random.Random(0)
    return [draw(sample_scene(rng, notice=False), side) for _ in range(count)]


def drawn_placeholders(count: int, picture: PictureConfig) -> list[Image.Image]:
    """Cards that say in words, with an icon or both that there is no picture, squared as any picture is."""
    rng = random.Random(1)
    return [square(_draw_card(rng), picture)[0] for _ in range(count)]


def _draw_card(rng: random.Random) -> Image.Image:
    side = rng.choice((150, 240, 320, 448, 600))
    shape = rng.choice(SHAPES)
    width, height = round(side * shape[0]), round(side * shape[1])
    ground, ink = _colors(rng)
    card = Image.new("RGB", (width, height), ground)
    pen = ImageDraw.Draw(card)
    if rng.random() < 0.3:
        inset = side // 20
        pen.rectangle((inset, inset, width - inset, height - inset), outline=ink, width=max(1, side // 150))
    with_icon, with_words = rng.choice(((True, True), (True, True), (False, True), (False, True), (True, False)))
    middle = (width / 2, height / 2)
    if with_icon:
        size = side * (0.22 if with_words else rng.uniform(0.2, 0.4))
        at = (middle[0], middle[1] - (0.16 * side if with_words else 0))
        rng.choice(_ICONS)(pen, at, size, ink, ground)
    if with_words:
        at = (middle[0], middle[1] + (0.24 * side if with_icon else 0))
        _write(pen, rng.choice(WORDS), at, side * rng.uniform(0.07, 0.13 if with_icon else 0.18), width, ink)
    return card


def _colors(rng: random.Random) -> tuple[RGB, RGB]:
    """Ground and ink: grey on grey mostly, sometimes on white, black or a colour."""
    style = rng.random()
    if style < 0.8:
        light = 255 if style < 0.25 else rng.randint(170, 250) if style < 0.65 else rng.randint(10, 90)
        dark = max(0, light - rng.randint(50, 170)) if light > 130 else min(255, light + rng.randint(70, 165))
        return (light, light, light), (dark, dark, dark)
    hue = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
    pale: RGB = (255, 255, 255) if sum(hue) < 450 else (30, 30, 30)
    return (hue, pale) if rng.random() < 0.5 else (pale, hue)


def _write(pen: ImageDraw.ImageDraw, words: str, at: tuple[float, float], size: float, width: int, ink: RGB) -> None:
    """Centred, broken into lines so that they fit into `width`."""
    font = ImageFont.load_default(max(8, round(size)))
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, font) <= 0.86 * width:
            lines[-1] = longer
        else:
            lines.append(word)
    pen.multiline_text(at, "\n".join(lines), fill=ink, font=font, anchor="mm", align="center")


_At = tuple[float, float]


def _picture_icon(pen: ImageDraw.ImageDraw, at: _At, size: float, ink: RGB, ground: RGB) -> None:
    (x, y), h = at, size / 2
    pen.rectangle((x - h, y - 0.8 * h, x + h, y + 0.8 * h), outline=ink, width=max(1, round(size / 14)))
    pen.polygon([(x - 0.8 * h, y + 0.6 * h), (x - 0.2 * h, y - 0.3 * h), (x + 0.4 * h, y + 0.6 * h)], fill=ink)
    pen.ellipse((x + 0.3 * h, y - 0.5 * h, x + 0.65 * h, y - 0.15 * h), fill=ink)


def _camera_icon(pen: ImageDraw.ImageDraw, at: _At, size: float, ink: RGB, ground: RGB) -> None:
    (x, y), h = at, size / 2
    pen.rectangle((x - h, y - 0.5 * h, x + h, y + 0.7 * h), fill=ink)
    pen.rectangle((x - 0.35 * h, y - 0.75 * h, x + 0.35 * h, y - 0.5 * h), fill=ink)
    pen.ellipse((x - 0.42 * h, y - 0.32 * h, x + 0.42 * h, y + 0.52 * h), fill=ground)


def _cross_icon(pen: ImageDraw.ImageDraw, at: _At, size: float, ink: RGB, ground: RGB) -> None:
    (x, y), h, stroke = at, size / 2, max(2, round(size / 10))
    pen.rectangle((x - h, y - h, x + h, y + h), outline=ink, width=max(1, stroke // 2))
    pen.line((x - 0.5 * h, y - 0.5 * h, x + 0.5 * h, y + 0.5 * h), fill=ink, width=stroke)
    pen.line((x - 0.5 * h, y + 0.5 * h, x + 0.5 * h, y - 0.5 * h), fill=ink, width=stroke)


def _ban_icon(pen: ImageDraw.ImageDraw, at: _At, size: float, ink: RGB, ground: RGB) -> None:
    (x, y), h, stroke = at, size / 2, max(2, round(size / 9))
    pen.ellipse((x - h, y - h, x + h, y + h), outline=ink, width=stroke)
    pen.line((x - 0.65 * h, y + 0.65 * h, x + 0.65 * h, y - 0.65 * h), fill=ink, width=stroke)


def _warning_icon(pen: ImageDraw.ImageDraw, at: _At, size: float, ink: RGB, ground: RGB) -> None:
    (x, y), h = at, size / 2
    pen.polygon([(x, y - h), (x + h, y + 0.8 * h), (x - h, y + 0.8 * h)], fill=ink)
    pen.text((x, y + 0.2 * h), "!", fill=ground, font=ImageFont.load_default(max(8, round(size / 2))), anchor="mm")


_ICONS = (_picture_icon, _camera_icon, _cross_icon, _ban_icon, _warning_icon)
