"""The operators' "triton" kernels. What wraps them says which shapes and types it covers; this only translates.

Triton is imported when a kernel is asked whether it supports a site, or bound: only devices that run it ask. What
scratch a kernel takes it says by `workspace`: binding to dummies on the host would tell nothing on a GPU. Declares no
operators itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from infera_gpu.op import Bind, Buffers, Call, Kernel, Op, Site

Kernels = dict[str, Kernel]

UNARY: Mapping[str, str] = MappingProxyType(
    {
        **{
            name: name
            for name in (
                *("abs", "ceil", "elu", "erf", "exp", "floor", "hard_sigmoid", "hard_swish", "leaky_relu", "log"),
                *("logical_not", "reciprocal", "relu", "sigmoid", "softplus", "sqrt", "tanh"),
            )
        },
        "negative": "neg",
    }
)
"""A ufunc or an activation, by the name that its CPU kernel has -> the Triton function."""

BINARY: Mapping[str, str] = MappingProxyType(
    {
        **{name: name for name in ("add", "equal", "greater", "greater_equal", "less", "less_equal")},
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


def _none(site: Site) -> int:
    return 0


def kernels(
    bind: Bind,
    supports: Callable[[Site], bool],
    *,
    inplace: tuple[int, ...],
    strided: bool,
    strided_out: bool | None = None,
    workspace: Callable[[Site], int] = _none,
) -> Kernels:
    """A kernel of the kind "triton". One that is `strided` writes any strides too, unless `strided_out` says otherwise.

    `workspace` gives the bytes of all its scratch, each piece `memory.aligned`.
    """
    writes = strided if strided_out is None else strided_out
    return {"triton": Kernel(bind, supports, workspace, inplace=inplace, strided=strided, strided_out=writes)}


def _slopes(site: Site) -> dict[str, float]:
    """The attributes that Triton's functions know by the same names."""
    return {name: float(site.attrs[name]) for name in ("alpha", "beta") if name in site.attrs}


def _always(site: Site) -> bool:
    return True


def _unary(
    function: Callable[[Site], str],
    parameters: Callable[[Site], dict[str, float]] = _slopes,
    when: Callable[[Site], bool] = _always,
) -> Kernels:
    """The kernels of out = f(x), f a Triton function chosen by the site; `parameters` gives its alpha and beta."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports_unary

        return when(site) and supports_unary(function(site), site.spec(0), site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton import elementwise

        return elementwise.unary(function(site), io.ins[0], io.outs[0], io.launcher, **parameters(site))

    return kernels(bind, supports, inplace=(0,), strided=True)


def unary(name: str) -> Kernels:
    """The kernels of a ufunc or an activation; none where Triton has no such function."""
    return _unary(lambda site: UNARY[name]) if name in UNARY else {}


def gelu(form: Callable[[Site], str]) -> Kernels:
    """The kernels of Gelu, "gelu" or "gelu_tanh" as `form` says."""
    return _unary(form)


def of_sum(function: str) -> Kernels:
    """The kernels of f(x + bias), the bias where there is one."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports_binary, supports_unary

        x, out = site.spec(0), site.outs[0]
        sums = not site.has(1) or supports_binary("add", x, site.spec(1), out)
        return sums and supports_unary(function, x, out)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton import elementwise

        (out,) = io.outs
        added = elementwise.binary("add", io.ins[0], io.ins[1], out, io.launcher) if site.has(1) else []
        return [*added, *elementwise.unary(function, out if added else io.ins[0], out, io.launcher)]

    return kernels(bind, supports, inplace=(0,), strided=True)


def activation(name: str) -> Kernels:
    """The kernels of an activation, Swish with its usual factor of 1; none where Triton has no such function."""
    if name == "swish":
        return _unary(lambda site: "silu", lambda site: {}, when=lambda site: bool(site.attrs["alpha"] == 1))
    return unary(name)


