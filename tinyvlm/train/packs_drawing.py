"""Packs of a saved plan as bars: `tinyvlm data show RUN --packs N`.

    step 0 · pack 2 · 253 of 256 positions, 98.8 % · 4 samples, 4 pictures
    |░░░░░▒▒▒▒▒█|░░░░░▒▒▒▒▒▒▒▒▒▒█|░░░░░▒▒▒▒█▒▒▒█▒▒▒▒█|░░░░░▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒██·

Drawn from lengths alone, as they are in the plan: of a sample, first what its pictures take, then its words, then what
is supervised.  That is how much there is of each, not where it stands; `data show` without packs tells that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from rich.text import Text

from tinyvlm import report
from tinyvlm.errors import ConfigError, DataError, StageError
from tinyvlm.folders import Manifest
from tinyvlm.train.plan import Item, Plan

KINDS = {
    "pictures": ("░", "magenta"),
    "words": ("▒", "blue"),
    "supervised": ("█", "green"),
    "padding": ("·", "dim"),
}
"""What positions hold → its mark and its colour in the terminal."""


class Limits(NamedTuple):
    """What a plan was cut by."""

    pack_length: int
    samples_per_pack: int


class Drawn(NamedTuple):
    """One pack of a plan, and where it comes."""

    step: int
    number: int
    """Among all packs."""
    items: list[Item]
    length: int
    """Positions that it takes, padding included."""

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items)

    @property
    def caption(self) -> str:
        """What stands above the bar."""
        pictures = sum(item.pictures for item in self.items)
        share = f"{100 * self.tokens / self.length:.1f} %"
        samples = "1 sample" if len(self.items) == 1 else f"{len(self.items)} samples"
        return (
            f"step {self.step} · pack {self.number} · {self.tokens:,} of {self.length:,} positions, {share} · "
            f"{samples}, {'1 picture' if pictures == 1 else f'{pictures} pictures'}"
        )


def find_plan(place: Path) -> Path:
    """The plan at a place: the file, or the one in a training run's folder.

    Raises:
        DataError: there is none.
    """
    path = place / "plan.parquet" if place.is_dir() else place
    if not path.is_file():
        raise DataError(f"{place} has no plan.parquet; give the folder of a training stage, or a saved plan.")
    return path


def limits(path: Path) -> Limits | None:
    """What the plan says that it was cut by, or else the manifest beside it; None where neither says so."""
    told = json.loads((pq.read_schema(path).metadata or {}).get(b"shape", b"{}"))
    if not told:
        try:
            told = Manifest.read(path.parent).settings
        except StageError:
            return None
    return Limits(int(told["pack_length"]), int(told["samples_per_pack"]))


def choose(plan: Plan, cut_by: Limits | None, first_step: int, count: int) -> list[Drawn]:
    """`count` packs, from `first_step` on.

    A pack has room for `pack_length` tokens; a sample that has one of its own is padded to the longest of its step.

    Raises:
        ConfigError: the plan has no such step.
    """
    if not 0 <= first_step < plan.num_steps:
        raise ConfigError(f"The plan has {plan.num_steps} steps, from 0 on; it has no step {first_step}.")
    per_step = len(plan.packs(0))

    def drawn() -> Any:
        for step in range(first_step, plan.num_steps):
            packs = plan.packs(step)
            longest = max(sum(item.tokens for item in pack) for pack in packs)
            length = cut_by.pack_length if cut_by and cut_by.samples_per_pack != 1 else longest
            for place, pack in enumerate(packs):
                yield Drawn(step, step * per_step + place, pack, length)

    return list(islice(drawn(), count))


def summary(path: Path, plan: Plan) -> str:
    """The whole plan in one line."""
    said = f"{plan.num_packs:,} packs in {plan.num_steps:,} steps, {len(plan.items):,} samples"
    try:
        fill = json.loads((path.parent / "plan.json").read_text())["fill"]
    except (OSError, ValueError, KeyError):
        return said
    return f"{said}, {100 * fill:.1f} % of all positions filled"


def parts_of(item: Item, num_image_tokens: int) -> dict[str, int]:
    """How many tokens of a sample are of which kind.  `num_image_tokens` 0: pictures are not told from words."""
    pictures = min(item.pictures * num_image_tokens, item.tokens - item.supervised)
    words = item.tokens - item.supervised - pictures
    return {"pictures": pictures, "words": words, "supervised": item.supervised}


def legend(num_image_tokens: int) -> Text:
    """What the marks mean."""
    shown = {name: look for name, look in KINDS.items() if num_image_tokens or name != "pictures"}
    text = Text("each sample from | to |: ")
    for name, (mark, style) in shown.items():
        text.append(f"{mark * 2} {name}  ", style)
    if not num_image_tokens:
        text.append("(pictures are among the words: give --recipe or --model to tell them apart)", "dim")
    return text


def to_text(pack: Drawn, num_image_tokens: int, width: int) -> Text:
    """A pack as a caption, a bar of `width` characters, and the samples' lengths where there is room."""
    marks: list[tuple[str, str]] = []
    lengths = ""
    end = 0
    for item in pack.items:
        begin = len(marks)
        marks.append(("|", "bold"))
        for name, number in parts_of(item, num_image_tokens).items():
            end += number
            marks += [KINDS[name]] * (round(width * end / pack.length) - len(marks))
        if len(marks) - begin > len(f"{item.tokens} ") and len(lengths) <= begin:
            lengths = f"{lengths:{begin}} {item.tokens}"
    marks += [KINDS["padding"]] * (width - len(marks))
    return Text.assemble((f"{pack.caption}\n", "bold"), *marks[:width], "\n", (f"{lengths}\n", "dim"))


