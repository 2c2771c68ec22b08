"""Text that shows what it says, and does nothing else to a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""What begins a line somewhere, or moves a terminal's cursor."""


def printable(text: str) -> str:
    """The text on one line, with control characters as Python writes them."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
