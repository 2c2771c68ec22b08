"""What the host does between a plan and the next: nodes that run on NumPy, and the copies that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from infera_gpu.graph import Node
from infera_gpu.layout import Operand
from infera_gpu.specialize import Eager, Segment


def summary(segment: Segment, outputs: Mapping[str, Operand]) -> str:
    """How many nodes and copies follow the steps of the segment's plan, whose `outputs` these are; empty where none."""
    reads = [v for e in segment.eager for v in e.node.reads]
    copies = len(_copied([*segment.waits, *reads], outputs))
    numpys = sum(not e.node.subgraphs for e in segment.eager)
    with_bodies = len(segment.eager) - numpys + sum(bool(n.subgraphs) for n in segment.rest)
    said = [f"{counted(numpys, 'node')} on NumPy"] if numpys else []
    said += [f"{counted(with_bodies, 'node')} with subgraphs"] if with_bodies else []
    nodes = " and ".join(said)
    return ", with ".join(filter(None, (nodes, f"{counted(copies, 'copy')} to the host" if copies else "")))


def places(segment: Segment, outputs: Mapping[str, Operand], *, copies: bool) -> list[tuple[str, str]]:
    """Every node that runs then, and where; with what is copied, where there are `copies` between host and device.

    Then those of what is left that have subgraphs.
    """
    return [
        *((str(e.node), f"{_where(e.node)}{_copies(e, outputs) if copies else ''}") for e in segment.eager),
        *((str(n), f"{_bodies(n)}: planned with the rest") for n in segment.rest if n.subgraphs),
    ]


def _where(node: Node) -> str:
    return f"{_bodies(node)}: planned when run" if node.subgraphs else "NumPy"


def _bodies(node: Node) -> str:
    """How large they are; their steps follow from the shapes that they get."""
    return ", ".join(f"{name} of {counted(len(graph.nodes), 'node')}" for name, graph in node.subgraphs)


def _copies(eager: Eager, outputs: Mapping[str, Operand]) -> str:
    """In brackets; of what is made, only where it is arrays for sure."""
    back = [] if eager.op.host else [o for o in eager.node.outputs if o]
    ways = ((_copied(eager.node.reads, outputs), "to the host"), (back, "back"))
    said = [f"{', '.join(map(repr, names))} {way}" for names, way in ways if names]
    return f" (copies {' and '.join(said)})" if said else ""


def counted(number: int, what: str) -> str:
    """So many of them, in words."""
    several = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what if number == 1 else several}"


def _copied(values: Iterable[str], outputs: Mapping[str, Operand]) -> list[str]:
    """Those that lie on a device, each once."""
    found = dict.fromkeys(v for v in values if v in outputs)
    return [v for v in found if outputs[v].space == "device" and not outputs[v].constant]
