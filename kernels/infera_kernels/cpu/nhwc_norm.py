"""Normalisation over neighbouring channels on NumPy, channels last: a block of pixels at a time, in cache."""

from __future__ import annotations

import numpy as np

from infera_kernels.calls import Array, Call, Scratch, Split
from infera_kernels.cpu.elementwise import const
from infera_kernels.cpu.nhwc_rows import in_parts, longest, spans
from infera_kernels.portable.norm import neighbours

BLOCK_BYTES = 1 << 17
"""Squares of one block, which are read once a neighbour."""


def local_response(
    x: Array, y: Array, scratch: Scratch, split: Split, *, size: int, alpha: float, beta: float, bias: float
) -> list[Call]:
    """y = x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta, (..., C); contiguous.

    Squares lie with zeros between the pixels, as many as a pixel has neighbours outside: then a sum over neighbours is
    a sum of shifted vectors that know no pixels.
    """
    channels = x.shape[-1]
    shifts = neighbours(size, channels)
    width, taps = channels + len(shifts) - 1, len(shifts)
    source, target = x.reshape(-1, channels, copy=False), y.reshape(-1, channels, copy=False)
    most = BLOCK_BYTES // (width * x.itemsize)

    def part(start: int, stop: int) -> list[Call]:
        room = longest(start, stop, most) * width
        squares, sums = scratch((room,), x.dtype), scratch((room,), x.dtype)
        calls: list[Call] = [(np.copyto, (squares, const(0, x))), (np.copyto, (sums, const(0, x)))]
        for low, high in spans(start, stop, most):
            span = (high - low) * width
            count = span - taps + 1
            whole = sums[:count]
            inner = squares[:span].reshape(-1, width)[:, -shifts[0] : channels - shifts[0]]
            calls.append((np.multiply, (source[low:high], source[low:high], inner)))
            calls.append((np.copyto, (whole, squares[:count])))
            calls += [(np.add, (whole, squares[k : k + count], whole)) for k in range(1, taps)]
            calls += [(np.multiply, (whole, const(alpha / size, x), whole)), (np.add, (whole, const(bias, x), whole))]
            calls.append((np.power, (whole, const(-beta, x), whole)))
            factors = sums[:span].reshape(-1, width)[:, :channels]
            calls.append((np.multiply, (source[low:high], factors, target[low:high])))
        return calls

    return in_parts(len(source), split, part)
