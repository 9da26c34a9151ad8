"""`tinyvlm data …`: look at conversations and take them elsewhere."""

from __future__ import annotations

import argparse

from tinyvlm.data import show_command


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    """The commands of the group; each sets `run`, which takes the options and gives the exit code."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    told = "print conversations as the model sees them, or draw the packs of a training plan"
    show_command.add_arguments(commands.add_parser("show", help=told))
