"""Linear quantisation, and exact products of 8-bit matrices by float32 BLAS.

NumPy multiplies integer matrices without BLAS. Products of 8-bit integers are exact in float32 as long as no partial
sum passes 2**24, whatever the order of summation; so the sums run over ranges of K for which that is proven, from the
constant matrix's own values where there is one, and the ranges are added up in int32. Constant 8-bit weights of
transformers mostly need a single range: the cost is that of the float32 product, less what narrow weights save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.blas import reads_as_it_lies
from infera_kernels.cpu.elementwise import BLOCK, blocks, call, const, copy, copy_where, cut, limit
from infera_kernels.cpu.matmul import FEW_ROWS, MOST_IN_RANGES, UNPACKED, in_ranges, matmul

EXACT = 2**24
"""Integers up to this size are float32s, and so are their sums up to it."""


def as_float(x: Array | None, scratch: Scratch) -> tuple[Array | None, list[Call]]:
    """A zero point as float32."""
    if x is None:
        return None, []
    wide = scratch(x.shape, np.float32)
    return wide, [copy(wide, x)]


class _Saturate:
    """Clamps blocks of float32 to an integer type's range and stores them in it, NaN as the lowest."""

    def __init__(self, dtype: np.dtype[Any], size: int, scratch: Scratch, *, above_only: bool = False) -> None:
        info = np.iinfo(dtype)
        self.once: list[Call] = []
        self._limits = []
        bounds = ((np.minimum, info.max),) if above_only else ((np.fmax, info.min), (np.fmin, info.max))
        for ufunc, bound in bounds:
            full, filled = limit(bound, size, np.float32, scratch)
            self._limits.append((ufunc, full))
            self.once += filled

    def calls(self, t: Array, q: Array) -> list[Call]:
        return [*(call(f, t, full[: t.size].reshape(t.shape), t) for f, full in self._limits), copy(q, t)]


def quantize(
    x: Array, scale: Array, zero: Array | None, q: Array, scratch: Scratch, *, above_only: bool = False
) -> list[Call]:
    """q = saturate(round(x / scale) + zero); x float32, scale and `zero` float32, single or broadcasting to x.

    `above_only` promises that no value falls below q's range.
    """
    size = min(q.size, BLOCK)
    t = scratch((size,), np.float32)
    saturate = _Saturate(q.dtype, size, scratch, above_only=above_only)
    calls = saturate.once
    for (src, dst), (factor, shift) in cut([x, q], [scale, zero]):
        part = t[: src.size].reshape(src.shape)
        calls += [call(np.true_divide, src, factor, part), call(np.rint, part, part)]
        if shift is not None:
            calls.append(call(np.add, part, shift, part))
        calls += saturate.calls(part, dst)
    return calls


def dequantize(q: Array, scale: Array, zero: Array | None, x: Array) -> list[Call]:
    """x = (q - zero) scale; x float32, scale and `zero` float32, 0-d or broadcasting to q."""
    calls: list[Call] = []
    for (src, dst), (factor, shift) in cut([q, x], [scale, zero]):
        calls.append(copy(dst, src))
        if shift is not None:
            calls.append(call(np.subtract, dst, shift, dst))
        calls.append(call(np.multiply, dst, factor, dst))
    return calls


def centre(
    x: Array, scale: Array, bounds: tuple[int, int], out: Array, scratch: Scratch, *, dequantize: bool = False
) -> list[Call]:
    """out = round(x / scale) clamped to `bounds`: quantised x less its zero point, as float32; `out` may be `x`.

    NaN becomes the lower bound. With `dequantize` times `scale` again. `scale` is 0-d.
    """
    size = min(out.size, BLOCK)
    (low, once), (high, filled) = (limit(bound, size, np.float32, scratch) for bound in bounds)
    calls = [*once, *filled]
    for src, dst in blocks(x, out):
        calls += [call(np.true_divide, src, scale, dst), call(np.rint, dst, dst)]
        for ufunc, full in ((np.fmax, low), (np.fmin, high)):
            calls.append(call(ufunc, dst, full[: dst.size].reshape(dst.shape), dst))
        if dequantize:
            calls.append(call(np.multiply, dst, scale, dst))
    return calls


def _dynamic_range(x: Array, scale: Array, point: Array, scratch: Scratch) -> list[Call]:
    """Scale and zero point, both 0-d float32, of x quantised to uint8 over the range that holds it and 0, whatever NaN
    is among it."""
    low, flat_range = scratch((), np.float32), scratch((), np.bool_)
    flat = x.reshape(-1)
    return [
        (np.fmin.reduce, (flat, 0, None, low, False, 0)),
        (np.fmax.reduce, (flat, 0, None, scale, False, 0)),
        call(np.subtract, scale, low, scale),
        call(np.true_divide, scale, const(255, scale), scale),
        call(np.equal, scale, const(0, scale), flat_range),
        copy_where(scale, const(1, scale), flat_range),
        call(np.true_divide, low, scale, point),
        call(np.negative, point, point),
        call(np.minimum, point, const(255, point), point),
        call(np.rint, point, point),
    ]


