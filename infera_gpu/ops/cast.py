"""Conversions between element types: Cast, CastLike, BitCast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Case, Op, Site, f32
from infera_gpu.ops import _triton
from infera_gpu.ops._families import element_type, elementwise, is_native, plain
from infera_gpu.spec import Array, DType, TensorSpec, onnx_of_dtype
from infera_kernels.cpu import elementwise as cpu
from infera_kernels.portable import cast as portable


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


def _cast(name: str, since: int, target: Callable[[Site], DType], cases: tuple[Case, ...], **attrs: Any) -> Op:
    def infer(site: Site) -> tuple[TensorSpec]:
        return (TensorSpec(site.spec(0).shape, target(site)),)

    def compute(xp: Any, site: Site, x: Array, *_: Array) -> Array:
        rounding = site.attrs.get("round_mode", "up")
        if rounding not in ("up", "down", "nearest"):
            raise site.fail(f"round_mode is '{rounding}', expected up, down or nearest")
        return portable.cast(xp, x, target(site), saturate=bool(site.attrs.get("saturate", 1)), rounding=rounding)

    kernels = elementwise(_bind, supports=_direct) | _triton.CAST
    return Op(name, since, infer, plain(compute), cases, attrs, kernels=kernels)


def _code(dtype: Any) -> int:
    return onnx_of_dtype(np.dtype(dtype))


_MIXED = np.array([[-1.75, 0, 1.5], [2.5, -0.25, 100]], np.float32)

_CAST_CASES = (
    *(
        Case(f"float_{np.dtype(t).name}", (_MIXED,), {"to": _code(t)})
        for t in (np.float64, np.float16, np.int8, np.int32, np.int64, np.bool_)
    ),
    Case("bool_float", (_MIXED > 0,), {"to": _code(np.float32)}),
    Case("int64_int32", (np.array([1, -5, 2**31 + 7]),), {"to": _code(np.int32)}),
    Case("int64_float", (np.array(7),), {"to": _code(np.float32)}),
    Case("past_block", (f32(3, 6001),), {"to": _code(np.int64)}, low=-99, high=99),
    Case("empty", (f32(0, 2),), {"to": _code(np.int64)}),
)
_LIKE_CASES = tuple(
    Case(np.dtype(t).name, (_MIXED, TensorSpec((2,), np.dtype(t)))) for t in (np.float64, np.int32, np.bool_)
)


def _bit_cast_spec(site: Site) -> tuple[TensorSpec]:
    source, target = site.spec(0), _to(site)
    if source.dtype.itemsize != target.itemsize:
        raise site.fail(f"cannot reinterpret {source} as {target.name}: the elements differ in size")
    return (TensorSpec(source.shape, target),)


_BIT_CAST = Op(
    "BitCast",
    26,
    infer=_bit_cast_spec,
    compute=plain(lambda xp, site, x: x.view(_to(site))),
    view=lambda x, site: x.view(site.outs[0].dtype),
    attrs={"to": REQUIRED},
    cases=(Case("float_int", (f32(2, 3),), {"to": _code(np.int32)}),),
)

OPS: tuple[Op, ...] = (
    _cast("Cast", 6, _to, _CAST_CASES, to=REQUIRED),
    _cast("Cast", 19, _to, _CAST_CASES[:2], to=REQUIRED, saturate=1),
    _cast("Cast", 24, _to, _CAST_CASES[:2], to=REQUIRED, saturate=1, round_mode="up"),
    _cast("CastLike", 15, _like, _LIKE_CASES),
    _cast("CastLike", 19, _like, _LIKE_CASES, saturate=1),
    _cast("CastLike", 24, _like, _LIKE_CASES, saturate=1, round_mode="up"),
    _BIT_CAST,
)