def binary(ufunc: str) -> Kernels:
    """The kernels of out = ufunc(a, b) with broadcasting; none where Triton has no such function."""
    if ufunc not in BINARY:
        return {}
    function = BINARY[ufunc]

    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports_binary

        return supports_binary(function, site.spec(0), site.spec(1), site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton import elementwise

        a, b = io.ins
        return elementwise.binary(function, a, b, io.outs[0], io.launcher)

    return kernels(bind, supports, inplace=(0, 1), strided=True)


def ufunc(name: str) -> Kernels:
    """The kernels of a ufunc of one or two inputs."""
    return unary(name) or binary(name)


def variadic(ufunc: str) -> Kernels:
    """The kernels of inputs combined from left to right: a copy of one, else a launch for each after the first.

    The output takes over no input's memory: another launch might still read it.
    """
    function = BINARY[ufunc]

    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports_binary, supports_copy

        out = site.outs[0]
        if len(site.ins) == 1:
            return supports_copy(site.spec(0), out)
        return all(supports_binary(function, site.spec(0), site.spec(i), out) for i in range(1, len(site.ins)))

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton import elementwise

        first, *others = io.ins
        out = io.outs[0]
        if not others:
            return elementwise.copy(first, out, io.launcher)
        calls = elementwise.binary(function, first, others[0], out, io.launcher)
        for other in others[1:]:
            calls += elementwise.binary(function, out, other, out, io.launcher)
        return calls

    return kernels(bind, supports, inplace=(), strided=True)


# ---- powers, bounds, choices and casts


def _is_square(site: Site) -> bool:
    """Whether the exponent is known to be 2, and does not change the shape."""
    exponent = site.value(1)
    known = exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0
    return known and site.outs[0].shape == site.spec(0).shape


def _supports_power(site: Site) -> bool:
    from infera_kernels.triton.elementwise import supports_binary

    base = site.spec(0)
    exponent = base if _is_square(site) else site.spec(1)
    return supports_binary("pow", base, exponent, site.outs[0])


def _bind_power(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton import elementwise

    base, exponent = io.ins
    if _is_square(site):
        return elementwise.binary("mul", base, base, io.outs[0], io.launcher)
    return elementwise.binary("pow", base, exponent, io.outs[0], io.launcher)


POWER = kernels(_bind_power, _supports_power, inplace=(0, 1), strided=True)
"""a ** b of one floating type; a square is a product, whatever the exponent's type."""


def _bounds(site: Site) -> dict[str, float]:
    """Clip's known bounds as the parameters of Triton's clip."""
    if site.attrs:
        return {"alpha": float(site.attrs["min"]), "beta": float(site.attrs["max"])}
    known = {name: site.value(i) for name, i in (("alpha", 1), ("beta", 2))}
    return {name: float(value.reshape(-1)[0]) for name, value in known.items() if value is not None}


def _bounds_known(site: Site) -> bool:
    return all(not site.has(i) or site.value(i) is not None for i in (1, 2))


CLIP = _unary(lambda site: "clip", _bounds, _bounds_known)
"""Floats between bounds that are known while planning."""


def _supports_where(site: Site) -> bool:
    from infera_kernels.triton.elementwise import supports_where

    return supports_where(site.spec(0), site.spec(1), site.spec(2), site.outs[0])


def _bind_where(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton import elementwise

    condition, x, y = io.ins
    return elementwise.where(condition, x, y, io.outs[0], io.launcher)


WHERE = kernels(_bind_where, _supports_where, inplace=(1, 2), strided=True)


def _supports_copy(site: Site) -> bool:
    from infera_kernels.triton.elementwise import supports_copy

    return supports_copy(site.spec(0), site.outs[0])


def _bind_copy(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton import elementwise

    return elementwise.copy(io.ins[0], io.outs[0], io.launcher)


CAST = kernels(_bind_copy, _supports_copy, inplace=(), strided=True)


OPS: tuple[Op, ...] = ()
