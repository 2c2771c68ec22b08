"""Rows of quantised tables are gathered first and become floats then: embeddings stay 8-bit in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node, made_name
from infera_gpu.passes.quant import DEQUANTIZE, FLOAT, is_byte, parameters_of


def gathered(graph: Graph) -> Graph:
    """A Gather along axis 0 changes places with what makes its constant table float32, exactly."""
    if not any(n.qualified == "Gather" for n in graph.nodes):
        return graph
    producers = graph.producers()
    nodes: list[Node] = []
    constants: dict[str, HostArray] = {}
    for n in graph.nodes:
        made_by = producers.get(n.inputs[0]) if n.qualified == "Gather" and not n.opset else None
        made: list[Node] = []
        if made_by is not None and not n.attrs.get("axis", 0):
            made = _before_dequantize(graph, n, made_by) or _before_scaling(graph, n, made_by, producers, constants)
        nodes += made or [n]
    return replace(graph, nodes=tuple(nodes), constants={**graph.constants, **constants})


def _before_dequantize(graph: Graph, n: Node, made_by: Node) -> list[Node]:
    if made_by.qualified not in DEQUANTIZE or not parameters_of(graph, made_by):
        return []
    table = graph.constants.get(made_by.inputs[0])
    if table is None or not table.ndim:
        return []
    rows = made_name(n.outputs[0], "rows")
    return [
        replace(n, inputs=(made_by.inputs[0], n.inputs[1]), outputs=(rows,)),
        replace(made_by, inputs=(rows, *made_by.inputs[1:]), outputs=n.outputs, name=n.name),
    ]


def _before_scaling(
    graph: Graph, n: Node, made_by: Node, producers: Mapping[str, Node], constants: dict[str, HostArray]
) -> list[Node]:
    """The same for a table that is cast and multiplied by the scale of all, of its columns or of its rows."""
    if made_by.qualified != "Mul":
        return []
    for wide, by in (made_by.inputs, made_by.inputs[::-1]):
        cast, scale = producers.get(wide), graph.constants.get(by)
        if cast is None or cast.qualified != "Cast" or cast.attrs.get("to") != FLOAT or scale is None:
            continue
        table = graph.constants.get(cast.inputs[0])
        if table is None or table.ndim != 2 or not is_byte(table) or scale.dtype != np.float32:
            continue
        rows, floats, scales = (made_name(n.outputs[0], what) for what in ("rows", "floats", "scales"))
        if (scale.size == 1 and scale.ndim <= 2) or scale.shape in (table.shape[1:], (1, table.shape[1])):
            constants[scales] = scale.reshape(() if scale.size == 1 else -1)
            of_rows = []
        elif scale.shape == (table.shape[0], 1):
            of_rows = [replace(n, inputs=(by, n.inputs[1]), outputs=(scales,))]
        else:
            continue
        return [
            replace(n, inputs=(cast.inputs[0], n.inputs[1]), outputs=(rows,)),
            replace(cast, inputs=(rows,), outputs=(floats,)),
            *of_rows,
            replace(made_by, inputs=(floats, scales), outputs=n.outputs, name=n.name),
        ]
    return []
