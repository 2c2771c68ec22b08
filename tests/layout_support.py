"""What tests of layouts share: a graph converted, run, and compared with what it was."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from infera_gpu.devices import open_device
from infera_gpu.graph import Graph, HostArray
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes.layout import convert
from infera_gpu.session import Session
from infera_gpu.spec import tensors_of
from tests.text import parse


def transposes(graph: Graph) -> int:
    return sum(n.op == "Transpose" for g in graph.walk() for n in g.nodes)


def run(graph: Graph, feeds: Mapping[str, HostArray]) -> dict[str, HostArray]:
    return Session(graph, open_device("cpu"), fuse=False).run(feeds)


def assert_same(graph: Graph, made: Graph, feeds: Mapping[str, HostArray], tol: float = 1e-6) -> None:
    made.check()
    got, want = run(made, feeds), run(graph, feeds)
    for name, expected in want.items():
        assert got[name].shape == expected.shape
        scale = np.abs(expected).max(initial=0.0)
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=tol * scale, err_msg=name)


def check(text: str, left: int, opset: int = 17, sizes: Mapping[str, int] | None = None) -> Graph:
    """The converted graph, which has `left` Transposes and computes the same."""
    graph = load_graph(parse(text, opset))
    made = convert(graph, registry())
    assert transposes(made) == left
    rng = np.random.default_rng(0)
    feeds = {
        k: rng.standard_normal([d if isinstance(d, int) else (sizes or {})[str(d)] for d in s.shape]).astype(s.dtype)
        for k, s in tensors_of(graph.inputs, "input").items()
    }
    assert_same(graph, made, feeds)
    return made
