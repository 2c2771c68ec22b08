"""A graph while passes rewrite it: its nodes in slots, indexed by value and by operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.passes.facts import Facts
from infera_gpu.passes.known import Known
from infera_gpu.passes.sizes import Sizes
from infera_gpu.spec import TensorSpec


class Draft:
    """The nodes of a graph, each in a slot of its place in topological order; slots fall empty, and few are added.

    `graph` has the inputs, outputs and opsets, and the constants with those that were added; not its nodes, which
    `finished` gives. `readers` maps a value to those who read it, by identity; captures of subgraphs count. `known` is
    what an earlier pass found out of the values' types: see `Facts`.
    """

    def __init__(self, graph: Graph, known: dict[str, Known] | None = None) -> None:
        self.constants: dict[str, HostArray] = dict(graph.constants)
        self.graph = replace(graph, nodes=(), constants=self.constants)
        self.slots: list[Node | None] = list(graph.nodes)
        self.producers: dict[str, Node] = {}
        self.made_by: dict[str, str] = {}
        self.readers: dict[str, dict[int, Node]] = {}
        self.by_op: dict[str, set[int]] = {}
        self._slot: dict[int, int] = {}
        for slot, n in enumerate(graph.nodes):
            self._enter(n, slot)
        self._facts = Facts(self.graph, self.producers, known)

    def __len__(self) -> int:
        return len(self._slot)

    def candidates(self, ops: Iterable[str]) -> list[Node]:
        """The nodes of these operators, the last one first."""
        slots = sorted((s for op in ops for s in self.by_op.get(op, ())), reverse=True)
        return [n for s in slots if (n := self.slots[s]) is not None]

    def holds(self, n: Node) -> bool:
        """Whether this very node is still there."""
        slot = self._slot.get(id(n))
        return slot is not None and self.slots[slot] is n

    def place(self, n: Node) -> int:
        """Where a node stands: after those that it reads."""
        return self._slot[id(n)]

    def spec(self, value: str) -> TensorSpec | None:
        """What is known of a value's type; None where not even its element type is."""
        return self._facts.spec(value)

    def sizes(self, value: str) -> Sizes | None:
        """The elements of a shape that the graph computes; None where not even their count is known."""
        return self._facts.sizes(value)

    def replace(
        self,
        inside: Iterable[Node],
        made: Node,
        constants: Iterable[tuple[str, HostArray]] = (),
        before: Sequence[Node] = (),
    ) -> None:
        """Put `made` where the first of `inside` stands, take all of them out, and what nobody needs any more.

        `before` stand before it, in their order: they read what was made there, or each other.
        """
        self.constants.update(constants)
        inside = tuple(inside)
        slot = self._slot[id(inside[0])]
        for n in inside:
            self._leave(n)
        self._enter(made, slot)
        for place, n in zip(self._room(made, before), before, strict=True):
            self._enter(n, place)
        self._sweep(v for n in inside for v in n.reads)

    def _room(self, follower: Node, nodes: Sequence[Node]) -> list[int]:
        """Empty slots for nodes before another, after all that they read."""
        if not nodes:
            return []
        slot = self._slot[id(follower)]
        read = [self.producers[v] for n in nodes for v in n.reads if v in self.producers]
        free = [s for s in range(max((self._slot[id(n)] for n in read), default=-1) + 1, slot) if self.slots[s] is None]
        if len(free) < len(nodes):
            free = list(range(slot, slot + len(nodes)))
            self.slots[slot:slot] = [None] * len(nodes)
            moved = [(n, s) for s, n in enumerate(self.slots) if n is not None and s >= slot]
            for n, s in moved:
                self.by_op[n.qualified].discard(s - len(nodes))
            for n, s in moved:
                self._slot[id(n)] = s
                self.by_op[n.qualified].add(s)
        return free[-len(nodes) :]

    def bypass(self, n: Node) -> None:
        """Let who reads an Identity's output read its input, but for subgraphs; it goes when nobody needs it."""
        (value,), (source,) = n.outputs, n.inputs
        for reader in list(self.readers.get(value, {}).values()):
            if not any(value in sub.captures() for _, sub in reader.subgraphs):
                slot = self._slot[id(reader)]
                self._leave(reader)
                self._enter(reader.over(tuple([source if i == value else i for i in reader.inputs])), slot)
        if value not in self.readers and value not in self.graph.outputs:
            self._leave(n)

    def finished(self) -> Graph:
        """The graph as it is now; constants that nobody reads are left out."""
        needed = {*self.graph.outputs, *self.readers}
        return replace(
            self.graph,
            nodes=tuple(n for n in self.slots if n is not None),
            constants={k: v for k, v in self.constants.items() if k in needed},
        )

    def _enter(self, n: Node, slot: int) -> None:
        self.slots[slot] = n
        self._slot[id(n)] = slot
        op = n.qualified
        self.by_op.setdefault(op, set()).add(slot)
        for o in n.outputs:
            if o:
                self.producers[o] = n
                self.made_by[o] = op
        for v in n.reads:
            self.readers.setdefault(v, {})[id(n)] = n

    def _leave(self, n: Node) -> None:
        slot = self._slot.pop(id(n))
        self.slots[slot] = None
        slots = self.by_op[n.qualified]
        slots.discard(slot)
        if not slots:
            del self.by_op[n.qualified]
        for o in n.outputs:
            if o:
                del self.producers[o], self.made_by[o]
        for v in set(n.reads):
            readers = self.readers[v]
            readers.pop(id(n), None)
            if not readers:
                del self.readers[v]

    def _sweep(self, values: Iterable[str]) -> None:
        todo = list(values)
        while todo:
            n = self.producers.get(todo.pop())
            if n is None or any(o in self.readers or o in self.graph.outputs for o in n.outputs if o):
                continue
            self._leave(n)
            todo += n.reads
