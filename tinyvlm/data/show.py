"""Conversations as the model sees them: `tinyvlm data show`.

    rows of a prepare folder ──choose──▶ a few ──look──▶ the tokens that enter, one by one ──▶ to_text, show_page.py
                                                    (processor.tokens, as in training)

What is shown is decoded from the token ids that training gets, so a picture that stands elsewhere, words that are not
supervised, or a special token that is none can be seen here.  Of rows that are set aside the reason is shown too.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from rich.text import Text

from tinyvlm import chat, schema
from tinyvlm.charts import number
from tinyvlm.chat import Picture
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.samples import Draw, Place, kinds_of, rows_at
from tinyvlm.errors import DataError, InputError, StageError
from tinyvlm.folders import Manifest, find_folders, is_finished, part_paths
from tinyvlm.model.processing import TinyVLMProcessor
from tinyvlm.report import size
from tinyvlm.storage import exists, readable

_CHOSEN_BY = ("key", "status", "source", "family", "split")
_SHOWN = (*_CHOSEN_BY, "detail", "source_key", "messages", "images", "tokens", "meta")

LEARNED = ("⟦", "⟧")
"""What stands around supervised tokens where there is no colour."""

_INVISIBLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which conversations are shown; empty: all are."""

    keys: tuple[int, ...] = ()
    source: str = ""
    """`m3it` is all of `m3it/coco`, `m3it/vqa-v2`, … too."""
    family: str = ""
    split: tuple[str, ...] = ()
    status: tuple[str, ...] = ()
    """Empty: usable ones, and whatever their status those that `keys` names."""
    count: int = 8


class Piece(NamedTuple):
    """The fewest neighbouring tokens that are whole characters; of image tokens, all that stand together."""

    ids: tuple[int, ...]
    text: str
    is_special: bool
    supervised: bool


class Shown(NamedTuple):
    """A picture of a conversation, as it is stored."""

    size: str
    """Pixels and format, or what is wrong."""
    num_bytes: int
    sha256: str
    body: bytes | None


@dataclass(frozen=True)
class View:
    """One conversation, and what the model sees of it."""

    row: Mapping[str, Any]
    pieces: list[Piece]
    """Empty where nothing can enter."""
    problem: str
    """Why nothing can."""
    pictures: list[Shown]
    side: int
    """Pixels of a picture's side as the vision tower gets it."""
    num_image_tokens: int
    """Of each picture."""

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def num_supervised(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.supervised)

    @property
    def title(self) -> str:
        """Key, source, family, split."""
        return visible(" · ".join(str(self.row.get(name)) for name in ("key", "source", "family", "split")))

    @property
    def lengths(self) -> str:
        """How long it is, in tokens."""
        if not self.pieces:
            return f"Nothing enters the model: {visible(self.problem)}"
        parts = [f"{number(self.num_supervised)} supervised"]
        pictures = sum(piece.text == chat.IMAGE for piece in self.pieces if piece.is_special)
        if pictures:
            of = "one picture" if pictures == 1 else f"{pictures} pictures"
            parts.insert(0, f"{number(pictures * self.num_image_tokens)} of {of}")
        counted = self.row.get("tokens")
        if counted not in (None, self.num_tokens):
            parts.append(f"prepare counted {number(counted)}, with another tokenizer or size of pictures")
        return f"{number(self.num_tokens)} tokens: {', '.join(parts)}"

    @property
    def set_aside(self) -> str:
        """Status, what it means, and the reason; "" for a usable conversation."""
        status = self.row.get("status") or ""
        if status == schema.OK:
            return ""
        said = f"{status} ({schema.STATUSES.get(status, 'unknown status')})"
        return visible(": ".join([said, self.row["detail"]]) if self.row.get("detail") else said)

    @property
    def meta(self) -> str:
        return "" if self.row.get("meta") in (None, "", "{}") else visible(str(self.row["meta"]))

    @property
    def raw(self) -> list[tuple[str, str]]:
        """(role, words) as the row has them."""
        messages = messages_of(self.row.get("messages") or [])
        return [
            (
                visible(message.role),
                "".join(
                    f"[picture {part.index}]" if isinstance(part, Picture) else visible(part) for part in message.parts
                ),
            )
            for message in messages
        ]

    @property
    def picture_lines(self) -> list[str]:
        """A line about each picture."""
        return [
            f"{one.size}, {size(one.num_bytes) if one.num_bytes else 'not stored'}, "
            f"sha256 {visible(one.sha256[:12]) or 'unknown'}"
            + (f", enters as {self.side}×{self.side}" if self.pieces and one.num_bytes else "")
            for one in self.pictures
        ]


