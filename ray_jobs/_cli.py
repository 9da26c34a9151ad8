"""The command line that all stages share, and how they end.

    python -m ray_jobs.<stage> --recipe R --input I [--input J] --output O [--set a.b=v ...] [--workers N] [--dry-run]
                               [--retry STATUS ...]   of stages that map rows      [--limit ROWS]   of download
                               [--takedown LIST]      of download and preprocess

Exit code 0: done, or was done before.  2: an expected failure, told as one sentence on stderr.  130: interrupted.
143: asked to stop with SIGTERM, and training kept a checkpoint.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ray_jobs import _cluster, _run_stage
from ray_jobs._cluster import StageResources
from tinyvlm import config
from tinyvlm.errors import ConfigError, Interrupted, TinyVLMError
from tinyvlm.folders import Input, Manifest, require_space
from tinyvlm.recipes import Recipe, load
from tinyvlm.removal import take_down
from tinyvlm.schema import statuses_of
from tinyvlm.stage import Stage, open_input
from tinyvlm.stage_run import StageRun
from tinyvlm.storage import address
from tinyvlm.takedown import read_list

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a command line asked for."""

    recipe: Recipe
    inputs: tuple[Path, ...]
    output: Path
    workers: int | None
    """Of an elastic pool the most."""
    dry_run: bool
    retry: tuple[str, ...] = ()
    """Statuses and families whose rows are done again."""
    takedown: Path | None = None
    """A list of what must not be kept."""
    min_workers: int | None = None
    """Of an elastic pool."""


def parse(stage_name: str, argv: Sequence[str], *, writes: bool = True, extra: Sequence[str] = ()) -> Job:
    """Read the options of a stage.  `writes`: it makes a folder, so it wants --output.

    `extra`: which of --retry, --takedown, --limit it has.

    Raises:
        ConfigError: an unknown option or setting, with the nearest valid one; a value that is missing or wrong.
    """
    parser = _Parser(prog=f"python -m ray_jobs.{stage_name}", description=f"Run the stage {stage_name!r}.")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a recipe of tinyvlm.recipes, or a JSON file")
    parser.add_argument(
        "--input", type=address, action="append", metavar="FOLDER", help="what is read; may be repeated"
    )
    parser.add_argument("--output", type=address, metavar="FOLDER", help="where the stage's folder is made")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="a setting; may be repeated")
    if "--workers MIN-MAX" in extra:
        told = "number of workers, or the fewest and the most that the run goes on with; default: one a GPU"
        parser.add_argument("--workers", type=_range, metavar="N|MIN-MAX", help=told)
    else:
        parser.add_argument("--workers", type=_count, metavar="N", help="size of the pool; default: as many as fit")
    parser.add_argument("--dry-run", action="store_true", help="print recipe, plan and resources, and do nothing")
    if "--retry" in extra:
        told = "do rows of these statuses again: a status, a family (timeout), transient or failed; may be repeated"
        parser.add_argument("--retry", action="append", default=[], metavar="STATUS", help=told)
    if "--takedown" in extra:
        told = "links, host:NAMEs and sha256s that are not fetched and not kept, in all that lies under --output"
        parser.add_argument("--takedown", type=address, metavar="LIST", help=told)
    if "--limit" in extra:
        parser.add_argument("--limit", type=_count, metavar="ROWS", help="use only so many rows from the list's start")
    options = parser.parse_args(list(argv))
    for name in ("recipe", "input", "output") if writes else ("recipe", "input"):
        if not getattr(options, name):
            raise ConfigError(f"{stage_name} wants --{name}; see python -m ray_jobs.{stage_name} --help.")
    limit = getattr(options, "limit", None)
    recipe = load(options.recipe, [*options.set, *([f"links.limit={limit}"] if limit else [])])
    inputs = tuple(path.absolute() for path in options.input)
    retry = tuple(name for text in getattr(options, "retry", []) for name in text.split(","))
    statuses_of(retry)  # before any work: an unknown one is refused
    takedown = getattr(options, "takedown", None)
    if takedown:
        read_list(takedown)  # before any work: a bad line is refused
    least, most = options.workers if isinstance(options.workers, tuple) else (None, options.workers)
    return Job(
        recipe=recipe,
        inputs=inputs,
        output=(options.output or Path()).absolute(),
        workers=most,
        dry_run=options.dry_run,
        retry=retry,
        takedown=takedown,
        min_workers=least,
    )


