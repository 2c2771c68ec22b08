"""com.microsoft: quantised forms of plain operators, as one table: dequantise, compute, quantise again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Kernel, Op, Site
from infera_gpu.ops._families import normalized, points, scales, u8
from infera_gpu.ops._ms import F32, ms_op
from infera_gpu.ops._triton_quantised import MEAN, elementwise, joined
from infera_gpu.ops._triton_quantised import softmax as rows
from infera_gpu.ops.pool import compute_average, pool_attrs, pool_spec
from infera_gpu.ops.window import channels_last
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.activation import activation
from infera_kernels.portable.quant import added, centred, dequantize, quantize, requantize
from infera_kernels.portable.softmax import softmax

Shape = Callable[[Site], tuple[int, ...]]
Plain = Callable[[Any, Site, Sequence[Array]], Array]
"""The operator on floats: `plain(xp, site, operands)`."""


Operands = Sequence[tuple[Array, Array | None]]
"""Quantised tensors and their zero points."""
Integers = Callable[[Any, Site, Operands, Sequence[Array], Array, Array], Array]
"""It on integers: `integers(xp, site, operands, their scales, the output's scale and zero point)`.

What lies halfway between two integers then does so exactly, where the scales allow it.
"""


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


def _again(xp: Any, made: Array, scale: Array, zero: Array | None, dtype: Any, *, shifted_first: bool = False) -> Array:
    """`made` quantised. `shifted_first` adds the zero point before rounding, which moves halves."""
    scale, zero = scale.reshape(()), None if zero is None else zero.reshape(())
    if shifted_first and zero is not None:
        made, scale, zero = made / scale + zero.astype(F32), xp.ones_like(scale), None
    return quantize(xp, made, scale, zero, dtype)


def quantized(
    name: str,
    operands: int,
    plain: Plain | None,
    shape: Shape,
    cases: tuple[Case, ...],
    integers: Integers | None = None,
    first: int = 0,
    shifted_first: bool = False,
    kernels: Mapping[str, Kernel] | None = None,
    **attrs: Any,
) -> Op:
    """An operator of `operands` quantised tensors: each with scale and zero point, then those of the output.

    `first` inputs come before them as they are, and go to `plain` before the others. Without `plain` it is what
    `integers` makes.
    """
    n = first + 3 * operands
    tensors = range(first, n, 3)

    def infer(site: Site) -> tuple[TensorSpec]:
        for i in (*range(first), *tensors, *(i + 1 for i in tensors), n):
            site.spec(i)
        _scalars(site, *(i + k for i in tensors for k in (1, 2)), n, n + 1)
        return (TensorSpec(shape(site), site.spec(first).dtype),)

    def compute(xp: Any, site: Site, *ins: Array | None) -> Array:
        zero = ins[n + 1] if len(ins) > n + 1 else None
        scale = ins[n]
        assert scale is not None
        if integers is not None:
            point = xp.zeros((), site.spec(first).dtype) if zero is None else zero.reshape(())
            given: list[Any] = [(ins[i], ins[i + 2]) for i in tensors]
            scales: list[Any] = [ins[i + 1] for i in tensors]
            return integers(xp, site, given, [s.reshape(()) for s in scales], scale.reshape(()), point)
        assert plain is not None
        made = plain(xp, site, [*ins[:first], *(_operand(xp, ins, i) for i in tensors)])
        return _again(xp, made, scale, zero, site.spec(first).dtype, shifted_first=shifted_first)

    return ms_op(name, infer, compute, cases, kernels=kernels, **attrs)


def _broadcast(*inputs: int) -> Shape:
    def shape(site: Site) -> tuple[int, ...]:
        specs = [site.spec(i) for i in inputs]
        try:
            return np.broadcast_shapes(*(s.dims for s in specs))
        except ValueError:
            raise site.fail(f"{', '.join(map(str, specs))} do not broadcast") from None

    return shape


def _same(site: Site) -> tuple[int, ...]:
    return site.spec(0).dims


def _pooled(site: Site) -> tuple[int, ...]:
    dims = site.spec(0).dims
    inner = dims[1:-1] if site.attrs["channels_last"] else dims[2:]
    if len(dims) < 3 or 0 in inner:
        raise site.fail(f"its input is {site.spec(0)}, expected batch, channels and axes to pool over, none empty")
    if site.attrs["channels_last"]:
        return (dims[0], *(1,) * (len(dims) - 2), dims[-1])
    return (*dims[:2], *(1,) * (len(dims) - 2))


def _mean(xp: Any, site: Site, operands: Operands, scales: Sequence[Array], scale: Array, zero: Array) -> Array:
    (x,) = (centred(xp, q, point, 0) for q, point in operands)
    axes = tuple(range(1, x.ndim - 1)) if site.attrs["channels_last"] else tuple(range(2, x.ndim))
    sums = x.sum(axis=axes, keepdims=True)
    return requantize(xp, sums, scales[0] / (scale * np.float32(x.size // sums.size)), zero)


_AVERAGE = channels_last(pool_spec, partial(compute_average, in_order=True), lambda site: site.attrs["channels_last"])


def _sum(xp: Any, site: Site, operands: Operands, scales: Sequence[Array], scale: Array, zero: Array) -> Array:
    return added(xp, operands, [s / scale for s in scales], zero)


def _product(xp: Any, site: Site, operands: Operands, scales: Sequence[Array], scale: Array, zero: Array) -> Array:
    a, b = (centred(xp, q, point, 0) for q, point in operands)
    return requantize(xp, a * b, scales[0] * scales[1] / scale, zero)


def _softmax(xp: Any, site: Site, ins: Sequence[Array]) -> Array:
    (x,) = ins
    return softmax(xp, x.reshape(_rows(site))).reshape(x.shape) if x.size else x


def _rows(site: Site) -> tuple[int, int, int]:
    """The input's shape as (outer, what sums to 1, inner): before opset 13 that was all axes from `axis` on."""
    dims = site.spec(0).dims
    (axis,) = normalized(site, [int(site.attrs["axis"])], len(dims))
    inner = math.prod(dims[axis + 1 :]) if int(site.attrs["opset"]) >= 13 else 1
    return math.prod(dims[:axis]), math.prod(dims[axis:]) // max(inner, 1), inner


