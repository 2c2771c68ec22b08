"""Softmax and its logarithm on NumPy, a cache-sized block at a time."""

from __future__ import annotations

import numpy as np

from infera_kernels.calls import SERIAL, Array, Call, Scratch, Split
from infera_kernels.cpu.elementwise import const
from infera_kernels.cpu.norm import row_blocks
from infera_kernels.cpu.parts import parts

ELEMENT_NS = 1.5
"""Nanoseconds an element takes, about."""


def softmax(x: Array, y: Array, scratch: Scratch, split: Split = SERIAL, *, log: bool = False) -> list[Call]:
    """y = softmax(x), or its logarithm, along the middle axis of (outer, axis, inner); `y` may be `x`."""
    cuts = parts(x.shape[0], x.size * ELEMENT_NS, split)
    return split.parallel([_rows(x[cut], y[cut], scratch, log) for cut in cuts])


def _rows(x: Array, y: Array, scratch: Scratch, log: bool) -> list[Call]:
    outer, length, inner = x.shape
    plane = length * inner * x.itemsize
    spans = list(row_blocks(slice(0, outer), plane))
    rows = spans[0].stop if spans else 0
    top, total = scratch((rows, 1, inner), x.dtype), scratch((rows, 1, inner), x.dtype)
    powers = scratch((rows, length, inner), x.dtype) if log else None
    ones = scratch((length,), x.dtype) if inner == 1 else None
    calls: list[Call] = [] if ones is None else [(np.copyto, (ones, const(1, x)))]
    for span in spans:
        count = span.stop - span.start
        source, target, high, sums = x[span], y[span], top[:count], total[:count]
        raised = target if powers is None else powers[:count]
        calls += [
            (np.maximum.reduce, (source, 1, None, high, True)),
            (np.subtract, (source, high, target)),
            (np.exp, (target, raised)),
        ]
        if ones is None:
            calls.append((np.add.reduce, (raised, 1, None, sums, True)))
        else:
            calls.append((np.matmul, (raised[:, :, 0], ones, sums[:, 0, 0])))
        if log:
            calls += [(np.log, (sums, sums)), (np.subtract, (target, sums, target))]
        else:
            calls += [(np.true_divide, (const(1, x), sums, sums)), (np.multiply, (target, sums, target))]
    return calls
