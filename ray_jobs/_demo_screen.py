"""What a person sees while the demo runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_jobs._local_cluster import MemoryMeter

GIB = 1024**3


class Screen:
    """Rows of stages with their state, time and last word.  Use as a context manager."""

    def __init__(self, stages: tuple[str, ...]) -> None:
        self.console = Console(highlight=False)
        self.states = {stage: ("waiting", 0.0, "") for stage in stages}
        self.current, self.began, self.root = "", 0.0, Path()
        self.memory = ""
        self._live = Live(self._table(), console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim")

    def begin(self, stage: str, root: Path) -> None:
        self.current, self.began, self.root = stage, time.monotonic(), root
        self.states[stage] = ("running", 0.0, "submitted")
        if self.console.is_terminal:
            self._live.update(self._table())
        else:
            self.console.print(f"{stage} …")

    def tick(self, meter: MemoryMeter) -> None:
        """Called while a stage runs."""
        word = last_word(self.root, self.current) or self.states[self.current][2]
        self.states[self.current] = ("running", time.monotonic() - self.began, word)
        self.memory = f"memory now {meter.now_bytes / GIB:.1f} GiB, peak {meter.peak_bytes / GIB:.1f} GiB"
        self._live.update(self._table())

    def end(self, stage: str, seconds: float, *, finished_before: bool) -> None:
        word = "finished before" if finished_before else last_word(self.root, stage)
        self.states[stage] = ("done", seconds, word)
        if self.console.is_terminal:
            self._live.update(self._table())
        else:
            self.console.print(f"{stage} done in {seconds:.0f} s  {word}")

    def close(self, summary: dict[str, Any], asked: list[dict[str, str]], root: Path, url: str) -> None:
        """The five answers and the one summary table."""
        self._live.stop()
        self.console.print(self._table())
        for item in asked:
            mark = "✓" if item["answer"] == item["truth"] else "✗"
            self.console.print(f"  {mark} {item['question']}  →  {item['answer']}   (truth: {item['truth']})")
        table = Table(title="Summary", show_header=False, title_justify="left")
        for name, value in summary_rows(summary):
            table.add_row(name, value)
        self.console.print(table)
        self.console.print(f"report  {root / 'report.html'}\nsummary {root / 'summary.json'}\npage    {url}")

    def _table(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
        # Of a narrow terminal the last words get what is left.
        for column, width in (("stage", 10), ("", 1), ("time", 5)):
            table.add_column(column, justify="right" if column == "time" else "left", no_wrap=True, width=width)
        table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
        styles = {"waiting": "dim", "running": "bold cyan", "done": "green"}
        marks = {"waiting": "·", "running": "▶", "done": "✓"}
        for stage, (state, seconds, word) in self.states.items():
            clock = f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if state != "waiting" else ""
            table.add_row(Text(stage, styles[state]), marks[state], clock, Text(word, "dim"))
        return Group(table, Text(self.memory, "dim"))


def last_word(root: Path, stage: str) -> str:
    """The newest progress line of a stage, from the progress.json in its folder."""
    files = sorted(root.glob(f"{stage}-*/progress.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return ""
    try:
        return str(json.loads(files[-1].read_text()).get("text", ""))
    except (json.JSONDecodeError, OSError):
        return ""


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as label and text, for the terminal and the report."""
    by_type = "  ".join(f"{name} {value:.1%}" for name, value in summary["accuracy_by_answer_type"].items())
    chance = "  ".join(f"{name} {value:.1%}" for name, value in summary["chance"].items())
    bleu = "  ".join(f"BLEU-{n} {summary[f'bleu_{n}']:.3f}" for n in (1, 2, 3, 4))
    slowest = sorted(summary["minutes_by_stage"].items(), key=lambda item: -item[1])
    return [
        ("accuracy", f"{summary['accuracy']:.2%} of {summary['num_questions']:,} test questions"),
        ("by answer type", by_type),
        ("chance lines", chance),
        ("pictures shuffled", f"{summary['accuracy_shuffled']:.2%}"),
        ("captions", bleu),
        ("minutes", f"{summary['minutes']:.1f}   " + "  ".join(f"{name} {value:.1f}" for name, value in slowest)),
        ("peak memory", f"{summary['peak_memory_gib']:.1f} GiB, everything together"),
        ("links", "  ".join(f"{name} {count:,}" for name, count in summary["download_statuses"].items())),
    ]
