"""`tinyvlm`: the command line.  What needs Ray is started as a `ray_jobs` process, so this module never imports it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tinyvlm.errors import ClusterError, DataError, InputError, TinyVLMError
from tinyvlm.storage import address

DEFAULT_URL = "http://127.0.0.1:8000"


def main(argv: list[str] | None = None) -> int:
    """Run one command; expected failures become one sentence and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments[:1] == ["demo"]:
            return _demo(arguments[1:])
        if arguments[:1] == ["labels"]:
            from tinyvlm.labels import command as labels

            return labels.main(arguments[1:])
        options = _parser().parse_args(arguments)
        command: int = options.run(options)
        return command
    except TinyVLMError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from tinyvlm.bench import encode, ingest, plan, train
    from tinyvlm.data.commands import add_data_commands

    parser = argparse.ArgumentParser(prog="tinyvlm", description="Make and serve a small vision-language model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("demo", help="the whole line on this machine, from links to a served answer")
    commands.add_parser("labels", help="list, check and grow the label files of the explore stage")

    ask = commands.add_parser("ask", help="ask a running endpoint about pictures")
    ask.add_argument("question")
    ask.add_argument("--picture", type=Path, action="append", default=[], help="a picture file; may be repeated")
    ask.add_argument("--url", default=DEFAULT_URL)
    ask.add_argument("--model", default="tinyvlm")
    ask.set_defaults(run=_ask)

    verify = commands.add_parser("verify", help="check a stage folder against its checksums")
    verify.add_argument("folder", type=address)
    told = "remove damaged files and the manifest, so that the same command does those parts again"
    verify.add_argument("--discard", action="store_true", help=told)
    verify.set_defaults(run=_verify)

    clean = commands.add_parser("clean", help="remove what a finished stage folder does not need any more")
    clean.add_argument("folder", type=address)
    clean.set_defaults(run=_clean)

    add_data_commands(commands.add_parser("data", help="look at conversations and take them elsewhere"))
    takedown = commands.add_parser("takedown", help="remove pictures, words and features of listed links from folders")
    listed = "a text, CSV or Parquet file: a link, host:NAME or the sha256 of a picture a line"
    takedown.add_argument("list", type=address, metavar="LIST", help=listed)
    told = "a stage folder, or a root that holds some; new runs under that root keep to the list too"
    takedown.add_argument("places", type=address, nargs="+", metavar="ROOT-or-FOLDER", help=told)
    takedown.set_defaults(run=_takedown)

    bench = commands.add_parser("bench", help="measure something, beside others, on this machine")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    ingest.add_arguments(benches.add_parser("ingest", help="from links to finished pictures"))
    plan.add_arguments(benches.add_parser("plan", help="the order of millions of samples: time, memory, fill, reading"))
    encode.add_arguments(benches.add_parser("encode", help="pictures a second through a vision tower"))
    train.add_arguments(benches.add_parser("train", help="the training loop beside transformers' Trainer"))

    recipe = commands.add_parser("recipe", help="print a recipe as JSON, with --set applied")
    recipe.add_argument("name")
    recipe.add_argument("--set", action="append", default=[], metavar="A.B=V")
    recipe.set_defaults(run=_recipe)
    return parser


def _demo(arguments: list[str]) -> int:
    """In a process of its own, because it needs Ray."""
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise ClusterError(
            "The demo wants Ray, which is not installed; run `pip install 'tinyvlm[ray,demo]'`, or `make demo`."
        )
    process = subprocess.Popen([sys.executable, "-m", "ray_jobs.demo", *arguments], env=os.environ)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the child got it too and is putting things away


def _ask(options: argparse.Namespace) -> int:
    from tinyvlm.serve.client import ask

    pictures = []
    for path in options.picture:
        if not path.is_file():
            raise InputError(f"There is no picture file {path}.")
        pictures.append(path.read_bytes())
    sys.stdout.write(ask(options.url, options.question, pictures, model=options.model) + "\n")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from tinyvlm.upkeep import discard_damaged, verify

    problems = verify(options.folder)
    if problems:
        remedy = "add --discard, then run the stage's command again"
        if options.discard:
            remedy = f"removed {len(discard_damaged(options.folder))}; now run the stage's command again"
        raise DataError(f"{options.folder} differs from its manifest: {'; '.join(problems)}; {remedy}.")
    sys.stdout.write(f"{options.folder}: every file matches its manifest.\n")
    return 0


def _clean(options: argparse.Namespace) -> int:
    from tinyvlm.upkeep import clean

    left = clean(options.folder)
    sys.stdout.write(f"{options.folder}: removed {len(left)} of its files, none of them named by the manifest.\n")
    return 0


def _takedown(options: argparse.Namespace) -> int:
    from tinyvlm.removal import take_down
    from tinyvlm.takedown import read_list

    done = take_down(read_list(options.list), options.places)
    for item in done:
        if not item.in_use:
            said = f"{item.num_rows} {'row' if item.num_rows == 1 else 'rows'} taken down"
            more = "; trained on rows that are taken down: its weights are not changed" if item.trained_on else ""
            sys.stdout.write(f"{item.folder}: {said}{more}\n")
    sys.stdout.write(f"{sum(item.num_rows for item in done)} rows taken down in {len(done)} folders.\n")
    in_use = [item.in_use for item in done if item.in_use]
    if in_use:
        raise DataError(f"{' '.join(in_use)} The list is noted: what works there keeps to it; then run this again.")
    return 0


def _recipe(options: argparse.Namespace) -> int:
    import json

    from tinyvlm import config, recipes

    sys.stdout.write(json.dumps(config.to_dict(recipes.load(options.name, options.set)), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
