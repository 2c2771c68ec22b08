"""The "triton" kernels of elementwise operators: what each is as an expression of Triton's functions.

An operator, or a chain of them, is one launch. Declares no operators itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.spec import TensorSpec
from infera_kernels.triton.terms import CAST, WHERE, Term, trimmed

MOST_INPUTS = 12
"""Of a chain: more values than that do not lie in registers, or on the CPU in the cache, together."""

MOST_COMBINED = 32
"""Inputs of a variadic operator, which are read one after the other."""

UNARY: Mapping[str, str] = MappingProxyType(
    {
        **{
            name: name
            for name in (
                *("abs", "ceil", "celu", "cos", "cosh", "elu", "erf", "exp", "floor", "hard_sigmoid", "hard_swish"),
                *("isnan", "leaky_relu", "log", "logical_not", "mish", "reciprocal", "relu", "rint", "selu", "shrink"),
                *("sigmoid", "sign", "sin", "sinh", "softplus", "softsign", "sqrt", "tan", "tanh", "thresholded_relu"),
            )
        },
        **{f"arc{name}": f"a{name}" for name in ("cos", "cosh", "sin", "sinh", "tan", "tanh")},
        "invert": "bitwise_not",
        "negative": "neg",
    }
)
"""A ufunc or an activation, by the name that its CPU kernel has -> the Triton function."""

BINARY: Mapping[str, str] = MappingProxyType(
    {
        **{
            name: name
            for name in (
                *("add", "bitwise_and", "bitwise_or", "bitwise_xor"),
                *("equal", "greater", "greater_equal", "less", "less_equal"),
            )
        },
        "subtract": "sub",
        "multiply": "mul",
        "true_divide": "div",
        "maximum": "max",
        "minimum": "min",
        "logical_and": "and",
        "logical_or": "or",
        "logical_xor": "xor",
    }
)
"""A ufunc -> the Triton function."""

_PARAMETERS: Mapping[str, str] = MappingProxyType(
    {"alpha": "alpha", "beta": "beta", "gamma": "beta", "lambd": "alpha", "bias": "beta"}
)
"""An attribute of activations -> which parameter of Triton's functions it is."""

