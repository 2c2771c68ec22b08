"""The fused rotary embedding that graph passes make."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.op import Buffers, Call, Case, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops._families import i64, plain, single
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.rotary import rotate_halves


def _fits(site: Site) -> bool:
    """Whether `half` is half a head, and cos and sin broadcast to x."""
    x = site.spec(0).dims
    if not x or x[-1] != 2 * (single(site, 3, "half") or 0):
        return False
    try:
        return np.broadcast_shapes(*(site.spec(i).dims for i in range(3))) == x
    except ValueError:
        return False


def _infer(site: Site) -> tuple[TensorSpec]:
    if not _fits(site):
        raise site.fail(f"cos {site.spec(1)} and sin {site.spec(2)} do not turn {site.spec(0)} by halves")
    return (site.spec(0),)


def _parts(site: Site) -> Expansion | None:
    """The operators apart, where heads are cut elsewhere than in the middle or cos and sin are wider than they."""
    if _fits(site):
        return None
    (x, cos, sin, half), out = site.node.inputs, site.node.outputs[0]
    begin, end, axis, a, b, minus, turned, kept, more = (made_name(out, f"part {i}") for i in range(9))
    constants: dict[str, HostArray] = {begin: i64(0), end: i64(2**63 - 1), axis: i64(-1)}
    at, name = dict[str, Any](opset=13), site.node.name
    nodes = (
        Node("Slice", (x, begin, half, axis), (a,), name=f"{name}/first", **at),
        Node("Slice", (x, half, end, axis), (b,), name=f"{name}/second", **at),
        Node("Neg", (b,), (minus,), name=f"{name}/minus", **at),
        Node("Concat", (minus, a), (turned,), {"axis": -1}, name=f"{name}/turned", **at),
        Node("Mul", (turned, sin), (more,), name=f"{name}/sin", **at),
        Node("Mul", (x, cos), (kept,), name=f"{name}/cos", **at),
        Node("Add", (kept, more), (out,), name=f"{name}/sum", **at),
    )
    return Expansion(nodes, constants)


def _bind(site: Site, io: Buffers) -> list[Call]:
    return rotate_halves(io.ins[0], io.ins[1], io.ins[2], io.outs[0], io.scratch)


def _compute(xp: Any, site: Site, x: Array, cos: Array, sin: Array, half: Array) -> Array:
    middle = x.shape[-1] // 2
    turned = xp.concatenate((-x[..., middle:], x[..., :middle]), axis=-1)
    return x * cos + turned * sin


def _supported(site: Site) -> bool:
    dtype = site.spec(0).dtype
    return dtype in (np.float32, np.float64) and all(site.spec(i).dtype == dtype for i in (1, 2))


# Y = X cos + (-B, A) sin, where X is (A, B) along its last axis, each `half` elements.
_FUSED = Op(
    "RotateHalves",
    1,
    domain="infera",
    infer=_infer,
    compute=plain(_compute),
    expand=_parts,
    kernels={"cpu": Kernel(_bind, _supported, strided=True)},
    values=(3,),
    cases=(
        Case("heads", (f32(2, 3, 5, 8), f32(2, 1, 5, 8), f32(2, 1, 5, 8), i64(4))),
        Case("row", (f32(3, 6), f32(6), f32(1, 6), i64(3))),
    ),
)

OPS: tuple[Op, ...] = (_FUSED,)
