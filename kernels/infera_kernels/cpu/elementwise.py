"""The words of bound NumPy kernels: calls, constants, cache-sized blocks; and the elementwise kernels themselves.

A kernel function takes its arrays once and returns the calls of every later run. Nothing a call does may allocate an
array, so temporaries come from `scratch(shape, dtype)` and every view is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call, Scratch, maximum, minimum

BLOCK = 65536
"""Elements of a block in a chain of ufuncs: four float32 operands fill a 1 MB L2 cache. Two threads gain nothing from
much smaller blocks: each call takes the interpreter's lock again (see `parts`)."""


def call(ufunc: Callable[..., object], *operands: Array) -> Call:
    """`ufunc(*inputs, output)`. NumPy 2.4 takes the output of maximum and minimum by keyword only.

    Its negative is wrong for inputs of some strides where the output is not contiguous (steps of 16 bytes and
    float32, for one).
    """
    if ufunc is np.maximum:
        return maximum(*operands)
    if ufunc is np.minimum:
        return minimum(*operands)
    if ufunc is np.negative and not operands[-1].flags.c_contiguous:
        x, out = operands
        return np.multiply, (x, const(-1, x), out)
    return ufunc, operands


def clamp(x: Array, low: Array, high: Array, out: Array) -> Call:
    """min(max(x, low), high) with 0-d bounds; a NaN stays one.

    One pass with SIMD. np.maximum and np.minimum against a single value have none.
    """
    return np.ndarray.clip, (x, low, high, out)


def copy(dst: Array, src: Array) -> Call:
    """dst[...] = src, cast where the dtypes differ; `src` may broadcast."""
    return np.copyto, (dst, src, "unsafe")


def copy_where(dst: Array, src: Array, mask: Array) -> Call:
    """dst[mask] = src[mask]"""
    return np.copyto, (dst, src, "unsafe", mask)


def const(value: Any, like: Array) -> Array:
    """A 0-d array of `like`'s dtype: unlike a Python number it is not converted anew in every call."""
    return np.asarray(value, like.dtype)


def contiguous(x: Array, scratch: Scratch) -> tuple[Array, list[Call]]:
    """`x` itself where it is C-contiguous, else a scratch copy and the call that fills it."""
    if x.flags.c_contiguous:
        return x, []
    dense = scratch(x.shape, x.dtype)
    return dense, [copy(dense, x)]


def converted(x: Array, dtype: Any, scratch: Scratch) -> tuple[Array, list[Call]]:
    """`x` itself where it has `dtype`, else a scratch copy of that dtype and the call that fills it."""
    if x.dtype == dtype:
        return x, []
    cast = scratch(x.shape, dtype)
    return cast, [copy(cast, x)]


