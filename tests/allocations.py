"""What a run allocates."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

RUNS = 3


def transient(run: Callable[[], object]) -> int:
    """The most bytes that a warm run has in use above what it started with.

    What other threads of the process allocate meanwhile is counted too, but they do not do it in every run: of several
    the least is given.
    """
    tracemalloc.start()
    try:
        run()
        return min(_peak(run) for _ in range(RUNS))
    finally:
        tracemalloc.stop()


def _peak(run: Callable[[], object]) -> int:
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    run()
    return tracemalloc.get_traced_memory()[1] - before
