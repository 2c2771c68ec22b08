"""Convolutions with channels last, and as few Transposes as that takes.

A value is `Transpose(stored, perm)` of what is stored. Convolutions ask for inputs stored with channels last, operators
that work in any order (`RULES`) take over that of their inputs, and a Transpose of the model only changes what is known
of its value. Where a value is needed as the model has it, a Transpose makes it. What hangs together this way is a
region: one that costs more than it gains is left as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node, made_name
from infera_gpu.op import Registry
from infera_gpu.passes.fold import drop_dead
from infera_gpu.passes.layout_gains import KINDS, Convolutions, gain_of
from infera_gpu.passes.permute import Moved, Order, inverse, last_order, ordered_name
from infera_gpu.passes.permute_images import CONVOLUTIONS, RULES
from infera_gpu.passes.sketch import sketch
from infera_gpu.spec import DType, TensorSpec, constant

UNKNOWN = 1 << 14
"""Elements of a tensor of which nothing is known."""

CALL = 1 << 10
"""Elements that are moved in the time that a step takes to start."""


def convert(graph: Graph, registry: Registry, kind: str = "cpu") -> Graph:
    """The graph with its convolutions' channels last where that gains, and with fewer Transposes.

    `kind` is that of the kernels: one of KINDS. Inputs and outputs stay as they are. No arithmetic changes. Nothing
    has been checked when passes run: a graph with a node that makes a rule stumble is left as it is, and the node is
    named when it is planned.
    """
    try:
        return _converted(graph, registry, kind)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return graph


def _converted(graph: Graph, registry: Registry, kind: str) -> Graph:
    if not _may_gain(graph):
        return graph
    specs = sketch(graph, registry)
    left: frozenset[int] = frozenset()
    while True:
        work = _Conversion(graph, specs, left, KINDS[kind])
        made = work.run()
        losing = work.losing()
        if not losing:
            return drop_dead(made)
        left |= losing
        if left.issuperset(work.changed):
            return drop_dead(graph)


def _may_gain(graph: Graph) -> bool:
    """Whether there is a convolution, or a Transpose that meets what could take over its order."""
    transposed: set[str] = set()
    for n in graph.nodes:
        op = n.qualified
        if op in CONVOLUTIONS or ((op == "Transpose" or op in RULES) and not transposed.isdisjoint(n.inputs)):
            return True
        if op == "Transpose":
            transposed.add(n.outputs[0])
    return False


class _Conversion:
    """One attempt. The nodes numbered in `left` stay as they are. Implements permute.Facts."""

    def __init__(self, graph: Graph, specs: Mapping[str, TensorSpec], left: frozenset[int], kind: Convolutions) -> None:
        self.graph, self.specs, self.left, self.kind = graph, dict(specs), left, kind
        self.nodes: list[Node] = []
        self.constants: dict[str, HostArray] = dict(graph.constants)
        self.views: dict[str, tuple[str, Order]] = {}
        """value -> (stored, perm): the value is Transpose(stored, perm)"""
        self.made: dict[tuple[str, Order], str] = {}
        """(stored, perm) -> the value that a Transpose made of it"""
        self.named: set[str] = set()
        self.parents: dict[str, str] = {}
        self.gains: defaultdict[str, float] = defaultdict(float)
        self.members: defaultdict[str, set[int]] = defaultdict(set)
        self.changed: set[int] = set()
        """Numbers of the nodes that are not emitted as they are."""

    # ---- what rules ask

    @property
    def floats(self) -> frozenset[DType]:
        return self.kind.floats

    @property
    def ranks(self) -> frozenset[int]:
        return self.kind.ranks

    def rank(self, value: str) -> int | None:
        if value in self.views:
            return len(self.views[value][1])
        spec = self.specs.get(value)
        return None if spec is None else spec.ndim

    def example(self, value: str) -> TensorSpec | None:
        return self.specs.get(value)

    def constant(self, value: str) -> HostArray | None:
        return self.graph.constants.get(value)

    def opset(self, node: Node) -> int:
        return self.graph.opset_of(node)

    # ---- regions

    def region(self, stored: str) -> str:
        while (parent := self.parents.get(stored, stored)) != stored:
            stored = parent
        return stored

    def join(self, a: str, b: str) -> None:
        self.parents[self.region(b)] = self.region(a)

    def losing(self) -> frozenset[int]:
        """The nodes of regions that gain nothing."""
        gains: defaultdict[str, float] = defaultdict(float)
        members: defaultdict[str, set[int]] = defaultdict(set)
        for stored, gain in self.gains.items():
            gains[self.region(stored)] += gain
        for stored, nodes in self.members.items():
            members[self.region(stored)] |= nodes
        return frozenset(i for root, nodes in members.items() if gains[root] <= 0 for i in nodes)

    def cost(self, value: str, order: Order) -> int:
        """What a Transpose of the value costs, in elements: nothing where the axes that it moves have one element."""
        spec = self.specs.get(value)
        if spec is None or spec.ndim != len(order):
            return UNKNOWN
        kept = [axis for axis in order if spec.dims[axis] != 1]
        return 0 if kept == sorted(kept) else CALL + spec.size

    # ---- values

    def plain(self, value: str) -> str:
        """Where the value is with its axes as the model has them."""
        stored, perm = self.views.get(value, (value, ()))
        if perm == tuple(range(len(perm))):
            return stored
        if (stored, perm) not in self.made:
            self.transpose(stored, perm, value)
            self.gains[stored] -= self.cost(stored, perm)
        return self.made[stored, perm]

    def name(self, value: str) -> None:
        """Makes the value under its own name, for outputs and for subgraphs."""
        found = self.plain(value)
        if found != value and value not in self.named:
            self.nodes.append(Node("Identity", (found,), (value,), name=value))
            self.named.add(value)

    def stored(self, value: str, order: Order) -> str:
        """Where the value is with its axes in this order; one of fewer axes as it broadcasts."""
        if value in self.graph.constants:
            return self.permuted(value, order)
        straight = tuple(range(len(order)))
        base, perm = self.views.get(value, (value, straight))
        rank = self.rank(value)
        if rank is not None and rank < len(order):
            base, perm = self.unsqueezed(self.plain(value), len(order) - rank), straight
        total = tuple(perm[axis] for axis in order)
        if total == straight:
            return base
        if (base, total) not in self.made:
            name = ordered_name(value, order)
            self.transpose(base, total, name)
            self.gains[name] -= self.cost(base, total)
            if base in self.members:
                self.join(base, name)
        return self.made[base, total]

    def permuted(self, value: str, order: Order) -> str:
        """A constant with its axes in this order."""
        array = self.graph.constants[value]
        if array.size == 1 and array.ndim <= len(order):
            return value
        name = ordered_name(value, order)
        if name not in self.constants:
            wide = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
            self.constants[name] = constant(np.ascontiguousarray(wide.transpose(order)))
        return name

    def unsqueezed(self, value: str, count: int) -> str:
        """The value with `count` axes of one element before its own."""
        name, axes = made_name(value, "wide", count), tuple(range(count))
        if name not in self.named:
            self.named.add(name)
            if self.graph.opsets.get("", 1) < 13:
                self.nodes.append(Node("Unsqueeze", (value,), (name,), {"axes": axes}, name=name))
            else:
                self.constants[made_name(name, "axes")] = np.array(axes, np.int64)
                self.nodes.append(Node("Unsqueeze", (value, made_name(name, "axes")), (name,), name=name))
            spec = self.specs.get(value)
            if spec is not None:
                self.specs[name] = TensorSpec((1,) * count + spec.shape, spec.dtype)
        return name

    def transpose(self, stored: str, perm: Order, name: str) -> None:
        """Emits what makes Transpose(stored, perm) under this name."""
        self.nodes.append(Node("Transpose", (stored,), (name,), {"perm": perm}, name=name))
        self.made[stored, perm] = name
        self.note(name, stored, perm)

    def note(self, name: str, value: str, perm: Order) -> None:
        """Keeps an idea of the size of Transpose(value, perm)."""
        spec = self.specs.get(value)
        if spec is not None and spec.ndim == len(perm):
            self.specs[name] = TensorSpec(tuple([spec.shape[axis] for axis in perm]), spec.dtype)

    # ---- nodes

    def run(self) -> Graph:
        for i, node in enumerate(self.graph.nodes):
            if node.qualified == "Transpose" and self.absorb(node):
                self.changed.add(i)
                continue
            moved = None if i in self.left else self.move(node)
            if moved is not None:
                self.changed.add(i)
                self.emit(i, node, moved)
            else:
                for _, sub in node.subgraphs:
                    for value in sorted(sub.captures()):
                        self.name(value)
                self.nodes.append(node.over(tuple([self.plain(v) if v else v for v in node.inputs])))
        for value in self.graph.outputs:
            self.name(value)
        return replace(self.graph, nodes=tuple(self.nodes), constants=self.constants)

    def absorb(self, node: Node) -> bool:
        """A Transpose of the model: nothing is done yet. Whether it is one whose axes are known."""
        value, target = node.inputs[0], node.outputs[0]
        rank, perm = self.rank(value), node.attrs.get("perm")
        if perm is None:
            perm = None if rank is None else tuple(range(rank))[::-1]
        if perm is None or rank not in (None, len(perm)) or sorted(perm) != list(range(len(perm))):
            return False
        stored, before = self.views.get(value, (value, tuple(range(len(perm)))))
        self.views[target] = stored, tuple(before[axis] for axis in perm)
        self.gains[stored] += self.cost(value, tuple(perm))
        return True

    def move(self, node: Node) -> Moved | None:
        """The node over what is stored, where there is a rule for it and an input is stored in another order."""
        try:
            if node.qualified in CONVOLUTIONS:
                weight = self.graph.constants.get(node.inputs[1])
                return None if weight is None else CONVOLUTIONS[node.qualified](self, node, last_order(weight.ndim))
            rule = RULES.get(node.qualified)
            if rule is None:
                return None
            orders = [inverse(self.views[v][1]) for v in node.inputs if v in self.views]
            for order in sorted(dict.fromkeys(orders), key=orders.count, reverse=True):
                moved = None if order == tuple(range(len(order))) else rule(self, node, order)
                if moved is not None:
                    return moved
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            pass  # a node that a rule stumbles over is named when it is planned
        return None

    def emit(self, i: int, node: Node, moved: Moved) -> None:
        """Emits what a rule made of node i."""
        reads = {value: self.stored(value, order) for value, order in moved.reads.items()}
        makes = {
            value: value if order == tuple(range(len(order))) else ordered_name(value, order)
            for value, order in moved.makes.items()
        }
        for n in moved.nodes:
            inputs = tuple([reads.get(v) or (self.plain(v) if v else v) for v in n.inputs])
            self.nodes.append(n.over(inputs, tuple([makes.get(o, o) for o in n.outputs])))
        self.constants.update({k: constant(a) for k, a in moved.constants.items()})
        inside = [v for v in (*reads.values(), *makes.values()) if v not in self.constants]
        for value in inside:
            self.join(inside[0], value)
            self.members[value].add(i)
        for value, order in moved.makes.items():
            self.note(makes[value], value, order)
            if makes[value] != value:
                self.views[value] = makes[value], inverse(order)
        if node.qualified in CONVOLUTIONS:
            spec = self.specs.get(node.outputs[0])
            elements = UNKNOWN if spec is None else spec.size
            self.gains[inside[0]] += gain_of(self.kind, node, self.graph.constants[node.inputs[1]], elements)
