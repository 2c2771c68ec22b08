"""Garbage collection while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal


@contextmanager
def uncollected() -> Iterator[None]:
    """Puts garbage collection off, in the whole process.

    Models and plans are many small objects that stay: looking through all of them again and again, and through what
    else the process has, finds nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def settle(after: Literal["load", "plan", "bind"]) -> None:
    """Once a process after each, while collection is off: what there is counts as old from now on.

    The next collection would look at everything that the first load made, or the first plan, or what was bound first,
    which takes a small model as long as some passes do. Not later: it also puts off the next full collection, and
    whoever loads and drops models in a loop needs those. A process that has frozen objects, to fork, keeps them frozen.
    """
    if not gc.isenabled() and not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()  # into the oldest generation
