"""Products with known weights on int8: weights quantised now, activations as they come.

Weights are symmetric, with a scale for each column; activations are uint8 with the range that they have in that run
(DynamicQuantizeLinear), which needs no calibration. ONNX's own operators say it, so that what follows is the path of
models that were quantised by others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node, made_name
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.pattern import own_opset
from infera_gpu.spec import onnx_of_dtype

WORTH = 4096
"""Elements of a weight from which quantising pays; smaller ones are often what a result depends on most."""

_FLOAT32 = np.dtype(np.float32)
_SINCE = {"DynamicQuantizeLinear": 11, "MatMulInteger": 10, "Cast": 6, "Mul": 7, "Add": 7}
"""The first version in which each operator that is made here means what it does here."""


def quantised(graph: Graph) -> Graph:
    """The graph with every MatMul and Gemm of known two-dimensional float32 weights as an integer product; itself where
    there is none."""
    draft = Draft(graph)
    constants = dict(graph.constants)
    nodes: list[Node] = []
    made: dict[str, tuple[str, str, str]] = {}

    def own(n: Node) -> Node:
        opset = own_opset(graph, _SINCE[n.op])
        return replace(n, opset=opset) if opset else n

    for n in graph.nodes:
        weight = _weight(draft, n)
        nodes += [n] if weight is None else map(own, _product(n, weight, constants, made))
    if not made:
        return graph
    read = {v for n in nodes for v in n.reads} | set(graph.outputs)
    return replace(graph, nodes=tuple(nodes), constants={k: v for k, v in constants.items() if k in read})


def quantises(graph: Graph) -> bool:
    """Whether `quantised` changes it."""
    draft = Draft(graph)
    return any(_weight(draft, n) is not None for n in graph.nodes)


def _weight(draft: Draft, n: Node) -> HostArray | None:
    """The right side as (depth, columns), of a product that can be one of integers; None of any other node."""
    if n.qualified not in ("MatMul", "Gemm") or len(n.inputs) < 2:
        return None
    weight, x = _lying(draft, n.inputs[1]), draft.spec(n.inputs[0])
    if weight is None or weight.size < WORTH or weight.dtype != _FLOAT32:
        return None
    if x is None or x.dtype != _FLOAT32 or not np.isfinite(weight).all():
        return None
    if n.op == "Gemm" and (n.attrs.get("transA", 0) or n.attrs.get("alpha", 1.0) != 1.0):
        return None
    if n.op == "Gemm" and not (x.ranked and x.ndim == 2):  # an integer product would not refuse other ranks
        return None
    return weight.T if n.attrs.get("transB", 0) else weight


def _lying(draft: Draft, value: str) -> HostArray | None:
    """The matrix that is constant, or what Transpose and Identity make of one."""
    turned = False
    while (maker := draft.producers.get(value)) is not None:
        perm = maker.attrs.get("perm", (1, 0)) if maker.qualified == "Transpose" else (0, 1)
        if maker.qualified not in ("Transpose", "Identity") or perm not in ((0, 1), (1, 0)):
            return None
        turned, value = turned != (perm == (1, 0)), maker.inputs[0]
    found = draft.constants.get(value)
    if found is None or found.ndim != 2:
        return None
    return found.T if turned else found


def by_columns(weight: HostArray) -> tuple[HostArray, HostArray]:
    """(depth, columns) as int8, and a scale for each column, by which it is about the weight.

    1 for a column of zeros, or of what is too small for a scale that is a normal number: it becomes zeros.
    """
    scale = np.abs(weight).max(axis=0, initial=0.0) / _FLOAT32.type(127)
    scale = np.where(scale >= np.finfo(_FLOAT32).smallest_normal, scale, _FLOAT32.type(1))
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def _product(
    n: Node, weight: HostArray, constants: dict[str, HostArray], made: dict[str, tuple[str, str, str]]
) -> Iterator[Node]:
    """The nodes in place of one. `made` are the activations that are quantised already: value -> (q, scale, zero)."""
    x, out = n.inputs[0], n.outputs[0]
    if x not in made:
        made[x] = (made_name(x, "uint8"), made_name(x, "scale"), made_name(x, "zero"))
        yield Node("DynamicQuantizeLinear", (x,), made[x])
    q, scale, zero = made[x]
    w, w_scale = made_name(out, "int8"), made_name(out, "scales")
    constants[w], constants[w_scale] = by_columns(weight)
    product, wide, both, plain = (made_name(out, what) for what in ("product", "wide", "scaling", "scaled"))
    addend = n.inputs[2] if len(n.inputs) > 2 else ""
    scaled = plain if addend else out
    yield Node("MatMulInteger", (q, w, zero), (product,), name=n.name)
    yield Node("Cast", (product,), (wide,), {"to": onnx_of_dtype(_FLOAT32)})
    yield Node("Mul", (scale, w_scale), (both,))
    yield Node("Mul", (wide, both), (scaled,))
    beta = float(n.attrs.get("beta", 1.0))
    if addend and beta != 1.0:
        factor, addend_scaled = made_name(out, "beta"), made_name(out, "addend")
        constants[factor] = np.array(beta, _FLOAT32)
        yield Node("Mul", (addend, factor), (addend_scaled,))
        addend = addend_scaled
    if addend:
        yield Node("Add", (plain, addend), (out,))
