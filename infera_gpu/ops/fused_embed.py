"""Sums of embeddings and their layer normalisation, which graph passes make."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.op import Case, Cases, Expansion, Op, Site, f32
from infera_gpu.ops._families import i64, plain
from infera_gpu.ops._triton_embed import embedded
from infera_gpu.spec import Array, TensorSpec, broadcast_shape
from infera_kernels.portable.norm import affine, standardized

_TABLES = (1, 3, 5)
_SCALE, _BIAS = 6, 7


def _given(site: Site) -> list[int]:
    return [i for i in _TABLES if site.has(i)]


def _lead(site: Site) -> tuple[int, ...]:
    try:
        return broadcast_shape(*(site.spec(i - 1).dims for i in _given(site)))
    except ValueError:
        indices = ", ".join(str(site.spec(i - 1)) for i in _given(site))
        raise site.fail(f"the indices {indices} do not broadcast to each other") from None


def _tables(site: Site) -> list[int] | None:
    """The inputs that are tables; None where the indices of one of them vary along an axis, and not along a later one,
    which one launch cannot have."""
    lead = _lead(site)
    for i in _given(site):
        dims = site.spec(i - 1).dims
        while dims[:1] == (1,):
            dims = dims[1:]
        if dims != lead[len(lead) - len(dims) :]:
            return None
    return _given(site)


def _infer(site: Site) -> tuple[TensorSpec]:
    words, given = site.spec(1), _given(site)
    if len(given) < 2 or any(site.spec(i).ndim != 2 or site.spec(i).dims[1:] != words.dims[1:] for i in given):
        raise site.fail(f"tables {', '.join(str(site.spec(i)) for i in given)}: expected two or more of equal columns")
    if not site.has(_SCALE):
        raise site.fail(f"input {_SCALE}, the scale of the norm, is left out; only the shift may be")
    for i in (_SCALE, _BIAS):
        if site.has(i) and site.spec(i).dims != words.dims[1:]:
            raise site.fail(f"input {i} is {site.spec(i)}, expected {list(words.dims[1:])}")
    return (TensorSpec((*_lead(site), words.dims[1]), words.dtype),)


def _parts(site: Site) -> Expansion | None:
    """The rows of each table, their sum and its norm, where one launch cannot have them."""
    if _tables(site) is not None:
        return None
    node, out = site.node, site.node.outputs[0]
    nodes: list[Node] = []

    def add(op: str, opset: int, *inputs: str, **attrs: Any) -> str:
        name = made_name(out, f"part {len(nodes)}")
        nodes.append(Node(op, inputs, (name,), attrs, name=f"{node.name}/{op} {len(nodes)}", opset=opset))
        return name

    total, *others = [add("Gather", 13, node.inputs[i], node.inputs[i - 1], axis=0) for i in _given(site)]
    for other in others:
        total = add("Add", 13, total, other)
    affine = [node.inputs[i] for i in (_SCALE, _BIAS) if site.has(i)]
    nodes.append(
        Node(
            "LayerNormalization",
            (total, *affine),
            (out,),
            {"axis": -1, "epsilon": site.attrs["epsilon"]},
            name=f"{node.name}/norm",
            opset=17,
        )
    )
    return Expansion(tuple(nodes), {})


def _compute(xp: Any, site: Site, *ins: Array | None) -> Array:
    values = dict(enumerate(ins))
    total: Any = None
    for i in _given(site):
        index, table = values[i - 1], values[i]
        assert index is not None
        assert table is not None
        rows = table[index].astype(np.promote_types(table.dtype, np.float32))
        total = rows if total is None else total + rows
    made, _, _ = standardized(xp, total, (-1,), site.attrs["epsilon"])
    return affine(made, values[_SCALE], values.get(_BIAS), site.spec(1).dtype)


_IDS, _KINDS = i64(1, 4, 2, 0, -3, 3).reshape(2, 3), i64(1, 0, 1, 0, 0, -1).reshape(2, 3)

# Y = layer_norm(words[ids] + places[positions] + kinds[segments]) over the last axis, times a scale, plus a shift that
# may be left out, as may be the last table. Indices broadcast to each other; a negative one counts from the end.
_EMBEDDED = Op(
    "EmbeddedNormalization",
    1,
    domain="infera",
    infer=_infer,
    compute=plain(_compute),
    expand=_parts,
    kernels=embedded(_tables),
    attrs={"epsilon": 1e-5},
    cases=Cases(
        lambda: (
            Case("three", (_IDS, f32(6, 8), i64(0, 1, 2).reshape(1, 3), f32(5, 8), _KINDS, f32(2, 8), f32(8), f32(8))),
            Case("two", (_IDS, f32(6, 300), i64(2, 0, -1), f32(5, 300), None, None, f32(300))),
            Case("first_repeats", (i64(0, 1, 2), f32(6, 8), _IDS, f32(6, 8), _KINDS, f32(2, 8), f32(8), f32(8))),
            Case("whole", (_IDS, f32(6, 8), _IDS, f32(6, 8), _KINDS.astype(np.int32), f32(2, 8), f32(8), f32(8))),
            Case("both_repeat", (_IDS[:1], f32(6, 8), i64(4, 0, 1), f32(5, 8), _KINDS, f32(2, 8), f32(8))),
            Case("apart", (_IDS, f32(6, 8), i64(1, 2).reshape(2, 1), f32(5, 8), None, None, f32(8), f32(8))),
        )
    ),
)

OPS: tuple[Op, ...] = (_EMBEDDED,)
