"""`tinyvlm data show`: arguments and output; the views themselves are show.py's and train/packs_drawing.py's."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tinyvlm import recipes, schema
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.folders import write_atomic
from tinyvlm.schema import FAMILIES, SPLITS
from tinyvlm.storage import address

PIPE_WIDTH = 100
"""Characters of a pack's bar where there is no terminal."""

if TYPE_CHECKING:
    from tinyvlm.data.show import Choice
    from tinyvlm.model.processing import TinyVLMProcessor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `tinyvlm data show` takes."""
    parser.add_argument("folder", type=address, help="of prepare, or a run that has some; for --packs of training")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--recipe", help="whose model's tokens and pictures: a name, or a .json file")
    whose.add_argument("--model", type=Path, help="the same of a model that is there: its folder")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="settings of the recipe")
    parser.add_argument("--key", type=int, action="append", default=[], help="this conversation; may be repeated")
    parser.add_argument("--source", default="", help="only of this source: m3it has m3it/coco in it")
    parser.add_argument("--family", default="", choices=FAMILIES)
    parser.add_argument("--split", action="append", default=[], choices=SPLITS)
    parser.add_argument("--status", action="append", default=[], help="ok, a status, a family of them, or failed")
    parser.add_argument("--count", type=int, default=8, help="conversations, of every source and family in turn")
    parser.add_argument("--packs", type=int, metavar="N", help="draw so many packs of the training plan in FOLDER")
    parser.add_argument("--step", type=int, default=0, help="with --packs: the step to begin with")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead, with the pictures")
    parser.add_argument("--no-color", action="store_true", help="marks instead of colours")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out.

    Raises:
        TinyVLMError: as a sentence for the user.
    """
    for name in ("count", "packs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    return _packs(options) if options.packs else _conversations(options)


def _conversations(options: argparse.Namespace) -> int:
    from tinyvlm.data import show, show_page

    folders = show.conversation_folders(options.folder)
    processor = _processor(options)
    choice = _choice(options)
    rows = [(folder, show.choose(folder, choice)) for folder in folders]
    _check_found(rows, choice, options.folder)
    each = max(1, choice.count // sum(1 for _, found in rows if found))
    views = [
        (folder, [show.look(row, processor) for row in (found if choice.keys else found[:each])])
        for folder, found in rows
        if found
    ]
    if options.html:
        write_atomic(options.html, show_page.page(views))
        sys.stdout.write(f"{sum(len(found) for _, found in views)} conversations: {options.html}\n")
        return 0
    console, plain = _console(options.no_color)
    shown = [show.to_text(view, plain) for _, found in views for view in found]
    _print([show.legend(plain), *shown], console, plain)
    return 0


def _choice(options: argparse.Namespace) -> Choice:
    from tinyvlm.data.show import Choice

    status = schema.statuses_of(options.status)
    if schema.OK in options.status:
        status = (schema.OK, *status)
    choice = Choice(source=options.source, family=options.family, split=tuple(options.split), status=status)
    return replace(choice, keys=tuple(dict.fromkeys(options.key)), count=options.count)


def _check_found(rows: list[tuple[Path, list[dict[str, object]]]], choice: Choice, place: Path) -> None:
    from tinyvlm.data.show import sources_in

    keys = {row["key"] for _, found in rows for row in found}
    missing = [str(key) for key in choice.keys if key not in keys]
    if missing:
        raise DataError(f"{place} has no conversation with the key {', '.join(missing)}.")
    if not any(found for _, found in rows):
        known = sorted({name for folder, _ in rows for name in sources_in(folder)})
        raise DataError(
            f"{place} has no such conversation; its sources are {', '.join(known) or 'none'}. "
            "Ask for less, or see its report.html for what there is."
        )


def _processor(options: argparse.Namespace) -> TinyVLMProcessor:
    """Of the recipe's model, or of one that was saved."""
    from tinyvlm.model.build import build_processor

    if options.model:
        return _saved(options.model)
    if not options.recipe:
        raise ConfigError("Whose tokens?  Give --recipe (the one that training uses), or --model with a model folder.")
    recipe = recipes.load(options.recipe, options.set)
    return build_processor(recipe.model, recipe.picture)


def _saved(folder: Path) -> TinyVLMProcessor:
    """Of a model folder, or of the one in a training run's folder."""
    from tinyvlm.model.build import load_processor

    inside = folder / "model"
    return load_processor((inside if (inside / "config.json").is_file() else folder).absolute())


def _packs(options: argparse.Namespace) -> int:
    from tinyvlm.train import packs_drawing
    from tinyvlm.train.plan import Plan

    path = packs_drawing.find_plan(options.folder)
    plan = Plan.load(path)
    packs = packs_drawing.choose(plan, packs_drawing.limits(path), options.step, options.packs)
    num_image_tokens, head = _num_image_tokens(options, path.parent), packs_drawing.summary(path, plan)
    if options.html:
        write_atomic(options.html, packs_drawing.page(head, packs, num_image_tokens))
        sys.stdout.write(f"{len(packs)} packs: {options.html}\n")
        return 0
    console, plain = _console(options.no_color)
    width = max(40, console.width) if console.is_terminal else PIPE_WIDTH
    drawn = [packs_drawing.to_text(pack, num_image_tokens, width) for pack in packs]
    _print([Text(head), packs_drawing.legend(num_image_tokens), *drawn], console, plain)
    return 0


def _num_image_tokens(options: argparse.Namespace, run_folder: Path) -> int:
    """Of one picture; 0 where nobody says."""
    if options.recipe:
        return recipes.load(options.recipe, options.set).model.num_image_tokens
    model = options.model or run_folder
    if options.model or (model / "model" / "config.json").is_file():
        return _saved(model).num_image_tokens
    return 0


def _console(no_color: bool) -> tuple[Console, bool]:
    """Where to print, and whether without colour: so it is asked for, here or by NO_COLOR, or nobody would see it."""
    console = Console(highlight=False)
    return console, no_color or console.no_color or not console.is_terminal or console.color_system is None


def _print(texts: list[Text], console: Console, plain: bool) -> None:
    try:
        for text in texts:
            if plain:
                console.file.write(f"{text.plain}\n")
            else:
                console.print(text, soft_wrap=True)
        console.file.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left must not be told at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