Terms = tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Formula:
    """What an operator is as an expression over the inputs of a site; None where it is none. Binds it."""

    terms: Callable[[Site], Terms | None]

    def _found(self, site: Site) -> tuple[tuple[int, ...], Terms] | None:
        terms = site.once("formula", lambda: self.terms(site))
        return None if terms is None else trimmed(terms, len(site.ins))

    def supports(self, site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports

        found = self._found(site)
        return found is not None and supports(found[1], _present(site, found[0]), site.outs[0])

    def __call__(self, site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.elementwise import expression

        found = self._found(site)
        assert found is not None
        return expression(found[1], [io.ins[i] for i in found[0]], io.outs[0], io.launcher)


def _present(site: Site, used: Sequence[int]) -> list[TensorSpec]:
    return [site.spec(i) for i in used]


def formula(terms: Callable[[Site], Terms | None]) -> Kernels:
    """The kernels of an expression: any strides, and the output may take over any input of its shape and type."""
    made = Formula(terms)
    return kernels(made, made.supports, inplace=tuple(range(MOST_INPUTS)), strided=True, strided_out=True)


def formula_of(op: Op) -> Formula | None:
    """The operator's expression, where it has one."""
    kernel = op.kernels.get("triton")
    return kernel.bind if kernel is not None and isinstance(kernel.bind, Formula) else None


def _with_parameters(function: str, site: Site) -> Term:
    """The function of input 0, with the attributes as its parameters."""
    given = {_PARAMETERS[name]: float(value) for name, value in site.attrs.items()}
    return Term(function, (0,), given.get("alpha"), given.get("beta"))


def unary(name: str) -> Kernels:
    """The kernels of a ufunc or an activation; none where Triton has no such function."""
    return formula(lambda site: (_with_parameters(UNARY[name], site),)) if name in UNARY else {}


def gelu(form: Callable[[Site], str]) -> Kernels:
    """The kernels of Gelu, "gelu" or "gelu_tanh" as `form` says."""
    return formula(lambda site: (Term(form(site), (0,)),))


def of_sum(function: str) -> Kernels:
    """The kernels of f(x + bias), the bias where there is one."""

    def terms(site: Site) -> Terms:
        return (Term("add", (0, 1)), Term(function, (len(site.ins),))) if site.has(1) else (Term(function, (0,)),)

    return formula(terms)


def _swish(site: Site) -> Term:
    alpha = float(site.attrs["alpha"])
    return Term("silu", (0,)) if alpha == 1 else Term("swish", (0,), alpha)


def activation(name: str) -> Kernels:
    """The kernels of an activation; none where Triton has no such function."""
    return formula(lambda site: (_swish(site),)) if name == "swish" else unary(name)


SWIGLU = formula(lambda site: (_swish(site), Term("mul", (len(site.ins), 1))))


def binary(ufunc: str) -> Kernels:
    """The kernels of out = ufunc(a, b) with broadcasting; none where Triton has no such function."""
    return formula(lambda site: (Term(BINARY[ufunc], (0, 1)),)) if ufunc in BINARY else {}


def ufunc(name: str) -> Kernels:
    """The kernels of a ufunc of one or two inputs."""
    return unary(name) or binary(name)


def variadic(ufunc: str, *, mean: bool = False) -> Kernels:
    """The kernels of inputs combined from left to right, divided by their number for a mean."""

    def terms(site: Site) -> Terms | None:
        n = len(site.ins)
        if n > MOST_COMBINED:
            return None
        made = [Term(BINARY[ufunc], (i if i == 0 else n + i - 1, i + 1)) for i in range(n - 1)]
        if mean:
            made.append(Term("over", (2 * n - 2 if n > 1 else 0,), float(n)))
        return tuple(made) or (Term(CAST, (0,), dtype=site.outs[0].dtype.name),)

    return formula(terms)


def _is_square(site: Site) -> bool:
    """Whether the exponent is known to be 2, and does not change the shape."""
    exponent = site.value(1)
    known = exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0
    return known and site.outs[0].shape == site.spec(0).shape


def _power(site: Site) -> Terms:
    if _is_square(site):
        return (Term("mul", (0, 0)),)
    if site.spec(1).dtype == site.spec(0).dtype:
        return (Term("pow", (0, 1)),)
    return (Term(CAST, (1,), dtype=site.spec(0).dtype.name), Term("pow", (0, 2)))


POWER = formula(_power)
"""a ** b of floats, the exponent of any type; a square is a product."""

MODULO = formula(lambda site: (Term("fmod" if site.attrs["fmod"] else "mod", (0, 1)),))

SHIFT = formula(lambda site: (Term(f"shift_{str(site.attrs['direction']).lower()}", (0, 1)),))

PRELU = formula(lambda site: (Term("prelu", (0, 1)),))


def _is_inf(site: Site) -> Terms:
    """Infinities that do not count are NaN, which nothing equals."""
    negative, positive = bool(site.attrs["detect_negative"]), bool(site.attrs["detect_positive"])
    return (Term("isinf", (0,), -np.inf if negative else np.nan, np.inf if positive else np.nan),)


IS_INF = formula(_is_inf)


def _clip(site: Site) -> Terms:
    """Bounds of floats that are known while planning are compiled in; others are read."""
    if site.attrs:
        return (Term("clip", (0,), float(site.attrs["min"]), float(site.attrs["max"])),)
    given = [i for i in (1, 2) if site.has(i)]
    known = {i: value for i in given if (value := site.value(i)) is not None and site.spec(0).dtype.kind == "f"}
    if len(known) == len(given):
        low, high = (float(known[i].reshape(-1)[0]) if i in known else None for i in (1, 2))
        return (Term("clip", (0,), low, high),)
    if len(given) == 2:
        return (Term("clamp", (0, 1, 2)),)
    return (Term("max" if given == [1] else "min", (0, given[0])),)


CLIP = formula(_clip)

SELECT = formula(lambda site: (Term(WHERE, (0, 1, 2)),))

CONVERT = formula(lambda site: (Term(CAST, (0,), dtype=site.outs[0].dtype.name),))

OPS: tuple[Op, ...] = ()
