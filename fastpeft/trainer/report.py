"""What a run says while it works: few lines, bars for what takes long, and only from the first rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Reporter:
    """Lines and progress bars; silent on ranks other than the first.

    Bars are drawn on terminals only. A log file gets the lines, which say everything that matters.
    """

    def __init__(self, enabled: bool) -> None:
        self._console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._errors = Console(quiet=not enabled, highlight=False, soft_wrap=True, stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            transient=True,
            disable=not (enabled and self._console.is_terminal),
        )

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(escape(text))

    def warn(self, text: str) -> None:
        """Print a line to the error stream."""
        self._errors.print(f"[yellow]warning:[/] {escape(text)}")

    def table(self, rows: dict[str, str], title: str) -> None:
        """Print names and values."""
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, escape(value))
        self._console.print(table)

    @contextlib.contextmanager
    def bar(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A progress bar for the length of a block; yields the function that advances it."""
        task = self._progress.add_task(description, total=total, completed=done)
        if len(self._progress.tasks) == 1:
            self._progress.start()
        try:
            yield lambda amount: self._progress.advance(task, amount)
        finally:
            self._progress.remove_task(task)
            if not self._progress.tasks:
                self._progress.stop()
