"""Plans as bytes and back, beside the graph that they are of: see `graph_codec`.

Only what a run needs is written: plans of one segment, in host memory. Nodes and constants of the graph are written as
numbers and names; what planning made of its own, nodes that stand for others and folded constants, is written whole.
Steps and nodes are read when somebody asks for them: who has a recipe for all steps does not.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infera_gpu.errors import PlanError
from infera_gpu.graph import Graph, HostArray, T
from infera_gpu.graph_codec import Damaged, Reader, Unencodable, Writer, code_of, framed, unframed
from infera_gpu.layout import operand_of
from infera_gpu.op import Later, Registry, Site
from infera_gpu.plan import Packed, Plan
from infera_gpu.recipe import Written
from infera_gpu.spec import TensorSpec, dtype_of_onnx
from infera_gpu.specialize import Placed, Segment


def encoded(plan: Plan, graph: Graph, recipe: Written | None = None) -> bytes:
    """The plan of `graph` as bytes, with how it is bound. Raises Unencodable for one of several segments, or not for
    host memory alone."""
    segment = plan.segment
    if not segment.is_last or segment.objects or plan.carried or plan.staging or plan.graphs is not None:
        raise Unencodable("a plan of several segments, or on a GPU")
    writer = Writer()
    numbers = {id(n): i for i, n in enumerate(graph.nodes)}
    constants = {
        k: None if graph.constants.get(k) is a and plan.constants[k] is a else writer.array(plan.constants[k])
        for k, a in segment.constants.items()
    }
    said: dict[str, Any] = {
        "constants": constants,
        "made": segment.outputs,
        **{k: {v: _window(o) for v, o in getattr(plan, k).items()} for k in ("inputs", "outputs")},
        "entering": {k: writer.spec(s) for k, s in segment.inputs.items()},
        "arenas": dict(plan.arenas),
        "bounds": dict(plan.lower_bounds),
        "saved": dict(plan.saved),
        "direct": sorted(plan.direct),
        "bordered": plan.bordered,
        "device": [plan.device, plan.concurrency],
        "recipe": recipe and [recipe.text, list(map(writer.array, recipe.own)), recipe.packed],
    }
    later = {
        "nodes": [_site(p.site, numbers, writer) for p in segment.nodes],
        "steps": [_step(fields) for fields in plan.packed],
        "placed": plan.placed,
    }
    said["later"] = json.dumps(later, separators=(",", ":"))
    return framed(said, writer.arrays)


def decoded(data: HostArray, graph: Graph, registry: Registry) -> Plan:
    """The plan of `graph` that was `encoded`. Raises Damaged."""
    return unframed(data, lambda reader, said: _plan(said, reader, graph, registry))


def _site(site: Site, numbers: Mapping[int, int], writer: Writer) -> list[Any]:
    if site.batch_invariant or site.tuned is not None:
        raise Unencodable("a plan for a GPU")
    number = numbers.get(id(site.node))
    specs = [[None if s is None else [s.shape, code_of(s.dtype)] for s in given] for given in (site.ins, site.outs)]
    return [writer.node(site.node) if number is None else number, site.opset, *specs]


def _window(fields: Sequence[Any]) -> list[Any]:
    root, space, shape, dtype, strides, offset, constant = fields
    return [root, space, shape, code_of(dtype), strides, offset, constant]


def _step(fields: Packed) -> list[Any]:
    kind, label, via, ins, outs, space, number, workspace, parts = fields
    return [
        kind,
        label,
        via,
        [o and _window(o) for o in ins],
        [_window(o) for o in outs],
        space,
        number,
        workspace and _window(workspace),
        parts,
    ]


def _operand(said: Sequence[Any]) -> Packed:
    root, space, shape, code, strides, offset, constant = said
    return root, space, tuple(shape), dtype_of_onnx(code), tuple(strides), offset, constant


def _plan(said: Mapping[str, Any], reader: Reader, graph: Graph, registry: Registry) -> Plan:
    constants = {k: graph.constants[k] if a is None else reader.array(*a) for k, a in said["constants"].items()}
    device, concurrency = said["device"]
    recipe = None
    if said["recipe"] is not None:
        text, own, packed = said["recipe"]
        recipe = Written(text, tuple([reader.array(*a) for a in own]), tuple([(name, tag) for name, tag in packed]))

    reading = threading.Lock()  # arrays are read in the order in which they lie

    def later(key: str, make: Callable[[Any], T]) -> Later[T]:
        def made() -> list[T]:
            try:
                with reading:
                    return [make(one) for one in json.loads(said["later"])[key]]
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, Damaged) as error:
                raise PlanError(f"a plan that was kept is damaged: {error}") from error

        return Later(made)

    return Plan(
        device=device,
        concurrency=concurrency,
        segment=Segment(
            nodes=later("nodes", lambda p: _placed(p, reader, graph, registry, constants)),
            inputs={k: reader.spec(s) for k, s in said["entering"].items()},
            outputs=tuple(said["made"]),
            specs={},
            constants=constants,
        ),
        packed=later("steps", lambda fields: _packed(*fields)),
        inputs={k: operand_of(_operand(o)) for k, o in said["inputs"].items()},
        carried={},
        outputs={k: operand_of(_operand(o)) for k, o in said["outputs"].items()},
        constants=constants,
        arenas=said["arenas"],
        lower_bounds=said["bounds"],
        placed=later("placed", tuple),
        saved=Counter(said["saved"]),
        direct=frozenset(said["direct"]),
        bordered=said["bordered"],
        recipe=recipe,
    )


def _placed(
    said: Sequence[Any], reader: Reader, graph: Graph, registry: Registry, constants: Mapping[str, HostArray]
) -> Placed:
    given, opset, ins, outs = said
    node = graph.nodes[given] if isinstance(given, int) else reader.node(*given)
    op = registry.find(node.domain, node.op, opset)
    if op is None:
        raise Damaged
    specs = [tuple([s and TensorSpec(tuple(s[0]), dtype_of_onnx(s[1])) for s in some]) for some in (ins, outs)]
    values = tuple([constants.get(i) for i in node.inputs])
    return Placed(op, Site(node, op.fill(node), specs[0], values, specs[1], opset))


def _packed(
    kind: str,
    label: str,
    via: str,
    ins: list[Any],
    outs: list[Any],
    space: str,
    number: Any,
    workspace: Any,
    parts: int,
) -> Packed:
    return (
        kind,
        label,
        via,
        tuple([o and _operand(o) for o in ins]),
        tuple([_operand(o) for o in outs]),
        space,
        number,
        workspace and _operand(workspace),
        parts,
    )
