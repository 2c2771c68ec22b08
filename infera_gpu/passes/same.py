"""Nodes that make nothing new vanish: those that give an input back, and those that compute what another has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.op import Op, Registry
from infera_gpu.passes.facts import Facts
from infera_gpu.passes.known import Known, broadcast
from infera_gpu.spec import dtype_of_onnx

Test: TypeAlias = Callable[[Node, Facts], int | None]
"""The input that a node gives back, every bit of it, in every run; None where it may be another value."""


def _always(n: Node, facts: Facts) -> int | None:
    return 0


def _alone(n: Node, facts: Facts) -> int | None:
    return 0 if len(n.inputs) == 1 else None


def _dropout(n: Node, facts: Facts) -> int | None:
    """In inference. Its mask is looked after by who asks."""
    if len(n.inputs) < 3 or not n.inputs[2]:
        return 0
    mode = facts.constant(n.inputs[2])
    return 0 if mode is not None and mode.size == 1 and not bool(mode.reshape(-1)[0]) else None


def _cast(n: Node, facts: Facts) -> int | None:
    x = facts.spec(n.inputs[0])
    return 0 if x is not None and x.dtype == dtype_of_onnx(n.attrs["to"]) else None


def _reshape(n: Node, facts: Facts) -> int | None:
    """Every dimension but one stays, and so the last one does."""
    x, target = facts.spec(n.inputs[0]), facts.constant(n.inputs[1])
    if x is None or not x.ranked or target is None or target.shape != (x.ndim,) or n.attrs.get("allowzero", 0):
        return None
    stay = [size == 0 or size == d for size, d in zip(target.tolist(), x.shape, strict=True)]
    return 0 if all(stay) or (stay.count(False) == 1 and target[stay.index(False)] == -1) else None


def _transpose(n: Node, facts: Facts) -> int | None:
    perm = n.attrs.get("perm")
    return 0 if perm is not None and tuple(perm) == tuple(range(len(perm))) else None


ENDLESS = (1 << 31) - 1
"""An end from here on means the end."""


def _slice(n: Node, facts: Facts) -> int | None:
    starts, ends = (n.attrs[k] if k in n.attrs else _ints(facts, n, i) for i, k in ((1, "starts"), (2, "ends")))
    steps = _ints(facts, n, 4) if len(n.inputs) > 4 and n.inputs[4] else ()
    return 0 if not any(starts) and all(e >= ENDLESS for e in ends) and all(s == 1 for s in steps) else None


def _ints(facts: Facts, n: Node, i: int) -> tuple[int, ...]:
    """A constant input. Raises AttributeError where it is none."""
    return tuple(facts.constant(n.inputs[i]).reshape(-1).tolist())  # type: ignore[union-attr]


def _pad(n: Node, facts: Facts) -> int | None:
    pads = n.attrs["pads"] if "pads" in n.attrs else _ints(facts, n, 1)
    x = facts.spec(n.inputs[0])
    fits = x is None or not x.ranked or len(n.inputs) > 3 or len(pads) == 2 * x.ndim
    value = facts.spec(n.inputs[2]) if len(n.inputs) > 2 and n.inputs[2] else None
    one = value is None or (value.ranked and all(d == 1 for d in value.shape))
    return 0 if fits and one and len(pads) % 2 == 0 and not any(pads) else None


def _tile(n: Node, facts: Facts) -> int | None:
    return 0 if all(r == 1 for r in _ints(facts, n, 1)) else None


def _expand(n: Node, facts: Facts) -> int | None:
    x = facts.spec(n.inputs[0])
    if x is None or not x.ranked:
        return None
    shape = _ints(facts, n, 1)
    made = broadcast([x.shape, shape])
    ones = len(shape) <= x.ndim and all(d == 1 for d in shape)
    return 0 if ones or (None not in made and made == x.shape) else None


def _neutral(value: float, *at: int, when: Callable[[HostArray], bool] = lambda c: True) -> Test:
    """A constant of this one value at one of these inputs leaves the other one as it is, if it adds no axis."""

    def test(n: Node, facts: Facts) -> int | None:
        for i in at:
            c = facts.constant(n.inputs[i])
            if c is None or c.size != 1 or c.dtype.kind not in "iuf" or c.reshape(-1)[0] != value or not when(c):
                continue
            x = facts.spec(n.inputs[1 - i])
            if x is not None and x.dtype != c.dtype and n.op != "Pow":
                continue  # which planning refuses
            if c.ndim == 0 or (x is not None and x.ranked and x.ndim >= c.ndim):
                return 1 - i
        return None

    return test


def _is_negative_zero(c: HostArray) -> bool:
    """-0.0, the only float that every float stays the same with: -0.0 + 0.0 is 0.0."""
    return c.dtype.kind != "f" or bool(np.signbit(c.reshape(-1)[0]))


def _is_positive_zero(c: HostArray) -> bool:
    return c.dtype.kind != "f" or not np.signbit(c.reshape(-1)[0])


SAME: Mapping[str, Test] = MappingProxyType(
    {
        "Identity": _always,
        "Dropout": _dropout,
        **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _alone),
        "Cast": _cast,
        "Reshape": _reshape,
        "Transpose": _transpose,
        "Slice": _slice,
        "Pad": _pad,
        "Tile": _tile,
        "Expand": _expand,
        "Mul": _neutral(1, 0, 1),
        "Div": _neutral(1, 1),
        "Pow": _neutral(1, 1),
        "Add": _neutral(0, 0, 1, when=_is_negative_zero),
        "Sub": _neutral(0, 1, when=_is_positive_zero),
    }
)
"""Standard operator -> when it gives an input back."""


def _given_back(n: Node, facts: Facts) -> int | None:
    test = None if n.domain else SAME.get(n.op)
    try:
        return test(n, facts) if test is not None else None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None  # planning says what is wrong with it


class _Renaming:
    """A walk over a graph that leaves out nodes whose outputs are known under other names."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        captured = {v for n in graph.nodes for _, sub in n.subgraphs for v in sub.captures()}
        self.fixed = captured.union(graph.outputs)
        self.names: dict[str, str] = {}
        self.nodes: list[Node] = []

    def renamed(self, n: Node) -> Node:
        if self.names and any(i in self.names for i in n.inputs):
            return n.over(tuple([self.names.get(i, i) for i in n.inputs]))
        return n

    def may_go(self, n: Node) -> bool:
        """Whether no name of an output must stay."""
        return self.fixed.isdisjoint(n.outputs)

    def finished(self) -> Graph:
        return replace(self.graph, nodes=tuple(self.nodes)) if self.names else self.graph


