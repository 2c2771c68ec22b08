"""Matrix products on NumPy's BLAS, and what follows a product while it is in cache.

np.matmul hands a matrix to BLAS where one of its last two strides is the item size and the other at least a row; other
layouts it copies on its own, so they are copied into scratch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from infera_kernels.calls import SERIAL, Array, Call, Scratch, Split
from infera_kernels.cpu.activation import blockwise
from infera_kernels.cpu.blas import reads_as_it_lies
from infera_kernels.cpu.elementwise import BLOCK, call, const, copy
from infera_kernels.cpu.parts import along, parts
from infera_kernels.record import Record


def _blas_takes(x: Array) -> bool:
    """Whether BLAS reads the matrices in `x`'s last two axes where they lie, as they are or transposed."""
    rows, cols = x.shape[-2:]
    down, right = x.strides[-2:]
    item = x.itemsize

    def laid_out(inner: int, outer: int, width: int, count: int) -> bool:
        return (inner == item or width == 1) and (count == 1 or (outer % item == 0 and outer >= width * item))

    return laid_out(right, down, cols, rows) or laid_out(down, right, rows, cols)


def readable(x: Array, scratch: Scratch) -> tuple[Array, list[Call]]:
    if x.ndim < 2 or x.size == 0 or _blas_takes(x):
        return x, []
    dense = scratch(x.shape, x.dtype)
    return dense, [copy(dense, x)]


def rows_of(x: Array) -> Array | None:
    """(..., K) as (rows, K) without a copy, or None."""
    try:
        return x.reshape((-1 if x.size else math.prod(x.shape[:-1]), x.shape[-1]), copy=False)
    except ValueError:
        return None


FEW_ROWS = 3
"""Up to so many rows one GEMV each beats a GEMM, which packs the whole right-hand matrix first."""

CACHED = 1 << 20
"""Bytes of a right-hand matrix up to which each of a few rows finds it in the cache."""

_BLOCK_BYTES, _BLOCK_COLUMNS = 1 << 18, 2048
"""A block of what has more, which stays in the smallest of second-level caches while the rows go by. Where rows of the
matrix lie in one piece each, it has so many columns of them at most: what they are added to stays too."""

_FEWEST_COLUMNS = 16
"""Of a block where columns lie in one piece each: what they are multiplied with is read anew for each block."""

_LONG = 1 << 12
"""Elements of a column, where columns lie in one piece each: of longer ones OpenBLAS' GEMV reads so many of each, then
the next so many of each."""

_TOGETHER = 4
"""Such columns that are read from end to end at a time: as many pieces of memory as the processor sees coming."""


def matmul(a: Array, b: Array, out: Array, scratch: Scratch) -> list[Call]:
    """out = a @ b by np.matmul's rules; (..., M, K) times one (K, N) matrix is one product of all rows."""
    if b.ndim == 2 and a.ndim > 2:
        flat, target = rows_of(a), rows_of(out)
        if flat is not None and target is not None:
            a, out = flat, target
    few = a.ndim == b.ndim == 2 and 1 < a.shape[0] <= FEW_ROWS
    if few:
        a, out = a[:, None], out[:, None]
    a, calls = readable(a, scratch)
    b, more = readable(b, scratch)
    if few and b.nbytes > CACHED:
        return [*calls, *more, *_blockwise(a, b, out, scratch)]
    if a.ndim == b.ndim == 2 and len(a) == 1 and len(b) > _LONG and b.strides[0] == out.strides[1] == b.itemsize:
        return [*calls, *more, *_by_columns(a, b, out)]
    return [*calls, *more, *_products(a, b, out, scratch)]


def _by_columns(a: Array, b: Array, out: Array) -> list[Call]:
    """out (1, N) = a (1, K) @ b, whose columns lie in one piece each, a few of them at a time."""
    whole = b.shape[1] - b.shape[1] % _TOGETHER
    calls: list[Call] = []
    for start, stop, width in ((0, whole, _TOGETHER), (whole, b.shape[1], 1)):
        if start < stop:
            some = b.T[start:stop].reshape(-1, width, len(b), copy=False).swapaxes(1, 2)
            calls.append((np.matmul, (a, some, out[:, start:stop].reshape(-1, 1, width, copy=False))))
    return calls


