"""Activations that are quantised to uint8 become int8, whose products tensor cores compute.

q and its zero point less 128 are the same numbers by the same scale, and round alike. It is done where nothing but
dequantisation sees the integers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node, made_name
from infera_gpu.passes.quant import DEQUANTIZE, parameters_of

_QUANTIZE = ("QuantizeLinear", "com.microsoft.QuantizeLinear")


def signed(graph: Graph) -> Graph:
    """The graph with int8 in the place of uint8, which rounds to the same numbers."""
    if not any(n.qualified in _QUANTIZE for n in graph.nodes):
        return graph
    readers = graph.readers()
    constants: dict[str, HostArray] = {}
    made: dict[int, Node] = {}
    for n in graph.nodes:
        if n.qualified not in _QUANTIZE or n.outputs[0] in graph.outputs or not _is_unsigned(graph, n):
            continue
        found = readers.get(n.outputs[0], ())
        if found and all(r.qualified in DEQUANTIZE and _is_unsigned(graph, r) for r in found):
            for each in (n, *found):
                made[id(each)] = _moved(graph, each, constants)
    if not made:
        return graph
    nodes = tuple(made.get(id(n), n) for n in graph.nodes)
    return replace(graph, nodes=nodes, constants={**graph.constants, **constants})


def _is_unsigned(graph: Graph, n: Node) -> bool:
    """Whether a node's scale and zero point are known and single, and its integers uint8 by that zero point."""
    known = None if n.opset or "output_dtype" in n.attrs else parameters_of(graph, n)
    return known is not None and known[1].dtype == np.uint8 and n.inputs[0] not in graph.constants


def _moved(graph: Graph, n: Node, constants: dict[str, HostArray]) -> Node:
    """The node with int8 and its zero point less 128."""
    point = n.inputs[2]
    name = made_name(point, "signed")
    constants[name] = np.asarray(graph.constants[point].astype(np.int16) - 128, np.int8)
    return replace(n, inputs=(*n.inputs[:2], name))
