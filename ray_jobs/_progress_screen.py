"""The live table of a running stage, where a person sits at a terminal; elsewhere nothing."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ray_jobs._progress import Progress

REFRESHES_PER_S = 2


@contextlib.contextmanager
def live_table(progress: Progress) -> Iterator[bool]:
    """Shows `progress` until the end of the context, where stderr is a terminal; tells whether it does.

    Lines that are logged meanwhile appear above the table.
    """
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty() or not console.is_terminal or console.is_dumb_terminal:  # FORCE_COLOR makes no terminal
        yield False
        return
    before = sys.stderr
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is before
    ]
    live = Live(
        console=console,
        get_renderable=lambda: table(progress),
        refresh_per_second=REFRESHES_PER_S,
        transient=True,
        redirect_stdout=False,
    )
    with live:
        for handler in handlers:
            handler.setStream(sys.stderr)  # rich's, which writes above the table
        try:
            yield True
        finally:
            for handler in handlers:
                handler.setStream(before)


def table(progress: Progress) -> Group:
    """A bar, and below it the words of the plain line."""
    head, *rest = progress.words()
    bar = Table.grid(padding=(0, 1))
    share = progress.rows_done / max(1, progress.num_rows)
    bar.add_row(
        Text(progress.stage, "bold cyan"),
        ProgressBar(total=max(1, progress.num_rows), completed=progress.rows_done, width=32),
        Text(f"{share:.0%}"),
        Text(head, "dim"),
    )
    return Group(bar, Text(" · ".join(rest), "dim"))
