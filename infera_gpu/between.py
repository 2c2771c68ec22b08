"""What the host does between a plan and the next: nodes that run on NumPy, and the copies that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from infera_gpu.layout import Operand
from infera_gpu.specialize import Eager, Segment


def summary(segment: Segment, outputs: Mapping[str, Operand]) -> str:
    """How many nodes and copies follow the steps of the segment's plan, whose `outputs` these are; empty where none."""
    reads = [v for e in segment.eager for v in e.node.reads]
    nodes, copies = len(segment.eager), len(_copied([*segment.waits, *reads], outputs))
    said = [f"{nodes} {'node' if nodes == 1 else 'nodes'} on NumPy"] if nodes else []
    said += [f"{copies} {'copy' if copies == 1 else 'copies'} to the host"] if copies else []
    return " with ".join(said)


def places(segment: Segment, outputs: Mapping[str, Operand], *, copies: bool) -> list[tuple[str, str]]:
    """Every node that runs then, and where; with what is copied, where there are `copies` between host and device."""
    return [(str(e.node), f"NumPy{_copies(e, outputs) if copies else ''}") for e in segment.eager]


def _copies(eager: Eager, outputs: Mapping[str, Operand]) -> str:
    """In brackets; of what is made, only where it is arrays for sure."""
    back = [] if eager.op.host else [o for o in eager.node.outputs if o]
    ways = ((_copied(eager.node.reads, outputs), "to the host"), (back, "back"))
    said = [f"{', '.join(map(repr, names))} {way}" for names, way in ways if names]
    return f" (copies {' and '.join(said)})" if said else ""


def _copied(values: Iterable[str], outputs: Mapping[str, Operand]) -> list[str]:
    """Those that lie on a device, each once."""
    found = dict.fromkeys(v for v in values if v in outputs)
    return [v for v in found if outputs[v].space == "device" and not outputs[v].constant]
