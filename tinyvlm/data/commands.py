"""`tinyvlm data …`: look at conversations and take them elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinyvlm.data import show_command
from tinyvlm.storage import address


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    """The commands of the group; each sets `run`, which takes the options and gives the exit code."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    told = "print conversations as the model sees them, or draw the packs of a training plan"
    show_command.add_arguments(commands.add_parser("show", help=told))

    export = commands.add_parser("export", help="write conversations as CSV, which prepare.source=csv reads back")
    export.add_argument("folder", type=address, help="a folder of prepare, or a root that holds one")
    export.add_argument("output", type=Path, metavar="OUT.csv", help="pictures go into OUT.pictures beside it")
    told = "conversations: everything; published: instruction, inputs, outputs, image_path; seed-vqa: image_id, prompt"
    export.add_argument(
        "--schema", choices=("conversations", "published", "seed-vqa"), default="conversations", help=told
    )
    export.add_argument("--all", action="store_true", help="also rows that cannot be used, with their reason")
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from tinyvlm.data.export import export

    done = export(options.folder, options.output, layout=options.schema, all_rows=options.all)
    sys.stdout.write(f"{options.output}: {done.num_rows:,} conversations, {done.num_pictures:,} new pictures.\n")
    for reason, number in done.left_out.most_common():
        sys.stdout.write(f"left out: {number:,} ({reason})\n")
    return 0
