"""Values written where a part of another one lay that nobody reads any more.

A value that is cut into parts stays in memory until the last of them has been read. Queries, keys and values are such
parts of one product: what attention gives can lie where the queries lay, and its heads are beside each other then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_gpu.choice import Choice
from infera_gpu.layout import Operand, views_of
from infera_gpu.spec import TensorSpec
from infera_gpu.specialize import Segment


class Lying:
    """What lies in each block of memory, and until which node it is read."""

    def __init__(self, segment: Segment, choices: Sequence[Choice]) -> None:
        self._nodes, self._choices, self._kept = segment.nodes, choices, frozenset(segment.outputs)
        self._readers: dict[str, list[int]] = {}
        for i, p in enumerate(segment.nodes):
            for v in p.site.node.inputs:
                self._readers.setdefault(v, []).append(i)
        self._values: dict[str, list[tuple[Operand, int]]] = {}

    def add(self, operand: Operand, last: int) -> None:
        """A value lies there from now on, which node `last` is the last to read."""
        self._values.setdefault(operand.root, []).append((operand, last))

    def free(self, index: int, root: str, name: str, spec: TensorSpec, over: Operand | None) -> Operand | None:
        """Where in the block node `index` may write its output `name`.

        No value that is read there by then or later shares an element with the window, but for the input `over` that
        the node may overwrite; and all readers of `name` read it there.
        """
        lying = self._values.get(root, ())
        if name in self._kept or len(lying) < 2:
            return None
        for window, last in lying:
            mine = (over,) if window == over else ()
            if (
                (last < index or window == over)
                and (window.shape, window.dtype) == (spec.dims, spec.dtype)
                and all(s > 0 for d, s in zip(window.shape, window.strides, strict=True) if d > 1)
                and not any(overlap(window, o) for o, end in lying if end > index or (end == index and o not in mine))
                and self._is_read_at(name, window)
            ):
                return window
        return None

    def _is_read_at(self, value: str, operand: Operand) -> bool:
        """Whether everybody who reads the value, or a view of it, reads it where it lies."""
        return value not in self._kept and all(self._reads(i, operand) for i in self._readers.get(value, ()))

    def _reads(self, i: int, operand: Operand) -> bool:
        op, site, (_, space, kernel) = self._nodes[i].op, self._nodes[i].site, self._choices[i]
        view = op.view
        if view is None:
            return space == operand.space and (kernel is None or kernel.strided)
        made = views_of(operand, lambda x: view(x, site))
        names = site.node.outputs
        return made is not None and all(self._is_read_at(n, o) for n, o in zip(names, made, strict=False))


WORK = 10_000
"""Candidates that are tried to tell whether windows overlap; real ones need a few hundred."""


def overlap(a: Operand, b: Operand) -> bool:
    """Whether two windows into one block share an element, or it is too hard to tell that they do not."""
    (low_a, high_a), (low_b, high_b) = a.bounds(), b.bounds()
    low, high = min(low_a, low_b), max(high_a, high_b)
    block = as_strided(np.empty(1, np.uint8), (high - low,), (1,))
    x, y = (np.ndarray(o.shape, f"V{o.dtype.itemsize}", block, o.offset - low, o.strides) for o in (a, b))
    try:
        return np.shares_memory(x, y, WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