def visible(text: str) -> str:
    """Text of strangers without what a terminal would obey: control characters as their pictures or their numbers."""
    return _INVISIBLE.sub(
        lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 32 else f"<U+{ord(found[0]):04X}>", text
    )


def conversation_folders(place: Path) -> list[Path]:
    """The `prepare` folders at a place: itself, or those in it that its pointers name.

    Raises:
        DataError: there is none.
    """
    if not exists(place):
        raise DataError(f"There is no folder {place}; give one of the stage prepare.")
    if is_finished(place):
        stage = Manifest.read(place).stage
        if stage != "prepare":
            raise DataError(f"{place} is a folder of the stage {stage!r}; give one of the stage prepare.")
        return [place]
    try:
        return find_folders([place], "prepare", "data show")
    except StageError as error:
        raise DataError(f"{place} is no finished folder of the stage prepare, and has none in it ({error})") from error


def choose(folder: Path, choice: Choice) -> list[dict[str, Any]]:
    """Rows of a folder: those with the wanted keys, in their order, or some of every source and family.

    Raises:
        DataError: a part cannot be read.
    """
    paths = part_paths(folder)
    draw, by_key = Draw(choice.count), dict[int, Place]()
    keys = np.array([key for key in choice.keys if abs(key) < 2**63], np.int64)
    try:
        for part, path in enumerate(paths):
            with pq.ParquetFile(readable(path)) as file:
                table = file.read(["key"] if choice.keys else list(_CHOSEN_BY))
            if choice.keys:
                rows = np.flatnonzero(np.isin(table["key"].to_numpy(), keys))
                by_key |= {table["key"][int(row)].as_py(): Place(part, int(row)) for row in rows}
                continue
            rows = np.flatnonzero(_fits(table, choice))
            table = table.take(rows)
            kinds = kinds_of(table, ("source", "family", "status") if choice.status else ("source", "family"))
            draw.add(part, table["key"], kinds, rows)
        places = [by_key[key] for key in choice.keys if key in by_key] if choice.keys else draw.mixed(choice.count)
        found = rows_at(paths, places, _SHOWN)
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{folder} cannot be read as conversations ({reason}); run prepare again.") from error
    return [found[place] for place in places]


def _fits(table: pa.Table, choice: Choice) -> npt.NDArray[np.bool_]:
    fits = pc.is_in(table["status"], pa.array(choice.status or [schema.OK], pa.string()))
    if choice.source:
        own, inside = pc.equal(table["source"], choice.source), pc.starts_with(table["source"], f"{choice.source}/")
        fits = pc.and_(fits, pc.or_(own, inside))
    if choice.family:
        fits = pc.and_(fits, pc.equal(table["family"], choice.family))
    if choice.split:
        fits = pc.and_(fits, pc.is_in(table["split"], pa.array(choice.split, pa.string())))
    chosen: npt.NDArray[np.bool_] = pc.fill_null(fits, False).to_numpy(zero_copy_only=False).astype(bool)
    return chosen


def sources_in(folder: Path) -> list[str]:
    """The sources that a folder has rows of."""
    known: set[str] = set()
    for path in part_paths(folder):
        with pq.ParquetFile(readable(path)) as file:
            known.update(pc.unique(file.read(["source"])["source"]).to_pylist())
    return sorted(str(name) for name in known)


def look(row: Mapping[str, Any], processor: TinyVLMProcessor) -> View:
    """What the model would see of a row.

    Of a row that is set aside, the pictures that its text refers to stand for those that it lacks.
    """
    messages, images = messages_of(row.get("messages") or []), row.get("images") or []
    num_pictures = len(images)
    if row.get("status") != schema.OK:
        num_pictures = sum(isinstance(part, Picture) for message in messages for part in message.parts)
    seen, problem = list[Piece](), ""
    try:
        seen = pieces(*processor.tokens(messages, num_pictures), processor)
    except InputError as error:
        problem = str(error)
    pictures = [_picture(image) for image in images]
    return View(row, seen, problem, pictures, processor.picture.tower_size, processor.num_image_tokens)


