"""Reductions, scans and the position of an extremum over chosen axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import call, const, contiguous, copy, copy_where


def _kept(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if i in axes else d for i, d in enumerate(shape))


def _reduce(ufunc: Any, x: Array, axes: tuple[int, ...], out: Array) -> Call:
    """`out` has x's rank; an empty reduction leaves the ufunc's identity, which an extremum takes from its dtype."""
    args: tuple[Any, ...] = (x, axes, out.dtype, out, True)
    if ufunc in (np.maximum, np.minimum) and 0 in (x.shape[a] for a in axes):
        args = (*args, _worst(out.dtype, highest=ufunc is np.minimum))
    return ufunc.reduce, args


def _worst(dtype: np.dtype[Any], *, highest: bool) -> Any:
    if dtype.kind == "b":
        return highest
    if dtype.kind == "f":
        return math.inf if highest else -math.inf
    info = np.iinfo(dtype)
    return info.max if highest else info.min


def _mean(x: Array, axes: tuple[int, ...], out: Array, scratch: Scratch) -> list[Call]:
    count = const(math.prod(x.shape[a] for a in axes), out)
    return [_reduce(np.add, x, axes, out), call(np.true_divide, out, count, out)]


def _mapped(before: Callable[..., object] | None, after: Callable[..., object] | None) -> Callable[..., list[Call]]:
    """The sum of `before(x)`, then `after` of that."""

    def calls(x: Array, axes: tuple[int, ...], out: Array, scratch: Scratch) -> list[Call]:
        made: list[Call] = []
        if before is not None:
            mapped = scratch(x.shape, x.dtype)
            made.append(call(before, x, mapped))
            x = mapped
        made.append(_reduce(np.add, x, axes, out))
        return made if after is None else [*made, call(after, out, out)]

    return calls


def _log_sum_exp(x: Array, axes: tuple[int, ...], out: Array, scratch: Scratch) -> list[Call]:
    """Shifted by the maximum where that is finite, so that nothing overflows."""
    shift, finite = scratch(out.shape, out.dtype), scratch(out.shape, np.bool_)
    shifted = scratch(x.shape, x.dtype)
    return [
        _reduce(np.maximum, x, axes, out),
        call(np.isfinite, out, finite),
        copy(shift, const(0, out)),
        copy_where(shift, out, finite),
        call(np.subtract, x, shift, shifted),
        call(np.exp, shifted, shifted),
        _reduce(np.add, shifted, axes, out),
        call(np.log, out, out),
        call(np.add, out, shift, out),
    ]


def _plain(ufunc: Any) -> Callable[..., list[Call]]:
    return lambda x, axes, out, scratch: [_reduce(ufunc, x, axes, out)]


_REDUCTIONS: dict[str, Callable[..., list[Call]]] = {
    "sum": _plain(np.add),
    "prod": _plain(np.multiply),
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "mean": _mean,
    "l1": _mapped(np.abs, None),
    "l2": _mapped(np.square, np.sqrt),
    "log_sum": _mapped(None, np.log),
    "log_sum_exp": _log_sum_exp,
    "sum_square": _mapped(np.square, None),
}


def reduction(kind: str, x: Array, axes: Sequence[int], out: Array, scratch: Scratch) -> list[Call]:
    """x reduced over `axes` into `out`, with or without the reduced axes. float32, float64; integers but for mean,
    l2, log_sum and log_sum_exp."""
    return _REDUCTIONS[kind](x, tuple(axes), out.reshape(_kept(x.shape, axes)), scratch)


def arg_extremum(x: Array, axis: int, out: Array, scratch: Scratch, *, largest: bool, last: bool) -> list[Call]:
    """The index of the extremum along `axis`, the first or the last among equals, into int64 `out`."""
    n = x.shape[axis]
    rows = np.moveaxis(x, axis, -1)
    rows, calls = contiguous(rows[..., ::-1] if last else rows, scratch)
    target = out.reshape(rows.shape[:-1])
    find = np.ndarray.argmax if largest else np.ndarray.argmin
    calls.append((find, (rows, -1, target)))
    return [*calls, call(np.subtract, const(n - 1, out), target, target)] if last else calls


def scan(ufunc: Any, x: Array, axis: int, out: Array, *, exclusive: bool, reverse: bool, identity: int) -> list[Call]:
    """Running sums or products along `axis`; `exclusive` leaves out the element itself, `reverse` runs backwards."""
    src, dst = np.moveaxis(x, axis, 0), np.moveaxis(out, axis, 0)
    if reverse:
        src, dst = src[::-1], dst[::-1]
    calls: list[Call] = []
    if exclusive:
        calls.append(copy(dst[:1], const(identity, out)))
        src, dst = src[:-1], dst[1:]
    if not src.size:
        return calls
    if src[0].size < _WIDE:
        return [*calls, (ufunc.accumulate, (src, 0, out.dtype, dst))]
    calls.append(copy(dst[0], src[0]))
    return calls + [call(ufunc, dst[i - 1], src[i], dst[i]) for i in range(1, len(src))]


_WIDE = 16
"""From so many elements beside the axis one call a step beats ufunc.accumulate, which strides along the axis."""