def remove_identities(graph: Graph, known: dict[str, Known] | None = None) -> Graph:
    """Nodes that give an input back vanish; an output of the graph keeps its name. `known`: see `Facts`."""
    walk, read = _Renaming(graph), {v for n in graph.nodes for v in n.reads}
    producers: dict[str, Node] = {}
    facts = Facts(graph, producers, known)
    for n in map(walk.renamed, graph.nodes):
        source = _given_back(n, facts) if n.outputs and n.outputs[0] and walk.may_go(n) else None
        if source is not None and n.inputs[source] and read.isdisjoint(n.outputs[1:]):
            walk.names[n.outputs[0]] = n.inputs[source]
        else:
            walk.nodes.append(n)
            producers.update((o, n) for o in n.outputs if o)
    return walk.finished()


SMALL = 4096
"""Bytes. Larger constants are compared by where they lie."""


def share_values(graph: Graph, registry: Registry) -> Graph:
    """Nodes that compute what an earlier one has, of the same operator, inputs and attributes, vanish."""
    walk = _Renaming(graph)
    found: dict[Hashable, str] = {}
    for name, value in graph.constants.items():
        if name not in walk.fixed and (kept := found.setdefault(_bytes_of(value), name)) != name:
            walk.names[name] = kept
    known: dict[Hashable, list[Node]] = {}
    ops: dict[tuple[str, str, int], Op | None] = {}
    for n in map(walk.renamed, graph.nodes):
        if walk.may_go(n) and not n.subgraphs:
            asked = (n.domain, n.op, graph.opset_of(n))
            if asked not in ops:
                ops[asked] = registry.find(*asked)
            op = ops[asked]
            if op is not None and op.repeats(n) and not op.host:
                alike = known.setdefault(_signature(n), [])
                first = next((m for m in alike if _attributes(m) == _attributes(n)), None)
                if first is not None:
                    walk.names.update(zip(n.outputs, first.outputs, strict=True))
                    continue
                alike.append(n)
        walk.nodes.append(n)
    return walk.finished()


def _bytes_of(value: HostArray) -> Hashable:
    like = (value.dtype, value.shape)
    if value.dtype == object:
        return (*like, id(value))
    if value.nbytes <= SMALL:
        return (*like, value.tobytes())
    return (*like, value.strides, value.__array_interface__["data"][0])


def _signature(n: Node) -> Hashable:
    """Equal for nodes that compute the same if their `_attributes` are equal too."""
    return (n.op, n.domain, n.overload, n.opset, n.inputs, tuple(map(bool, n.outputs)))


def _attributes(n: Node) -> dict[str, Any]:
    return {k: _frozen(v) for k, v in n.attrs.items()}


def _frozen(value: Any) -> Any:
    """An attribute as something to compare; numbers of different types differ, and so do 0.0 and -0.0."""
    if isinstance(value, np.ndarray):
        return repr(_bytes_of(value))
    return repr(value)


EXTRAS = frozenset(
    {
        *("MaxPool", "Dropout", "LayerNormalization", "SimplifiedLayerNormalization", "LSTM", "GRU", "RNN"),
        *("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization"),
    }
)
"""Operators whose outputs after the first may be left out without changing the others."""


def drop_outputs(graph: Graph) -> Graph:
    """Outputs that nobody reads are left out where an operator allows it: fewer are computed, and more patterns fit."""
    if not any(n.outputs[1:] and n.qualified in EXTRAS for n in graph.nodes):
        return graph
    needed = {*graph.outputs, *(v for n in graph.nodes for v in n.reads)}
    nodes = [
        replace(n, outputs=_trimmed(n.outputs, needed)) if n.outputs[1:] and n.qualified in EXTRAS else n
        for n in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


def _trimmed(outputs: tuple[str, ...], needed: Collection[str]) -> tuple[str, ...]:
    kept = [outputs[0], *(o if o in needed else "" for o in outputs[1:])]
    while len(kept) > 1 and not kept[-1]:
        kept.pop()
    return tuple(kept)
