"""Elementwise operations by name, one by one or in expressions: on which types, with which result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton import arithmetic as a
from infera_kernels.triton import functions as f
from infera_kernels.triton import hyperbolic as h
from infera_kernels.triton import trigonometric as t
from infera_kernels.triton.layout import FLOATS, STORED, few, name_of
from infera_kernels.triton.pointwise import Applied, pointwise
from infera_kernels.triton.terms import CAST, WHERE, Term

_FLOATING = FLOATS | {"float64"}
_BOOL = frozenset({"bool"})
_INTEGERS = STORED - _FLOATING - _BOOL
_UNSIGNED = frozenset(name for name in _INTEGERS if name.startswith("u"))
_SIGNED = _INTEGERS - _UNSIGNED
_NUMBERS = _FLOATING | _INTEGERS


@dataclass(frozen=True, slots=True)
class Elementwise:
    """One operation. The result has the type of the last input unless `result` names another.

    `alpha` and `beta` are the defaults of its parameters; None where it has none. Half precision is computed in
    float32 and rounded once.
    """

    fn: Any
    dtypes: frozenset[str]
    result: str | None = None
    alpha: float | None = None
    beta: float | None = None


UNARY: Mapping[str, Elementwise] = MappingProxyType(
    {
        **{
            name: Elementwise(fn, _FLOATING)
            for name, fn in {
                "acos": h.acos,
                "acosh": h.acosh,
                "asin": h.asin,
                "asinh": h.asinh,
                "atan": h.atan,
                "atanh": h.atanh,
                "ceil": f.ceil,
                "cos": t.cos,
                "cosh": h.cosh,
                "erf": f.erf,
                "exp": f.exp,
                "floor": f.floor,
                "gelu": f.gelu,
                "gelu_tanh": f.gelu_tanh,
                "hard_swish": f.hard_swish,
                "log": f.log,
                "mish": f.mish,
                "reciprocal": f.reciprocal,
                "rint": f.rint,
                "sigmoid": f.sigmoid,
                "silu": f.silu,
                "sin": t.sin,
                "sinh": h.sinh,
                "softplus": f.softplus,
                "softsign": f.softsign,
                "sqrt": f.sqrt,
                "tan": t.tan,
                "tanh": f.tanh,
            }.items()
        },
        "abs": Elementwise(f.abs, _FLOATING | _SIGNED),
        "bitwise_not": Elementwise(f.invert, _INTEGERS),
        "celu": Elementwise(f.celu, _FLOATING, alpha=1.0),
        "clip": Elementwise(f.clip, _FLOATING, alpha=-np.inf, beta=np.inf),
        "elu": Elementwise(f.elu, _FLOATING, alpha=1.0),
        "hard_sigmoid": Elementwise(f.hard_sigmoid, _FLOATING, alpha=0.2, beta=0.5),
        "isinf": Elementwise(f.isinf, _FLOATING, result="bool", alpha=-np.inf, beta=np.inf),
        "isnan": Elementwise(f.isnan, _FLOATING, result="bool"),
        "leaky_relu": Elementwise(f.leaky_relu, _FLOATING, alpha=0.01),
        "logical_not": Elementwise(f.logical_not, _BOOL),
        "neg": Elementwise(f.neg, _FLOATING | _SIGNED),
        "over": Elementwise(a.over, _FLOATING, alpha=1.0),
        "relu": Elementwise(f.relu, _FLOATING | _SIGNED),
        "selu": Elementwise(f.selu, _FLOATING, alpha=1.6732631921768188, beta=1.0507010221481323),
        "shrink": Elementwise(f.shrink, _FLOATING, alpha=0.5, beta=0.0),
        "sign": Elementwise(f.sign, _FLOATING | _SIGNED),
        "swish": Elementwise(f.swish, _FLOATING, alpha=1.0),
        "thresholded_relu": Elementwise(f.thresholded_relu, _FLOATING, alpha=1.0),
    }
)
"""`alpha` and `beta`: clip's bounds, the infinities of isinf, the slopes of the others, but the offset of hard_sigmoid,
the factor of selu, the threshold of shrink and thresholded_relu, shrink's bias, and what `over` divides by."""

BINARY: Mapping[str, Elementwise] = MappingProxyType(
    {
        "add": Elementwise(a.add, _NUMBERS),
        "sub": Elementwise(a.sub, _NUMBERS),
        "mul": Elementwise(a.mul, _NUMBERS),
        "div": Elementwise(a.div, _NUMBERS),
        "fmod": Elementwise(a.fmod, FLOATS | _INTEGERS),
        "mod": Elementwise(a.modulo, FLOATS | _INTEGERS),
        "pow": Elementwise(a.pow, _FLOATING),
        "min": Elementwise(a.minimum, _NUMBERS),
        "max": Elementwise(a.maximum, _NUMBERS),
        "prelu": Elementwise(a.prelu, _FLOATING | _SIGNED),
        **{
            name: Elementwise(fn, _NUMBERS, result="bool")
            for name, fn in {
                "not_equal": a.not_equal,
                "less": a.less,
                "less_equal": a.less_equal,
                "greater": a.greater,
                "greater_equal": a.greater_equal,
            }.items()
        },
        "equal": Elementwise(a.equal, _NUMBERS | _BOOL, result="bool"),
        "and": Elementwise(a.logical_and, _BOOL),
        "or": Elementwise(a.logical_or, _BOOL),
        "xor": Elementwise(a.logical_xor, _BOOL),
        "bitwise_and": Elementwise(a.logical_and, _INTEGERS),
        "bitwise_or": Elementwise(a.logical_or, _INTEGERS),
        "bitwise_xor": Elementwise(a.logical_xor, _INTEGERS),
        "shift_left": Elementwise(a.shift_left, _UNSIGNED),
        "shift_right": Elementwise(a.shift_right, _UNSIGNED),
    }
)

