"""The fused normalisation to unit length that graph passes make."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.op import Buffers, Call, Case, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops._families import i64, plain, split_of
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.norm import l2_normalize
from infera_kernels.portable.norm import l2_normalized


def _fits(site: Site) -> bool:
    """Whether the shape that norms were expanded to is no wider than x."""
    x, shape = site.spec(0).dims, site.ints(1)
    try:
        return shape is None or np.broadcast_shapes(shape, x) == x
    except ValueError:
        return False


def _infer(site: Site) -> tuple[TensorSpec]:
    site.axis()
    if site.attrs["bound"] not in ("max", "add") or not _fits(site):
        raise site.fail(f"bound is {site.attrs['bound']!r} and the shape {site.ints(1)} for {site.spec(0)}")
    return (site.spec(0),)


def _parts(site: Site) -> Expansion | None:
    """The unit vectors, and what makes them as wide as their norms were."""
    if _fits(site):
        return None
    node, out = site.node, site.node.outputs[0]
    unit = made_name(out, "unit")
    return Expansion(
        (
            Node(node.op, node.inputs[:1], (unit,), node.attrs, node.domain, f"{node.name}/unit"),
            Node("Expand", (unit, node.inputs[1]), (out,), name=f"{node.name}/expand", opset=13),
        )
    )


def _how(site: Site) -> dict[str, Any]:
    return {"epsilon": site.attrs["epsilon"], "bound": site.attrs["bound"], "squared": bool(site.attrs["squared"])}


def _bind(site: Site, io: Buffers) -> list[Call]:
    dims, axis = site.spec(0).dims, site.axis()
    shape = math.prod(dims[:axis]), dims[axis], math.prod(dims[axis + 1 :])
    return l2_normalize(io.ins[0].reshape(shape), io.outs[0].reshape(shape), io.scratch, split_of(io), **_how(site))


def _compute(xp: Any, site: Site, x: Array, shape: Array | None = None) -> Array:
    return l2_normalized(xp, x, site.axis(), **_how(site))


def _supported(site: Site) -> bool:
    x = site.spec(0)
    return x.size > 0 and x.ndim > 0 and x.dtype in (np.float32, np.float64)


# Y = X / n, where n is the root of the sum of squares along `axis`. With `bound` "max" n is at least `epsilon`, with
# "add" it is greater by that; where `squared` the sum is, and not its root. The shape that n was expanded to, input 1,
# may be left out.
_FUSED = Op(
    "L2Normalization",
    1,
    domain="infera",
    infer=_infer,
    compute=plain(_compute),
    expand=_parts,
    kernels={"cpu": Kernel(_bind, _supported, inplace=(0,))},
    attrs={"axis": -1, "epsilon": 0.0, "bound": "max", "squared": 0},
    values=(1,),
    cases=(
        Case("rows", (f32(3, 7), i64(3, 7)), {"epsilon": 1e-12}),
        Case("zeros", (np.zeros((2, 3), np.float32),), {"epsilon": 1e-12, "squared": 1}),
        Case("channels", (f32(2, 5, 7, 3),), {"axis": 1, "epsilon": 0.5, "bound": "add"}),
        Case("squared", (f32(2, 3, 5),), {"axis": -2, "epsilon": 0.5, "bound": "add", "squared": 1}),
        Case("at_least", (f32(4, 6),), {"epsilon": 3.0}),
        Case("blocks", (f32(130, 521),), {"epsilon": 1e-6}),
        Case("first_axis", (f32(70, 67),), {"axis": 0}),
    ),
)

OPS: tuple[Op, ...] = (_FUSED,)
