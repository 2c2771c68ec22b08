"""Gated products, which graph passes make of the feed-forward of Llama-like models."""

from __future__ import annotations

from typing import Any

from infera_gpu.op import Case, Cases, Op, Site, f32
from infera_gpu.ops._families import plain, uniform
from infera_gpu.ops._later import Kinds
from infera_gpu.ops.matmul import ACTIVATIONS, check_activation, matmul_spec
from infera_gpu.ops.normalized import check_scale, normalized
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.activation import activation
from infera_kernels.portable.matmul import transposed


def _spec(site: Site) -> tuple[TensorSpec]:
    check_activation(site)
    gate, up = site.spec(1), site.spec(2)
    if gate.ndim != 2 or up != gate:
        raise site.fail(f"expected two matrices of one shape and type, got {gate} and {up}")
    if site.has(3):
        check_scale(site, 3)
    return matmul_spec(site)


def _gated(xp: Any, site: Site, x: Array, gate: Array, up: Array, scale: Array | None = None) -> Array:
    """Two-byte floats are rounded once, at the end."""
    rows = normalized(xp, x, scale, site.attrs["epsilon"])
    weights = (transposed(xp.asarray(w, rows.dtype), site.attrs["transB"]) for w in (gate, up))
    gates, ups = (xp.matmul(rows, w) for w in weights)
    act = ACTIVATIONS[site.attrs["activation"]]
    return ((activation(xp, act, gates) if act else gates) * ups).astype(x.dtype)


_GATE, _UP = uniform(0, -1, 1, 4, 3), uniform(1, -1, 1, 4, 3)

# Y = act(X @ Wgate') * (X @ Wup'). Both weights are matrices of one shape; W' is W, or with transB = 1 its transpose.
# The products follow MatMul's rules. `activation` is one of infera.FusedMatMul's. With a fourth input, the scale, X is
# normalised first, as infera.NormalizedMatMul says.
_GATED = Op(
    "GatedMatMul",
    1,
    domain="infera",
    infer=_spec,
    compute=plain(_gated),
    kernels=Kinds({}, "_triton_gated", lambda gpu: gpu.GATED),
    attrs={"activation": "silu", "transB": 0, "epsilon": 1e-5},
    cases=Cases(
        lambda: (
            *(Case(act or "none", (f32(3, 4), _GATE, _UP), {"activation": act}) for act in ACTIVATIONS),
            Case("rows", (f32(2, 5, 300), f32(300, 70), f32(300, 70))),
            Case("one_row", (f32(1, 1, 300), f32(300, 70), f32(300, 70))),
            Case("transposed", (f32(17, 40), f32(33, 40), f32(33, 40)), {"transB": 1}),
            Case("transposed_row", (f32(1, 70), f32(33, 70), f32(33, 70)), {"transB": 1, "activation": "gelu"}),
            Case("normalized", (f32(3, 4), _GATE, _UP, uniform(2, 0.5, 2, 4)), {"epsilon": 0.25}),
            Case("normalized_row", (f32(1, 1, 300), f32(300, 70), f32(300, 70), f32(300))),
            Case("normalized_transposed_row", (f32(1, 70), f32(33, 70), f32(33, 70), f32(70)), {"transB": 1}),
            Case("vector", (f32(4), _GATE, _UP)),
            Case("no_terms", (f32(2, 0), f32(0, 3), f32(0, 3))),
            Case("empty", (f32(0, 4), _GATE, _UP)),
            Case("no_columns", (f32(2, 4), f32(4, 0), f32(4, 0))),
        )
    ),
)

OPS: tuple[Op, ...] = (_GATED,)
