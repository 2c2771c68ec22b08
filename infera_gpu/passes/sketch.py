"""Ranks of values, and an idea of their sizes, before a run tells their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.op import Op, Registry, Site
from infera_gpu.spec import TensorSpec, is_plain, spec_of

BATCH: Final = 1
OTHER: Final = 64
"""Sizes taken for unknown dimensions: of a first axis, and of others, where 64 fits what networks halve."""

FEW = 4096
"""Elements. Values of that size are followed: shapes, and what is computed from them."""


def sketch(graph: Graph, registry: Registry) -> dict[str, TensorSpec]:
    """Specs of values, were every unknown size of the inputs one that is taken for it.

    The ranks hold for all sizes: an operator's output ranks follow from its inputs' ranks and from how many values a
    shape has, but for Squeeze without axes, subgraphs and what depends on data, whose outputs are left out; so is what
    cannot be inferred, and what follows from it. The sizes are an example.
    """
    specs = {k: _example(s) for k, s in graph.inputs.items() if isinstance(s, TensorSpec) and s.ranked and is_plain(s)}
    specs |= {k: spec_of(a) for k, a in graph.constants.items()}
    known: dict[str, HostArray] = {k: a for k, a in graph.constants.items() if a.size <= FEW}
    for node in graph.nodes:
        if node.subgraphs or any(i and i not in specs for i in node.inputs):
            continue
        opset = graph.opset_of(node)
        op = registry.find(node.domain, node.op, opset)
        if op is None or op.host:
            continue
        if node.op == "Squeeze" and "axes" not in node.attrs and len([i for i in node.inputs if i]) < 2:
            continue
        try:
            _visit(op, node, opset, specs, known)
        except Exception:  # the example does not fit, or the node does not: planning names what is wrong
            continue
    return specs


def _example(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(
        tuple(d if isinstance(d, int) else OTHER if i else BATCH for i, d in enumerate(spec.shape)), spec.dtype
    )


def _visit(op: Op, node: Node, opset: int, specs: dict[str, TensorSpec], known: dict[str, HostArray]) -> None:
    """Adds what is known of the node's outputs."""
    ins = tuple([specs[i] if i else None for i in node.inputs])
    values = tuple([known.get(i) if i else None for i in node.inputs])
    site = Site(node, op.fill(node), ins, values, opset=opset)
    outs = tuple(op.infer(site))
    specs.update({k: s for k, s in zip(node.outputs, outs, strict=False) if k and s is not None and is_plain(s)})
    follows = op.shapes_only or all(v is not None or s is None for v, s in zip(values, ins, strict=True))
    if not op.repeats(node) or not follows or any(s is None or s.size > FEW for s in outs):
        return
    given: Sequence[HostArray | None] = values
    if op.shapes_only:
        given = [None if s is None else np.broadcast_to(np.zeros((), s.dtype), s.dims) for s in ins]
    computed = op.outputs(np, site.giving(tuple([s for s in outs if s is not None])), given)
    known.update({k: a for k, a in zip(node.outputs, computed, strict=False) if k})