def dynamic_quantize(x: Array, q: Array, scale: Array, zero: Array, scratch: Scratch) -> list[Call]:
    """q, scale and zero point of x over the range that holds it and 0; x float32 and contiguous, q uint8.

    The lowest value becomes round(low / scale) + round(-low / scale) = 0, so that none falls below; the highest may
    be rounded up to 256.
    """
    point = scratch((), np.float32)
    calls = [*_dynamic_range(x, scale, point, scratch), copy(zero, point)]
    return calls + quantize(x, scale, point, q, scratch, above_only=True)


def dynamic_centre(x: Array, out: Array, scale: Array, scratch: Scratch) -> list[Call]:
    """`dynamic_quantize` whose integers, less their zero point, are float32; NaN becomes the lowest."""
    low, high, point = (scratch((), np.float32) for _ in range(3))
    calls = [
        *_dynamic_range(x, scale, point, scratch),
        call(np.negative, point, low),
        call(np.subtract, const(255, point), point, high),
    ]
    for src, dst in blocks(x, out):
        calls += [call(np.true_divide, src, scale, dst), call(np.rint, dst, dst)]
        calls += [call(np.fmax, dst, low, dst), call(np.fmin, dst, high, dst)]
    return calls


def largest(dtype: np.dtype[Any], zero: Array | None, *, known: bool) -> int:
    """The largest |value - zero point| of an 8-bit type. `zero` is None where there is none or it is not `known`."""
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    if not known:
        return high - low
    points = np.zeros(1, dtype) if zero is None else np.asarray(zero)
    return max(high - int(points.min()), int(points.max()) - low)


