"""Conversions between element types: Cast, CastLike, BitCast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import REQUIRED, Buffers, Call, Case, Cases, Op, Site, f32
from infera_gpu.ops import _triton_elementwise as _triton
from infera_gpu.ops._families import NARROW, element_type, elementwise, is_native, narrow, plain
from infera_gpu.spec import Array, DType, TensorSpec, onnx_of_dtype
from infera_kernels.cpu import elementwise as cpu
from infera_kernels.portable import cast as portable
from infera_kernels.portable.quant import is_integer


def _to(site: Site) -> DType:
    return element_type(site, "to")


def _like(site: Site) -> DType:
    return site.spec(1).dtype


def _direct(site: Site) -> bool:
    """Whether NumPy converts without a detour: not strings, and not where float8 and int4 would have to saturate."""
    source, target = site.spec(0).dtype, site.outs[0].dtype
    return is_native(source) and (is_native(target) or target.name == "bfloat16")


def _bind(site: Site, io: Buffers) -> list[Call]:
    return [cpu.copy(io.outs[0], io.ins[0])]


def _cast(name: str, since: int, target: Callable[[Site], DType], cases: Sequence[Case], **attrs: Any) -> Op:
    def infer(site: Site) -> tuple[TensorSpec]:
        return (TensorSpec(site.spec(0).shape, target(site)),)

    def compute(xp: Any, site: Site, x: Array, *_: Array) -> Array:
        rounding = site.attrs.get("round_mode", "up")
        if rounding not in ("up", "down", "nearest"):
            raise site.fail(f"round_mode is '{rounding}', expected up, down or nearest")
        return portable.cast(xp, x, target(site), saturate=bool(site.attrs.get("saturate", 1)), rounding=rounding)

    kernels = elementwise(_bind, supports=_direct) | _triton.CONVERT
    return Op(name, since, infer, plain(compute), cases, attrs, kernels=kernels)


def _code(dtype: Any) -> int:
    return onnx_of_dtype(np.dtype(dtype))


def _whole(dtype: DType) -> HostArray:
    """float32 values to convert, whole and in range for integers: onnxruntime rounds others, onnx cuts them off."""
    if is_integer(dtype):
        return narrow(dtype, 2, 3).astype(np.float32)
    return np.array([[0.3, 1, 2.7], [3.1, 1e9, 0.001]], np.float32) if dtype.name == "float8_e8m0fnu" else _MIXED


_MIXED = np.array([[-1.75, 0, 1.5], [2.5, -0.25, 100]], np.float32)

_CAST_CASES = Cases(
    lambda: (
        *(
            Case(f"float_{np.dtype(t).name}", (_MIXED,), {"to": _code(t)})
            for t in (np.float64, np.float16, np.int8, np.int32, np.int64, np.bool_)
        ),
        Case("bool_float", (_MIXED > 0,), {"to": _code(np.float32)}),
        Case("int64_int32", (np.array([1, -5, 2**31 + 7]),), {"to": _code(np.int32)}),
        Case("int64_float", (np.array(7),), {"to": _code(np.float32)}),
        Case("past_block", (f32(3, 24001),), {"to": _code(np.int64)}, low=-99, high=99),
        Case("empty", (f32(0, 2),), {"to": _code(np.int64)}),
    )
)
_NARROW_CASES = Cases(
    lambda: (
        case
        for dtype, since in (
            *NARROW.items(),
            *((np.dtype(t), 28) for t in (ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn)),
        )
        for case in (
            Case(f"float_{dtype.name}", (_whole(dtype),), {"to": _code(dtype)}, opset=since),
            Case(f"{dtype.name}_float", (narrow(dtype, 2, 3),), {"to": _code(np.float32)}, opset=since),
            Case(f"{dtype.name}_half", (narrow(dtype, 2, 3),), {"to": _code(np.float16)}, opset=since),
        )
    )
)
_LIKE_CASES = tuple(
    Case(np.dtype(t).name, (_MIXED, TensorSpec((2,), np.dtype(t)))) for t in (np.float64, np.int32, np.bool_)
)


_NARROW = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2, "float6_e2m3fn": 6, "float6_e3m2fn": 6}


def _bits(dtype: DType) -> int:
    """Bits of an element, of which NumPy may leave some of its bytes unused. 0 for strings."""
    return 0 if dtype.hasobject else _NARROW.get(dtype.name, 8 * dtype.itemsize)


_NARROW_LIKE = Cases(
    lambda: (Case(dtype.name, (_whole(dtype), narrow(dtype, 2)), opset=since) for dtype, since in NARROW.items())
)
_EDGES = np.array(
    [0, 1e-40, 2**-128, 2**-127, 1.25 * 2**-127, 1.5 * 2**-127, 2**-126, 1.25 * 2**-126, 1, 1.5, 1.6, 2.0**127,
     1.25 * 2.0**127, 1.5 * 2.0**127, np.inf, np.nan],
    np.float32,
)  # fmt: skip
_POWERS = Cases(
    lambda: (
        Case(f"power_{mode}_{saturate}", (_EDGES,), {"to": 24, "round_mode": mode, "saturate": saturate})
        for mode in ("up", "down", "nearest")
        for saturate in (0, 1)
    )
)


def _at(cases: Sequence[Case], first: int, end: int) -> tuple[Case, ...]:
    """The cases of these opsets."""
    return tuple(c for c in cases if first <= (c.opset or 0) < end)


def _bit_cast_spec(site: Site) -> tuple[TensorSpec]:
    source, target = site.spec(0), _to(site)
    if _bits(source.dtype) != _bits(target) or not _bits(target):
        raise site.fail(f"cannot reinterpret {source} as {target.name}: the elements differ in size")
    return (TensorSpec(source.shape, target),)


_BIT_CAST = Op(
    "BitCast",
    26,
    infer=_bit_cast_spec,
    compute=plain(lambda xp, site, x: x.view(_to(site))),
    view=lambda x, site: x.view(site.outs[0].dtype),
    attrs={"to": REQUIRED},
    cases=Cases(
        lambda: (
            Case("float_int", (f32(2, 3),), {"to": _code(np.int32)}),
            Case("int4_uint4", (np.arange(-8, 8).astype(ml_dtypes.int4),), {"to": _code(ml_dtypes.uint4)}),
            Case("uint2_int2", (np.arange(4).astype(ml_dtypes.uint2),), {"to": _code(ml_dtypes.int2)}),
            Case("uint16_bfloat16", (np.array([0x3F80, 0xC000, 1], np.uint16),), {"to": _code(ml_dtypes.bfloat16)}),
            Case("float8_int8", (_MIXED.astype(ml_dtypes.float8_e5m2),), {"to": _code(np.int8)}),
        )
    ),
)

OPS: tuple[Op, ...] = (
    _cast("Cast", 6, _to, _CAST_CASES, to=REQUIRED),
    _cast("Cast", 19, _to, Cases(lambda: _CAST_CASES[:2] + _at(_NARROW_CASES, 19, 24)), to=REQUIRED, saturate=1),
    _cast(
        "Cast",
        24,
        _to,
        Cases(lambda: (*_CAST_CASES[:2], *_at(_NARROW_CASES, 24, 29), *_POWERS)),
        to=REQUIRED,
        saturate=1,
        round_mode="up",
    ),
    _cast("CastLike", 15, _like, _LIKE_CASES),
    _cast("CastLike", 19, _like, Cases(lambda: _LIKE_CASES + _at(_NARROW_LIKE, 19, 24)), saturate=1),
    _cast("CastLike", 24, _like, Cases(lambda: _LIKE_CASES + _at(_NARROW_LIKE, 24, 26)), saturate=1, round_mode="up"),
    _BIT_CAST,
)
