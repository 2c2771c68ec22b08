"""LayerNormalization whose result is quantised for one reader writes the integers beside it, for GPUs."""

from __future__ import annotations

from dataclasses import replace

from infera_gpu.graph import Graph, Node
from infera_gpu.passes.quant import parameters_of

_NORM = "LayerNormalization"


def quantized_norms(graph: Graph) -> Graph:
    """The graph with one node for each norm and a quantisation of its result; itself where there is none."""
    if not any(n.qualified == _NORM for n in graph.nodes):
        return graph
    readers = graph.readers()
    made: dict[int, Node | None] = {}
    for n in graph.nodes:
        if n.qualified != _NORM or any(n.outputs[1:]) or n.attrs.get("stash_type", 1) != 1 or len(n.inputs) < 2:
            continue
        found = next((r for r in readers.get(n.outputs[0], ()) if _quantises(graph, r)), None)
        if found is not None:
            bias = n.inputs[2] if len(n.inputs) > 2 else ""
            attrs = {k: v for k, v in n.attrs.items() if k != "stash_type"}
            inputs = (*n.inputs[:2], bias, *found.inputs[1:3])
            outputs = (n.outputs[0], found.outputs[0])
            made[id(n)] = Node("QuantizedLayerNormalization", inputs, outputs, attrs, "infera", n.name)
            made[id(found)] = None
    if not made:
        return graph
    return replace(graph, nodes=tuple([m for n in graph.nodes if (m := made.get(id(n), n)) is not None]))


def _quantises(graph: Graph, n: Node) -> bool:
    """Whether a node quantises to 8 bits by one known scale."""
    plain = n.qualified == "QuantizeLinear" and not n.opset and "output_dtype" not in n.attrs
    return plain and parameters_of(graph, n) is not None
