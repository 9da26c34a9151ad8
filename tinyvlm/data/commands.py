"""`tinyvlm data …`: look at conversations before anything is trained on them."""

from __future__ import annotations

import argparse
from typing import Any

from tinyvlm.data import show_command


def add_data_commands(commands: Any) -> None:
    """The group `data`, to the commands of `tinyvlm`."""
    data = commands.add_parser("data", help="look at what the model is trained on")
    kinds: Any = data.add_subparsers(required=True, metavar="WHAT")
    show: argparse.ArgumentParser = kinds.add_parser(
        "show", help="conversations token by token, or the packs of a training plan"
    )
    show_command.add_arguments(show)
