"""The fused normalisations that graph passes make: along one axis, wherever it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.op import Buffers, Call, Case, Cases, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops import _jit, _triton_norm
from infera_gpu.ops._families import i64, plain, split_of
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.norm import l2_normalize, scaled, standardize, standardize_axis
from infera_kernels.portable.norm import affine, l2_normalized, standardized


def _shape(site: Site) -> tuple[int, int, int]:
    """The input as (outer, axis, inner)."""
    dims, axis = site.spec(0).dims, site.axis()
    return math.prod(dims[:axis]), dims[axis], math.prod(dims[axis + 1 :])


def _supported(site: Site) -> bool:
    x = site.spec(0)
    same = all(s.dtype == x.dtype for s in site.ins[1:] if s is not None and s.dtype.kind == "f")
    return x.size > 0 and x.ndim > 0 and x.dtype in (np.float32, np.float64) and same


# ---- to unit length


def _fits(site: Site) -> bool:
    """Whether the shape that norms were expanded to is no wider than x."""
    x, shape = site.spec(0).dims, site.ints(1)
    try:
        return shape is None or np.broadcast_shapes(shape, x) == x
    except ValueError:
        return False


def _infer(site: Site) -> tuple[TensorSpec]:
    site.axis()
    bound, finite = site.attrs["bound"], site.attrs["finite"]
    if bound not in (("max",) if finite else ("max", "add")) or not _fits(site):
        raise site.fail(f"bound is {bound!r}, finite {finite} and the shape {site.ints(1)} for {site.spec(0)}")
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
    flags = {name: bool(site.attrs[name]) for name in ("squared", "finite")}
    return {"epsilon": site.attrs["epsilon"], "bound": site.attrs["bound"], **flags}


def _bind(site: Site, io: Buffers) -> list[Call]:
    shape = _shape(site)
    return l2_normalize(io.ins[0].reshape(shape), io.outs[0].reshape(shape), io.scratch, split_of(io), **_how(site))


_LENGTHS = {
    ("max", 0, 0): "length_at_least",
    ("max", 0, 1): "length_within",
    ("max", 1, 0): "root_of_at_least",
    ("max", 1, 1): "root_of_within",
    ("add", 0, 0): "length_and",
    ("add", 1, 0): "root_of_sum",
}
"""(bound, squared, finite) -> the kind that Triton has."""


def _unit_rows(site: Site) -> _triton_norm.Rows:
    kind = _LENGTHS[site.attrs["bound"], site.attrs["squared"], site.attrs["finite"]]
    return _triton_norm.along(site, site.axis(), kind, float(site.attrs["epsilon"]))


def _compute(xp: Any, site: Site, x: Array, shape: Array | None = None) -> Array:
    return l2_normalized(xp, x, site.axis(), **_how(site))


# Y = X / n, where n is the root of the sum of squares along `axis`. With `bound` "max" n is at least `epsilon`, and
# where `finite` at most the largest number of its type; with "add" it is greater by that; where `squared` the sum is,
# and not its root. The shape that n was expanded to, input 1, may be left out.
_UNIT = Op(
    "L2Normalization",
    1,
    domain="infera",
    infer=_infer,
    compute=plain(_compute),
    expand=_parts,
    kernels={"cpu": Kernel(_bind, _supported, inplace=(0,))} | _triton_norm.rows(_unit_rows),
    attrs={"axis": -1, "epsilon": 0.0, "bound": "max", "squared": 0, "finite": 0},
    values=(1,),
    cases=Cases(
        lambda: (
            Case("rows", (f32(3, 7), i64(3, 7)), {"epsilon": 1e-12}),
            Case("zeros", (np.zeros((2, 3), np.float32),), {"epsilon": 1e-12, "squared": 1}),
            Case("channels", (f32(2, 5, 7, 3),), {"axis": 1, "epsilon": 0.5, "bound": "add"}),
            Case("squared", (f32(2, 3, 5),), {"axis": -2, "epsilon": 0.5, "bound": "add", "squared": 1}),
            Case("at_least", (f32(4, 6),), {"epsilon": 3.0}),
            Case("finite", (np.array([[np.inf, 1], [3, 4]], np.float32),), {"epsilon": 1e-12, "finite": 1}),
            Case("finite_sum", (np.array([[-np.inf, 1], [3, 4]], np.float32),), {"squared": 1, "finite": 1}),
            Case("blocks", (f32(130, 521),), {"epsilon": 1e-6}),
            Case("first_axis", (f32(70, 67),), {"axis": 0}),
            Case("tiles", (f32(2, 130, 1200),), {"axis": 1}),
        )
    ),
)


# ---- to mean 0 and deviation 1


def _infer_axis(site: Site) -> tuple[TensorSpec]:
    length = site.spec(0).dims[site.axis()]
    for i in (1, 2):
        if site.has(i) and site.spec(i).dims != (length,):
            raise site.fail(
                f"input {i} is {site.spec(i)}, expected [{length}] along axis {site.axis()} of {site.spec(0)}"
            )
    return (site.spec(0),)


def _bind_axis(site: Site, io: Buffers) -> Sequence[Call]:
    shape = _shape(site)
    x, y = io.ins[0].reshape(shape), io.outs[0].reshape(shape)
    scale, bias = (io.ins[i] if site.has(i) else None for i in (1, 2))
    how: dict[str, Any] = {"epsilon": site.attrs["epsilon"], "center": bool(site.attrs["center"])}
    if shape[2] > 1:
        return standardize_axis(x, y, io.scratch, split_of(io), scale=scale, bias=bias, **how)
    x, y = x[:, :, 0], y[:, :, 0]
    return standardize(x, y, io.scratch, split_of(io), finish=lambda rows: scaled(y[rows], scale, bias), **how)


def _axis_rows(site: Site) -> _triton_norm.Rows:
    kind, column = "layer" if site.attrs["center"] else "rms", (site.spec(0).dims[site.axis()], 1)
    inputs: _triton_norm.Inputs = {"weight": (1, column), "bias": (2, column)}
    return _triton_norm.along(site, site.axis(), kind, float(site.attrs["epsilon"]), inputs)


def _compute_axis(xp: Any, site: Site, x: Array, scale: Array | None = None, bias: Array | None = None) -> Array:
    axis = site.axis()
    y = standardized(xp, x, (axis,), site.attrs["epsilon"], center=bool(site.attrs["center"]))[0]
    columns = [None if a is None else a.reshape(-1, *(1,) * (x.ndim - axis - 1)) for a in (scale, bias)]
    return affine(y, columns[0], columns[1], x.dtype)


# Y = (X - mean) / sqrt(mean((X - mean)^2) + epsilon) * scale + bias along `axis`; scale and bias, inputs 1 and 2, have
# one element for each place on it, and may be left out. Without `center` the mean is 0.
_AXIS = Op(
    "AxisNormalization",
    1,
    domain="infera",
    infer=_infer_axis,
    compute=plain(_compute_axis),
    kernels={"cpu": Kernel(_bind_axis, _supported, inplace=(0,))}
    | _triton_norm.rows(_axis_rows)
    | _jit.standardize(lambda site: _shape(site)[:2], lambda site: _shape(site)[2] == 1 and _supported(site)),
    attrs={"axis": -1, "epsilon": 1e-5, "center": 1},
    cases=Cases(
        lambda: (
            Case("channels", (f32(2, 5, 7, 3), f32(5), f32(5)), {"axis": 1}),
            Case("bias", (f32(2, 5, 7), None, f32(5)), {"axis": -2, "epsilon": 0.1}),
            Case("last", (f32(3, 7), f32(7), f32(7))),
            Case("not_centred", (f32(2, 6, 5),), {"axis": 1, "center": 0}),
            Case("tiles", (f32(2, 130, 1200), f32(130), f32(130)), {"axis": 1}),
            Case("first", (f32(4, 9), f32(4)), {"axis": 0}),
        )
    ),
)


# ---- of what a scale may widen


def _normalized_dims(site: Site) -> tuple[int, ...]:
    return site.spec(0).dims[site.axis() :]


def _infer_widened(site: Site) -> tuple[TensorSpec]:
    x, given = site.spec(0), [s.dims for s in site.ins[1:] if s is not None]
    site.axis()
    try:
        return (TensorSpec(np.broadcast_shapes(x.dims, *given), x.dtype),)
    except ValueError:
        raise site.fail(f"scale and bias {given} do not broadcast with {x}") from None


def _norm_and_affine(site: Site) -> Expansion:
    """The norm with its scale and bias, or where they are wider than what is normalised, Mul and Add behind it."""
    node, center, (x, *affine) = site.node, bool(site.attrs["center"]), site.node.inputs
    attrs = {name: site.attrs[name] for name in ("axis", "epsilon")}
    norm, opset = ("LayerNormalization", 17) if center else ("RMSNormalization", 23)
    given = {i: name for i, name in enumerate(affine, 1) if name}
    if all(site.spec(i).dims == _normalized_dims(site) for i in given) and (center or 2 not in given):
        return Expansion((Node(norm, (x, *affine), node.outputs, attrs, name=node.name, opset=opset),))
    made = made_name(node.outputs[0], "norm")
    nodes = [Node(norm, (x,), (made,), attrs, name=f"{node.name}/norm", opset=opset)]
    for i, name in given.items():
        op = "Mul" if i == 1 else "Add"
        nodes.append(Node(op, (made, name), (made_name(node.outputs[0], op),), name=f"{node.name}/{op}", opset=14))
        made = nodes[-1].outputs[0]
    nodes[-1] = replace(nodes[-1], outputs=node.outputs)
    return Expansion(tuple(nodes))


def _compute_widened(xp: Any, site: Site, x: Array, scale: Array | None = None, bias: Array | None = None) -> Array:
    axes = tuple(range(site.axis(), x.ndim))
    y = standardized(xp, x, axes, site.attrs["epsilon"], center=bool(site.attrs["center"]))[0]
    return affine(y, scale, bias, x.dtype)


# Layer or RMS normalisation over the axes from `axis` on, times a scale, plus a bias, which may both be left out, and
# broadcast with what is normalised as they would in Mul and Add.
_WIDENED = Op(
    "WidenedNormalization",
    1,
    domain="infera",
    infer=_infer_widened,
    compute=plain(_compute_widened),
    expand=_norm_and_affine,
    attrs={"axis": -1, "epsilon": 1e-5, "center": 1},
    cases=Cases(
        lambda: (
            Case("fits", (f32(3, 5, 7), f32(7), f32(7))),
            Case("trailing_axes", (f32(3, 5, 7), f32(5, 7)), {"axis": -2, "center": 0}),
            Case("widened", (f32(3, 1), f32(4), f32(4))),
            Case("bias_alone", (f32(3, 1), None, f32(4))),
            Case("not_centred", (f32(3, 5), f32(5), f32(5)), {"center": 0, "epsilon": 0.1}),
        )
    ),
)

OPS: tuple[Op, ...] = (_UNIT, _AXIS, _WIDENED)
