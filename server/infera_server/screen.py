"""Where `infera serve` reports: panels and a progress bar on a terminal, plain lines into a file or a pipe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from infera_server.log_lines import LineFormatter, one_line
from infera_server.models.repository import Entry
from infera_server.report import lines, panel
from infera_server.settings import Settings


class Screen(Protocol):
    """Reports what is loaded. A reader that has left is no error: the server serves on."""

    def handler(self) -> logging.Handler: ...
    def settled(self, entry: Entry, settings: Settings) -> None: ...
    def serving(self, text: str) -> None: ...


class Plain:
    """One line for each fact, never wrapped."""

    def handler(self) -> logging.Handler:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
        return handler

    def settled(self, entry: Entry, settings: Settings) -> None:
        for line in lines(entry, settings):
            self.serving(line)

    def serving(self, text: str) -> None:
        with suppress(OSError):
            print(one_line(text), file=sys.stderr, flush=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Be silent from now on. (Rich would end the process.)"""
        self.quiet = True


class Terminal:
    """Panels, with a progress bar below them until everything is loaded."""

    def __init__(self, total: int) -> None:
        self._console = _Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("loading {task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self._console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task(f"{total} model{'s' if total > 1 else ''}", total=total)
        self._progress.start()

    def handler(self) -> logging.Handler:
        handler = RichHandler(console=self._console, show_path=False, markup=False)
        handler.setFormatter(LineFormatter("%(message)s"))
        return handler

    def settled(self, entry: Entry, settings: Settings) -> None:
        self._progress.print(panel(entry, settings))
        self._progress.advance(self._task)

    def serving(self, text: str) -> None:
        self._progress.stop()
        self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


@contextmanager
def screen(total: int) -> Iterator[Screen]:
    """What to report to, for so many models."""
    if not sys.stderr.isatty():
        plain = Plain()
        plain.serving(f"loading {total} model{'s' if total > 1 else ''}")
        yield plain
        return
    terminal = Terminal(total)
    try:
        yield terminal
    finally:
        terminal.stop()
