"""RMS normalisation of a sum, taken apart where a product can add: the norm is then its reader's, see `normalized`."""

from __future__ import annotations

from dataclasses import replace

from infera_gpu.graph import Graph, Node, made_name
from infera_gpu.passes.facts import Facts

_SKIP, _NORM = "com.microsoft.SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"
_PRODUCTS = frozenset({"MatMul", "com.microsoft.MatMulNBits"})


def apart(graph: Graph) -> Graph:
    """The graph with a sum and a norm for each norm of a sum of two values of one shape, one of them a product by a
    constant, or one with a bias, that nobody else reads; itself where there is none.

    In halves the sum is rounded before it is normalised, as onnxruntime does on GPUs.
    """
    if not any(n.qualified == _SKIP for n in graph.nodes):
        return graph
    readers, producers = graph.readers(), {o: n for n in graph.nodes for o in n.outputs if o}
    facts = Facts(graph, producers)

    def is_product(value: str, *, biased: bool = False) -> bool:
        made_by = producers.get(value)
        if made_by is None or len(readers.get(value, ())) != 1 or value in graph.outputs:
            return False
        if made_by.qualified == "Add" and not biased:
            terms = [v for v in made_by.inputs if v not in graph.constants]
            return len(terms) == 1 and is_product(terms[0], biased=True)
        return made_by.qualified in _PRODUCTS and not graph.constants.keys().isdisjoint(made_by.inputs[1:2])

    def is_alike(a: str, b: str) -> bool:
        spec = facts.spec(a)
        return spec is not None and spec.ranked and spec == facts.spec(b)

    nodes: list[Node] = []
    for n in graph.nodes:
        terms = n.inputs[:2]
        if n.qualified == _SKIP and _is_plain(n) and any(map(is_product, terms)) and is_alike(*terms):
            total, norm = _apart(n)
            producers[total.outputs[0]] = total
            nodes += total, norm
        else:
            nodes.append(n)
    return replace(graph, nodes=tuple(nodes)) if len(nodes) > len(graph.nodes) else graph


def _is_plain(n: Node) -> bool:
    """Nothing else is added, and nobody wants the statistics."""
    given = len(n.inputs) >= 3 and all(n.inputs[:3]) and bool(n.outputs[0])
    return given and not any(n.inputs[3:]) and not any(n.outputs[1:3])


def _apart(n: Node) -> tuple[Node, Node]:
    out, label = n.outputs[0], n.name or n.outputs[0]
    total = n.outputs[3] if any(n.outputs[3:]) else made_name(out, "sum")
    epsilon = {"epsilon": n.attrs.get("epsilon", 1e-12)}
    return (
        Node("Add", n.inputs[:2], (total,), name=f"{label}/sum"),
        Node(_NORM, (total, n.inputs[2]), (out,), epsilon, name=label),
    )
