"""Elementwise operations by name: which function, on which types, with which result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton import functions as f
from infera_kernels.triton.layout import FLOATS, INTEGERS, MAX_DIMS, STORED, name_of
from infera_kernels.triton.pointwise import pointwise

_NUMBERS = FLOATS | INTEGERS
_BOOL = frozenset({"bool"})


@dataclass(frozen=True, slots=True)
class Elementwise:
    """One operation. The result has the inputs' dtype unless `result` names another.

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
            name: Elementwise(fn, FLOATS)
            for name, fn in {
                "ceil": f.ceil,
                "erf": f.erf,
                "exp": f.exp,
                "floor": f.floor,
                "gelu": f.gelu,
                "gelu_tanh": f.gelu_tanh,
                "hard_swish": f.hard_swish,
                "log": f.log,
                "reciprocal": f.reciprocal,
                "relu": f.relu,
                "sigmoid": f.sigmoid,
                "silu": f.silu,
                "softplus": f.softplus,
                "sqrt": f.sqrt,
                "tanh": f.tanh,
            }.items()
        },
        "abs": Elementwise(f.abs, _NUMBERS),
        "neg": Elementwise(f.neg, _NUMBERS),
        "logical_not": Elementwise(f.logical_not, _BOOL),
        "clip": Elementwise(f.clip, FLOATS, alpha=-np.inf, beta=np.inf),
        "elu": Elementwise(f.elu, FLOATS, alpha=1.0),
        "hard_sigmoid": Elementwise(f.hard_sigmoid, FLOATS, alpha=0.2, beta=0.5),
        "leaky_relu": Elementwise(f.leaky_relu, FLOATS, alpha=0.01),
    }
)
"""`alpha` and `beta`: clip's bounds, the slopes of elu, leaky_relu and hard_sigmoid, hard_sigmoid's offset."""

BINARY: Mapping[str, Elementwise] = MappingProxyType(
    {
        "add": Elementwise(f.add, _NUMBERS),
        "sub": Elementwise(f.sub, _NUMBERS),
        "mul": Elementwise(f.mul, _NUMBERS),
        "div": Elementwise(f.div, FLOATS),
        "pow": Elementwise(f.pow, FLOATS),
        "min": Elementwise(f.minimum, _NUMBERS),
        "max": Elementwise(f.maximum, _NUMBERS),
        **{
            name: Elementwise(fn, _NUMBERS, result="bool")
            for name, fn in {
                "equal": f.equal,
                "not_equal": f.not_equal,
                "less": f.less,
                "less_equal": f.less_equal,
                "greater": f.greater,
                "greater_equal": f.greater_equal,
            }.items()
        },
        "and": Elementwise(f.logical_and, _BOOL),
        "or": Elementwise(f.logical_or, _BOOL),
        "xor": Elementwise(f.logical_xor, _BOOL),
    }
)


def _fits(out: Typed, *ins: Typed) -> bool:
    """Whether every input broadcasts to the output's shape, of at most MAX_DIMS dimensions."""
    shape = tuple(out.shape)
    try:
        return np.broadcast_shapes(shape, *(tuple(x.shape) for x in ins)) == shape and len(shape) <= MAX_DIMS
    except ValueError:
        return False


def _supports(table: Mapping[str, Elementwise], op: str, out: Typed, *ins: Typed) -> bool:
    entry = table.get(op)
    if entry is None or not _fits(out, *ins):
        return False
    dtypes = {name_of(x) for x in ins}
    return len(dtypes) == 1 and dtypes <= entry.dtypes and name_of(out) == (entry.result or next(iter(dtypes)))


def supports_unary(op: str, x: Typed, out: Typed) -> bool:
    """A name in UNARY, x of a type listed there, `out` of the same type and of a shape that x broadcasts to."""
    return _supports(UNARY, op, out, x)


def supports_binary(op: str, x: Typed, y: Typed, out: Typed) -> bool:
    """A name in BINARY, both inputs of one type listed there and broadcasting to `out`, which has its result type."""
    return _supports(BINARY, op, out, x, y)


def supports_where(condition: Typed, x: Typed, y: Typed, out: Typed) -> bool:
    """A bool condition, and x, y, out of one type that can be stored; all broadcasting to `out`."""
    dtypes = {name_of(x), name_of(y), name_of(out)}
    return name_of(condition) == "bool" and len(dtypes) == 1 and dtypes <= STORED and _fits(out, condition, x, y)


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
    chosen = [d if v is None else float(v) for v, d in ((alpha, entry.alpha), (beta, entry.beta))]
    return pointwise(entry.fn, (x,), out, launcher, *chosen)


def binary(op: str, x: Any, y: Any, out: Any, launcher: Launcher) -> list[Call]:
    """out = op(x, y) with broadcasting, any strides."""
    if not supports_binary(op, x, y, out):
        raise _refuse(op, out, x, y)
    return pointwise(BINARY[op].fn, (x, y), out, launcher)


def where(condition: Any, x: Any, y: Any, out: Any, launcher: Launcher) -> list[Call]:
    """out = x where condition, else y, with broadcasting, any strides."""
    if not supports_where(condition, x, y, out):
        raise _refuse("where", out, condition, x, y)
    return pointwise(f.select, (condition, x, y), out, launcher)


def copy(x: Any, out: Any, launcher: Launcher) -> list[Call]:
    """out = x: a strided copy, a materialised transpose or broadcast, a cast (floats to integers truncate)."""
    if not supports_copy(x, out):
        raise _refuse("copy", out, x)
    return pointwise(f.identity, (x,), out, launcher)