def page(head: str, packs: Sequence[Drawn], num_image_tokens: int) -> str:
    """The same on a page."""
    shown = [name for name in KINDS if num_image_tokens or name != "pictures"]
    key = "".join(f"<li><i class='of-{name}'></i>{name}</li>" for name in shown)
    said = "Pictures are among the words: give --recipe or --model to tell them apart. " if not num_image_tokens else ""
    note = (
        f"<p class='note'>{escape(head)}. Of each sample, how much is what; not where it stands. {said}"
        f"Point at a sample to see which conversation it is.</p><ul class='legend packed'>{key}</ul>"
    )
    return report.page("Packs", [("", note + "".join(_bar(pack, num_image_tokens) for pack in packs))], STYLE)


def _bar(pack: Drawn, num_image_tokens: int) -> str:
    samples = "".join(_sample(item, pack.length, num_image_tokens) for item in pack.items)
    return f"<div class='pack'><p>{escape(pack.caption)}</p><div class='bar packed'>{samples}</div></div>"


def _sample(item: Item, length: int, num_image_tokens: int) -> str:
    parts = parts_of(item, num_image_tokens)
    said = " · ".join(f"{number:,} {name}" for name, number in parts.items() if number)
    pieces = "".join(
        f"<i class='of-{name}' style='flex-grow:{number}'></i>" for name, number in parts.items() if number
    )
    share = 100 * item.tokens / length
    return (
        f"<div style='width:{share:.4f}%' title='conversation {item.key}: {item.tokens:,} tokens ({escape(said)})'>"
        f"{pieces}{f'<span>{item.tokens:,}</span>' if share > 4 else ''}</div>"
    )


STYLE = """
.pack{margin:0 0 14px}.pack p{margin:0 0 4px;font-size:13.5px;color:var(--soft);font-variant-numeric:tabular-nums}
.bar.packed{display:flex;height:30px;border:1px solid var(--rule);border-radius:5px;overflow:hidden;
background:repeating-linear-gradient(135deg,var(--card) 0 5px,var(--rule) 5px 7px)}
.bar.packed>div{display:flex;position:relative;box-shadow:inset -2px 0 0 var(--page);overflow:hidden;padding-right:2px;
min-width:0}
.bar.packed>div:hover{filter:brightness(1.15)}
.bar.packed span{position:absolute;left:5px;top:6px;font-size:12px;line-height:18px;color:#fff;
text-shadow:0 0 3px #0009;font-variant-numeric:tabular-nums}
.packed .of-pictures{background:var(--c3)}.packed .of-words{background:var(--c0)}
.packed .of-supervised{background:var(--good)}
.legend.packed{margin-bottom:14px}.legend.packed .of-padding{background:
repeating-linear-gradient(135deg,var(--card) 0 2px,var(--soft) 2px 3px);outline:1px solid var(--rule)}
"""
