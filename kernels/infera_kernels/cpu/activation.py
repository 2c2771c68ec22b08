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
from infera_kernels.cpu.elementwise import BLOCK, blocks, call, clamp, const, copy, copy_where, cut, limit

# erf(x) = tanh(x P(x²)) to 8e-8, P of degree 6 with P(0) = 2 / sqrt(pi), so that small results keep their relative
# accuracy: atanh(erf(x)) / x fitted on (0, 4], weighted by 1 - erf(x)² and then iteratively (Lawson) to level the
# error. Beyond 4, x P(x²) stays above 9.5, where tanh rounds to ±1 in float32. There the error is at most 1.7e-7.
# With NumPy's SIMD tanh this takes 15 passes over a block, against 27 for the usual rational form.
_ERF = (1.12837917, 0.102768807, -0.000190301108, -0.000621436438, 8.83061213e-05, -5.77970913e-06, 1.48178798e-07)


def _atanh_erf(x: Array, out: Array, z: Array, scale: float) -> list[Call]:
    """atanh(erf(scale x))"""
    c = [const(k * scale ** (2 * i + 1), x) for i, k in enumerate(_ERF)]
    calls = [call(np.multiply, x, x, z), call(np.multiply, z, c[-1], out)]
    for k in c[-2:0:-1]:
        calls += [call(np.add, out, k, out), call(np.multiply, out, z, out)]
    return [*calls, call(np.add, out, c[0], out), call(np.multiply, out, x, out)]


