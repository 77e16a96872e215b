"""What a person sees in a terminal or a log: progress per stage while a run lasts, and tables."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kr_ray.runs.results import Result

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from kr_ray.runs.progress import StageProgress

CELL_FRAME = 3
"""Columns of the screen that a cell's frame takes: a line and a blank
on either side, shared with the neighbour."""


def plain_console() -> Console:
    """A console that shows text as it is: in a path or an error,
    brackets are no markup and `:key:` is no emoji."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


class Display:
    """Progress per stage: bars in a terminal, a line now and then in a log."""

    LOG_EVERY_S, LOG_AT_MOST_EVERY_S = 15.0, 300.0
    """A log's lines come the rarer, the longer the stage: a tenth of
    the time it has taken, within these bounds."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        self.console = plain_console()
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description:<21}", markup=False), BarColumn(16),
            TextColumn("{task.percentage:>3.0f}%", markup=False), TimeElapsedColumn(),
            # wraps in what room is left
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1)),
            console=self.console, disable=not self.live, expand=True,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.started = self.logged = 0.0

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def stage_started(self, stage: str) -> None:
        self.tasks[stage] = self.progress.add_task(stage, total=1.0, note="")
        if not self.live:
            self.console.print(f"{stage}: started")
            self.started = self.logged = time.monotonic()

    def stage_progress(self, stage: str, progress: StageProgress) -> None:
        note = progress.describe()
        self.progress.update(self.tasks[stage], completed=progress.share, note=note)
        now = time.monotonic()
        pause = min(max(self.LOG_EVERY_S, (now - self.started) / 10), self.LOG_AT_MOST_EVERY_S)
        if not self.live and progress.share and now - self.logged > pause:
            self.logged = now
            self.console.print(f"{stage}: {progress.share:.0%} {note}", soft_wrap=True)

    def notice(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def stage_finished(self, stage: str, result: Result, skipped: bool) -> None:
        note = result.headline()
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=1.0, note=note)
        self.progress.update(self.tasks[stage], completed=1.0, note=note)
        self.progress.stop_task(self.tasks[stage])
        if not self.live:
            took = "finished before" if skipped else f"{result.wall_s:.1f} s"
            self.console.print(f"{stage}: done ({took}) {note}", soft_wrap=True)


@dataclass
class Grid:
    """A table of plain text for a terminal, a pipe or a log, in which no figure is ever cut: where a row does
    not fit, its cells stand under each other."""

    title: str
    headings: Sequence[str]
    note: str = ""
    """Below the rows."""
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Raises ValueError for another number of cells than headings."""
        if len(cells) != len(self.headings):
            raise ValueError(
                f"`len(cells) == len(headings)` must hold, but got {len(cells)} and "
                f"{len(self.headings)}; give one per heading"
            )
        self.rows.append(cells)

    def width(self) -> int:
        """Columns of the screen that the framed table needs with every line of every cell whole."""
        columns = zip(self.headings, *self.rows, strict=True)
        return 1 + sum(CELL_FRAME + max(_columns(cell) for cell in column) for column in columns)

    def print(self, console: Console | None = None) -> None:
        """As a framed table where the console is wide enough, else stacked."""
        console = console or plain_console()
        self._print_table(console) if self.width() <= console.width else self._print_stacked(console)
        if self.note:
            console.print(self.note)

    def _print_table(self, console: Console) -> None:
        from rich.table import Column, Table
        from rich.text import Text

        table = Table(
            *(Column(Text(heading), no_wrap=True) for heading in self.headings), title=Text(self.title)
        )
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)

    def _print_stacked(self, console: Console) -> None:
        """The first cell as a heading, the others below it with their names;
        long text wraps at words, and no word is cut."""
        from rich.text import Text

        name_width = max((_columns(heading) for heading in self.headings[1:]), default=0)
        console.print(Text(self.title, style="bold"), soft_wrap=True)
        for first, *others in self.rows:
            console.print(Text(first, style="bold"), soft_wrap=True)
            for heading, cell in zip(self.headings[1:], others, strict=True):
                for number, line in enumerate(cell.splitlines()):
                    shown = _indented(heading if number == 0 else "", line, name_width, console.width)
                    console.print(Text(shown), soft_wrap=True)


def _columns(text: str) -> int:
    """Of the widest line; East Asian characters take two."""
    from rich.cells import cell_len

    return max((cell_len(line) for line in text.splitlines()), default=0)


def _indented(name: str, line: str, name_width: int, width: int) -> str:
    """`  name   line`, further lines below the first one's start."""
    from rich.cells import cell_len

    start = "  " + name + " " * (name_width - cell_len(name) + 2)
    room = max(width - name_width - 4, 20)
    parts = textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) or [""]
    return ("\n" + " " * (name_width + 4)).join([start + parts[0], *parts[1:]])
