"""Convolutions and products of 8-bit integers with all that follows them: what passes make of quantised models on GPUs.

(x, w, bias, residual, factor, x's zero point, the residual's scale and zero point, the result's). Sums of
(x - zero point) times w are exact. Times `factor`, one a channel (x's scale times that of w), they are float32, and so
are the bias and the residual, which is of floats, or of 8-bit integers where it has a scale. After the activation the
result is quantised, times the inverse of its scale, or is of the float type `to`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.op import Case, Cases, Op, Site, f32
from infera_gpu.ops import conv
from infera_gpu.ops._families import FLOAT32, element_type, integers, plain, points, scales, uniform
from infera_gpu.ops._triton_quantized import CONV_KERNELS, CONV_LAST_KERNELS, MATMUL_KERNELS
from infera_gpu.ops.channels_last import ChannelsLast
from infera_gpu.ops.matmul import product_dims
from infera_gpu.ops.window import ATTRS
from infera_gpu.spec import Array, TensorSpec, broadcast_shape
from infera_kernels.portable import quant as portable
from infera_kernels.portable.conv import convolution

X, W, BIAS, RESIDUAL, FACTOR, X_ZERO, R_SCALE, R_ZERO, SCALE, ZERO = range(10)


def _spec(site: Site, dims: tuple[int, ...], channels: int) -> tuple[TensorSpec]:
    """The result's, whose products have these dimensions. Raises PlanError where parameters do not fit."""
    for i in (X, W):
        if site.spec(i).dtype.name not in ("int8", "uint8"):
            raise site.fail(f"input {i} is {site.spec(i)}, expected 8-bit integers")
    if not site.has(FACTOR):
        raise site.fail(f"input {FACTOR}, the factor of every channel's sums, is left out")
    for i in (BIAS, FACTOR):
        if site.has(i) and site.spec(i).dims != (channels,):
            raise site.fail(f"input {i} is {site.spec(i)}, expected {channels} values, one for each channel")
    for i in (X_ZERO, R_SCALE, R_ZERO, SCALE, ZERO):
        if site.has(i) and site.spec(i).size != 1:
            raise site.fail(f"input {i} is {site.spec(i)}, expected one value")
    if site.has(SCALE) != site.has(ZERO) or site.has(R_SCALE) != site.has(R_ZERO):
        raise site.fail("a scale and its zero point come together or not at all")
    conv.activation_of(site)
    if site.has(RESIDUAL):
        try:
            dims = broadcast_shape(dims, site.spec(RESIDUAL).dims)
        except ValueError:
            raise site.fail(f"residual is {site.spec(RESIDUAL)}, expected {list(dims)}") from None
    dtype = site.spec(ZERO).dtype if site.has(ZERO) else element_type(site, "to", FLOAT32)
    return (TensorSpec(dims, dtype),)


def _finished(xp: Any, site: Site, sums: Array, axis: int, ins: Sequence[Array | None]) -> Array:
    """What is made of exact sums, whose channels are an axis."""
    given = [*ins, *[None] * (ZERO + 1 - len(ins))]
    along = [-1 if i == axis % sums.ndim else 1 for i in range(sums.ndim)]
    factor, bias, residual = given[FACTOR], given[BIAS], given[RESIDUAL]
    assert factor is not None
    y = sums.astype(xp.int32).astype(xp.float32) * factor.reshape(along)
    if bias is not None:
        y = y + bias.astype(xp.float32).reshape(along)
    if residual is not None:
        r, scale, zero = residual.astype(xp.float32), given[R_SCALE], given[R_ZERO]
        if scale is not None and zero is not None:
            r = (r - zero.reshape(()).astype(xp.float32)) * scale.reshape(())
        y = y + r
    y = conv.activated(xp, site, y)
    scale, zero = given[SCALE], given[ZERO]
    if scale is None or zero is None:
        made: Array = y.astype(site.outs[0].dtype if site.outs else element_type(site, "to", FLOAT32))
        return made
    return portable.requantize(xp, y, xp.float32(1) / scale.reshape(()), zero.reshape(()))


