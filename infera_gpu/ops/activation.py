"""Activations: one table, one program each in the CPU kernels, one definition each in the portable ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs
from infera_gpu.op import Buffers, Call, Case, Cases, Op, Site, broadcast, f32, same_as
from infera_gpu.ops import _jit
from infera_gpu.ops import _triton_elementwise as _triton
from infera_gpu.ops._families import CHAIN_NS, elementwise, floating, native, plain
from infera_gpu.ops.elementwise import single
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import activation as cpu
from infera_kernels.cpu import elementwise as cpu_elementwise
from infera_kernels.portable import activation as portable
from infera_kernels.portable import elementwise as portable_elementwise

_EDGES = np.array([0.0, -0.0, np.inf, -1e30, 1e30, 1e-30, -20.5, 20.5, 100, -100], np.float32)


def _f16(*shape: int) -> TensorSpec:
    return TensorSpec(shape, np.dtype(np.float16))


_INTEGERS = Case("integers", (np.arange(-4, 5, dtype=np.int32),), {"bias": 1.5, "lambd": 2.0})


def _cases(variants: tuple[Attrs, ...], *, half: bool) -> tuple[Case, ...]:
    return (
        Case("matrix", (f32(3, 5),), low=-4, high=4),
        Case("past_block", (f32(2, 3, 12001),), low=-8, high=8),
        Case("edges", (_EDGES,)),
        Case("nan", (np.array([np.nan, 1], np.float32),)),
        Case("empty", (f32(0, 2),)),
        *((Case("half", (_f16(3, 5),), tol=2e-3),) if half else ()),
        *(Case("_".join(f"{k}{v:g}" for k, v in variant.items()), (f32(3, 5),), variant) for variant in variants),
    )


def _compiled(function: str) -> _jit.Kernels:
    if function not in _jit.ACTIVATIONS:
        return {}
    return _jit.activation(lambda site: function, lambda site: tuple(map(float, site.attrs.values())))


def _activation(
    name: str, function: str, since: int, attrs: dict[str, float] | None = None, *variants: dict[str, float]
) -> Op:
    def bind(site: Site, io: Buffers) -> list[Call]:
        return cpu.activation(function, io.ins[0], io.outs[0], io.scratch, **site.attrs)

    def compute(xp: Any, site: Site, x: Array) -> Array:
        return portable.activation(xp, function, x, **site.attrs)

    return Op(
        name,
        since,
        infer=same_as(),
        compute=plain(compute),
        kernels=elementwise(bind, supports=floating, ns=CHAIN_NS) | _triton.activation(function) | _compiled(function),
        attrs=attrs or {},
        cases=_cases(variants, half=name != "Celu"),  # which takes float32 only
    )


def _with_cases(op: Op, *cases: Case) -> Op:
    return replace(op, cases=(*op.cases, *cases))


_SELU = {"alpha": 1.6732631921768188, "gamma": 1.0507010221481323}

_FAMILY = (
    _activation("Relu", "relu", 6),
    _with_cases(
        _activation("LeakyRelu", "leaky_relu", 6, {"alpha": 0.01}, {"alpha": 1.5}, {"alpha": -0.5}),
        Case("alpha0", (_EDGES,), {"alpha": 0.0}),
    ),
    _activation("Elu", "elu", 6, {"alpha": 1.0}, {"alpha": 0.3}),
    _activation("Selu", "selu", 6, _SELU, {"alpha": 2.0, "gamma": 3.0}),
    _activation("Celu", "celu", 12, {"alpha": 1.0}, {"alpha": 0.3}),
    _activation("Sigmoid", "sigmoid", 6),
    _activation("HardSigmoid", "hard_sigmoid", 6, {"alpha": 0.2, "beta": 0.5}, {"alpha": 0.5, "beta": 0.6}),
    _activation("HardSwish", "hard_swish", 14),
    _activation("Tanh", "tanh", 6),
    _activation("Softplus", "softplus", 1),
    _activation("Softsign", "softsign", 1),
    _activation("ThresholdedRelu", "thresholded_relu", 10, {"alpha": 1.0}, {"alpha": 0.25}),
    _activation("Mish", "mish", 18),
    _activation("Swish", "swish", 24, {"alpha": 1.0}, {"alpha": 1.7}),
    _with_cases(
        _activation("Shrink", "shrink", 9, {"bias": 0.0, "lambd": 0.5}, {"bias": 0.5, "lambd": 1.0}), _INTEGERS
    ),
)


def _gelu_form(site: Site) -> str:
    forms = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = site.attrs["approximate"]
    if approximate not in forms:
        raise site.fail(f"approximate is '{approximate}', expected 'none' or 'tanh'")
    return forms[approximate]


def _gelu_spec(site: Site) -> tuple[TensorSpec]:
    _gelu_form(site)
    return (site.spec(0),)


def _bind_gelu(site: Site, io: Buffers) -> list[Call]:
    return cpu.activation(_gelu_form(site), io.ins[0], io.outs[0], io.scratch)


def _gelu(domain: str, since: int) -> Op:
    """Gelu: the standard operator from opset 20 on, and the same for older models in the domain `infera`."""
    return Op(
        "Gelu",
        since,
        domain=domain,
        infer=_gelu_spec,
        compute=plain(lambda xp, site, x: portable.activation(xp, _gelu_form(site), x)),
        kernels=elementwise(_bind_gelu, supports=single, ns=CHAIN_NS)
        | _triton.gelu(_gelu_form)
        | _jit.activation(_gelu_form),
        attrs={"approximate": "none"},
        cases=Cases(
            lambda: (
                Case("erf", (f32(3, 5),), low=-6, high=6),
                Case("erf_past_block", (f32(2, 3, 12001),), low=-6, high=6),
                Case("erf_tails", (np.array([-1e30, -40, -9, 9, 40, 1e30, 0, -0.0], np.float32),)),
                Case("tanh", (f32(3, 5),), {"approximate": "tanh"}, low=-6, high=6),
                Case("tanh_past_block", (f32(3, 24001),), {"approximate": "tanh"}, low=-6, high=6),
                Case("half", (_f16(3, 5),), tol=2e-3),
                Case("empty", (f32(0, 2),)),
            )
        ),
    )


def _bind_swiglu(site: Site, io: Buffers) -> list[Call]:
    gate, x = io.ins
    return cpu.swiglu(gate, x, io.outs[0], io.scratch, alpha=site.attrs["alpha"])


def _swiglu(xp: Any, site: Site, gate: Array, x: Array) -> Array:
    return portable.activation(xp, "swish", gate, alpha=site.attrs["alpha"]) * x


_SWIGLU = Op(
    "SwiGLU",
    28,
    infer=same_as(),
    compute=plain(_swiglu),
    kernels=elementwise(_bind_swiglu, supports=floating, ns=CHAIN_NS) | _triton.SWIGLU,
    attrs={"alpha": 1.0},
    cases=Cases(
        lambda: (
            Case("matrix", (f32(3, 5), f32(3, 5)), {"alpha": 1.5}),
            Case("past_block", (f32(3, 24001), f32(3, 24001))),
        )
    ),
)


def _bind_prelu(site: Site, io: Buffers) -> list[Call]:
    x, slope = io.ins
    return cpu.prelu(x, slope, io.outs[0], io.scratch)


def _prelu_spec(site: Site) -> tuple[TensorSpec]:
    (spec,) = broadcast(site.spec(0).dtype)(site)
    if spec is None or spec.shape != site.spec(0).shape:
        raise site.fail(f"slope {site.spec(1)} does not broadcast to {site.spec(0)}")
    return (spec,)


_PRELU = Op(
    "PRelu",
    7,
    infer=_prelu_spec,
    compute=plain(lambda xp, site, x, slope: portable.prelu(xp, x, slope)),
    kernels=elementwise(_bind_prelu) | _triton.PRELU,
    cases=Cases(
        lambda: (
            Case("channel", (f32(2, 3, 4, 5), f32(3, 1, 1))),
            Case("scalar", (f32(2, 3), f32(1))),
            Case("same_past_block", (f32(4, 5001), f32(4, 5001))),
            Case("past_block", (f32(1, 3, 65, 101), f32(3, 1, 1))),
            Case("empty", (f32(0, 3), f32(3))),
        )
    ),
)


def _attr_bounds(site: Site, like: Array) -> tuple[Array, Array]:
    return like.dtype.type(site.attrs["min"]), like.dtype.type(site.attrs["max"])


def _input_bounds(site: Site, ins: tuple[Array, ...]) -> tuple[Array | None, Array | None]:
    low, high = (ins[i].reshape(()) if site.has(i) else None for i in (1, 2))
    return low, high


def _clip(since: int, cases: tuple[Case, ...], attrs: Attrs | None = None) -> Op:
    def bounds(site: Site, ins: tuple[Array, ...]) -> tuple[Array | None, Array | None]:
        return _attr_bounds(site, ins[0]) if site.attrs else _input_bounds(site, ins)

    def compute(xp: Any, site: Site, *ins: Array) -> Array:
        low, high = bounds(site, ins)
        return portable_elementwise.clip(xp, ins[0], low, high)

    return Op(
        "Clip",
        since,
        infer=same_as(),
        compute=plain(compute),
        kernels=elementwise(
            lambda site, io: cpu_elementwise.clip(io.ins[0], *bounds(site, tuple(io.ins)), io.outs[0]),
            supports=native,
        )
        | _triton.CLIP,
        attrs=attrs or {},
        cases=cases,
    )


_LOW, _HIGH = np.array(-0.5, np.float32), np.array(1.25, np.float32)
_CLIP = (
    _clip(
        6,
        (
            Case("both", (f32(3, 5),), {"min": -0.5, "max": 1.0}, opset=7),
            Case("low_past_block", (f32(3, 24001),), {"min": 0.0}, opset=7),
            Case("neither", (f32(3, 5),), opset=7),
        ),
        {"min": float(np.finfo(np.float32).min), "max": float(np.finfo(np.float32).max)},
    ),
    _clip(
        11,
        (
            Case("both", (f32(3, 5), _LOW, _HIGH)),
            Case("low_past_block", (f32(3, 24001), _LOW)),
            Case("high", (f32(3, 5), None, _HIGH)),
            Case("neither", (f32(3, 5),)),
            Case("computed", (f32(3, 5), f32(), f32())),
            Case("empty", (f32(0, 5), _LOW, _HIGH)),
            Case("int64", (np.arange(-9, 9), np.array(-2), np.array(5)), opset=12),
        ),
    ),
)

OPS: tuple[Op, ...] = (*_FAMILY, _gelu("", 20), _gelu("infera", 1), _SWIGLU, _PRELU, *_CLIP)