def _erf(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    z, p = t
    return [*_atanh_erf(x, p, z, 1), call(np.tanh, p, out)]


def _gelu(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    """x / 2 (1 + erf(x / √2))"""
    z, p = t
    return [
        *_atanh_erf(x, p, z, 0.5**0.5),
        call(np.tanh, p, p),
        call(np.add, p, const(1, x), p),
        call(np.multiply, x, const(0.5, x), z),
        call(np.multiply, p, z, out),
    ]


def _gelu_tanh(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    """x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)), u = √(2/π) (x + 0.044715 x³)"""
    z, p = t
    scale = -2 * (2 / np.pi) ** 0.5
    return [
        call(np.multiply, x, x, z),
        call(np.multiply, z, const(0.044715 * scale, x), z),
        call(np.add, z, const(scale, x), z),
        call(np.multiply, z, x, p),
        call(np.exp, p, p),
        call(np.add, p, const(1, x), p),
        call(np.true_divide, x, p, out),
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
    return [clamp(x, const(0, x), const(np.inf, x), out)]


def _leaky_relu(x: Array, out: Array, t: Sequence[Array], alpha: float) -> list[Call]:
    slope, zero = t
    calls = [call(np.multiply, x, const(alpha, x), slope)]
    if 0 < alpha <= 1:  # infinity times 0 is NaN
        return [*calls, call(np.maximum, x, slope, out)]
    if alpha > 1:
        return [*calls, call(np.minimum, x, slope, out)]
    return [
        call(np.minimum, x, zero, slope),
        call(np.multiply, slope, const(alpha, x), slope),
        call(np.maximum, x, zero, out),
        call(np.add, out, slope, out),
    ]


def _elu(
    x: Array, out: Array, t: Sequence[Array], alpha: float, *, gamma: float = 1.0, width: float = 1.0
) -> list[Call]:
    """gamma x above 0, gamma alpha (exp(x / width) - 1) below"""
    low, zero = t
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
    zero, one = t
    return [
        call(np.multiply, x, const(alpha, x), out),
        call(np.add, out, const(beta, x), out),
        call(np.maximum, out, zero, out),
        call(np.minimum, out, one, out),
    ]


def _hard_swish(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    gate, *limits = t
    return [*_hard_sigmoid(x, gate, limits, 1 / 6, 0.5), call(np.multiply, x, gate, out)]


def _tanh(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    return [call(np.tanh, x, out)]


def _softplus(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    """max(x, 0) + log1p(e), e = exp(-|x|), which does not overflow.

    log1p(e) = log(u) - ((u - 1) - e) / u with u = 1 + e rounded (as in GSL): NumPy's own log1p has no SIMD.
    """
    e, u, rounding, zero = t
    one = const(1, x)
    return [
        call(np.abs, x, e),
        call(np.negative, e, e),
        call(np.exp, e, e),
        call(np.add, e, one, u),
        call(np.subtract, u, one, rounding),
        call(np.subtract, rounding, e, rounding),
        call(np.true_divide, rounding, u, rounding),
        call(np.log, u, u),
        call(np.subtract, u, rounding, u),
        call(np.maximum, x, zero, out),
        call(np.add, out, u, out),
    ]


def _softsign(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    (scale,) = t
    return [call(np.abs, x, scale), call(np.add, scale, const(1, x), scale), call(np.true_divide, x, scale, out)]


def _mish(x: Array, out: Array, t: Sequence[Array]) -> list[Call]:
    """x tanh(softplus(x)) = x n / (n + 2) with e = exp(x), n = e (e + 2); it equals x in float64 from 20 on."""
    n, d, twenty = t
    two = const(2, x)
    return [
        call(np.minimum, x, twenty, d),
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
    for test, edge, shift in ((np.less, -lambd, bias), (np.greater, lambd, -bias)):
        calls += [
            call(test, x, const(edge, x), mask),
            (partial(np.add, where=mask), (x, const(shift, x), result)),
        ]
    return [*calls, copy(out, result)]


class Program(NamedTuple):
    """How one block is computed, and what temporaries that takes: blocks of its dtype, blocks of bool, and blocks
    full of one number each, which np.maximum and np.minimum are faster against than against a single value."""

    emit: Callable[..., list[Call]]
    temporaries: int = 0
    masks: int = 0
    limits: tuple[float, ...] = ()


PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        "erf": Program(_erf, 2),
        "gelu": Program(_gelu, 2),
        "gelu_tanh": Program(_gelu_tanh, 2),
        "sigmoid": Program(_sigmoid),
        "swish": Program(_swish, 1),
        "relu": Program(_relu),
        "leaky_relu": Program(_leaky_relu, 1, limits=(0,)),
        "elu": Program(_elu, 1, limits=(0,)),
        "selu": Program(_selu, 1, limits=(0,)),
        "celu": Program(_celu, 1, limits=(0,)),
        "hard_sigmoid": Program(_hard_sigmoid, limits=(0, 1)),
        "hard_swish": Program(_hard_swish, 1, limits=(0, 1)),
        "tanh": Program(_tanh),
        "softplus": Program(_softplus, 3, limits=(0,)),
        "softsign": Program(_softsign, 1),
        "mish": Program(_mish, 2, limits=(20,)),
        "thresholded_relu": Program(_thresholded_relu, masks=1),
        "shrink": Program(_shrink, 1, masks=1),
    }
)


def blockwise(
    name: str, size: int, dtype: Any, scratch: Scratch, **attrs: float
) -> tuple[list[Call], Callable[[Array, Array], list[Call]]]:
    """The calls to make once, and `emit(x, out)` for blocks of at most `size` elements, which share temporaries."""
    program = PROGRAMS[name]
    half = np.dtype(dtype).itemsize == 2
    work = np.dtype(np.float32) if half else np.dtype(dtype)
    flat = [scratch((size,), work) for _ in range(program.temporaries)]
    flat += [scratch((size,), np.bool_) for _ in range(program.masks)]
    once: list[Call] = []
    for bound in program.limits:
        full, filled = limit(bound, size, work, scratch)
        flat.append(full)
        once += filled
    staging = scratch((size,), work) if half else None

    def emit(x: Array, out: Array) -> list[Call]:
        t = [f[: x.size].reshape(x.shape) for f in flat]
        if staging is None:
            return program.emit(x, out, t, **attrs)
        wide = staging[: x.size].reshape(x.shape)
        return [copy(wide, x), *program.emit(wide, wide, t, **attrs), copy(out, wide)]

    return once, emit


def activation(name: str, x: Array, out: Array, scratch: Scratch, **attrs: float) -> list[Call]:
    """The activation `name` of PROGRAMS over whole arrays; `x` may be strided, and `out` may be `x`."""
    once, emit = blockwise(name, min(out.size, BLOCK), out.dtype, scratch, **attrs)
    return once + [c for src, dst in blocks(x, out) for c in emit(src, dst)]


def swiglu(gate: Array, x: Array, out: Array, scratch: Scratch, *, alpha: float) -> list[Call]:
    """gate sigmoid(alpha gate) x; `out` may be `gate`."""
    calls, emit = blockwise("swish", min(out.size, BLOCK), out.dtype, scratch, alpha=alpha)
    for a, b, dst in blocks(gate, x, out):
        calls += [*emit(a, dst), call(np.multiply, dst, b, dst)]
    return calls


def prelu(x: Array, slope: Array, out: Array, scratch: Scratch) -> list[Call]:
    """max(x, 0) + slope min(x, 0), the slope broadcast to x; `out` may be `x`."""
    size = min(out.size, BLOCK)
    low = scratch((size,), out.dtype)
    zeros, calls = limit(0, size, out.dtype, scratch)
    for (src, dst), (factor,) in cut([x, out], [slope]):
        t, zero = (f[: src.size].reshape(src.shape) for f in (low, zeros))
        calls += [
            call(np.minimum, src, zero, t),
            call(np.multiply, t, factor, t),
            call(np.maximum, src, zero, dst),
            call(np.add, dst, t, dst),
        ]
    return calls
