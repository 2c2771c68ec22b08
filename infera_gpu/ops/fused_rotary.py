"""The fused rotary embedding that graph passes make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.op import Buffers, Call, Case, Cases, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops._families import i64, plain, reshapes_to, single
from infera_gpu.ops._triton_rotary import FUSED as TRITON
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.rotary import rotate

FAR = 2**63 - 1


def _fits(site: Site) -> bool:
    """Whether pairs are cut as the operator does it, and cos and sin broadcast to them."""
    x, attrs = site.spec(0).dims, site.attrs
    if not x or x[-1] % 2:
        return False
    half = x[-1] // 2
    if attrs["interleaved"]:
        pairs = (*x[:-1], half, 2)
        given, back = site.ints(3), site.ints(4)
        cut = (given is None or reshapes_to(given, x, pairs)) and (back is None or reshapes_to(back, pairs, x))
    else:
        start, end = single(site, 3, "half"), single(site, 4, "end")
        cut = start in (None, half) and (end is None or end >= x[-1])
    turned = (*x[:-1], half) if attrs["per_pair"] else x
    try:
        return cut and np.broadcast_shapes(turned, *(site.spec(i).dims for i in (1, 2))) == turned
    except ValueError:
        return False


def _infer(site: Site) -> tuple[TensorSpec]:
    if not _fits(site):
        raise site.fail(f"cos {site.spec(1)} and sin {site.spec(2)} do not turn the pairs of {site.spec(0)}")
    return (site.spec(0),)


def _parts(site: Site) -> Expansion | None:
    """The operators apart, where heads are cut elsewhere than in the middle or cos and sin are wider than they."""
    if _fits(site):
        return None
    interleaved, dims = bool(site.attrs["interleaved"]), site.spec(0).dims
    x, cos, sin, cut, end = (*site.node.inputs, "", "")[:5]
    out = site.node.outputs[0]
    constants: dict[str, HostArray] = {}
    nodes: list[Node] = []

    def numbers(*values: int) -> str:
        name = made_name(out, f"numbers {len(constants)}")
        constants[name] = i64(*values)
        return name

    def add(op: str, *inputs: str, **attrs: Any) -> str:
        name = made_name(out, f"part {len(nodes)}")
        nodes.append(Node(op, inputs, (name,), attrs, name=f"{site.node.name}/{op} {len(nodes)}", opset=13))
        return name

    def joined(first: str, second: str) -> str:
        if not interleaved:
            return add("Concat", first, second, axis=-1)
        pairs = add("Concat", add("Unsqueeze", first, last), add("Unsqueeze", second, last), axis=-1)
        rank = len(site.ints(3) or (*dims, 2)) - 1
        return add("Reshape", pairs, end or numbers(*(0,) * (rank - 1), -1))

    last = numbers(-1)
    if not interleaved:
        middle = cut or numbers(-(-dims[-1] // 2))
        a = add("Slice", x, numbers(0), middle, last)
        b = add("Slice", x, middle, end or numbers(FAR), last)
    elif cut:
        pairs = add("Reshape", x, cut)
        a, b = (add("Squeeze", add("Slice", pairs, numbers(i), numbers(i + 1), last), last) for i in (0, 1))
    else:
        a, b = (add("Slice", x, numbers(i), numbers(FAR), last, numbers(2)) for i in (0, 1))
    if site.attrs["per_pair"]:
        real = add("Sub", add("Mul", a, cos), add("Mul", b, sin))
        joined(real, add("Add", add("Mul", b, cos), add("Mul", a, sin)))
    else:
        add("Add", add("Mul", x, cos), add("Mul", joined(add("Neg", b), a), sin))
    nodes[-1] = replace(nodes[-1], outputs=(out,))
    return Expansion(tuple(nodes), constants)


def _bind(site: Site, io: Buffers) -> list[Call]:
    x, cos, sin = io.ins[:3]
    how = {name: bool(site.attrs[name]) for name in ("interleaved", "per_pair")}
    return rotate(x, cos, sin, io.outs[0], io.scratch, strict=io.strict, **how)


def _compute(xp: Any, site: Site, x: Array, cos: Array, sin: Array, *cut: Array | None) -> Array:
    pairs = (-1, 2) if site.attrs["interleaved"] else (2, -1)
    split = x.reshape(*x.shape[:-1], *pairs)
    axis = pairs.index(2) - 2
    a, b = (split.take(i, axis=axis) for i in (0, 1))
    if site.attrs["per_pair"]:
        return xp.stack((a * cos - b * sin, b * cos + a * sin), axis=axis).reshape(x.shape)
    return x * cos + xp.stack((-b, a), axis=axis).reshape(x.shape) * sin


def _supported(site: Site) -> bool:
    dtype = site.spec(0).dtype
    return dtype in (np.float32, np.float64) and all(site.spec(i).dtype == dtype for i in (1, 2))


_X, _TABLE, _HALF = f32(2, 3, 5, 8), f32(2, 1, 5, 8), f32(5, 4)
_WIDE, _WIDE_TABLE = f32(1, 4, 65, 64), f32(65, 64)

# Y = X cos + turned sin along the last axis, where `turned` has -b and a in the places of the members a and b of each
# pair. Pairs are half the axis apart, or neighbours where `interleaved`. With `per_pair` cos and sin have one element a
# pair. Inputs 3 and 4, which may be left out, say how X was cut: where its first half ends and where the second does;
# of interleaved pairs the shape that X was given, (..., pairs, 2), and the shape that the result was given again.
_FUSED = Op(
    "Rotary",
    1,
    domain="infera",
    infer=_infer,
    compute=plain(_compute),
    expand=_parts,
    kernels={"cpu": Kernel(_bind, _supported, strided=True, strided_out=True), **TRITON},
    attrs={"interleaved": 0, "per_pair": 0},
    values=(3, 4),
    cases=Cases(
        lambda: (
            Case("heads", (_X, _TABLE, _TABLE, i64(4))),
            Case("row", (f32(3, 6), f32(6), f32(1, 6), i64(3), i64(FAR))),
            Case("uncut", (_WIDE, _WIDE_TABLE, _WIDE_TABLE)),
            Case("per_pair", (_X, _HALF, _HALF), {"per_pair": 1}),
            Case("interleaved", (_X, _TABLE, _TABLE), {"interleaved": 1}),
            Case("shapes", (_X, _TABLE, _TABLE, i64(2, 3, 5, -1, 2), i64(2, 3, 5, 8)), {"interleaved": 1}),
            Case("complex", (_X, _HALF, f32(3, 1, 4)), {"interleaved": 1, "per_pair": 1}),
            Case("complex_wide", (_WIDE, f32(65, 32), f32(65, 32)), {"interleaved": 1, "per_pair": 1}),
        )
    ),
)

OPS: tuple[Op, ...] = (_FUSED,)
