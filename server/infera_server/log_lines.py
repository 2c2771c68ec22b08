"""What is logged: a message is one line, whatever values are in it; only a traceback has more, which are indented."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import TypeAlias

from infera_gpu.printable import printable

ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def one_line(text: str) -> str:
    """The text with control characters as Python writes them; what ends it is left out."""
    return printable(text.rstrip())


class LineFormatter(logging.Formatter):
    """A value that a client sent cannot begin a line that looks like another message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, ei: ExcInfo) -> str:
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(f"  {one_line(line)}" for line in text.split("\n"))
