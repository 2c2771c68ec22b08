"""Rewrites of the graph, once a model: what pays on every device, each provably safe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from infera_gpu.graph import Graph, Node
from infera_gpu.op import Registry
from infera_gpu.passes import conv, gelu, matmul
from infera_gpu.passes.engine import Fusion, apply
from infera_gpu.passes.fold import drop_dead, fold_constants, remove_identities

FUSIONS: tuple[Fusion, ...] = (*conv.FUSIONS, *gelu.FUSIONS, *matmul.FUSIONS)
"""In the order in which they are applied."""


ROUNDS = 8
"""Applications of one fusion: BatchNormalization then Mul then Add on one Conv, each of which enables the next."""


def optimize(
    graph: Graph, registry: Registry, report: Callable[[str, int], None] | None = None, *, strict: bool = False
) -> Graph:
    """The graph after every pass, its subgraphs first. `report(pass, times it fired)` is told what each did.

    `strict` leaves out the fusions that change the order of operations.
    """
    graph = replace(graph, nodes=tuple(_inside(n, registry, report, strict) for n in graph.nodes))
    graph = drop_dead(remove_identities(fold_constants(graph, registry)))
    for fusion in FUSIONS:
        if strict and fusion.reassociates:
            continue
        for _ in range(ROUNDS):
            graph, times = apply(graph, fusion)
            if not times:
                break
            graph = drop_dead(graph)
            if report is not None:
                report(fusion.name, times)
    return graph


def _inside(node: Node, registry: Registry, report: Callable[[str, int], None] | None, strict: bool) -> Node:
    if not node.subgraphs:
        return node
    subgraphs = {k: optimize(g, registry, report, strict=strict) for k, g in node.subgraphs}
    return replace(node, attrs={**node.attrs, **subgraphs})
