"""com.microsoft: gates of language models whose attention is linear."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops._ms import F32, ms_op
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.activation import activation
from infera_kernels.portable.norm import affine, standardized

_GATES = {"silu": "swish", "swish": "swish", "sigmoid": "sigmoid"}


def _infer_norm(site: Site) -> tuple[TensorSpec]:
    x, scale, gate = (site.spec(i) for i in range(3))
    if scale.ndim != 1 or not x.ndim or not scale.size or x.dims[-1] % scale.size or gate.dims != x.dims:
        raise site.fail(f"X {x}, scale {scale} and gate {gate} do not fit each other")
    if site.attrs["activation"] not in _GATES:
        raise site.fail(f"activation '{site.attrs['activation']}' is not one of {', '.join(_GATES)}")
    return (x,)


def _norm(xp: Any, site: Site, x: Array, scale: Array, gate: Array) -> Array:
    made, _, _ = standardized(xp, x.reshape(-1, scale.size), (-1,), site.attrs["epsilon"], center=False)
    gates = activation(xp, _GATES[site.attrs["activation"]], gate.astype(F32))
    return (affine(made, scale, None, F32).reshape(x.shape) * gates).astype(x.dtype)


def _infer_scaled(site: Site) -> tuple[TensorSpec]:
    if site.has(1) and site.spec(1).size != 1:
        raise site.fail(f"scale is {site.spec(1)}, expected one number")
    return (site.spec(0),)


def _scaled(xp: Any, site: Site, x: Array, scale: Array | None = None) -> Array:
    """Rounded to x's type after every step."""
    factor = np.float32(site.attrs["alpha"]) if scale is None else scale.reshape(()).astype(F32)
    z = (x.astype(F32) * factor).astype(x.dtype)
    return z * activation(xp, "sigmoid", z)


def _infer_add(site: Site) -> tuple[TensorSpec]:
    x = site.spec(0)
    if site.has(3):
        raise site.fail("gate_weight is not supported")
    if not x.ndim or site.spec(1) != x or site.spec(2).dims != (*x.dims[:-1], 1):
        raise site.fail(f"X {x}, Y {site.spec(1)} and gate {site.spec(2)} do not fit each other")
    return (x,)


def _infer_gate(site: Site) -> tuple[TensorSpec, ...]:
    a = site.spec(0)
    if a.ndim != 3 or any(site.spec(i).dims != a.dims[2:] for i in (1, 2)) or (site.has(3) and site.spec(3) != a):
        raise site.fail(f"a {a}, dt_bias {site.spec(1)} and decay_scale {site.spec(2)} do not fit each other")
    if not site.has(3) and len(site.node.outputs) > 1:
        raise site.fail("beta is wanted, but b is left out")
    return (a, a) if site.has(3) else (a,)


def _gate(xp: Any, site: Site, a: Array, bias: Array, scale: Array, b: Array | None = None) -> tuple[Array, ...]:
    decay = (scale * activation(xp, "softplus", a.astype(F32) + bias)).astype(a.dtype)
    return (decay,) if b is None else (decay, activation(xp, "sigmoid", b))


OPS: tuple[Op, ...] = (
    ms_op(
        "GatedRMSNorm",
        _infer_norm,
        _norm,
        (
            Case("rows", (f32(2, 3, 8), f32(8), f32(2, 3, 8))),
            Case("heads", (f32(2, 3, 8), f32(4), f32(2, 3, 8)), {"activation": "sigmoid", "epsilon": 0.1}),
        ),
        activation="silu",
        epsilon=1e-5,
    ),
    ms_op(
        "ScaledSiLU",
        _infer_scaled,
        _scaled,
        (
            Case("attribute", (f32(3, 5),), {"alpha": 1.7}),
            Case("input", (f32(3, 5), np.array(0.3, np.float32)), {"alpha": 1.7}),
        ),
        alpha=1.0,
    ),
    ms_op(
        "GatedAdd",
        _infer_add,
        lambda xp, site, x, y, gate: x + y * gate,
        (Case("rows", (f32(2, 3, 5), f32(2, 3, 5), f32(2, 3, 1))),),
        needs=(0, 1, 2),
    ),
    ms_op(
        "LinearAttentionGate",
        _infer_gate,
        _gate,
        (
            Case("decay", (f32(2, 3, 4), f32(4), f32(4))),
            Case("both", (f32(2, 3, 4), f32(4), f32(4), f32(2, 3, 4)), n_outs=2),
        ),
        needs=(0, 1, 2),
    ),
)
