"""com.microsoft: quantised forms of plain operators, as one table: dequantise, compute, quantise again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site
from infera_gpu.ops._families import normalized
from infera_gpu.ops._ms import F32, ms_op
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.activation import activation
from infera_kernels.portable.quant import dequantize, quantize
from infera_kernels.portable.softmax import softmax

Shape = Callable[[Site], tuple[int, ...]]
Plain = Callable[[Any, Site, Sequence[Array]], Array]
"""The operator on floats: `plain(xp, site, operands)`."""


def _scalars(site: Site, *inputs: int) -> None:
    for i in inputs:
        if site.has(i) and site.spec(i).size != 1:
            raise site.fail(f"input {i} is {site.spec(i)}, expected one number")


def _operand(xp: Any, ins: Sequence[Array | None], i: int) -> Array:
    """Operand, scale and zero point at i, as float32."""
    x, scale, zero = ins[i : i + 3]
    assert x is not None
    assert scale is not None
    return dequantize(xp, x, scale.reshape(()), None if zero is None else zero.reshape(()), F32)


def _again(xp: Any, made: Array, scale: Array, zero: Array | None, dtype: Any) -> Array:
    return quantize(xp, made, scale.reshape(()), None if zero is None else zero.reshape(()), dtype)


def quantized(name: str, operands: int, plain: Plain, shape: Shape, cases: tuple[Case, ...], **attrs: Any) -> Op:
    """An operator of `operands` quantised tensors: each with scale and zero point, then those of the output."""
    n = 3 * operands

    def infer(site: Site) -> tuple[TensorSpec]:
        for i in (*range(0, n, 3), *range(1, n, 3), n):
            site.spec(i)
        _scalars(site, *(i for i in range(n + 2) if i % 3), n)
        return (TensorSpec(shape(site), site.spec(0).dtype),)

    def compute(xp: Any, site: Site, *ins: Array | None) -> Array:
        made = plain(xp, site, [_operand(xp, ins, i) for i in range(0, n, 3)])
        zero = ins[n + 1] if len(ins) > n + 1 else None
        scale = ins[n]
        assert scale is not None
        return _again(xp, made, scale, zero, site.spec(0).dtype)

    return ms_op(name, infer, compute, cases, **attrs)


def _broadcast(site: Site) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(site.spec(0).dims, site.spec(3).dims)
    except ValueError:
        raise site.fail(f"{site.spec(0)} and {site.spec(3)} do not broadcast") from None


def _same(site: Site) -> tuple[int, ...]:
    return site.spec(0).dims


def _pooled(site: Site) -> tuple[int, ...]:
    dims = site.spec(0).dims
    if len(dims) < 3:
        raise site.fail(f"its input is {site.spec(0)}, expected batch, channels and at least one more axis")
    if site.attrs["channels_last"]:
        return (dims[0], *(1,) * (len(dims) - 2), dims[-1])
    return (*dims[:2], *(1,) * (len(dims) - 2))


def _pool(xp: Any, site: Site, ins: Sequence[Array]) -> Array:
    (x,) = ins
    axes = tuple(range(1, x.ndim - 1)) if site.attrs["channels_last"] else tuple(range(2, x.ndim))
    return x.mean(axis=axes, keepdims=True)


def _softmax(xp: Any, site: Site, ins: Sequence[Array]) -> Array:
    (x,) = ins
    (axis,) = normalized(site, [int(site.attrs["axis"])], x.ndim)
    inner = math.prod(x.shape[axis + 1 :]) if int(site.attrs["opset"]) >= 13 else 1
    return softmax(xp, x.reshape(math.prod(x.shape[:axis]), -1, inner)).reshape(x.shape) if x.size else x


def _u8(*shape: int) -> TensorSpec:
    return TensorSpec(shape, np.dtype(np.uint8))


def _scale(value: float) -> Array:
    return np.array(value, np.float32)


def _zero(value: int) -> Array:
    return np.array(value, np.uint8)


# Scales without common factors: exact halves would be rounded either way, by the last bit of the arithmetic.
_A, _B = (_u8(2, 3, 4), _scale(0.0531), _zero(120)), (_u8(3, 1), _scale(0.0217), _zero(10))
_OUT = (_scale(0.0419), _zero(100))
_WIDE: dict[str, Any] = {"low": 0, "high": 255}


def _concat_inputs(site: Site) -> range:
    if len(site.ins) < 5 or (len(site.ins) - 2) % 3:
        raise site.fail(f"{len(site.ins)} inputs, expected scale, zero point, and three for each tensor")
    return range(2, len(site.ins), 3)


def _infer_concat(site: Site) -> tuple[TensorSpec]:
    first = site.spec(2)
    (axis,) = normalized(site, [int(site.attrs["axis"])], first.ndim)
    total = 0
    for i in _concat_inputs(site):
        dims = site.spec(i).dims
        if (*dims[:axis], *dims[axis + 1 :]) != (*first.dims[:axis], *first.dims[axis + 1 :]) or not dims:
            raise site.fail(f"input {i} is {site.spec(i)}, which does not continue {first} along axis {axis}")
        total += dims[axis]
        site.spec(i + 1)
        _scalars(site, i + 1, i + 2)
    site.spec(0)
    _scalars(site, 0, 1)
    return (TensorSpec((*first.dims[:axis], total, *first.dims[axis + 1 :]), site.spec(1).dtype),)


def _concat(xp: Any, site: Site, *ins: Array) -> Array:
    parts = [_operand(xp, ins, i) for i in _concat_inputs(site)]
    return _again(xp, xp.concatenate(parts, axis=int(site.attrs["axis"])), ins[0], ins[1], site.spec(1).dtype)


_BINARY = (Case("broadcast", (*_A, *_B, *_OUT), **_WIDE),)
OPS = (
    quantized("QLinearAdd", 2, lambda xp, site, ins: ins[0] + ins[1], _broadcast, _BINARY),
    quantized("QLinearMul", 2, lambda xp, site, ins: ins[0] * ins[1], _broadcast, _BINARY),
    quantized(
        "QLinearLeakyRelu",
        1,
        lambda xp, site, ins: activation(xp, "leaky_relu", ins[0], alpha=site.attrs["alpha"]),
        _same,
        (Case("plain", (*_A, *_OUT), {"alpha": 0.1}, **_WIDE),),
        alpha=0.01,
    ),
    quantized(
        "QLinearSigmoid",
        1,
        lambda xp, site, ins: activation(xp, "sigmoid", ins[0]),
        _same,
        (Case("plain", (*_A, _scale(1 / 256), _zero(0)), **_WIDE),),
    ),
    quantized(
        "QLinearSoftmax",
        1,
        _softmax,
        _same,
        (Case("last", (*_A, _scale(1 / 256), _zero(0)), {"opset": 13}, **_WIDE),),
        axis=-1,
        opset=REQUIRED,
    ),
    quantized(
        "QLinearGlobalAveragePool",
        1,
        _pool,
        _pooled,
        (Case("images", (_u8(2, 3, 4, 5), _scale(0.05), _zero(120), *_OUT), **_WIDE),),
        channels_last=0,
    ),
    ms_op(
        "QLinearConcat",
        _infer_concat,
        _concat,
        (Case("two", (_scale(0.05), _zero(100), *_A, _u8(2, 5, 4), _scale(0.04), _zero(90)), {"axis": 1}, **_WIDE),),
        axis=REQUIRED,
    ),
)