def _centred(xp: Any, x: Array, zero: Array | None) -> Array:
    """x less its zero point in float64, in which sums are exact: integers have no BLAS."""
    wide = x.astype(xp.float64)
    return wide if zero is None else wide - zero.reshape(()).astype(xp.float64)


def _at(ins: Sequence[Array | None], i: int) -> Array | None:
    return ins[i] if i < len(ins) else None


# ---- QuantizedConv


def _infer_conv(site: Site) -> tuple[TensorSpec]:
    found = conv.conv_window(site)
    channels = site.spec(W).dims[0]
    return _spec(site, (site.spec(X).dims[0], channels, *found.out), channels)


def _conv(xp: Any, site: Site, *ins: Array | None) -> Array:
    x, w = ins[X], ins[W]
    assert x is not None
    assert w is not None
    found = conv.conv_window(site)
    data, weights = _centred(xp, x, _at(ins, X_ZERO)), w.astype(xp.float64)
    group = int(site.attrs["group"])
    sums = convolution(xp, data, weights, None, found.out, group=group, **found.params)
    return _finished(xp, site, sums, 1, ins)


# ---- QuantizedMatMul: x (..., K), w (K, N)


def _infer_product(site: Site) -> tuple[TensorSpec]:
    w = site.spec(W)
    if w.ndim != 2:
        raise site.fail(f"weights are {w}, expected (K, N)")
    return _spec(site, product_dims(site, site.spec(X).dims, w.dims), w.dims[1])


def _product(xp: Any, site: Site, *ins: Array | None) -> Array:
    x, w = ins[X], ins[W]
    assert x is not None
    assert w is not None
    return _finished(xp, site, xp.matmul(_centred(xp, x, _at(ins, X_ZERO)), w.astype(xp.float64)), -1, ins)


# ---- cases

_S8, _U8, _F16 = np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.float16)


def _bytes(dtype: Any, *shape: int) -> TensorSpec:
    return TensorSpec(shape, np.dtype(dtype))


def _factor(channels: int) -> Any:
    return uniform(channels, 0.0005, 0.002, channels)


def _quantised(scale: float, zero: int, dtype: Any = _S8) -> tuple[Any, Any]:
    return scales(scale), points(zero, dtype=dtype)


def _case(
    name: str, x: tuple[int, ...], w: tuple[int, ...], channels: int, bias: Any = None, residual: Any = None,
    zero: int = 0, of_residual: tuple[Any, Any] = (None, None), of_result: tuple[Any, Any] = (None, None),
    attrs: dict[str, Any] | None = None, tol: float = 1e-5,
) -> Case:  # fmt: skip
    ins = (
        _bytes(_S8, *x), integers(1, _S8, *w), bias, residual, _factor(channels), points(zero, dtype=_S8),
        *of_residual, *of_result,
    )  # fmt: skip
    last = max(i for i, value in enumerate(ins) if value is not None) + 1
    return Case(name, ins[:last], attrs or {}, low=-128, high=127, tol=tol)


_ROUND = _quantised(0.25, 3)
_OTHER = _quantised(0.5, -7)
_SAME: dict[str, Any] = {"pads": (1, 1, 1, 1)}

