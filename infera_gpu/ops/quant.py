"""Linear quantisation: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from infera_gpu.op import Buffers, Call, Case, Cases, Kernel, Op, Site, f32
from infera_gpu.ops import _jit_quant, _triton_quant
from infera_gpu.ops._families import FLOAT32, NARROW, element_type, is_native, narrow, plain
from infera_gpu.spec import Array, DType, TensorSpec, onnx_of_dtype
from infera_kernels.cpu import quant as cpu
from infera_kernels.portable import quant as portable
from infera_kernels.portable.quant import is_integer

UINT8 = np.dtype(np.uint8)


def _block(site: Site) -> int:
    return int(site.attrs.get("block_size", 0))


def _axis(site: Site) -> int:
    """The axis that scales run along: without meaning, and so not checked, where there is but one scale."""
    return site.axis() if "axis" in site.attrs and site.spec(1).size > 1 else 0


def _place(site: Site) -> tuple[int, int]:
    return _axis(site), _block(site)


def _check_scale(site: Site) -> None:
    x, scale, axis, block = site.spec(0), site.spec(1), _axis(site), _block(site)
    if site.has(2) and site.spec(2).size != 1 and site.spec(2).dims != scale.dims:
        raise site.fail(f"zero point is {site.spec(2)}, expected one value or the shape of the scale, {scale}")
    if scale.size == 1 and not block:
        return
    if block:
        blocked = tuple(-(-d // block) if i == axis else d for i, d in enumerate(x.dims))
        if scale.dims != blocked:
            raise site.fail(
                f"scale is {scale}, expected {list(blocked)} for blocks of {block} along axis {axis} of {x}"
            )
    elif scale.dims != x.dims[axis : axis + 1]:
        raise site.fail(f"scale is {scale}, expected one value, or one for each element of axis {axis} of {x}")


def _target(site: Site) -> DType:
    if site.has(2):
        return site.spec(2).dtype
    return element_type(site, "output_dtype", UINT8)


def _parameters(xp: Any, site: Site, *parameters: Array | None) -> list[Array | None]:
    shape = site.spec(0).dims
    return [None if p is None else portable.aligned(xp, p, shape, _axis(site), _block(site)) for p in parameters]


def _quantize_spec(site: Site) -> tuple[TensorSpec]:
    _check_scale(site)
    return (TensorSpec(site.spec(0).shape, _target(site)),)


def _quantize(xp: Any, site: Site, x: Array, scale: Array, zero: Array | None = None) -> Array:
    factor, shift = _parameters(xp, site, scale, zero)
    saturate = bool(site.attrs.get("saturate", 1))
    return portable.quantize(xp, x, factor, shift, _target(site), saturate=saturate)


def _zero(site: Site, io: Buffers, i: int) -> tuple[Array | None, list[Call]]:
    """Input i, a zero point, as float32: None where it is left out or known to be 0."""
    known = site.value(i)
    if not site.has(i) or (known is not None and not known.any()):
        return None, []
    if known is not None:
        return io.pack(i, "float32", lambda v: v.astype(np.float32)), []
    return cpu.as_float(io.ins[i], io.scratch)


def _bind_quantize(site: Site, io: Buffers) -> list[Call]:
    zero, calls = _zero(site, io, 2)
    factor, shift = _parameters(np, site, io.ins[1], zero)
    return calls + cpu.quantize(io.ins[0], factor, shift, io.outs[0], io.scratch)


def _plain_types(wide: TensorSpec, scale: TensorSpec, narrow: TensorSpec) -> bool:
    """Whether it is float32 on the wide side and an integer of at most 32 bits that NumPy knows on the narrow one."""
    small = is_native(narrow.dtype) and narrow.dtype.kind in "iu" and narrow.dtype.itemsize <= 4
    return wide.dtype == scale.dtype == FLOAT32 and small


def _quantize_supported(site: Site) -> bool:
    return _plain_types(site.spec(0), site.spec(1), site.outs[0]) and not _block(site)


def _dequantize_supported(site: Site) -> bool:
    return _plain_types(site.outs[0], site.spec(1), site.spec(0)) and not _block(site)


def _u8(*shape: int) -> TensorSpec:
    return TensorSpec(shape, UINT8)


def _scalar(value: float, dtype: Any = np.float32) -> np.ndarray[Any, np.dtype[Any]]:
    return np.array(value, dtype)


_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_TARGETS = {d: since for d, since in NARROW.items() if d != _E8M0} | {
    np.dtype(t): 28 for t in (ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn)
}
"""The narrow types to quantise to, and the opset from which ONNX has them; float8_e8m0 is one for scales."""

_POWER_SCALE = (
    Case("power_scale", (f32(3, 5), np.array(0.25).astype(_E8M0)), {"output_dtype": 3}, opset=24),
)  # fmt: skip
_POWER_SCALE_BACK = (
    Case("power_scale", (np.arange(-3, 3, dtype=np.int8), np.array(0.25).astype(_E8M0)), {"output_dtype": 1}, opset=24),
)  # fmt: skip
_SCALES = np.array([0.02, 0.1, 0.5], np.float32)
_ZEROS = np.array([128, 0, 255], np.uint8)
_SIGNED = np.array([3, 0, -7], np.int8)
_TIES = np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 1e9, -1e9], np.float32)

_TENSOR_CASES = (
    Case("no_zero", (f32(3, 5), _scalar(0.02))),
    Case("uint8", (f32(3, 5), _scalar(0.02), _scalar(128, np.uint8))),
    Case("int8", (f32(3, 5), _scalar(0.02), _scalar(-5, np.int8))),
    Case("ties", (_TIES, _scalar(1), _scalar(3, np.uint8))),
    Case("past_block", (f32(3, 24001), _scalar(0.02), _scalar(7, np.uint8))),
    Case("empty", (f32(0, 5), _scalar(0.02), _scalar(7, np.uint8))),
)
_AXIS_CASES = (
    Case("rows", (f32(3, 5), _SCALES, _ZEROS), {"axis": 0}),
    Case("channels", (f32(2, 3, 4, 5), _SCALES, _SIGNED)),
    Case("last", (f32(4, 3), _SCALES, _SIGNED), {"axis": -1}),
    Case("channels_past_block", (f32(2, 3, 3, 4001), _SCALES, _ZEROS)),
)
_BLOCK_SCALES = np.array([[0.02, 0.1], [0.5, 0.05], [0.3, 0.01]], np.float32)
_QUANTIZE_21 = (
    Case("blocks", (f32(3, 8), _BLOCK_SCALES), {"axis": 1, "block_size": 4, "output_dtype": 2}),
    Case("uint16", (f32(3, 5), _scalar(0.001), _scalar(30000, np.uint16))),
    Case("int16", (f32(3, 5), _scalar(0.001), _scalar(-100, np.int16))),
    Case("output_dtype", (f32(3, 5), _scalar(0.02)), {"output_dtype": 3}),
    Case("blocks_and_a_rest", (f32(3, 7), _BLOCK_SCALES), {"axis": 1, "block_size": 4, "output_dtype": 3}),
)


def _quantize_op(since: int, attrs: dict[str, Any], cases: tuple[Case, ...], domain: str = "") -> Op:
    return Op(
        "QuantizeLinear",
        since,
        domain=domain,
        infer=_quantize_spec,
        compute=plain(_quantize),
        kernels={"cpu": Kernel(bind=_bind_quantize, supports=_quantize_supported, strided=True)}
        | _triton_quant.quantize(_place)
        | _jit_quant.quantize(_quantize_supported),
        attrs=attrs,
        cases=cases,
    )


def _dequantize_spec(site: Site) -> tuple[TensorSpec]:
    _check_scale(site)
    return (TensorSpec(site.spec(0).shape, element_type(site, "output_dtype", site.spec(1).dtype)),)


def _dequantize(xp: Any, site: Site, q: Array, scale: Array, zero: Array | None = None) -> Array:
    factor, shift = _parameters(xp, site, scale, zero)
    return portable.dequantize(xp, q, factor, shift, element_type(site, "output_dtype", scale.dtype))


def _bind_dequantize(site: Site, io: Buffers) -> list[Call]:
    zero, calls = _zero(site, io, 2)
    factor, shift = _parameters(np, site, io.ins[1], zero)
    return calls + cpu.dequantize(io.ins[0], factor, shift, io.outs[0])


def _dequantize_op(since: int, attrs: dict[str, Any], cases: tuple[Case, ...], domain: str = "") -> Op:
    return Op(
        "DequantizeLinear",
        since,
        domain=domain,
        infer=_dequantize_spec,
        compute=plain(_dequantize),
        kernels={"cpu": Kernel(bind=_bind_dequantize, supports=_dequantize_supported, strided=True)}
        | _triton_quant.dequantize(_place),
        attrs=attrs,
        cases=cases,
    )


_BACK_CASES = (
    Case("no_zero", (_u8(3, 5), _scalar(0.02)), low=0, high=255),
    Case("uint8", (_u8(3, 5), _scalar(0.02), _scalar(128, np.uint8)), low=0, high=255),
    Case("int32", (TensorSpec((7,), np.dtype(np.int32)), _scalar(0.02)), low=-9999, high=9999),
    Case("past_block", (_u8(3, 24001), _scalar(0.02), _scalar(128, np.uint8)), low=0, high=255),
)
_BACK_AXIS_CASES = (
    Case("rows", (_u8(3, 5), _SCALES, _ZEROS), {"axis": 0}, low=0, high=255),
    Case("channels", (_u8(2, 3, 4, 5), _SCALES, _ZEROS), low=0, high=255),
    Case("last", (_u8(4, 3), _SCALES, _ZEROS), {"axis": -1}, low=0, high=255),
)
_BACK_21 = (
    Case("blocks", (_u8(3, 8), _BLOCK_SCALES), {"axis": 1, "block_size": 4}, low=0, high=255),
    Case("uint16", (TensorSpec((3, 5), np.dtype(np.uint16)), _scalar(0.001), _scalar(99, np.uint16)), high=60000),
    Case("blocks_and_a_rest", (_u8(3, 7), _BLOCK_SCALES), {"axis": 1, "block_size": 4}, low=0, high=255),
)

_INT4 = np.arange(-7, 8).reshape(3, 5).astype(ml_dtypes.int4)
_MS_BACK = (
    Case("int16", (TensorSpec((3, 5), np.dtype(np.int16)), _scalar(0.001)), low=-30000, high=30000),
    Case("int4", (_INT4, _scalar(0.1), _scalar(-2, ml_dtypes.int4))),
    Case("uint4_rows", ((_INT4.astype(np.int8) & 7).astype(ml_dtypes.uint4), _SCALES), {"axis": 0}),
)
_INT4_CASES = tuple(
    Case(np.dtype(t).name, (f32(3, 5), _scalar(0.3), _scalar(zero, t)))
    for t, zero in ((ml_dtypes.int4, -2), (ml_dtypes.uint4, 7))
)
_MS: dict[str, Any] = {"domain": "com.microsoft"}


def _zero_of(dtype: DType) -> Array:
    return np.zeros((), dtype)


def _rounded(*since: int) -> tuple[Case, ...]:
    """float32 to narrow types, those that came with these opsets; from 21 on also in blocks, told by an attribute."""
    found = [(d, s) for d, s in _TARGETS.items() if s in since]
    x = np.array([[-1.5, 0.3, 0.5, 1.5, 2.4, 100], [-100, 0, 0.25, -0.25, 3, 6]], np.float32)
    return (
        *(Case(f"{d.name}_zero", (x, _scalar(0.5), _zero_of(d)), opset=s) for d, s in found),
        *(
            Case(
                f"{d.name}_blocks",
                (x, np.array([[0.5, 2], [1, 0.25]], np.float32)),
                {"axis": 1, "block_size": 3, "output_dtype": onnx_of_dtype(d)},
                opset=max(21, s),
            )
            for d, s in found
            if min(since) >= 21
        ),
    )


def _widened(*since: int) -> tuple[Case, ...]:
    """Narrow types to float32: with a zero point, which is 0 for floats, and along an axis."""
    found = [(d, s) for d, s in _TARGETS.items() if s in since]
    return (
        *(
            Case(d.name, (narrow(d, 2, 6), _scalar(0.5), np.full((), is_integer(d), np.int8).astype(d)), opset=s)
            for d, s in found
        ),
        *(
            Case(f"{d.name}_axis", (narrow(d, 2, 6), np.array([0.5, 0.2], np.float32)), {"axis": 0}, opset=s)
            for d, s in found
        ),
    )


def _bind_dynamic(site: Site, io: Buffers) -> list[Call]:
    q, scale, zero = io.outs
    return cpu.dynamic_quantize(io.ins[0], q, scale, zero, io.scratch)


_DYNAMIC = Op(
    "DynamicQuantizeLinear",
    11,
    infer=lambda site: (
        TensorSpec(site.spec(0).shape, UINT8),
        TensorSpec((), site.spec(0).dtype),
        TensorSpec((), UINT8),
    ),
    compute=plain(lambda xp, site, x: portable.dynamic_quantize(xp, x)),
    kernels={"cpu": Kernel(bind=_bind_dynamic)} | _triton_quant.DYNAMIC,
    cases=Cases(
        lambda: (
            Case("both_signs", (f32(3, 5),), n_outs=3),
            Case("positive", (f32(3, 5),), n_outs=3, low=1, high=5),
            Case("negative", (f32(3, 5),), n_outs=3, low=-5, high=-1),
            Case("zeros", (np.zeros((2, 2), np.float32),), n_outs=3),
            Case("past_block", (f32(3, 24001),), n_outs=3),
        )
    ),
)

OPS: tuple[Op, ...] = (
    _quantize_op(10, {}, _TENSOR_CASES),
    _quantize_op(13, {"axis": 1}, _TENSOR_CASES[:2] + _AXIS_CASES),
    _quantize_op(19, {"axis": 1, "saturate": 1}, _TENSOR_CASES[1:3] + _AXIS_CASES[:1] + _rounded(19)),
    _quantize_op(
        21,
        {"axis": 1, "saturate": 1, "block_size": 0, "output_dtype": 0},
        _AXIS_CASES[:1] + _QUANTIZE_21 + _rounded(21),
    ),
    _quantize_op(
        23,
        {"axis": 1, "saturate": 1, "block_size": 0, "output_dtype": 0, "precision": 0},
        (_QUANTIZE_21[3], *_rounded(23, 25, 28), *_POWER_SCALE),
    ),
    _dequantize_op(10, {}, _BACK_CASES),
    _dequantize_op(13, {"axis": 1}, _BACK_CASES[:2] + _BACK_AXIS_CASES + _widened(19)),
    _dequantize_op(21, {"axis": 1, "block_size": 0}, _BACK_AXIS_CASES[:1] + _BACK_21 + _widened(21)),
    _dequantize_op(
        23,
        {"axis": 1, "block_size": 0, "output_dtype": 0},
        (*_BACK_CASES[1:2], *_widened(23, 25, 28), *_POWER_SCALE_BACK),
    ),
    _quantize_op(1, {"axis": 1}, _INT4_CASES + _TENSOR_CASES[:2] + _AXIS_CASES[:2] + _QUANTIZE_21[1:3], **_MS),
    _dequantize_op(1, {"axis": 1}, _BACK_CASES[1:3] + _BACK_AXIS_CASES[:2] + _BACK_21[1:2] + _MS_BACK, **_MS),
    _DYNAMIC,
)
