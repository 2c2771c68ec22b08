"""Rewrites that need no pattern: constants computed once, dead code dropped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.folding import fold_budget, may_fold
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.op import Registry, Site
from infera_gpu.spec import constant, spec_of


def fold_constants(graph: Graph, registry: Registry) -> Graph:
    """Every pure node whose inputs are all constants becomes constants."""
    constants: dict[str, HostArray] = dict(graph.constants)
    nodes: list[Node] = []
    budget = fold_budget(graph.constants)
    for node in graph.nodes:
        made = _fold(node, constants, graph, registry, budget)
        if made is None:
            nodes.append(node)
        else:
            constants.update(made)
            budget -= sum(a.nbytes for a in made.values())
    return replace(graph, nodes=tuple(nodes), constants=constants) if len(nodes) < len(graph.nodes) else graph


def _fold(
    node: Node, constants: dict[str, HostArray], graph: Graph, registry: Registry, budget: int
) -> dict[str, HostArray] | None:
    for i in node.inputs:
        if i and i not in constants:
            return None
    if node.subgraphs:
        return None
    opset = graph.opset_of(node)
    op = registry.find(node.domain, node.op, opset)
    if op is None or not op.repeats(node) or op.host:
        return None
    values = tuple(constants[i] if i else None for i in node.inputs)
    try:
        site = Site(node, op.fill(node), tuple(None if v is None else spec_of(v) for v in values), values, opset=opset)
        specs = op.infer(site)
        if not may_fold(op, site, specs, budget):
            return None
        made = op.outputs(np, site.giving(tuple([s for s in specs if s is not None])), values)
    except Exception:  # the specialiser meets it again if the node is live, and its error is the one to show
        return None
    return {name: constant(a) for name, a in zip(node.outputs, made, strict=False) if name}


def drop_dead(graph: Graph) -> Graph:
    """Nodes and constants that no output needs vanish."""
    needed = set(graph.outputs)
    live: list[Node] = []
    for n in reversed(graph.nodes):
        if not needed.isdisjoint(n.outputs):
            live.append(n)
            needed.update(n.reads)
    if len(live) == len(graph.nodes) and needed.issuperset(graph.constants):
        return graph
    constants = {k: v for k, v in graph.constants.items() if k in needed}
    return replace(graph, nodes=tuple(live[::-1]), constants=constants)