_CONV_CASES = Cases(
    lambda: (
        _case("padded", (2, 6, 5, 7), (5, 6, 3, 3), 5, f32(5), of_result=_ROUND, attrs=_SAME),
        _case("zero-point", (2, 32, 5, 4), (5, 32, 3, 2), 5, f32(5), None, 5, of_result=_ROUND,
              attrs={"pads": (2, 1, 0, 1), "strides": (2, 1), "dilations": (1, 2)}),
        _case("inside", (1, 33, 6, 5), (20, 33, 3, 3), 20, None, None, -128, of_result=_quantised(0.5, 99, _U8)),
        _case("residual", (2, 16, 4, 5), (32, 16, 1, 1), 32, f32(32), _bytes(_S8, 2, 32, 4, 5), 2, _OTHER, _ROUND,
              {"activation": "relu"}),
        _case("uint8-residual", (1, 64, 5, 5), (7, 64, 3, 3), 7, None, _bytes(_U8, 1, 7, 5, 5), 0,
              _quantised(0.1, 130, _U8), _ROUND, {"activation": "clip", "activation_params": (-3.0, 20.0), **_SAME}),
        _case("half-residual", (1, 8, 5, 5), (7, 8, 3, 3), 7, f32(7), TensorSpec((1, 7, 3, 3), _F16), 0,
              of_result=_ROUND, attrs={"activation": "leaky_relu", "activation_params": (0.125,)}),
        _case("floats", (2, 5, 6, 5), (9, 5, 2, 2), 9, f32(9), f32(2, 9, 5, 4), 4, attrs={"activation": "swish"}),
        _case("halves", (2, 12, 6, 5), (9, 4, 2, 2), 9, f32(9), tol=1e-3,
              attrs={"group": 3, "to": 10, "activation": "gelu"}),
        _case("colours", (2, 3, 11, 9), (8, 3, 7, 7), 8, f32(8), None, -20, of_result=_ROUND,
              attrs={"strides": (2, 2), "pads": (3, 3, 3, 3), "activation": "relu"}),
        _case("grouped", (1, 8, 5, 5), (6, 4, 3, 3), 6, f32(6), None, 9, of_result=_ROUND, attrs={"group": 2, **_SAME}),
        _case("depthwise", (1, 5, 5, 6), (5, 1, 3, 3), 5, f32(5), of_result=_ROUND, attrs={"group": 5, **_SAME}),
        _case("1d", (2, 4, 9), (3, 4, 3), 3, f32(3), None, 6, of_result=_ROUND,
              attrs={"pads": (2, 0), "dilations": (2,)}),
        _case("strided-pointwise", (1, 64, 5, 4), (16, 64, 1, 1), 16, None, None, 1, of_result=_ROUND,
              attrs={"strides": (2, 3)}),
        _case("many-channels", (1, 130, 3, 3), (40, 130, 2, 2), 40, f32(40), of_result=_ROUND),
    )
)  # fmt: skip

_PRODUCT_CASES = Cases(
    lambda: (
        _case("residual", (2, 5, 70), (70, 33), 33, f32(33), _bytes(_S8, 2, 5, 33), -5, _OTHER, _ROUND),
        _case("half-residual", (3, 64), (64, 48), 48, f32(48), TensorSpec((3, 48), _F16), attrs={"to": 10}, tol=1e-3),
        _case("gelu", (7, 32), (32, 16), 16, f32(16), of_result=_quantised(4.0, 1), attrs={"activation": "gelu"}),
        _case("floats", (1, 3, 17), (17, 5), 5, zero=3),
        _case("half-bias", (3, 16), (16, 8), 8, TensorSpec((8,), _F16), attrs={"to": 10}, tol=1e-3),
        _case("broadcast", (1, 3, 16), (16, 8), 8, residual=f32(2, 3, 8), of_result=_ROUND),
    )
)

_FINISH = {"activation": "", "activation_params": (), "to": 1}
_CONV = Op(
    "QuantizedConv", 1, _infer_conv, plain(_conv), _CONV_CASES, {**ATTRS, "group": 1, **_FINISH}, "infera",
    CONV_KERNELS,
)  # fmt: skip
CONV = ChannelsLast(_CONV, images=(X, RESIDUAL))

OPS: tuple[Op, ...] = (
    _CONV,
    replace(CONV.op(_CONV_CASES, {}), kernels=CONV_LAST_KERNELS),
    Op("QuantizedMatMul", 1, _infer_product, plain(_product), _PRODUCT_CASES, _FINISH, "infera", MATMUL_KERNELS),
)
