"""Activations as chains of ufuncs over cache-sized blocks.

Each `_name(x, out, t, **attrs)` emits the calls of one block: `out` may be `x`, `t` holds as many temporaries of x's
shape and dtype as `PROGRAMS` says. Half precision is computed in float32, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import BLOCK, blocks, call, const, copy, copy_where

# erf(x) = tanh(x P(x²)) to 6e-8 with P of degree 6: atanh(erf(x)) / x fitted on (0, 4], weighted by 1 - erf(x)² and
# then iteratively (Lawson) to level the error. Beyond 4, where P is held at P(16), tanh rounds to ±1 in float32.
# Written with NumPy's SIMD tanh this takes 16 passes over a block, against 27 for the usual rational form.
_ERF = (1.12837971, 0.102765481, -0.000184383734, -0.000625719532, 8.97125694e-05, -5.9856874e-06, 1.5896002e-07)
_ERF_FLAT_FROM = 4.0


def _erf(x: Array, out: Array, t: Sequence[Array], scale: float = 1.0) -> list[Call]:
    """erf(scale x)"""
    z, p = t
    c = [const(k * scale ** (2 * i + 1), x) for i, k in enumerate(_ERF)]
    calls = [
        call(np.multiply, x, x, z),
        call(np.minimum, z, const((_ERF_FLAT_FROM / scale) ** 2, x), z),
        call(np.multiply, z, c[-1], p),
    ]
    for k in c[-2:0:-1]:
        calls += [call(np.add, p, k, p), call(np.multiply, p, z, p)]
    return [*calls, call(np.add, p, c[0], p), call(np.multiply, p, x, p), call(np.tanh, p, out)]


def _gelu(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    z, p = t
    return [*_erf(x, p, t, 0.5**0.5), *_half_gate(x, p, z, out)]


def _half_gate(x: Array, gate: Array, t: Array, out: Array) -> list[Call]:
    """x / 2 (1 + gate)"""
    return [
        call(np.add, gate, const(1, x), gate),
        call(np.multiply, x, const(0.5, x), t),
        call(np.multiply, gate, t, out),
    ]


def _gelu_tanh(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    z, p = t
    scale = (2 / np.pi) ** 0.5
    return [
        call(np.multiply, x, x, z),
        call(np.multiply, z, const(0.044715 * scale, x), z),
        call(np.add, z, const(scale, x), z),
        call(np.multiply, z, x, p),
        call(np.tanh, p, p),
        *_half_gate(x, p, z, out),
    ]


def _sigmoid(x: Array, out: Array, t: Sequence[Array], scale: float = 1.0) -> list[Call]:
    """1 / (1 + exp(-scale x)): exact to rounding in both tails, which the tanh form is not."""
    one = const(1, x)
    return [
        call(np.multiply, x, const(-scale, x), out),
        call(np.exp, out, out),
        call(np.add, out, one, out),
        call(np.true_divide, one, out, out),
    ]


def _swish(x: Array, out: Array, t: Sequence[Array], alpha: float = 1.0) -> list[Call]:
    (gate,) = t
    return [*_sigmoid(x, gate, (), alpha)[:-1], call(np.true_divide, x, gate, out)]


def _relu(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    return [call(np.maximum, x, const(0, x), out)]


def _leaky_relu(x: Array, out: Array, t: Sequence[Array], alpha: float) -> list[Call]:
    (slope,) = t
    calls = [call(np.multiply, x, const(alpha, x), slope)]
    if 0 <= alpha <= 1:
        return [*calls, call(np.maximum, x, slope, out)]
    if alpha > 1:
        return [*calls, call(np.minimum, x, slope, out)]
    return [
        call(np.minimum, x, const(0, x), slope),
        call(np.multiply, slope, const(alpha, x), slope),
        call(np.maximum, x, const(0, x), out),
        call(np.add, out, slope, out),
    ]


def _elu(
    x: Array, out: Array, t: Sequence[Array], alpha: float, *, gamma: float = 1.0, width: float = 1.0
) -> list[Call]:
    """gamma x above 0, gamma alpha (exp(x / width) - 1) below"""
    (low,) = t
    zero = const(0, x)
    return [
        call(np.minimum, x, zero, low),
        *([call(np.true_divide, low, const(width, x), low)] if width != 1 else []),
        call(np.expm1, low, low),
        call(np.multiply, low, const(gamma * alpha, x), low),
        call(np.maximum, x, zero, out),
        *([call(np.multiply, out, const(gamma, x), out)] if gamma != 1 else []),
        call(np.add, out, low, out),
    ]


def _selu(x: Array, out: Array, t: Sequence[Array], alpha: float, gamma: float) -> list[Call]:
    return _elu(x, out, t, alpha, gamma=gamma)


def _celu(x: Array, out: Array, t: Sequence[Array], alpha: float) -> list[Call]:
    return _elu(x, out, t, alpha, width=alpha)


def _hard_sigmoid(x: Array, out: Array, t: Sequence[Array], alpha: float, beta: float) -> list[Call]:
    return [
        call(np.multiply, x, const(alpha, x), out),
        call(np.add, out, const(beta, x), out),
        call(np.maximum, out, const(0, x), out),
        call(np.minimum, out, const(1, x), out),
    ]


def _hard_swish(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    (gate,) = t
    return [*_hard_sigmoid(x, gate, (), 1 / 6, 0.5), call(np.multiply, x, gate, out)]


def _tanh(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    return [call(np.tanh, x, out)]


def _softplus(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    """max(x, 0) + log1p(exp(-|x|)), which does not overflow"""
    (low,) = t
    return [
        call(np.abs, x, low),
        call(np.negative, low, low),
        call(np.exp, low, low),
        call(np.log1p, low, low),
        call(np.maximum, x, const(0, x), out),
        call(np.add, out, low, out),
    ]


def _softsign(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    (scale,) = t
    return [call(np.abs, x, scale), call(np.add, scale, const(1, x), scale), call(np.true_divide, x, scale, out)]


def _mish(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    """x tanh(softplus(x)) = x n / (n + 2) with e = exp(x), n = e (e + 2); it equals x in float64 from 20 on."""
    n, d = t
    two = const(2, x)
    return [
        call(np.minimum, x, const(20, x), d),
        call(np.exp, d, d),
        call(np.add, d, two, n),
        call(np.multiply, n, d, n),
        call(np.add, n, two, d),
        call(np.true_divide, n, d, n),
        call(np.multiply, n, x, out),
    ]


def _thresholded_relu(x: Array, out: Array, t: Sequence[Array], alpha: float) -> list[Call]:
    """x above alpha, else 0; NaN is not above anything"""
    (drop,) = t
    return [
        call(np.greater, x, const(alpha, x), drop),
        call(np.logical_not, drop, drop),
        copy(out, x),
        copy_where(out, const(0, x), drop),
    ]


def _shrink(x: Array, out: Array, t: Sequence[Array], bias: float, lambd: float) -> list[Call]:
    """x + bias below -lambd, x - bias above lambd, else 0"""
    result, mask = t
    calls = [copy(result, const(0, x))]
    for test, limit, shift in ((np.less, -lambd, bias), (np.greater, lambd, -bias)):
        calls += [
            call(test, x, const(limit, x), mask),
            (partial(np.add, where=mask), (x, const(shift, x), result)),
        ]
    return [*calls, copy(out, result)]


class Program(NamedTuple):
    """How one block is computed, and how many temporaries of its dtype and of bool that takes."""

    emit: Callable[..., list[Call]]
    temporaries: int = 0
    masks: int = 0


PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        "erf": Program(_erf, 2),
        "gelu": Program(_gelu, 2),
        "gelu_tanh": Program(_gelu_tanh, 2),
        "sigmoid": Program(_sigmoid),
        "swish": Program(_swish, 1),
        "relu": Program(_relu),
        "leaky_relu": Program(_leaky_relu, 1),
        "elu": Program(_elu, 1),
        "selu": Program(_selu, 1),
        "celu": Program(_celu, 1),
        "hard_sigmoid": Program(_hard_sigmoid),
        "hard_swish": Program(_hard_swish, 1),
        "tanh": Program(_tanh),
        "softplus": Program(_softplus, 1),
        "softsign": Program(_softsign, 1),
        "mish": Program(_mish, 2),
        "thresholded_relu": Program(_thresholded_relu, 0, 1),
        "shrink": Program(_shrink, 1, 1),
    }
)


def blockwise(name: str, size: int, dtype: Any, scratch: Scratch, **attrs: float) -> Callable[[Array, Array], list[Call]]:
    """`emit(x, out)` for blocks of at most `size` elements; the blocks share their temporaries."""
    program = PROGRAMS[name]
    half = np.dtype(dtype).itemsize == 2
    work = np.dtype(np.float32) if half else np.dtype(dtype)
    flat = [scratch((size,), work) for _ in range(program.temporaries)]
    flat += [scratch((size,), np.bool_) for _ in range(program.masks)]
    staging = scratch((size,), work) if half else None

    def emit(x: Array, out: Array) -> list[Call]:
        t = [f[: x.size].reshape(x.shape) for f in flat]
        if staging is None:
            return program.emit(x, out, t, **attrs)
        wide = staging[: x.size].reshape(x.shape)
        return [copy(wide, x), *program.emit(wide, wide, t, **attrs), copy(out, wide)]

    return emit


def activation(name: str, x: Array, out: Array, scratch: Scratch, **attrs: float) -> list[Call]:
    """The activation `name` of PROGRAMS over whole arrays; `x` may be strided, and `out` may be `x`."""
    emit = blockwise(name, min(out.size, BLOCK), out.dtype, scratch, **attrs)
    return [c for src, dst in blocks(x, out) for c in emit(src, dst)]


def prelu(x: Array, slope: Array, out: Array, scratch: Scratch) -> list[Call]:
    """max(x, 0) + slope min(x, 0), the slope broadcast to x; `out` may be `x`."""
    low = scratch((min(out.size, BLOCK),), out.dtype)
    zero = const(0, out)
    calls: list[Call] = []
    for src, factor, dst in blocks(x, np.broadcast_to(slope, out.shape), out):
        t = low[: src.size].reshape(src.shape)
        calls += [
            call(np.minimum, src, zero, t),
            call(np.multiply, t, factor, t),
            call(np.maximum, src, zero, dst),
            call(np.add, dst, t, dst),
        ]
    return calls