def pieces(ids: npt.NDArray[np.int32], supervised: npt.NDArray[np.bool_], processor: TinyVLMProcessor) -> list[Piece]:
    """Token ids (T,) and whether the loss counts them (T,), as pieces of text."""
    special = {name for name, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    kinds = zip(np.isin(ids, list(special)).tolist(), supervised.tolist(), ids.tolist(), strict=True)
    told: list[Piece] = []
    for (is_special, learned), tokens in itertools.groupby(kinds, key=lambda token: token[:2]):
        run = [token for _, _, token in tokens]
        while run:
            length = _length(run, is_special, processor)
            name = processor.decode(run[:length], skip_special_tokens=False) if not is_special else ""
            told.append(Piece(tuple(run[:length]), name or _special(run[:length], processor), is_special, learned))
            run = run[length:]
    return told


def _length(run: Sequence[int], is_special: bool, processor: TinyVLMProcessor) -> int:
    """How many tokens the first piece of a run has."""
    if is_special:
        same = itertools.takewhile(lambda token: token == processor.image_token_id, run)
        return max(1, sum(1 for _ in same))
    # A token may end inside a character, which then decodes to a replacement mark.
    return next(
        (n for n in range(1, len(run)) if not processor.decode(run[:n], skip_special_tokens=False).endswith("\ufffd")),
        len(run),
    )


def _special(ids: Sequence[int], processor: TinyVLMProcessor) -> str:
    name = str(processor.tokenizer.convert_ids_to_tokens(int(ids[0])))
    return f"…{len(ids)}×{name}…" if ids[0] == processor.image_token_id else name


def _picture(image: Mapping[str, Any]) -> Shown:
    body, sha256 = image.get("bytes"), image.get("sha256") or ""
    if not body:
        return Shown("no picture", 0, sha256, None)
    try:
        with Image.open(io.BytesIO(body)) as opened:
            return Shown(f"{opened.width}×{opened.height} {opened.format}", len(body), sha256, body)
    except Exception as error:  # Pillow raises many kinds; a bad picture is to be seen here, not to stop the rest
        return Shown(f"unreadable ({type(error).__name__})", len(body), sha256, None)


STYLES = {"learned": "bold green", "special": "dim cyan", "image": "magenta", "bad": "bold red", "quiet": "dim"}


def legend(plain: bool) -> Text:
    """What the marks mean."""
    if plain:
        begin, end = LEARNED
        return Text(f"{begin}…{end} supervised: the loss counts it · \\<|…|> typed by someone, no special token")
    return Text.assemble(
        ("supervised: the loss counts it", STYLES["learned"]),
        " · ",
        ("<|special token|>", STYLES["special"]),
        " · ",
        ("pictures", STYLES["image"]),
    )


def to_text(view: View, plain: bool) -> Text:
    """A conversation for the terminal.  `plain`: without colour, so that marks say what colour would."""
    text = Text()
    text.append(f"── {view.title} ──\n", "" if plain else "bold")
    if view.set_aside:
        text.append(f"set aside: {view.set_aside}\n", "" if plain else STYLES["bad"])
    text.append(f"{view.lengths}\n", "" if plain else STYLES["quiet"])
    for place, line in enumerate(view.picture_lines):
        text.append(f"picture {place}: {line}\n", "" if plain else STYLES["image"])
    if view.pieces:
        _append_pieces(text, view.pieces, plain)
    else:
        for role, words in view.raw:
            text.append(f"{role}: {words}\n")
    if view.meta:
        text.append(f"meta: {view.meta}\n", "" if plain else STYLES["quiet"])
    return text


def _append_pieces(text: Text, seen: Sequence[Piece], plain: bool) -> None:
    for supervised, run in itertools.groupby(seen, key=lambda piece: piece.supervised):
        if plain and supervised:
            text.append(LEARNED[0])
        for is_special, same in itertools.groupby(run, key=lambda piece: piece.is_special):
            if is_special:
                for piece in same:
                    style = "image" if piece.text.strip("…").endswith(chat.IMAGE_TOKENS) else "special"
                    text.append(piece.text, "" if plain else STYLES["learned" if supervised else style])
                continue
            words = visible("".join(piece.text for piece in same))
            if plain:
                words = chat.CONTROL_NAME.sub(r"\\<", words)
            text.append(words, STYLES["learned"] if supervised and not plain else "")
        if plain and supervised:
            text.append(LEARNED[1])
    text.append("\n")
