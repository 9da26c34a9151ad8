"""`tinyvlm labels …`: list, check and grow label files."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from tinyvlm.errors import ClusterError, ConfigError, DataError
from tinyvlm.folders import write_atomic
from tinyvlm.labels import load_labels, packaged, path_of
from tinyvlm.labels.grow import Growth, read_list, to_text
from tinyvlm.labels.rules import key_of, review

NUM_ASKED = 20
"""Labels that an endpoint is asked for unless --count says another number."""


def main(arguments: list[str]) -> int:
    """Run one `tinyvlm labels` command.

    Raises:
        TinyVLMError: as a sentence for the user.
    """
    options = _parser().parse_args(arguments)
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tinyvlm labels", description="The label files of the explore stage.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the packaged files, a file's categories, or a category's labels")
    listing.add_argument("file", nargs="?", help=f"a path, or one of {', '.join(packaged())}")
    listing.add_argument("--category")
    listing.set_defaults(run=_list)

    check = commands.add_parser("check", help="find doubled, undescribed and overlong labels")
    check.add_argument("file")
    check.set_defaults(run=_check)

    expand = commands.add_parser("expand", help="grow a category, or begin a new one")
    expand.add_argument("--file", required=True, help="the label file: a path, or a packaged name with --output")
    expand.add_argument("--category", required=True)
    expand.add_argument("--count", type=int, help=f"new labels at most; {NUM_ASKED} from --url, all of --from")
    source = expand.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="an OpenAI-compatible base address, such as http://127.0.0.1:8000/v1")
    source.add_argument("--from", dest="list", type=Path, help='lines "name: description", or a .json file')
    expand.add_argument("--model", help="which of the endpoint's models is asked")
    expand.add_argument("--key-env", default="OPENAI_API_KEY", help="the variable that holds the endpoint's key")
    expand.add_argument("--timeout", type=float, default=120.0, help="seconds for one answer")
    expand.add_argument("--output", type=Path, help="where the grown file goes; over --file otherwise")
    expand.set_defaults(run=_expand)
    return parser


def _list(options: argparse.Namespace) -> int:
    if options.file is None:
        for name in packaged():
            file = load_labels(name)
            _say(f"{name}\tversion {file.version}\t{len(file.labels)} labels\t{file.content.get('about', '')}")
        return 0
    labels = load_labels(options.file).labels
    if options.category is None:
        for category, number in Counter(label.category for label in labels).items():
            _say(f"{category}\t{number}")
        return 0
    chosen = [label for label in labels if key_of(label.category) == key_of(options.category)]
    if not chosen:
        known = ", ".join(dict.fromkeys(label.category for label in labels))
        raise ConfigError(f"{options.file} has no category {options.category!r}; it has {known}.")
    for label in chosen:
        _say(f"{label.name}: {label.description}")
    return 0


def _check(options: argparse.Namespace) -> int:
    file = load_labels(options.file)
    wrong, better = review(file)
    for sentence in better:
        _say(f"note: {sentence}")
    for sentence in wrong:
        _say(f"wrong: {sentence}")
    if wrong:
        raise DataError(f"{options.file} has {len(wrong)} labels that are doubled or too long.")
    categories = len({label.category for label in file.labels})
    _say(f"{options.file}, version {file.version}: {len(file.labels)} labels in {categories} categories are in order.")
    return 0


def _expand(options: argparse.Namespace) -> int:
    if options.output is None and options.file in packaged():
        raise ConfigError(f"{options.file!r} is a packaged file; say with --output where the grown one goes.")
    if options.count is not None and options.count < 1:
        raise ConfigError(f"--count is {options.count}; it must be at least 1.")
    file = load_labels(options.file)
    if options.url is not None:
        growth = Growth(file, options.category, options.count or NUM_ASKED)
        source = _ask(options, growth)
    else:
        growth = Growth(file, options.category, options.count)
        growth.offer(read_list(options.list, options.category))
        source = f"list {options.list.name}"
    for name, why in growth.dropped.items():
        _say(f"dropped  {name!r}: {why}")
    for name, description in sorted(growth.added.items()):
        _say(f"added    {name}: {description}")
    return _write(options, growth, source)


def _ask(options: argparse.Namespace, growth: Growth) -> str:
    from tinyvlm.endpoint import Endpoint
    from tinyvlm.labels.endpoint import ask_for_labels

    if options.model is None:
        raise ConfigError("--url wants --model: which of the endpoint's models is asked.")
    if not options.timeout > 0:
        raise ConfigError(f"--timeout is {options.timeout:g}; it must be more than 0 seconds.")
    key = os.environ.get(options.key_env, "").strip() or None
    endpoint = Endpoint(url=options.url, model=options.model, key=key, timeout_s=options.timeout)
    try:
        ask_for_labels(endpoint, growth, _log)
    except (ClusterError, DataError) as error:
        if not growth.added:
            raise
        _log(f"stopped early, what came before is kept: {error}")
    return f"model {options.model} at {options.url}"


def _write(options: argparse.Namespace, growth: Growth, source: str) -> int:
    kind = "new category" if growth.is_new else "category"
    if not growth.added:
        _say(f"Nothing new for the {kind} {growth.category!r}: no file was written.")
        return 0
    content, path = growth.next_version(source), options.output or path_of(options.file)
    try:
        write_atomic(path, to_text(content))
    except OSError as error:
        raise DataError(f"The grown file cannot be written to {path} ({error}); give another --output.") from None
    fewer = f" ({growth.missing} fewer than asked for)" if growth.missing else ""
    _say(
        f"{path}, version {content['version']}: {len(growth.added)} labels added to the {kind} "
        f"{growth.category!r}{fewer}, which has {len(content['categories'][growth.category])} now."
    )
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
