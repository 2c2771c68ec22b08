"""Convolutions of quantised tensors: QLinearConv."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Buffers, Call, Case, Kernel, Op, Site
from infera_gpu.ops import _jit_quant
from infera_gpu.ops._families import plain
from infera_gpu.ops._triton_quant_conv import Form, integer_conv
from infera_gpu.ops._triton_quant_matmul import scaled
from infera_gpu.ops.conv import as_2d, window_2d
from infera_gpu.ops.quant_matmul import check_parameters, column, reach, require_parameters
from infera_gpu.ops.window import ATTRS, channels_first, window
from infera_gpu.spec import Array, DType, TensorSpec
from infera_kernels.calls import Scratch
from infera_kernels.cpu import quant as cpu
from infera_kernels.cpu.conv import conv2d
from infera_kernels.cpu.elementwise import copy
from infera_kernels.portable import conv as portable_conv
from infera_kernels.portable import quant as portable


def conv_spec(site: Site) -> tuple[TensorSpec]:
    """The output of QLinearConv."""
    require_parameters(site)
    x, w = site.spec(0), site.spec(3)
    group = int(site.attrs["group"])
    if x.ndim < 3 or x.ndim != w.ndim or group < 1 or x.dims[1] != w.dims[1] * group or w.dims[0] % group:
        raise site.fail(f"weights {w} do not fit {x} in {group} groups")
    check_parameters(site, (1, 2, 6, 7), (4, 5), w.dims[0])
    if site.has(8) and site.spec(8).dims != w.dims[:1]:
        raise site.fail(f"bias is {site.spec(8)}, expected {w.dims[0]} elements")
    shape = (x.dims[0], w.dims[0], *window(site, w.dims[2:]).out)
    return (TensorSpec(shape, site.spec(7).dtype),)


def conv(
    xp: Any,
    site: Site,
    x: Array,
    x_scale: Array,
    x_zero: Array,
    w: Array,
    w_scale: Array,
    w_zero: Array,
    y_scale: Array,
    y_zero: Array,
    bias: Array | None = None,
) -> Array:
    """QLinearConv. Padding holds the zero point, which is 0 once the inputs are centred.

    Sums are float64, exact below 2**53, because integer products have no BLAS.
    """
    view = window(site, w.shape[2:])
    data, weights = (portable.centred(xp, q, zero, 0).astype(xp.float64) for q, zero in ((x, x_zero), (w, w_zero)))
    group = int(site.attrs["group"])
    sums = portable_conv.convolution(xp, data, weights, bias, view.out, group=group, **view.params)
    factor = x_scale.reshape(()) * w_scale / y_scale.reshape(())
    return portable.requantize(xp, sums, portable.aligned(xp, factor, sums.shape, 1), y_zero.reshape(()))


# ---- on the CPU


def _dtype(site: Site, known: HostArray | None) -> DType:
    """float32 where no sum of the products passes what it holds exactly, float64 elsewhere."""
    left = reach(site, 0, 2)
    if known is not None:
        largest = np.abs(known).reshape(len(known), -1).sum(1, dtype=np.float64).max(initial=0) * left
    else:
        largest = left * reach(site, 3, 5) * math.prod(site.spec(3).dims[1:])
    return np.dtype(np.float32 if largest <= cpu.EXACT else np.float64)


def _centred(site: Site, weights: HostArray) -> HostArray:
    """int32 weights less their zero points, which are known."""
    made: HostArray = portable.centred(np, weights, site.value(5), 0)
    return made


def _wide(q: Array, zero: Array, dtype: DType, scratch: Scratch) -> tuple[Array, list[Call]]:
    """q - zero in a floating-point type, the zero point broadcasting."""
    wide, shift = scratch(q.shape, dtype), scratch(zero.shape, dtype)
    return wide, [(np.copyto, (wide, q)), (np.copyto, (shift, zero)), (np.subtract, (wide, shift, wide))]


def _bind(site: Site, io: Buffers) -> list[Call]:
    last = bool(site.attrs.get("channels_last", 0))
    found = window_2d(window(channels_first(site) if last else site, site.spec(3).dims[2:]))
    x, w, out = (np.moveaxis(io.ins[0], -1, 1) if last else io.ins[0]), io.ins[3], io.outs[0]
    weights, point = site.value(3), site.value(5)
    known = None if weights is None or point is None else _centred(site, weights)
    dtype = _dtype(site, known)
    data, calls = _wide(x, io.ins[2].reshape(()), dtype, io.scratch)
    if known is None:
        zero = io.ins[5]
        zero = zero.reshape(()) if zero.size == 1 else zero.reshape(-1, *(1,) * (w.ndim - 1))
        taps, more = _wide(w, zero, dtype, io.scratch)
        calls += more
    else:
        taps = io.pack(3, f"centred {dtype} {known.shape} {point}", lambda v: _centred(site, v).astype(dtype))
    shape = (x.shape[0], w.shape[0], *found.out[-(w.ndim - 2) :])
    exact, sums = io.scratch(shape, dtype), io.scratch(shape, np.int32)
    calls += conv2d(
        as_2d(data), as_2d(taps), None, as_2d(exact), io.scratch, group=int(site.attrs["group"]), **found.params
    )
    calls.append(copy(sums, exact))
    if site.has(8):
        calls.append((np.add, (sums, io.ins[8].reshape(-1, *(1,) * (w.ndim - 2)), sums)))
    factor, zero, more = _factor(io)
    made = io.scratch(shape, out.dtype) if last else out
    channels = factor if factor.ndim == 0 else factor.reshape(-1, *(1,) * (w.ndim - 2))
    calls += [*more, *cpu.requantize(sums, channels, zero, made, io.scratch)]
    return [*calls, (np.copyto, (out, np.moveaxis(made, 1, -1)))] if last else calls


def _factor(io: Buffers) -> tuple[Array, Array, list[Call]]:
    """What to multiply sums by, one value or one a channel, the output's zero point, and the calls that find them."""
    scale = column(io.ins[4])
    factor = io.scratch(scale.shape, np.float32)
    zero, calls = cpu.as_float(io.ins[7].reshape(()), io.scratch)
    assert zero is not None
    calls += [
        (np.multiply, (io.ins[1].reshape(()), scale, factor)),
        (np.true_divide, (factor, io.ins[6].reshape(()), factor)),
    ]
    return factor, zero, calls