def blocks(*arrays: Array, size: int = BLOCK) -> Iterator[tuple[Array, ...]]:
    """Views of at most `size` elements that together cover the arrays, which have one shape.

    Flat where every array is C-contiguous; else whole trailing axes and a range of the axis before them.
    """
    shape = arrays[0].shape
    if all(a.flags.c_contiguous for a in arrays):
        flat = [a.reshape(-1) for a in arrays]
        for i in range(0, flat[0].size, size):
            yield tuple(f[i : i + size] for f in flat)
        return
    if 0 in shape:
        return
    axis, inner = len(shape) - 1, 1
    while axis > 0 and inner * shape[axis] <= size:
        inner *= shape[axis]
        axis -= 1
    rows = max(1, size // inner)
    for outer in np.ndindex(*shape[:axis]):
        parts = [a[outer] for a in arrays]
        for i in range(0, shape[axis], rows):
            yield tuple(p[i : i + rows] for p in parts)


def _spread(x: Array, shape: Sequence[int]) -> Array:
    """`x` broadcast; its strides stay where it has the shape.

    NumPy copies an operand that lies where the output does with other strides, be it along an axis of size 1.
    """
    return x if x.shape == tuple(shape) else np.broadcast_to(x, shape)


def cut(
    arrays: Sequence[Array], operands: Sequence[Array | None], size: int = BLOCK
) -> Iterator[tuple[list[Array], list[Array | None]]]:
    """`blocks` of arrays of one shape, with the part of each operand that goes with them.

    Operands broadcast to that shape; None and single values go whole with every block.
    """
    shape = arrays[0].shape
    whole = [None if p is None else p.reshape(()) if p.size == 1 else _spread(p, shape) for p in operands]
    spread = [p for p in whole if p is not None and p.ndim]
    for views in blocks(*arrays, *spread, size=size):
        parts = iter(views[len(arrays) :])
        yield list(views[: len(arrays)]), [p if p is None or not p.ndim else next(parts) for p in whole]


def limit(bound: Any, size: int, dtype: Any, scratch: Scratch) -> tuple[Array, list[Call]]:
    """A block full of `bound`, a number or a 0-d array read in every run, and the call that fills it.

    np.maximum and np.minimum run without SIMD against a single value, and with it against an array.
    """
    full = scratch((size,), dtype)
    return full, [copy(full, bound if isinstance(bound, np.ndarray) else const(bound, full))]


def truncated_divide(a: Array, b: Array, out: Array, scratch: Scratch) -> list[Call]:
    """Integer a / b rounded towards zero, as in C; `out` may be `a` or `b`."""
    if out.dtype.kind == "u":
        return [call(np.floor_divide, a, b, out)]
    exact = scratch(out.shape, out.dtype)
    return [
        call(np.fmod, a, b, exact),
        call(np.subtract, a, exact, exact),
        call(np.floor_divide, exact, b, out),
    ]


def power(a: Array, b: Array, out: Array, scratch: Scratch, *, exponent: float | None) -> list[Call]:
    """a ** b of floats, where `exponent` is b's value if it is one known number; `out` may be `a`."""
    if exponent == 2:
        return [call(np.square, a, out)]
    if exponent == 3:
        size = min(out.size, BLOCK)
        t = scratch((size,), out.dtype)
        calls: list[Call] = []
        for x, y in blocks(np.broadcast_to(a, out.shape), out):
            square = t[: x.size].reshape(x.shape)
            calls += [call(np.square, x, square), call(np.multiply, x, square, y)]
        return calls
    b, calls = converted(b, out.dtype, scratch)
    return [*calls, call(np.power, a, b, out)]


def variadic(ufunc: Callable[..., object], ins: Sequence[Array], out: Array, *, mean: bool = False) -> list[Call]:
    """The inputs combined from left to right, divided by their number for a mean."""
    if len(ins) == 1:
        return [copy(out, ins[0])]
    calls = [call(ufunc, ins[0], ins[1], out), *(call(ufunc, out, x, out) for x in ins[2:])]
    return [*calls, call(np.true_divide, out, const(len(ins), out), out)] if mean else calls


_BITS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def where(condition: Array, x: Array, y: Array, out: Array, scratch: Scratch) -> list[Call]:
    """x where the condition holds, else y; `out` may be `x` or `y`.

    y ^ ((x ^ y) & -condition) on the bits: a masked copy is slow where the mask is irregular.
    """
    bits = _BITS[out.itemsize]
    size = min(out.size, BLOCK)
    flat = [scratch((size,), bits) for _ in range(2)]
    calls: list[Call] = []
    for (dst,), (c, a, b) in cut([out.view(bits)], [condition, x.view(bits), y.view(bits)]):
        mask, differing = (t[: dst.size].reshape(dst.shape) for t in flat)
        calls += [
            copy(mask, c),
            call(np.negative, mask, mask),
            call(np.bitwise_xor, a, b, differing),
            call(np.bitwise_and, differing, mask, differing),
            call(np.bitwise_xor, b, differing, dst),
        ]
    return calls


def clip(x: Array, low: Array | None, high: Array | None, out: Array) -> list[Call]:
    """min(max(x, low), high) with 0-d bounds; `out` may be `x`."""
    if low is None and high is None:
        return [copy(out, x)]
    ends = np.iinfo(out.dtype) if out.dtype.kind in "iu" else None
    least, most = (-np.inf, np.inf) if ends is None else (ends.min, ends.max)
    low, high = const(least, out) if low is None else low, const(most, out) if high is None else high
    return [clamp(x, low, high, out)]
