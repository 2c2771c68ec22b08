"""Models that quantise on the way: every node by itself, on what onnxruntime gave the nodes before it.

Where a float lies between two integers its last bit decides which one it becomes, and one step of 255 in the middle of
a network moves the outputs by up to a tenth of their peak. Two correct runtimes differ by that much; so do onnxruntime
and the same model in float64 (`python -m bench.quantized`). What must agree is therefore each node on equal inputs: the
integers exactly, the floats to a few of their last bits.
"""

from __future__ import annotations

import onnx
import pytest

import infera_gpu
from bench.inputs import EXAMPLES, Feeds
from bench.models import path_of
from infera_gpu.devices import open_device
from infera_gpu.errors import UnreachableError
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.session import Session
from infera_gpu.spec import spec_of
from infera_gpu.verify import OnnxRuntime, compare

QUANTIZED = (
    "minilm-l6-int8",
    "bert-tiny-ner",
    "quire-tagger",
    "pulsevad-int8",
    "traceforge-encoder",
    "traceforge-decoder",
)
TOLERANCE = 2e-6
"""Of the peak, a node."""


def everything(model: onnx.ModelProto, feeds: Feeds) -> dict[str, HostArray]:
    """What onnxruntime makes of every value. Edits `model`."""
    known = {o.name for o in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
                known.add(name)
    return OnnxRuntime(model.SerializeToString()).run(feeds)


def alone(node: Node, graph: Graph, values: dict[str, HostArray]) -> Graph:
    """A graph of this node."""
    fixed = {i: graph.constants[i] for i in node.inputs if i in graph.constants}
    return Graph(
        (node,),
        {i: spec_of(values[i]) for i in node.inputs if i and i not in fixed},
        {o: spec_of(values[o]) for o in node.outputs if o},
        fixed,
        graph.opsets,
    )


@pytest.mark.models
@pytest.mark.large
@pytest.mark.parametrize("at", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_node_agrees_on_equal_inputs(name: str, at: int) -> None:
    try:
        path = path_of(name)
    except UnreachableError as error:
        pytest.skip(f"{name} is out of reach: {error}")
    feeds = EXAMPLES[name][at].feeds()
    with infera_gpu.load(path, device="cpu", fuse=False) as session:
        graph = session.graph
    theirs = everything(onnx.load(path), feeds)
    values = {**theirs, **feeds}
    device = open_device("cpu")
    checked = 0
    for node in graph.nodes:
        if node.subgraphs or any(o and o not in theirs for o in node.outputs):
            continue
        single = alone(node, graph, values)
        got = Session(single, device, fuse=False).run({k: values[k] for k in single.inputs})
        for difference in compare(got, {k: theirs[k] for k in got}):
            assert difference.within(TOLERANCE), f"{node}: {difference}"
        checked += 1
    assert checked > 0.9 * len(graph.nodes)