# Scales without common factors: exact halves would be rounded either way, by the last bit of the arithmetic.
_A, _B = (u8(2, 3, 4), scales(0.0531), points(120)), (u8(3, 1), scales(0.0217), points(10))
_OUT = (scales(0.0419), points(100))
_WIDE: dict[str, Any] = {"low": 0, "high": 255}


def _concat_inputs(site: Site) -> range:
    if len(site.ins) < 5 or (len(site.ins) - 2) % 3:
        raise site.fail(f"{len(site.ins)} inputs, expected scale, zero point, and three for each tensor")
    return range(2, len(site.ins), 3)


def _axis(site: Site) -> int:
    (axis,) = normalized(site, [int(site.attrs["axis"])], site.spec(2).ndim)
    return axis


def _infer_concat(site: Site) -> tuple[TensorSpec]:
    first, axis = site.spec(2), _axis(site)
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


_HALVES = Case(
    "halves",
    (
        u8(20, 30),
        scales(2 / 255),
        points(128),
        np.array(255, np.uint8),
        scales(1 / 255),
        points(0),
        scales(2 / 255),
        points(3),
    ),
    **_WIDE,
)
_BINARY = (Case("broadcast", (*_A, *_B, *_OUT), **_WIDE), _HALVES)
OPS = (
    quantized(
        "QLinearAdd", 2, None, _broadcast(0, 3), (*_BINARY, _HALVES), integers=_sum, kernels=elementwise("add", 2)
    ),
    quantized(
        "QLinearMul", 2, None, _broadcast(0, 3), (*_BINARY, _HALVES), integers=_product, kernels=elementwise("mul", 2)
    ),
    quantized(
        "QLinearLeakyRelu",
        1,
        lambda xp, site, ins: activation(xp, "leaky_relu", ins[0], alpha=site.attrs["alpha"]),
        _same,
        (Case("plain", (*_A, *_OUT), {"alpha": 0.1}, **_WIDE),),
        kernels=elementwise("leaky_relu", 1),
        alpha=0.01,
    ),
    quantized(
        "QLinearSigmoid",
        1,
        lambda xp, site, ins: activation(xp, "sigmoid", ins[0]),
        _same,
        (Case("plain", (*_A, scales(1 / 256), points(0)), **_WIDE),),
        kernels=elementwise("sigmoid", 1),
    ),
    quantized(
        "QLinearSoftmax",
        1,
        _softmax,
        _same,
        (
            Case("last", (*_A, scales(1 / 256), points(0)), {"opset": 13}, **_WIDE),
            Case("middle", (*_A, scales(1 / 256), points(0)), {"opset": 13, "axis": 1}, **_WIDE),
            Case("flat", (*_A, scales(1 / 256), points(0)), {"opset": 12, "axis": 1}, **_WIDE),
        ),
        kernels=rows(_rows),
        axis=-1,
        opset=REQUIRED,
    ),
    quantized(
        "QLinearGlobalAveragePool",
        1,
        None,
        _pooled,
        (
            Case("halves", (u8(2, 3, 4, 4), scales(0.05), points(120), scales(0.05), points(3)), **_WIDE),
            Case("images", (u8(2, 3, 4, 5), scales(0.05), points(120), *_OUT), **_WIDE),
            Case("last", (u8(2, 9, 8, 3), scales(0.05), points(120), *_OUT), {"channels_last": 1}, **_WIDE),
        ),
        integers=_mean,
        kernels=MEAN,
        channels_last=0,
    ),
    quantized(
        "QLinearAveragePool",
        1,
        lambda xp, site, ins: _AVERAGE[1](xp, site, ins[0]),
        lambda site: _AVERAGE[0](site)[0].dims,
        (
            Case("2d", (u8(2, 3, 6, 5), scales(0.0531), points(120), *_OUT), {"kernel_shape": (3, 2)}, **_WIDE),
            Case(
                "padded",
                (u8(1, 3, 6, 5), scales(0.0531), points(120), *_OUT),
                {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "strides": (2, 1)},
                **_WIDE,
            ),
            Case(
                "last",
                (u8(1, 6, 5, 3), scales(0.0531), points(120), *_OUT),
                {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "count_include_pad": 1, "channels_last": 1},
                **_WIDE,
            ),
            Case(
                "quarters",
                (u8(1, 3, 8, 8), scales(0.05), points(4), scales(0.05), points(3)),
                {"kernel_shape": (2, 2), "strides": (2, 2)},
                **_WIDE,
            ),
            Case(
                "halves",
                (u8(1, 3, 6, 5), scales(0.05), points(3), scales(0.05), points(3)),
                {"kernel_shape": (2, 1)},
                **_WIDE,
            ),
        ),
        shifted_first=True,
        **pool_attrs("dilations", ceil_mode=0, count_include_pad=0),
        channels_last=0,
    ),
    quantized(
        "QLinearWhere",
        2,
        lambda xp, site, ins: xp.where(*ins),
        _broadcast(0, 1, 4),
        (Case("broadcast", (TensorSpec((3, 4), np.dtype(np.bool_)), *_A, *_B, *_OUT), **_WIDE),),
        first=1,
    ),
    ms_op(
        "QLinearConcat",
        _infer_concat,
        _concat,
        (Case("two", (scales(0.05), points(100), *_A, u8(2, 5, 4), scales(0.04), points(90)), {"axis": 1}, **_WIDE),),
        kernels=joined(_axis),
        axis=REQUIRED,
    ),
)
