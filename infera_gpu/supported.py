"""Whether there is an operator for every node of a graph, and what to do where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from infera_gpu.errors import InvalidModel, PlanError, UnsupportedOperatorError
from infera_gpu.graph import Graph, Node
from infera_gpu.op import Registry


def check_supported(graph: Graph, registry: Registry) -> None:
    """Raises UnsupportedOperatorError listing every node without an operator, those in subgraphs included.

    Raises InvalidModel where a node has an attribute that its operator has not, or lacks one.
    """
    missing = [*_unsupported(graph.nodes, graph, registry)]
    if missing:
        hints = {op: hint for op, _ in missing if (hint := _hint(op, registry))}
        raise UnsupportedOperatorError(missing, opset=graph.opsets.get("", 0), hints=hints, model=graph.name)


def _unsupported(nodes: Iterable[Node], graph: Graph, registry: Registry) -> Iterator[tuple[str, str]]:
    """Operator and name of what has none, in subgraphs too; `graph` is the outermost one, whose opsets hold."""
    for n in nodes:
        op = None if is_control(n) else registry.find(n.domain, n.op, graph.opset_of(n))
        if op is not None:
            try:
                op.fill(n)
            except PlanError as error:
                raise InvalidModel(f"{graph.name}: {error}") from None
        elif not is_control(n):
            yield n.qualified, n.name or n.outputs[0]
        for _, sub in n.subgraphs:
            yield from _unsupported(sub.nodes, graph, registry)


def _hint(qualified: str, registry: Registry) -> str:
    """What there is instead of an operator that is not there."""
    if qualified.startswith("com.microsoft.nchwc."):
        return (
            "onnxruntime writes com.microsoft.nchwc at ORT_ENABLE_ALL, for the CPU that it runs on: "
            "have it save the model at ORT_ENABLE_EXTENDED"
        )
    since = min((o.since for o in registry if o.qualified.rsplit("-", 1)[0] == qualified), default=0)
    if since:
        return f"there is {qualified} from opset {since} on, to which onnx.version_converter brings models"
    close = {name.lower(): name for name in registry.names}.get(qualified.lower())
    return f"there is {close}" if close else ""


def is_control(node: Node) -> bool:
    """Whether it is control flow that specialising takes apart, and that needs no operator of its own."""
    return node.op == "If" and not node.domain
