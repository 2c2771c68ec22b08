"""What a model's graph says about its rows: operators that make them depend on each other, and how large ids may be.

Running rows together and apart (`batching.prove`) shows most dependence, but not one that the data tried does not
bring out: a scale taken over the whole tensor changes nothing while every row has much the same range.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.spec import TensorSpec

_SHAPE_ONLY = frozenset({"Shape", "Size"})

_MIXES = {
    "DynamicQuantizeLinear": "takes one scale from all rows",
    "Unique": "removes what is equal in other rows",
}

_COMPARISONS = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_CONDITIONED = frozenset({"If", "Loop"})
_SAME = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})

_KEEPS_IDS = frozenset(
    {"Cast", "Clip", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Expand", "Tile",
     "Concat", "Where", "Min", "Max", "Abs", "Relu", "Split", "Gather"}
)  # fmt: skip
"""Operators whose first inputs' ids come out as they went in, or smaller."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a graph says about its rows: `mixes_rows`, `branch_values`, `id_limits`, and the bytes of its weights.

    `branches` has the values of every shared input, or None, as they are without a shape.
    """

    mixes_rows: str | None
    branches: Mapping[str, Sequence[bool | int | float] | None]
    id_limits: Mapping[str, int]
    weight_bytes: int


def facts_of(graph: Graph, inputs: Mapping[str, TensorSpec], shared: Collection[str]) -> Facts:
    """All of it, for a guess in which these inputs are not of one row but of all."""
    branches: dict[str, Sequence[bool | int | float] | None] = {}
    for name in shared:
        values = branch_values(graph, name, inputs[name])
        branches[name] = None if values is None else [value.item() for value in values]
    weights = sum(array.nbytes for inner in graph.walk() for array in inner.constants.values())
    return Facts(mixes_rows(graph, shared), branches, id_limits(graph), weights)


def mixes_rows(graph: Graph, shared: Collection[str] = ()) -> str | None:
    """The first operator whose results for one row depend on the values of the others, and why; None: none is known.

    The `shared` inputs are not of one row but of all.
    """
    return _mixing(graph, set(graph.inputs) - set(shared))


def branch_values(graph: Graph, name: str, spec: TensorSpec) -> Sequence[HostArray] | None:
    """Values of an input of one element among which is one for every way in which it chooses branches.

    They are the constants that it is compared with, and values between and around them. None where a branch hangs on
    it in another way; nothing where none does.
    """
    points: set[Any] = set()
    if spec.dtype.kind == "b":
        points = {False, True}
    elif not _compared(graph, {name}, {name}, points):
        return None
    elif points:
        ordered = sorted(points)
        points |= {ordered[0] - 1, ordered[-1] + 1}
        points |= {np.asarray((a + b) / 2, spec.dtype).item() for a, b in pairwise(ordered)}
    if spec.dtype.kind in "iu":
        limits = np.iinfo(spec.dtype)
        points = {point for point in points if limits.min <= point <= limits.max}
    return [np.full(spec.shape, point, spec.dtype) for point in sorted(points)]


def _compared(graph: Graph, same: set[str], made: set[str], points: set[Any]) -> bool:
    """Collect the constants that the values in `same` are compared with; what they make is added to `made`.

    Returns whether every branch that hangs on them does so by these comparisons.
    """
    for node in graph.nodes:
        if not any(value in made for value in node.reads):
            continue
        if not node.domain and node.op in _COMPARISONS:
            a, b = node.inputs
            constant = graph.constants.get(b if a in same else a)
            if constant is not None and constant.size == 1 and (a in same or b in same):
                points.add(constant.item())
                continue
        if node.op in _CONDITIONED and any(value in made for value in node.inputs[:2]):
            return False
        if not all(_compared(inner, set(same), set(made), points) for _, inner in node.subgraphs):
            return False
        made.update(o for o in node.outputs if o)
        if not node.domain and node.op in _SAME and node.inputs[0] in same:
            same.update(node.outputs)
    return True


def _mixing(graph: Graph, fed: set[str]) -> str | None:
    """`fed` holds the values that depend on what a request sends; what this graph makes of them is added."""
    for node in graph.nodes:
        if not any(value in fed for value in node.reads):
            continue
        if not node.domain and node.op in _MIXES:
            return f"{node} {_MIXES[node.op]}"
        if not node.domain and node.op == "If" and node.inputs[0] in fed:
            return f"{node} takes one branch for all rows"
        for _, inner in node.subgraphs:
            found = _mixing(inner, fed | set(inner.inputs))
            if found:
                return found
        if node.op not in _SHAPE_ONLY:
            fed.update(o for o in node.outputs if o)
    return None


def id_limits(graph: Graph) -> Mapping[str, int]:
    """For each input that a Gather uses as indices: the rows of the smallest constant table it looks up."""
    origins: dict[str, set[str]] = {name: {name} for name in graph.inputs}
    limits: dict[str, int] = {}
    for node in graph.nodes:
        if node.domain:
            continue
        for table, ids in _lookups(node, graph.constants):
            for name in origins.get(ids, ()):
                limits[name] = min(table, limits.get(name, table))
        if node.op in _KEEPS_IDS:
            found: set[str] = set().union(*(origins.get(value, set()) for value in node.inputs))
            origins.update({output: found for output in node.outputs if output and found})
    return limits


def _lookups(node: Node, constants: Mapping[str, HostArray]) -> Iterator[tuple[int, str]]:
    """(rows of the table, value that holds the indices) of a Gather from a constant."""
    table = constants.get(node.inputs[0]) if node.op == "Gather" else None
    if table is not None and table.ndim:
        axis = node.attrs.get("axis", 0)
        yield table.shape[axis], node.inputs[1]
