"""Arithmetic with broadcasting, variadic combinations, and functions of one argument."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Buffers, Call, Case, Cases, Compute, Op, Site, broadcast, f32, same_as
from infera_gpu.ops import _triton_elementwise as _triton
from infera_gpu.ops._families import CHAIN_NS, elementwise, floating, native, numeric, plain
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import activation as cpu_activation
from infera_kernels.cpu import elementwise as cpu
from infera_kernels.portable import activation as portable_activation
from infera_kernels.portable import elementwise as portable


def _ints(*shape: int, dtype: str = "int64") -> TensorSpec:
    return TensorSpec(shape, np.dtype(dtype))


BINARY_CASES = (
    Case("same", (f32(2, 3), f32(2, 3))),
    Case("both", (f32(3, 1, 5), f32(2, 1))),
    Case("row", (f32(4, 7), f32(7))),
    Case("scalar", (f32(), f32(2, 3))),
    Case("scalars", (f32(), f32())),
    Case("empty", (f32(0, 3), f32(1, 3))),
    Case("int64", (_ints(3, 2), _ints(3, 2)), low=-9, high=9),
)


def _ufunc(name: str) -> Compute:
    return plain(lambda xp, site, *ins: getattr(xp, name)(*ins))


def ufunc_op(name: str, ufunc: str, cases: tuple[Case, ...], *, since: int = 7, dtype: Any = None) -> Op:
    """An operator that is one ufunc, of the same name in NumPy and CuPy; without a `dtype` it takes numbers alone."""
    fn = getattr(np, ufunc)

    def bind(site: Site, io: Buffers) -> list[Call]:
        return [cpu.call(fn, *io.ins, io.outs[0])]

    n = fn.nin
    infer = same_as(dtype=dtype) if n == 1 else broadcast(dtype)
    return Op(
        name,
        since,
        infer=infer if dtype else numeric(infer),
        compute=_ufunc(ufunc),
        kernels=elementwise(bind, inplace=tuple(range(n))) | _triton.ufunc(ufunc),
        cases=cases,
    )


def _divide(site: Site, io: Buffers) -> list[Call]:
    a, b = io.ins
    if io.outs[0].dtype.kind == "f":
        return [cpu.call(np.true_divide, a, b, io.outs[0])]
    return cpu.truncated_divide(a, b, io.outs[0], io.scratch)


def _power(site: Site, io: Buffers) -> list[Call]:
    a, b = io.ins
    known = site.value(1)
    exponent = float(known.reshape(-1)[0]) if known is not None and known.size == 1 else None
    return cpu.power(a, b, io.outs[0], io.scratch, exponent=exponent)


def _power_spec(site: Site) -> tuple[TensorSpec]:
    """The base and the exponent may differ in type."""
    site.spec(1)
    (spec,) = broadcast(site.spec(0).dtype, mixed=True)(site)
    assert spec is not None
    return (spec,)


def _float_base(site: Site) -> bool:
    return native(site) and site.spec(0).dtype.kind == "f"


def _modulo(site: Site, io: Buffers) -> list[Call]:
    return [cpu.call(np.fmod if site.attrs["fmod"] else np.remainder, *io.ins, io.outs[0])]


DIVISORS = np.array([[3], [-2]], np.int64)
DIVIDENDS = np.array([[-7, 7, 6, 0], [-8, 9, -128, 1]], np.int64)

_ARITHMETIC = (
    *(
        ufunc_op(name, ufunc, BINARY_CASES)
        for name, ufunc in (("Add", "add"), ("Sub", "subtract"), ("Mul", "multiply"))
    ),
    Op(
        "Div",
        7,
        infer=numeric(broadcast()),
        compute=plain(lambda xp, site, a, b: portable.divide(xp, a, b)),
        kernels=elementwise(_divide, inplace=(0, 1)) | _triton.ufunc("true_divide"),
        cases=Cases(
            lambda: (
                Case("float", (f32(3, 1, 5), f32(2, 1)), low=0.5),
                Case("trunc", (DIVIDENDS, DIVISORS)),
                Case("unsigned", (DIVIDENDS.astype(np.uint8), np.array([3], np.uint8)), opset=14),
                Case("int32", (DIVIDENDS.astype(np.int32), np.array([-3], np.int32))),
                Case("empty", (f32(0, 3), f32(1, 3)), low=1),
            )
        ),
    ),
    Op(
        "Pow",
        7,
        infer=_power_spec,
        compute=plain(lambda xp, site, a, b: portable.power(xp, a, b)),
        kernels=elementwise(_power, supports=_float_base) | _triton.POWER,
        cases=Cases(
            lambda: (
                Case("float", (f32(3, 1, 5), f32(2, 1)), low=0.5),
                Case("square", (f32(5, 3), np.array(2, np.float32))),
                Case("cube", (f32(5, 3), np.array([3], np.float32))),
                Case("cube_past_block", (f32(2, 36001), np.array(3, np.float32))),
                Case("cube_broadcast", (f32(3), np.full((2, 1), 3, np.float32))),
                Case("cube_int", (f32(5, 3), np.array(3, np.int64)), opset=12),
                Case("int_exponents", (f32(2, 3), np.array([-1, 0, 4], np.int32)), low=1, opset=12),
                Case("int", (np.array([2, -3, 5], np.int64), np.array([3, 3, 0], np.int64)), opset=12),
                Case("int_to_float", (np.array([9, 2, 5], np.int64), np.array([0.5, 3, 2], np.float32)), opset=12),
            )
        ),
    ),
    Op(
        "Mod",
        10,
        infer=numeric(broadcast()),
        compute=plain(lambda xp, site, a, b: portable.modulo(xp, a, b, fmod=bool(site.attrs["fmod"]))),
        kernels=elementwise(_modulo, inplace=(0, 1)) | _triton.MODULO,
        attrs={"fmod": 0},
        cases=Cases(
            lambda: (
                Case("floor", (DIVIDENDS, DIVISORS)),
                Case("fmod_int", (DIVIDENDS, DIVISORS), {"fmod": 1}),
                Case("fmod", (f32(3, 4), np.array([0.75, -0.5, 1.25, 2], np.float32)), {"fmod": 1}),
            )
        ),
    ),
)


def _variadic(name: str, ufunc: str, *, mean: bool = False, integers: bool = False) -> Op:
    fn = getattr(np, ufunc)

    def bind(site: Site, io: Buffers) -> list[Call]:
        return cpu.variadic(fn, io.ins, io.outs[0], mean=mean)

    def combined(xp: Any, site: Site, *ins: Array) -> Array:
        return portable.mean(xp, ins) if mean else portable.combine(xp, ufunc, ins)

    cases = [
        Case("one", (f32(2, 3),)),
        Case("two", (f32(2, 3), f32(2, 3))),
        Case("three", (f32(2, 1), f32(3), f32(4, 1, 1)), opset=8),
        Case("empty", (f32(0, 3), f32(1, 3)), opset=8),
        Case("many", (f32(2, 3),) * 17),
    ]
    if integers:
        cases.append(Case("int8", (_ints(5, dtype="int8"), _ints(2, 1, dtype="int8")), low=-99, high=99, opset=12))
    kernels = elementwise(bind, inplace=()) | _triton.variadic(ufunc, mean=mean)
    return Op(name, 6, numeric(broadcast()), plain(combined), tuple(cases), kernels=kernels)


_VARIADIC = (
    _variadic("Sum", "add"),
    _variadic("Mean", "add", mean=True),
    _variadic("Max", "maximum", integers=True),
    _variadic("Min", "minimum", integers=True),
)

# operator, ufunc, first opset, range of the cases
_UNARY: tuple[tuple[str, str, int, float, float], ...] = (
    ("Neg", "negative", 6, -2, 2),
    ("Abs", "abs", 6, -2, 2),
    ("Sqrt", "sqrt", 6, 0, 4),
    ("Reciprocal", "reciprocal", 6, 0.25, 4),
    ("Exp", "exp", 6, -4, 4),
    ("Log", "log", 6, 0.01, 4),
    ("Floor", "floor", 6, -9, 9),
    ("Ceil", "ceil", 6, -9, 9),
    ("Round", "rint", 11, -9, 9),
    ("Sign", "sign", 9, -2, 2),
    ("Sin", "sin", 7, -9, 9),
    ("Cos", "cos", 7, -9, 9),
    ("Tan", "tan", 7, -1, 1),
    ("Asin", "arcsin", 7, -1, 1),
    ("Acos", "arccos", 7, -1, 1),
    ("Atan", "arctan", 7, -4, 4),
    ("Sinh", "sinh", 9, -4, 4),
    ("Cosh", "cosh", 9, -4, 4),
    ("Asinh", "arcsinh", 9, -4, 4),
    ("Acosh", "arccosh", 9, 1, 9),
    ("Atanh", "arctanh", 9, -0.9, 0.9),
)
_EXTRA = {
    "Round": (Case("half", (np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32),)),),
    "Neg": (Case("int64", (_ints(5),), low=-9, high=9),),
    "Abs": (Case("int64", (_ints(5),), low=-9, high=9),),
    "Sign": (Case("int64", (_ints(5),), low=-2, high=2),),
}


def _unary(name: str, ufunc: str, since: int, low: float, high: float) -> Op:
    cases = tuple(
        Case(id, (spec,), low=low, high=high)
        for id, spec in (("matrix", f32(3, 5)), ("scalar", f32()), ("empty", f32(0, 2)))
    )
    return ufunc_op(name, ufunc, (*cases, *_EXTRA.get(name, ())), since=since)


def _erf(site: Site, io: Buffers) -> list[Call]:
    return cpu_activation.activation("erf", io.ins[0], io.outs[0], io.scratch)


def single(site: Site) -> bool:
    """Whether every operand is float16 or float32: what approximations made for float32 serve."""
    return floating(site) and site.spec(0).dtype.itemsize <= 4


_ERF = Op(
    "Erf",
    9,
    infer=same_as(),
    compute=plain(lambda xp, site, x: portable_activation.activation(xp, "erf", x)),
    kernels=elementwise(_erf, supports=single, ns=CHAIN_NS) | _triton.unary("erf"),
    cases=Cases(
        lambda: (
            Case("matrix", (f32(3, 5),), tol=1e-6),
            Case("past_block", (f32(3, 24001),), tol=1e-6, low=-6, high=6),
            Case("edges", (np.array([0.0, -0.0, np.inf, -np.inf, 1e-30, -1e30, 3.9, -4.1], np.float32),), tol=1e-6),
            Case("empty", (f32(0, 2),)),
        )
    ),
)

OPS: tuple[Op, ...] = (*_ARITHMETIC, *_VARIADIC, *(_unary(*row) for row in _UNARY), _ERF)
