"""The rows of a table that graph passes make of products with one-hot vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.op import Buffers, Call, Case, Cases, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops._families import i64, plain
from infera_gpu.ops._triton_move import LOOKUP
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.indexing import lookup


def _wanted(site: Site) -> tuple[int, ...]:
    """The leading axes of the result. Raises PlanError where the indices and their shape do not fit."""
    ids, rows, shape = site.spec(0).dims, site.spec(1).dims[0] - 1, site.ints(2)
    if not ids or ids[-1] != 1:
        raise site.fail(f"indices are {site.spec(0)}, expected a last axis of 1")
    if shape is None:
        return ids[:-1]
    try:
        if shape and shape[-1] in (1, rows):
            return np.broadcast_shapes(ids[:-1], shape[:-1])
    except ValueError:
        pass
    raise site.fail(f"indices {site.spec(0)} do not expand to {list(shape)} for {rows} rows")


def _infer(site: Site) -> tuple[TensorSpec]:
    table = site.spec(1)
    if table.ndim != 2 or site.spec(0).dtype.kind not in "iu":
        raise site.fail(f"indices {site.spec(0)} and table {table}: expected integers and two axes")
    return (TensorSpec((*_wanted(site), table.dims[1]), table.dtype),)


def _parts(site: Site) -> Expansion | None:
    """The indices expanded first, where they are expanded."""
    ids, table, *shape = site.node.inputs
    if not shape or _wanted(site) == site.spec(0).dims[:-1]:
        return None
    out = site.node.outputs[0]
    wide, target = made_name(out, "wide"), made_name(out, "shape")
    expanded = Node("Expand", (ids, target), (wide,), name=f"{site.node.name}/expand", opset=13)
    return Expansion((expanded, replace(site.node, inputs=(wide, table))), {target: i64(*_wanted(site), 1)})


def _bind(site: Site, io: Buffers) -> list[Call]:
    table = io.ins[1]
    return lookup(table, io.ins[0].reshape(-1), io.outs[0].reshape(-1, table.shape[1]), io.scratch)


def _compute(xp: Any, site: Site, ids: Array, table: Array, shape: Array | None = None) -> Array:
    last = len(table) - 1
    rows = ids.astype(np.int64)[..., 0]
    return table[xp.where((rows < 0) | (rows > last), last, rows)]


def _supported(site: Site) -> bool:
    return site.spec(1).size > 0 and site.spec(1).dtype in (np.float32, np.float64)


# Y = table[ids], where ids have a last axis of 1, which the rows take the place of. The last row of the table is for
# whatever is no index of those before it, negative numbers too. Input 2, which may be left out, is the shape that the
# indices were expanded to.
_LOOKUP = Op(
    "Lookup",
    1,
    domain="infera",
    infer=_infer,
    compute=plain(_compute),
    expand=_parts,
    kernels={"cpu": Kernel(_bind, _supported)} | LOOKUP,
    values=(2,),
    cases=Cases(
        lambda: (
            Case("tokens", (np.array([[[0], [4], [2]]], np.int32), f32(5, 3))),
            Case("outside", (i64(-1, 1, 7, -(2**63), 2**62).reshape(5, 1), f32(4, 2))),
            Case("expanded", (i64(2, 0).reshape(2, 1), f32(4, 2), i64(1, 3))),
            Case("bytes", (np.arange(256, dtype=np.uint8).reshape(4, 64, 1), f32(101, 33))),
        )
    ),
)

OPS: tuple[Op, ...] = (_LOOKUP,)