def _bind_compiled(site: Site, io: Buffers) -> list[Call]:
    last = bool(site.attrs.get("channels_last", 0))
    found = window_2d(window(channels_first(site) if last else site, site.spec(3).dims[2:]))
    x, y = (a if a.ndim == 4 else np.expand_dims(a, 1 if last else 2) for a in (io.ins[0], io.outs[0]))
    factor, zero, calls = _factor(io)
    return [*calls, *_jit_quant.convolution(site, io, found, x, y, factor, zero, last=last)]


def _supported(site: Site) -> bool:
    eight_bit = all(site.spec(i).dtype.name in ("uint8", "int8") for i in (0, 3, 7))
    return eight_bit and site.spec(0).ndim in (3, 4) and min(site.spec(0).size, site.spec(3).size) > 0


KERNELS = {
    "cpu": Kernel(bind=_bind, supports=_supported, strided=True),
    "jit": Kernel(bind=_bind_compiled, supports=lambda site: _supported(site) and _jit_quant.convolves(site)),
    **integer_conv(Form((0, 2, 3, 5), scaled(1, 4, 6, 7), 8)),
}


# ---- cases


def _spec(dtype: Any, *shape: int) -> TensorSpec:
    return TensorSpec(shape, np.dtype(dtype))


def _scale(value: float) -> HostArray:
    return np.array(value, np.float32)


def _point(value: int, dtype: Any = np.uint8) -> HostArray:
    return np.array(value, dtype)


_LIMITS: dict[str, Any] = {"low": -128, "high": 255}


def conv_case(id: str, w: DType, *shapes: tuple[int, ...], per_channel: bool = False, **attrs: Any) -> Case:
    """A case of QLinearConv with uint8 inputs."""
    x_shape, w_shape = shapes
    out = w_shape[0]
    scale = np.linspace(0.01, 0.05, out, dtype=np.float32) if per_channel else _scale(0.02)
    zero = np.zeros(out, w) if per_channel else _point(2, w)
    bias = np.arange(out, dtype=np.int32) * 50
    ins = (
        _spec(np.uint8, *x_shape),
        _scale(0.05),
        _point(120),
        _spec(w, *w_shape),
        scale,
        zero,
        _scale(0.5),
        _point(99),
        bias,
    )
    return Case(id, ins, attrs, **_LIMITS)


_QLINEAR_CONV = Op(
    "QLinearConv",
    10,
    infer=conv_spec,
    compute=plain(conv),
    kernels=KERNELS,
    attrs={**ATTRS, "group": 1},
    cases=(
        conv_case("padded", np.dtype(np.uint8), (1, 2, 5, 6), (3, 2, 3, 3), pads=(1, 1, 1, 1)),
        conv_case("channels", np.dtype(np.int8), (2, 2, 5, 6), (3, 2, 3, 3), per_channel=True, strides=(2, 1)),
        conv_case("sums_past_float32", np.dtype(np.int8), (1, 64, 6, 6), (8, 64, 3, 3)),
        conv_case("tiles", np.dtype(np.int8), (1, 3, 13, 14), (9, 3, 3, 3), per_channel=True, pads=(1, 1, 1, 1)),
        conv_case("pointwise", np.dtype(np.uint8), (2, 6, 5, 4), (4, 6, 1, 1)),
        conv_case("1d", np.dtype(np.int8), (2, 4, 9), (3, 4, 3), pads=(2, 0), dilations=(2,)),
        conv_case("depthwise", np.dtype(np.int8), (1, 4, 5, 5), (4, 1, 3, 3), per_channel=True, group=4),
    ),
)

OPS: tuple[Op, ...] = (_QLINEAR_CONV,)
