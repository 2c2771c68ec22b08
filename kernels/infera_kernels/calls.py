"""What a kernel is bound to and what binding returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A numpy.ndarray or a cupy.ndarray."""

Call: TypeAlias = tuple[Callable[..., object], tuple[Any, ...]]
"""`fn(*args)` with everything decided: a bound kernel is a list of these, run in order, allocating nothing."""


class Scratch(Protocol):
    """Gives uninitialised, contiguous temporaries that live while one kernel runs."""

    def __call__(self, shape: Sequence[int], dtype: Any = ...) -> Array: ...


class Pack(Protocol):
    """`build(weights)`, made once and kept: what a kernel derives from weights that never change."""

    def __call__(self, tag: str, build: Callable[[Any], Any]) -> Array: ...


LEAST_NS = 90_000.0
"""Nanoseconds of work below which a part is not worth a thread of its own. Chosen by whole models, on the EPYC of
bench/results. Where it takes longer to wake a thread, as on the Xeon there, models of many small steps take longer with
two threads than with one, and more work would be asked for."""


class Split(NamedTuple):
    """Into how many parts a kernel may split its work, and how the calls of the parts become one list."""

    threads: int
    parallel: Callable[[Sequence[Iterable[Call]]], list[Call]]
    """Makes the calls of every part, at most `threads` parts at a time, and goes on when all are done.

    Parts must not touch each other's outputs or scratch. Their scratch has been asked for by now: while planning
    nobody looks at their calls, which may be made one by one.
    """

    least_ns: float = LEAST_NS
    """Nanoseconds of work below which a part is not worth what it costs to hand it over."""


def one_after_the_other(parts: Sequence[Iterable[Call]]) -> list[Call]:
    """The calls of every part in turn."""
    return list(chain.from_iterable(parts))


SERIAL = Split(1, one_after_the_other)
"""All work in one part."""


def maximum(a: Array, b: Array, out: Array) -> Call:
    """np.maximum into `out`, which NumPy takes by keyword only."""
    return (partial(np.maximum, out=out), (a, b))


def minimum(a: Array, b: Array, out: Array) -> Call:
    """np.minimum into `out`, which NumPy takes by keyword only."""
    return (partial(np.minimum, out=out), (a, b))
