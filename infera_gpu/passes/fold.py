"""Rewrites that need no pattern: constants computed once, dead code dropped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.folding import fold_budget, may_fold
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.op import Registry, Site
from infera_gpu.passes.facts import Facts
from infera_gpu.passes.known import Known
from infera_gpu.spec import constant, dtype_of_onnx, spec_of


def fold_constants(graph: Graph, registry: Registry, known: dict[str, Known] | None = None) -> Graph:
    """Every pure node whose inputs are all constants becomes constants, and so do known sizes as floats.

    Exporters compute factors of attention from the size of heads, which may be known where other sizes are not.
    `known`: see `Facts`.
    """
    constants: dict[str, HostArray] = dict(graph.constants)
    nodes: list[Node] = []
    budget = fold_budget(graph.constants)
    sized = _Sized(replace(graph, constants=constants), known) if any(n.op == "Shape" for n in graph.nodes) else None
    for node in graph.nodes:
        made = _fold(node, constants, graph, registry, budget)
        if made is None and sized is not None:
            made = _fold(node, sized.given(node), graph, registry, budget)
            sized.enter(node)
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


class _Sized:
    """Sizes of values that a graph asks for, known whatever the others are. `graph` has the constants as they grow."""

    def __init__(self, graph: Graph, known: dict[str, Known] | None) -> None:
        self._producers: dict[str, Node] = {}
        self._facts = Facts(graph, self._producers, known)
        self._needed = {*graph.inputs, *graph.outputs, *(v for n in graph.nodes if n.op != "Shape" for v in n.reads)}

    def enter(self, node: Node) -> None:
        """A node that stays, after those that it reads."""
        self._producers.update((o, node) for o in node.outputs if o)

    def given(self, node: Node) -> dict[str, HostArray]:
        """The sizes that a Cast makes floats of, where what has them is needed anyway: its errors are not hidden."""
        if node.qualified != "Cast":
            return {}
        try:
            if dtype_of_onnx(node.attrs["to"]).kind != "f":
                return {}
            spec, sizes = self._facts.spec(node.inputs[0]), self._facts.sizes(node.inputs[0])
            if spec is None or sizes is None or not all(isinstance(d, int) for d in sizes):
                return {}
            if spec.ndim > 1 or not self._needed.issuperset(self._asked(node)):
                return {}
            return {node.inputs[0]: np.array(sizes, spec.dtype).reshape(spec.dims)}
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return {}  # planning says what is wrong with it

    def _asked(self, node: Node) -> set[str]:
        """The values of whose sizes a node makes something."""
        found: set[str] = set()
        todo, seen = [*node.inputs], set[str]()
        while todo:
            value = todo.pop()
            made = self._producers.get(value)
            if made is not None and value not in seen:
                seen.add(value)
                if made.op == "Shape":
                    found.add(made.inputs[0])
                else:
                    todo += made.inputs
        return found


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
