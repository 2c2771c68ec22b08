"""Gradient nodes become the nodes that compute them: reverse-mode differentiation of the graph before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from infera_gpu.errors import ModelError
from infera_gpu.graph import Graph, Node, made_name

DOMAIN = "ai.onnx.preview.training"


@dataclass
class _Tape:
    """New nodes, with names of their own."""

    prefix: str
    nodes: list[Node] = field(default_factory=list)

    def __call__(self, op: str, *inputs: str, domain: str = "") -> str:
        name = made_name(self.prefix, len(self.nodes))
        self.nodes.append(Node(op, inputs, (name,), domain=domain, name=name))
        return name


Rule = Callable[[_Tape, Node, str], Iterator[tuple[str, str]]]
"""(input, its share of the gradient), from the node and the gradient of its output; broadcast like the output."""


def _add(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    yield from ((i, g) for i in n.inputs)


def _sub(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    yield n.inputs[0], g
    yield n.inputs[1], t("Neg", g)


def _mul(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    a, b = n.inputs
    yield a, t("Mul", g, b)
    yield b, t("Mul", g, a)


def _div(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    a, b = n.inputs
    share = t("Div", g, b)
    yield a, share
    yield b, t("Neg", t("Mul", share, t("Div", a, b)))


def _neg(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    yield n.inputs[0], t("Neg", g)


def _exp(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    yield n.inputs[0], t("Mul", g, n.outputs[0])


def _log(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    yield n.inputs[0], t("Div", g, n.inputs[0])


def _tanh(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    y = n.outputs[0]
    yield n.inputs[0], t("Sub", g, t("Mul", g, t("Mul", y, y)))


def _sigmoid(t: _Tape, n: Node, g: str) -> Iterator[tuple[str, str]]:
    y = n.outputs[0]
    yield n.inputs[0], t("Mul", g, t("Sub", y, t("Mul", y, y)))


RULES: dict[str, Rule] = {
    "Add": _add,
    "Sum": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Neg": _neg,
    "Identity": _add,
    "Exp": _exp,
    "Log": _log,
    "Tanh": _tanh,
    "Sigmoid": _sigmoid,
}


def differentiated(graph: Graph) -> Graph:
    """The graph without Gradient nodes. Raises ModelError for a node on the way that has no rule."""
    nodes: list[Node] = []
    for n in graph.nodes:
        nodes += _gradient(nodes, n) if (n.domain, n.op) == (DOMAIN, "Gradient") else [n]
    return replace(graph, nodes=tuple(nodes)) if len(nodes) != len(graph.nodes) else graph


def _gradient(before: list[Node], node: Node) -> list[Node]:
    xs, y = node.attrs.get("xs", ()), node.attrs.get("y", "")
    if len(node.outputs) > len(xs):
        raise ModelError(f"{node}: {len(node.outputs)} outputs for {len(xs)} values in xs")
    depends = set(xs)
    for n in before:
        if depends.intersection(n.inputs):
            depends.update(n.outputs)
    tape = _Tape(made_name(next(o for o in node.outputs if o), "gradient"))
    shares: dict[str, list[str]] = {y: [tape("OnesLike", y, domain="infera")]}
    totals: dict[str, str] = {}

    def total(value: str) -> str:
        if value not in totals:
            first, *rest = shares[value]
            for share in rest:
                first = tape("Add", first, share)
            totals[value] = first
        return totals[value]

    for n in reversed(before):
        if not n.outputs or n.outputs[0] not in shares or n.outputs[0] in xs or n.outputs[0] not in depends:
            continue
        rule = None if n.domain else RULES.get(n.op)
        if rule is None:
            raise ModelError(f"{node}: no derivative of {n} is known; there are those of {', '.join(RULES)}")
        for value, share in rule(tape, n, total(n.outputs[0])):
            if value in depends:
                shares.setdefault(value, []).append(tape("SumTo", share, value, domain="infera"))
    for x, out in zip(xs, node.outputs, strict=False):
        if out and x not in shares:
            raise ModelError(f"{node}: '{y}' does not depend on '{x}'")
        if out:
            tape.nodes.append(Node("Identity", (total(x),), (out,), name=out))
    return tape.nodes