_OTHERS: Mapping[str, Elementwise] = MappingProxyType(
    {
        CAST: Elementwise(f.identity, STORED),
        "clamp": Elementwise(a.clamp, _NUMBERS),
        WHERE: Elementwise(a.select, STORED),
    }
)
"""What takes three inputs, or has a type of its own."""

_ALL = {**UNARY, **BINARY, **_OTHERS}


@lru_cache(4096)
def result_of(terms: tuple[Term, ...], inputs: tuple[str, ...]) -> str | None:
    """The type of the expression's last term on inputs of these types; None where a term takes no such types."""
    types: list[str] = list(inputs)
    for term in terms:
        entry = _ALL.get(term.name)
        given = [types[i] for i in term.args]
        operands = set(given)
        if term.name == WHERE:
            if given[0] not in _BOOL:
                return None
            operands = set(given[1:])
        if entry is None or len(operands) != 1 or not operands <= entry.dtypes:
            return None
        if term.name == CAST and term.dtype not in STORED:
            return None
        types.append(term.dtype or entry.result or given[-1])
    return types[-1]


def supports(terms: Sequence[Term], ins: Sequence[Typed], out: Typed) -> bool:
    """Inputs that broadcast to `out`, of types that the expression takes, and `out` of the type that it gives."""
    return _fits(out, *ins) and result_of(tuple(terms), tuple(map(name_of, ins))) == name_of(out)


_TYPES: Mapping[str, Any] = MappingProxyType(
    {
        **{name: getattr(tl, name) for name in STORED - _BOOL},
        "bool": tl.int1,
    }
)


def _applied(term: Term) -> Applied:
    entry = _ALL[term.name]
    alpha = entry.alpha if term.alpha is None else term.alpha
    beta = entry.beta if term.beta is None else term.beta
    return Applied(entry.fn, term.args, (alpha, beta), _TYPES[term.dtype] if term.dtype else None)


def expression(terms: Sequence[Term], ins: Sequence[Any], out: Any, launcher: Launcher) -> list[Call]:
    """out = the last of the terms, with broadcasting and any strides, in one launch."""
    if not supports(terms, ins, out):
        raise _refuse("; ".join(t.name for t in terms), out, *ins)
    return pointwise([_applied(t) for t in terms], ins, out, launcher)


def _fits(out: Typed, *ins: Typed) -> bool:
    """Whether every input broadcasts to the output's shape, which is one that kernels walk."""
    shape = tuple(out.shape)
    try:
        return np.broadcast_shapes(shape, *(tuple(x.shape) for x in ins)) == shape and few(shape)
    except ValueError:
        return False


def supports_unary(op: str, x: Typed, out: Typed) -> bool:
    """A name in UNARY, x of a type listed there, `out` of the result's type and of a shape that x broadcasts to."""
    return op in UNARY and supports((Term(op, (0,)),), (x,), out)


def supports_binary(op: str, x: Typed, y: Typed, out: Typed) -> bool:
    """A name in BINARY, both inputs of one type listed there and broadcasting to `out`, which has its result type."""
    return op in BINARY and supports((Term(op, (0, 1)),), (x, y), out)


def supports_copy(x: Typed, out: Typed) -> bool:
    """Any two types that can be stored; x broadcasts to `out`."""
    return name_of(x) in STORED and name_of(out) in STORED and _fits(out, x)


def _refuse(what: str, out: Any, *ins: Any) -> ValueError:
    given = ", ".join(f"{name_of(x)}{list(x.shape)}" for x in ins)
    return ValueError(f"{what}: no kernel for {given} -> {name_of(out)}{list(out.shape)}")


def unary(
    op: str, x: Any, out: Any, launcher: Launcher, *, alpha: float | None = None, beta: float | None = None
) -> list[Call]:
    """out = op(x), both of any strides. `alpha` and `beta` replace the operation's defaults."""
    if not supports_unary(op, x, out):
        raise _refuse(op, out, x)
    entry = UNARY[op]
    if (alpha is not None and entry.alpha is None) or (beta is not None and entry.beta is None):
        raise ValueError(f"{op}: takes no {'alpha' if entry.alpha is None else 'beta'}")
    return expression((Term(op, (0,), alpha, beta),), (x,), out, launcher)


def binary(op: str, x: Any, y: Any, out: Any, launcher: Launcher) -> list[Call]:
    """out = op(x, y) with broadcasting, any strides."""
    if not supports_binary(op, x, y, out):
        raise _refuse(op, out, x, y)
    return expression((Term(op, (0, 1)),), (x, y), out, launcher)


def copy(x: Any, out: Any, launcher: Launcher) -> list[Call]:
    """out = x: a strided copy, a materialised transpose or broadcast, a cast (floats to integers truncate)."""
    if not supports_copy(x, out):
        raise _refuse("copy", out, x)
    return pointwise((Applied(f.identity, (0,)),), (x,), out, launcher)
