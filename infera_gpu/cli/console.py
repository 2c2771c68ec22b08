"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID


def print_error(message: str) -> None:
    """One line on stderr, however the message was wrapped."""
    line = " ".join(message.split())
    colour = sys.stderr.isatty()
    print(f"\x1b[1;31merror:\x1b[0m {line}" if colour else f"error: {line}", file=sys.stderr)


def note(message: str) -> None:
    """A remark on stderr."""
    print(message, file=sys.stderr)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", right: Sequence[str] = ()) -> None:
    """Print a table to stdout; the columns named in `right` are aligned right. Cells are text, not markup."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: do not fold what a program may read
    if title:
        print(title)
    console.print(shown)


@contextmanager
def downloading(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A function to be told (bytes done, bytes in all or None), which shows a bar once something is downloaded."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: list[TaskID] = []

        def progress(done: int, total: int | None) -> None:
            if not tasks:
                tasks.append(bars.add_task(what))
            bars.update(tasks[0], completed=done, total=total)

        yield progress