def _blockwise(a: Array, b: Array, out: Array, scratch: Scratch) -> list[Call]:
    """out (rows, 1, N) = a (rows, 1, K) @ b, each block of which is read from memory once."""
    (k, n), item = b.shape, b.itemsize
    if b.strides[1] == item:
        ranges = -(-n // _BLOCK_COLUMNS)
    else:
        ranges = -(-n // max(_FEWEST_COLUMNS, _BLOCK_BYTES // (k * item)))
    edges = [n * i // ranges for i in range(ranges + 1)]
    width = max(stop - start for start, stop in pairwise(edges))
    depth = max(1, _BLOCK_BYTES // (width * item))
    sums = scratch((*out.shape[:-1], width), out.dtype) if depth < k else out
    calls: list[Call] = []
    for start, stop in pairwise(edges):
        total, more = out[..., start:stop], sums[..., : stop - start]
        for i in range(0, k, depth):
            calls.append((np.matmul, (a[..., i : i + depth], b[i : i + depth, start:stop], more if i else total)))
            if i:
                calls.append(call(np.add, total, more, total))
    return calls


_COLUMNS, UNPACKED = 64, 1_000_000
"""OpenBLAS' kernels for AVX-512 multiply up to so many terms (rows x depth x columns) without packing the operands,
which reads a weight twice: that shows where rows are few."""

MOST_IN_RANGES = 64
"""Rows."""


def in_ranges(x: Array, width: int) -> Array:
    """x (..., M, N) as (..., ranges of `width` columns, M, width), without a copy."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // width, width, copy=False).swapaxes(-2, -3)


def _products(a: Array, b: Array, out: Array, scratch: Scratch) -> list[Call]:
    """out = a @ b, of matrices in ranges that BLAS need not pack, where it has a kernel for that; `b` and `out` may be
    given as `in_ranges` makes them."""
    whole: list[Call] = [(np.matmul, (a, b, out))]
    if a.ndim != 2 or a.dtype != np.float32 or not reads_as_it_lies():
        return whole
    if not FEW_ROWS < len(a) <= MOST_IN_RANGES or b.strides[-1] != b.itemsize:
        return whole
    given = out
    if b.ndim == 2 and b.shape[1] > _COLUMNS and not b.shape[1] % _COLUMNS:
        b, out = in_ranges(b, _COLUMNS), in_ranges(out, _COLUMNS)
    if b.ndim != 3 or b.shape[-1] != _COLUMNS:
        return whole
    rows, depth = a.shape
    parts = max(1, -(-depth * rows * _COLUMNS // UNPACKED))
    edges = [depth * i // parts for i in range(parts + 1)]
    sums = None if parts == 1 else scratch((rows, len(b) * _COLUMNS), out.dtype)
    calls: list[Call] = []
    for start, stop in pairwise(edges):
        if sums is None or not start:
            calls.append((np.matmul, (a[:, start:stop], b[:, start:stop], out)))
            continue
        ranges = in_ranges(sums, _COLUMNS)
        calls.append((np.matmul, (a[:, start:stop], b[:, start:stop], ranges)))
        # As matrices where there are any: of three axes NumPy may not see that no elements overlap, and copies them.
        calls.append(call(np.add, given, sums if given.ndim == 2 else ranges, given))
    return calls


def scaled(c: Array, beta: float, scratch: Scratch) -> tuple[Array, list[Call]]:
    """beta c, and the call that computes it."""
    product = scratch(c.shape, c.dtype)
    return product, [call(np.multiply, c, const(beta, c), product)]


def fused(
    a: Array,
    b: Array,
    out: Array,
    scratch: Scratch,
    split: Split = SERIAL,
    *,
    alpha: float = 1.0,
    bias: Array | None = None,
    activation: str = "",
    residual: Array | None = None,
) -> list[Call]:
    """out = act(alpha a @ b + bias) + residual, see `matmul` and `epilogue`; the parts of `split` do both."""
    depths = _depths(a, b, out, split)
    if len(depths) > 1:
        sums = scratch((len(depths), *out.shape), out.dtype)
        products = [matmul(along(a, -1, d), b[d], part, scratch) for d, part in zip(depths, sums, strict=True)]
        total = [call(np.add, sums[0], sums[1], out), *(call(np.add, out, more, out) for more in sums[2:])]
        last = epilogue(out, scratch, alpha=alpha, bias=bias, activation=activation, residual=residual)
        return [*split.parallel(products), *total, *last]
    return split.parallel(
        [
            [
                *matmul(p.a, p.b, p.out, scratch),
                *epilogue(p.out, scratch, alpha=alpha, bias=p.of(bias), activation=activation, residual=p.of(residual)),
            ]
            for p in pieces(a, b, out, split, activation)
        ]
    )


_FLOPS = 60.0
"""Operations a nanosecond in a large product, about; a part is worth the more the slower a processor is."""

WEIGHT_BYTES = 8.0
"""Bytes of the right-hand matrix that a product of few rows reads in a nanosecond."""

_STORED_NS, _ACTIVATED_NS = 0.2, 2.0
"""Nanoseconds an element of the product costs after it, without and with an activation."""


def _depths(a: Array, b: Array, out: Array, split: Split) -> list[slice]:
    """Ranges of K whose products are added up, each for a thread; one where another cut is better.

    Few rows are bound by reading `b`, whose rows a part then reads from end to end; with a range of columns each,
    threads would read short pieces of them.
    """
    fits = b.ndim == 2 <= a.ndim and b.strides[1] == b.itemsize and b.shape[0] and out.size <= FEW_ROWS * b.shape[1]
    if not fits or split.threads < 2:
        return []
    return parts(b.shape[0], b.nbytes / WEIGHT_BYTES, split, multiple=_GRANULES[-2])


class Piece(Record):
    """A part of a product: along `axis`, counted from the end, of the output and of what broadcasts to it."""

    a: Array
    b: Array
    out: Array
    axis: int
    part: slice

    def of(self, term: Array | None) -> Array | None:
        return None if term is None else along(term, self.axis, self.part)


def pieces(a: Array, b: Array, out: Array, split: Split, activation: str) -> Iterator[Piece]:
    """The product cut along its batch, its rows or its columns; rows and batches stay contiguous.

    BLAS packs all of `b` for every part of the rows and all of `a` for every part of the columns, so that the longer
    side is cut.
    """
    axis = next((i - out.ndim for i, d in enumerate(out.shape) if d > 1), -1)
    if axis == -2 and out.shape[-1] > out.shape[-2]:
        axis = -1
    ns = max(2 * out.size * a.shape[-1] / _FLOPS, b.nbytes / WEIGHT_BYTES)
    ns += out.size * (_ACTIVATED_NS if activation else _STORED_NS)
    cuts = parts(out.shape[axis], ns, split, multiple=_GRANULES.get(axis, 1)) if min(a.ndim, b.ndim) > 1 else []
    if len(cuts) < 2:
        yield Piece(a, b, out, axis, slice(None))
        return
    for part in cuts:
        left = a if axis == -1 else along(a, axis, part)
        right = b if axis == -2 else along(b, axis, part)
        yield Piece(left, right, along(out, axis, part), axis, part)


_GRANULES = {-1: 64, -2: 8}
"""Multiples of columns and rows that BLAS's inner loops take without a rest."""


def epilogue(
    y: Array,
    scratch: Scratch,
    *,
    alpha: float = 1.0,
    bias: Array | None = None,
    activation: str = "",
    residual: Array | None = None,
) -> list[Call]:
    """y = act(alpha y + bias) + residual in place, over cache-sized ranges of rows; both terms broadcast to `y`.

    `activation` is "" or a name of `infera_kernels.cpu.activation.PROGRAMS` without parameters.
    """
    if not y.size or (alpha == 1 and bias is None and not activation and residual is None):
        return []
    width = y.shape[-1] if y.ndim else 1
    rows = y.reshape((-1, width), copy=False)
    chunk = max(1, BLOCK // width)
    calls: list[Call] = []
    activate = None
    if activation:
        calls, activate = blockwise(activation, min(rows.shape[0], chunk) * width, y.dtype, scratch)
    add_bias, add_residual = _adder(y, bias), _adder(y, residual)
    for i in range(0, rows.shape[0], chunk):
        block = rows[i : i + chunk]
        if alpha != 1:
            calls.append(call(np.multiply, block, const(alpha, y), block))
        calls += add_bias(block, i)
        if activate is not None:
            flat = block.reshape(-1) if block.flags.c_contiguous else block
            calls += activate(flat, flat)
        calls += add_residual(block, i)
    return calls


def _adder(y: Array, term: Array | None) -> Callable[[Array, int], list[Call]]:
    """Adds to a range of y's rows, starting at row i, its part of a term that broadcasts to `y`.

    Row by row where the term's own rows cannot be laid out as y's are without copying it.
    """
    if term is None:
        return lambda block, i: []
    if term.size == 1 or term.shape[:-1] == (1,) * (term.ndim - 1):
        row = term.reshape(()) if term.size == 1 else term.reshape(-1)
        return lambda block, i: [call(np.add, block, row, block)]
    full = np.broadcast_to(term, y.shape)
    flat = rows_of(full)
    if flat is not None:
        return lambda block, i: [call(np.add, block, flat[i : i + len(block)], block)]
    lead = y.shape[:-1]
    return lambda block, i: [
        call(np.add, block[j], full[np.unravel_index(i + j, lead)], block[j]) for j in range(len(block))
    ]