def exact_ranges(k: int, a_largest: int, b_largest: int, b: Array | None = None) -> list[tuple[int, int]]:
    """The fewest equal ranges of K over which no sum of |a b| passes EXACT.

    `b` (..., K, N), where it is known, is what `less_zero` makes of the right-hand matrix: its columns' own sums bound
    the products.
    """
    longest = EXACT // (a_largest * b_largest)
    most = max(1, -(-k // longest))
    if b is not None:
        for count in range(1, most):
            ranges = _ranges(k, count)
            if all(_largest_sum(b[..., i:j, :]) * a_largest <= EXACT for i, j in ranges):
                return ranges
    return _ranges(k, most)


_ROWS = 64
"""Of int16 values of at most 9 bits: their sum is an int16 too."""


def _largest_sum(b: Array) -> int:
    """The largest sum of a column's sizes in b (..., K, N), int8, or int16 of at most 9 bits."""
    total = np.zeros((*b.shape[:-2], b.shape[-1]), np.int64)
    for i in range(0, b.shape[-2], _ROWS):
        total += np.abs(b[..., i : i + _ROWS, :], dtype=np.int16).sum(-2, dtype=np.int16)
    return int(total.max(initial=0))


def _ranges(k: int, count: int) -> list[tuple[int, int]]:
    edges = [i * k // count for i in range(count + 1)]
    return list(pairwise(edges))


def centred(q: Array, zero: Array | None, scratch: Scratch) -> tuple[Array, list[Call]]:
    """q - zero as float32, the zero point broadcasting to q."""
    wide = scratch(q.shape, np.float32)
    shift, calls = as_float(zero, scratch)
    calls.append(copy(wide, q))
    return wide, calls if shift is None else [*calls, call(np.subtract, wide, shift, wide)]


def matmul_integer(a: Array, b: Array, out: Array, ranges: Sequence[tuple[int, int]], scratch: Scratch) -> list[Call]:
    """int32 or float32 out = a @ b for float32 matrices of integers; `ranges` of K are those that `exact_ranges` gave.

    `a` (..., K) and `b` (..., K, N) as np.matmul takes them, `b` with two dimensions at least.
    """
    if len(ranges) == 1 and out.dtype == np.float32:
        return matmul(a, b, out, scratch)
    product = scratch(out.shape, np.float32)
    sums = out if out.dtype == np.int32 else scratch(out.shape, np.int32)
    term = scratch(out.shape if len(ranges) > 1 else (0,), np.int32)
    calls: list[Call] = []
    for n, (i, j) in enumerate(ranges):
        calls += matmul(a[..., i:j], b[..., i:j, :], product, scratch)
        if n == 0:
            calls.append(copy(sums, product))
        else:
            calls += [copy(term, product), call(np.add, sums, term, sums)]
    return calls if sums is out else [*calls, copy(out, sums)]


PANEL = 64
"""Columns of a panel of packed weights, whatever multiplies them: OpenBLAS reads so many where they lie."""
_APART, _JOINED = ((4, 1 << 17), (2, 3 << 16)), 1 << 18
"""How many panels become float32 at a time where each is multiplied alone, if they are up to so many weights, else one;
the weights that do where they are multiplied together, 1 MB."""


def together(rows: int, k: int) -> tuple[int, bool]:
    """How many panels of a (K, N) matrix become float32 at a time beside `rows` rows, and whether each is multiplied
    alone, where it lies; else they come to lie side by side, since BLAS packs both sides of each product."""
    panel = max(1, k * PANEL)
    if rows * panel <= UNPACKED or (rows <= MOST_IN_RANGES and reads_as_it_lies()):
        return next((count for count, most in _APART if count * panel <= most), 1), True
    return max(1, _JOINED // panel), False


def _panels(n: int, count: int) -> Iterator[tuple[int, int]]:
    """Ranges of N columns: of `count` whole panels or, towards the end, as many as there are, and of what is left."""
    whole = n - n % PANEL
    for j in range(0, whole, count * PANEL):
        yield j, min(j + count * PANEL, whole)
    if whole < n:
        yield whole, n


def less_zero(b: Array, zero: Array | None) -> Array:
    """8-bit b (..., K, N) less its zero point, one value or one a column: int16, or b itself where there is none."""
    return b if zero is None or not zero.any() else np.subtract(b, zero, dtype=np.int16)


def packed_panels(b: Array) -> Array:
    """What `less_zero` makes of a (K, N) matrix as int8, or int16 where it needs that: panels of PANEL columns, and of
    the rest, one after another."""
    k, n = b.shape
    small = b.dtype == np.int8 or not b.size or (b.min() >= -128 and b.max() <= 127)
    made = np.empty(b.size, np.int8 if small else np.int16)
    for i, j in _panels(n, 1):
        np.copyto(made[k * i : k * j].reshape(k, j - i), b[:, i:j], casting="unsafe")
    return made


_ROWS_PER_WEIGHT, _PART = 8, 5_000_000
"""Making a weight float32 takes about as long as multiplying it by so many rows; a part of fewer multiplications is not
worth a thread."""


def matmul_panels(
    a: Array, panels: Array, out: Array, ranges: Sequence[tuple[int, int]], scratch: Scratch, *, threads: int = 1
) -> list[list[Call]]:
    """int32 or float32 out = a @ b, b (K, N) given as `packed_panels` of it; else as `matmul_integer`.

    Weights are read once in a run and multiply few rows: that is bound by memory. So they stay narrow there, and some
    panels become float32 in cache, where BLAS reads them.
    Returns up to `threads` parts that may run at the same time.
    """
    k, n = a.shape[-1], out.shape[-1]
    rows, target = a.reshape(math.prod(a.shape[:-1]), k), out.reshape(-1, n)
    some, apart = together(len(rows), k)
    edges = list(_panels(n, some))
    worth = k * n * (len(rows) + _ROWS_PER_WEIGHT) // _PART
    count = max(1, min(threads, len(edges), worth))
    parts: list[list[Call]] = []
    for part in range(count):
        wide = scratch((k * min(some * PANEL, n),), np.float32)
        calls: list[Call] = []
        for i, j in edges[part::count]:
            narrow, weights, y = panels[k * i : k * j], wide[: k * (j - i)], target[:, i:j]
            if apart and j - i > PANEL:
                calls.append(copy(weights, narrow))
                left, right, y = rows, weights.reshape((j - i) // PANEL, k, PANEL), in_ranges(y, PANEL)
                if len(rows) <= FEW_ROWS:
                    left, right, y = left[:, None], right[:, None], y[:, :, None]
                calls += matmul_integer(left, right, y, ranges, scratch)
                continue
            weights, width = weights.reshape(k, j - i), min(PANEL, j - i)
            calls.append(copy(in_ranges(weights, width), narrow.reshape((j - i) // width, k, width)))
            calls += matmul_integer(rows, weights, y, ranges, scratch)
        parts.append(calls)
    return parts


def requantize(sums: Array, factor: Array, zero: Array, q: Array, scratch: Scratch) -> list[Call]:
    """q = saturate(round(sums factor) + zero); int32 sums, factor and `zero` float32, 0-d or broadcasting to them."""
    size = min(q.size, BLOCK)
    t = scratch((size,), np.float32)
    saturate = _Saturate(q.dtype, size, scratch)
    calls = saturate.once
    for (src, dst), (scale, shift) in cut([sums, q], [factor, zero]):
        part = t[: src.size].reshape(src.shape)
        calls += [
            copy(part, src),
            call(np.multiply, part, scale, part),
            call(np.rint, part, part),
            call(np.add, part, shift, part),
            *saturate.calls(part, dst),
        ]
    return calls
