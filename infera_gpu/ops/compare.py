"""Comparisons, logic, bits, and the choice between two tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Case, Cases, Op, Site, broadcast, f32, same_as
from infera_gpu.ops import _triton_elementwise as _triton
from infera_gpu.ops._families import BOOL, NARROW, elementwise, is_native, movable, plain
from infera_gpu.ops.elementwise import ufunc_op
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import elementwise as cpu
from infera_kernels.portable import elementwise as portable

_SPECIAL = np.array([np.nan, np.inf, -np.inf, 0, 1], np.float32)
_NARROW_SPECIAL = tuple(
    Case(dtype.name, (_SPECIAL.astype(dtype),), opset=20) for dtype, since in NARROW.items() if since == 19
)
_A = np.array([[1, 2, 3], [4, 5, 6]])
_B = np.array([[1, 3, 2]])
_BITS = np.array([True, False, True, False]), np.array([True, True, False, False])

_COMPARE_CASES = (
    Case("float", (_A.astype(np.float32), _B.astype(np.float32))),
    Case("int64", (_A.astype(np.int64), _B.astype(np.int64))),
    Case("nan", (_SPECIAL, _SPECIAL)),
    Case("random", (f32(4, 1, 3), f32(5, 1))),
    Case("empty", (f32(0, 3), f32(3))),
)


def _compare(name: str, ufunc: str, since: int) -> Op:
    cases = tuple(replace(c, opset=max(11, since)) for c in _COMPARE_CASES)
    return ufunc_op(name, ufunc, cases, since=since, dtype=BOOL)


def _logic(name: str, ufunc: str) -> Op:
    a, b = _BITS
    cases = (Case("table", (a, b)), Case("broadcast", (a.reshape(2, 2, 1), b)), Case("scalar", (a[0, ...], b)))
    return ufunc_op(name, ufunc, cases, dtype=BOOL)


def _bitwise(name: str, ufunc: str) -> Op:
    n = getattr(np, ufunc).nin
    a, b = _A.astype(np.int32) - 3, _B.astype(np.int32)
    cases = (Case("int32", (a, b)[:n]), Case("uint8", (_A.astype(np.uint8), _B.astype(np.uint8))[:n]))
    return ufunc_op(name, ufunc, cases, since=18)


def _shift(site: Site) -> Any:
    if site.attrs["direction"] not in ("LEFT", "RIGHT"):
        raise site.fail(f"direction is '{site.attrs['direction']}', expected 'LEFT' or 'RIGHT'")
    return np.left_shift if site.attrs["direction"] == "LEFT" else np.right_shift


def _shifted_spec(site: Site) -> Sequence[TensorSpec | None]:
    _shift(site)
    return broadcast()(site)


def _bind_shift(site: Site, io: Buffers) -> list[Call]:
    return [cpu.call(_shift(site), *io.ins, io.outs[0])]


def _shifted(xp: Any, site: Site, x: Array, by: Array) -> Array:
    return getattr(xp, _shift(site).__name__)(x, by)


def _bind_is_inf(site: Site, io: Buffers) -> list[Call]:
    (x,), (out,) = io.ins, io.outs
    signs = [sign for sign, flag in ((-np.inf, "detect_negative"), (np.inf, "detect_positive")) if site.attrs[flag]]
    if len(signs) == 2:
        return [cpu.call(np.isinf, x, out)]
    return [cpu.call(np.equal, x, cpu.const(signs[0], x), out) if signs else cpu.copy(out, cpu.const(False, out))]


def _is_inf(xp: Any, site: Site, x: Array) -> Array:
    negative, positive = bool(site.attrs["detect_negative"]), bool(site.attrs["detect_positive"])
    return portable.is_inf(xp, _native(x), negative=negative, positive=positive)


def _native(x: Array) -> Array:
    """The narrow floats of ml_dtypes as float32: not all of them have loops of their own."""
    return x if is_native(x.dtype) else x.astype(np.float32)


def _where_spec(site: Site) -> Sequence[TensorSpec | None]:
    condition, x, y = (site.spec(i) for i in range(3))
    if condition.dtype != BOOL:
        raise site.fail(f"the condition is {condition}, expected bool")
    if x.dtype != y.dtype:
        raise site.fail(f"inputs {x} and {y} differ in type; expected one type")
    return broadcast(x.dtype, mixed=True)(site)


def _bind_where(site: Site, io: Buffers) -> list[Call]:
    condition, x, y = io.ins
    return cpu.where(condition, x, y, io.outs[0], io.scratch)


def _bitwise_copy(site: Site) -> bool:
    return movable(site) and site.outs[0].dtype.itemsize <= 8


_COMPARISONS = tuple(
    _compare(*row)
    for row in (
        ("Equal", "equal", 7),
        ("Less", "less", 7),
        ("Greater", "greater", 7),
        ("LessOrEqual", "less_equal", 12),
        ("GreaterOrEqual", "greater_equal", 12),
    )
)
_LOGIC = tuple(_logic(*row) for row in (("And", "logical_and"), ("Or", "logical_or"), ("Xor", "logical_xor")))
_BITWISE = tuple(
    _bitwise(*row)
    for row in (
        ("BitwiseAnd", "bitwise_and"),
        ("BitwiseOr", "bitwise_or"),
        ("BitwiseXor", "bitwise_xor"),
        ("BitwiseNot", "invert"),
    )
)

OPS: tuple[Op, ...] = (
    *_COMPARISONS,
    *_LOGIC,
    *_BITWISE,
    ufunc_op("Not", "logical_not", (Case("flags", (_BITS[0],)),), since=1),
    Op(
        "BitShift",
        11,
        infer=_shifted_spec,
        compute=plain(_shifted),
        kernels=elementwise(_bind_shift, inplace=(0, 1)) | _triton.SHIFT,
        attrs={"direction": REQUIRED},
        cases=tuple(
            Case(direction.lower(), (_A.astype(np.uint8), _B.astype(np.uint8)), {"direction": direction})
            for direction in ("LEFT", "RIGHT")
        ),
    ),
    Op(
        "IsNaN",
        9,
        infer=same_as(dtype=BOOL),
        compute=plain(lambda xp, site, x: xp.isnan(_native(x))),
        kernels=elementwise(lambda site, io: [cpu.call(np.isnan, io.ins[0], io.outs[0])], inplace=())
        | _triton.unary("isnan"),
        cases=Cases(lambda: (Case("special", (_SPECIAL,)), Case("empty", (f32(0),)), *_NARROW_SPECIAL)),
    ),
    Op(
        "IsInf",
        10,
        infer=same_as(dtype=BOOL),
        compute=plain(_is_inf),
        kernels=elementwise(_bind_is_inf, inplace=()) | _triton.IS_INF,
        attrs={"detect_negative": 1, "detect_positive": 1},
        cases=Cases(
            lambda: (
                Case("both", (_SPECIAL,)),
                Case("negative", (_SPECIAL,), {"detect_positive": 0}),
                Case("positive", (_SPECIAL,), {"detect_negative": 0}),
                Case("none", (_SPECIAL,), {"detect_negative": 0, "detect_positive": 0}),
                *_NARROW_SPECIAL,
            )
        ),
    ),
    Op(
        "Where",
        9,
        infer=_where_spec,
        compute=plain(lambda xp, site, condition, x, y: xp.where(condition, x, y)),
        kernels=elementwise(_bind_where, inplace=(1, 2), supports=_bitwise_copy) | _triton.SELECT,
        cases=Cases(
            lambda: (
                Case("same", (_BITS[0], f32(4), f32(4))),
                Case("all", (_BITS[0].reshape(4, 1), f32(3), f32(2, 1, 1))),
                Case("scalar", (_BITS[0], f32(), f32(3, 4))),
                Case("int64", (_BITS[0], TensorSpec((4,), np.dtype(np.int64)), TensorSpec((1,), np.dtype(np.int64)))),
            )
        ),
    ),
)