def main(stage_name: str, run: Callable[[Job], None], *, writes: bool = True, extra: Sequence[str] = ()) -> NoReturn:
    """Parse this process's arguments, run, and exit as the drawing says."""
    _set_up_logging()
    try:
        run(parse(stage_name, sys.argv[1:], writes=writes, extra=extra))
        code = 0
    except Interrupted as error:
        code = _complain(str(error), 143)
    except TinyVLMError as error:
        code = _complain(str(error), 2)
    except OSError as error:
        code = _complain(f"{stage_name} stopped: {error.strerror or error} ({error.filename or 'no file'}).", 2)
    except KeyboardInterrupt:
        code = _complain(f"{stage_name} was interrupted; the same command continues.", 130)
    sys.exit(code)


def run_rows(
    job: Job, stage: Stage, resources: StageResources, open_rows: Callable[[Path], Input] | None = None
) -> Manifest | None:
    """Run a row stage as the job asks, or print what it would do.

    `open_rows(root)` makes the input where it is no stage folder; on a dry run its root is thrown away.
    """
    if job.dry_run:
        with tempfile.TemporaryDirectory(prefix="tinyvlm-plan-") as scratch:
            source = open_rows(Path(scratch)) if open_rows else open_input(stage, job.inputs)
            source = replace(source, folders={"--input": str(job.inputs[0])}) if open_rows else source
            run = StageRun(stage, source, job.output, job.retry)
            show_plan(stage.name, job, _run_stage.plan(run, job.workers, resources))
        return None
    if open_rows:  # it writes, so what can be known to fail must fail before
        _cluster.check_address()
        require_space(job.output, 0, stage.name)
        stage.check()
    if job.takedown:
        _take_down(job.takedown, job.output)
    source = open_rows(job.output) if open_rows else open_input(stage, job.inputs)
    run = StageRun(stage, source, job.output, job.retry)
    was_finished = run.is_finished
    manifest = _run_stage.run_stage(run, job.workers, resources)
    if not was_finished:
        _say_what_came(run, manifest)
    return manifest


def _take_down(path: Path, root: Path) -> None:
    """Note the list, so that this run and all later ones keep to it, and clear what lies under the root already."""
    listed = read_list(path)
    listed.add_to(root)
    for item in take_down(listed, [root]):
        if item.num_rows or item.in_use:
            log.info("takedown: %s", item.in_use or f"{item.num_rows} rows of {item.folder.name}")


def _say_what_came(run: StageRun, manifest: Manifest) -> None:
    statuses = ", ".join(f"{name} {count:,}" for name, count in manifest.statuses.items())
    rows = f"{manifest.rows_out:,} rows in {manifest.seconds:.1f} s{f' ({statuses})' if statuses else ''}"
    log.info("%s finished: %s\n%s%s", manifest.stage, rows, " " * 9, run.folder)
    if not manifest.rows_out:
        log.warning("%s had nothing to work on: the stage before left no row with status ok", manifest.stage)


def show_plan(stage_name: str, job: Job, plan: dict[str, Any]) -> None:
    """Print a dry run as one JSON document."""
    content = {"stage": stage_name, "recipe": config.to_dict(job.recipe), **plan}
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


class _Parser(argparse.ArgumentParser):
    """Complains as everything here does: with a ConfigError that names the nearest option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    @property
    def _options(self) -> list[str]:
        return [text for action in self._actions for text in action.option_strings if text.startswith("--")]

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise ConfigError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")
        near = difflib.get_close_matches(unknown.split()[0].split("=")[0], self._options, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._options)}."
        raise ConfigError(f"There is no option {unknown.split()[0]!r}; {hint}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number from 1 up, but got {text!r}")
    return int(text)


def _range(text: str) -> tuple[int, int] | int:
    least, mark, most = text.partition("-")
    if not mark:
        return _count(text)
    if _count(least) > _count(most):
        raise argparse.ArgumentTypeError(f"wants the smaller number first, but got {text!r}")
    return _count(least), _count(most)


def _set_up_logging() -> None:
    """Plain lines on stderr, each written at once, also where it is no terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("tinyvlm", "ray_jobs", "__main__"):
        logging.getLogger(name).setLevel(os.environ.get("TINYVLM_LOG_LEVEL", "INFO").upper())


def _complain(sentence: str, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(sentence.split())}\n")
    return code
