"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from infera_gpu.printable import printable


def print_error(message: str) -> None:
    """One line on stderr, however the message was wrapped."""
    line = printable(" ".join(message.split()))
    colour = sys.stderr.isatty()
    print(f"\x1b[1;31merror:\x1b[0m {line}" if colour else f"error: {line}", file=sys.stderr)


def note(message: str) -> None:
    """A remark of one line on stderr."""
    print(printable(message), file=sys.stderr)


def say(line: str) -> None:
    """A line on stdout with names in it, which a model may have written anything into."""
    print(printable(line))


Progress: TypeAlias = Callable[[int, int | None], None]
"""To be told the bytes done, and those in all or None."""


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time; nothing where stderr is no terminal."""
    with _spinning(what):
        yield


@contextmanager
def downloading(what: str) -> Iterator[Progress]:
    """A spinner with a bar of bytes, from before the first byte on: pip and a slow server let one wait."""
    with _spinning(what, bytes_too=True) as progress:
        yield progress


@contextmanager
def advancing(what: str) -> Iterator[Callable[[str, float], None]]:
    """A bar that is told what goes on, and how much of all is done, from 0 to 1."""
    with _spinning(what, bar=True) as progress:
        yield lambda now, done: progress(round(1000 * done), 1000, now)


@contextmanager
def _spinning(what: str, *, bytes_too: bool = False, bar: bool = False) -> Iterator[Callable[..., None]]:
    if not sys.stderr.isatty():
        yield lambda done, total, now="": None
        return
    from rich import progress as rich
    from rich.console import Console
    from rich.markup import escape

    columns: list[rich.ProgressColumn] = [rich.SpinnerColumn(), rich.TextColumn("{task.description}")]
    if bytes_too:
        columns += [rich.BarColumn(), rich.DownloadColumn(), rich.TransferSpeedColumn()]
    if bar:
        columns += [rich.BarColumn(), rich.TimeElapsedColumn()]
    # Not rich's Status: that draws from a thread only, which a parser holding the interpreter lock keeps waiting.
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(escape(what), total=None)

        def show(done: int, total: int | None, now: str = "") -> None:
            bars.update(task, completed=done, total=total, description=escape(now or what))

        yield show


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", right: Sequence[str] = ()) -> None:
    """Print a table to stdout; the columns named in `right` are aligned right. Cells are text, not
    markup, whose control characters are shown."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: do not fold what a program may read
    if title:
        print(title)
    console.print(shown)
