"""Padding on NumPy: each region of the output is a view of the input, reversed or shifted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from types import MappingProxyType

import numpy as np

from infera_kernels.calls import Array, Call
from infera_kernels.portable.pad import Pads, crop

View = Callable[[int, int], slice]
"""(elements of the axis, padding) -> the elements that fill the padding."""


def _reversed(start: int, count: int) -> slice:
    """`count` elements from `start` downwards."""
    stop = start - count
    return slice(start, stop if stop >= 0 else None, -1)


# mode -> (what lies before the axis, what lies after it, the padding that one period of the axis fills)
_VIEWS: Mapping[str, tuple[View, View, Callable[[int], float]]] = MappingProxyType(
    {
        "edge": (lambda n, p: slice(0, 1), lambda n, p: slice(n - 1, n), lambda n: float("inf") if n else 0),
        "reflect": (lambda n, p: _reversed(p, p), lambda n, p: _reversed(n - 2, p), lambda n: n - 1),
        "wrap": (lambda n, p: slice(n - p, n), lambda n, p: slice(0, p), lambda n: n),
    }
)


def fits(shape: tuple[int, ...], pads: Pads, mode: str) -> bool:
    """Whether `pad` can do this: no side is longer than what one copy of the axis fills."""
    if mode == "constant":
        return True
    limit = _VIEWS[mode][2]
    return all(max(b, a) <= limit(n + min(b, 0) + min(a, 0)) for n, (b, a) in zip(shape, pads, strict=True))


def pad(x: Array, y: Array, pads: Pads, *, mode: str, value: Array) -> list[Call]:
    """y = x padded, any dtype; `x` may be strided and `value` is 0-d. Raises KeyError for an unknown mode."""
    x, pads = crop(x, pads)
    calls: list[Call] = []
    for region in product(*(_regions(n, b, a, mode) for n, (b, a) in zip(x.shape, pads, strict=True))):
        target = y[tuple(where for where, _ in region)]
        views = [view for _, view in region]
        if target.size:
            source = value if None in views else x[tuple(v for v in views if v is not None)]
            calls.append((np.copyto, (target, source)))
    return calls


def _regions(n: int, before: int, after: int, mode: str) -> list[tuple[slice, slice | None]]:
    """Along one axis: (elements of the output, the elements of the input that go there, or None for the constant)."""
    views = (None, None) if mode == "constant" else (_VIEWS[mode][0](n, before), _VIEWS[mode][1](n, after))
    return [
        (slice(before, before + n), slice(None)),
        (slice(0, before), views[0]),
        (slice(before + n, before + n + after), views[1]),
    ]
