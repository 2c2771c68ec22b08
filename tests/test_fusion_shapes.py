"""Generated from the declarations: a fusion changes no result and no refusal, at other sizes and in other types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.devices import open_device
from infera_gpu.errors import InferaError
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.loader import load_graph
from infera_gpu.passes import FUSIONS, LAST, QUANTIZED, SIBLINGS
from infera_gpu.passes.engine import Rewrite, apply
from infera_gpu.passes.siblings import Siblings, joined
from infera_gpu.session import Session
from infera_gpu.spec import TensorSpec, onnx_of_dtype, tensors_of
from tests.text import parse

ALL: tuple[Rewrite, ...] = (*QUANTIZED, *FUSIONS, *SIBLINGS, *LAST)
EACH = pytest.mark.parametrize("fusion", [pytest.param(f, id=f.name) for f in ALL])
FLOAT = np.dtype(np.float32)

Sizes = Mapping[str, tuple[int, ...]]


@cache
def example(fusion: Rewrite) -> Graph:
    return load_graph(parse(fusion.example, fusion.opset))


def rewritten(graph: Graph, rewrite: Rewrite) -> tuple[Graph, int]:
    return joined(graph, rewrite) if isinstance(rewrite, Siblings) else apply(graph, rewrite)  # type: ignore[arg-type]


def inputs_of(graph: Graph) -> Mapping[str, TensorSpec]:
    return tensors_of(graph.inputs, "input")


def answer(graph: Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """What a graph gives as it stands; None where it is refused."""
    try:
        with Session(graph, open_device("cpu"), fuse=False) as session, np.errstate(all="ignore"):
            return session.run(feeds)
    except InferaError:
        return None


def feeds_of(graph: Graph, sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(sizes[n]).astype(s.dtype) for n, s in inputs_of(graph).items()}


def assert_alike(graph: Graph, fused: Graph, sizes: Sizes) -> bool:
    """Whether the graph answers at all."""
    feeds = feeds_of(graph, sizes)
    want, got = answer(graph, feeds), answer(fused, feeds)
    assert (want is None) == (got is None), f"{sizes}: {'refused' if want is None else 'answered'} as written"
    for name, expected in (want or {}).items():
        assert got is not None
        assert (got[name].shape, got[name].dtype) == (expected.shape, expected.dtype), sizes
        if expected.size:
            eps = 16 * float(np.finfo(expected.dtype).eps) if expected.dtype.kind == "f" else 0
            peak = float(np.abs(expected[np.isfinite(expected)]).max(initial=0))
            np.testing.assert_allclose(got[name], expected, rtol=eps, atol=eps * peak, err_msg=str(sizes))
    return want is not None


def written_sizes(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {n: tuple(d if isinstance(d, int) else 2 for d in s.shape) for n, s in inputs_of(graph).items()}


def other_sizes(graph: Graph) -> Iterator[Sizes]:
    """Every symbol 1, 3; then one axis of one input after the other 1, 3; and those of one size together."""
    written = written_sizes(graph)
    yield written
    for size in (1, 3):
        symbols = {n: s.shape for n, s in inputs_of(graph).items()}
        yield {n: tuple(d if isinstance(d, int) else size for d in shape) for n, shape in symbols.items()}
        for old in sorted({d for dims in written.values() for d in dims}):
            yield {n: tuple(size if d == old else d for d in dims) for n, dims in written.items()}
        for name, dims in written.items():
            for i in range(len(dims)):
                yield written | {name: (*dims[:i], size, *dims[i + 1 :])}


@EACH
def test_changes_nothing_at_other_sizes(fusion: Rewrite) -> None:
    """As it is declared, and with every size unknown: where a guard goes by sizes it may not fire then."""
    graph = example(fusion)
    blind = replace(
        graph,
        inputs={n: TensorSpec((None,) * s.ndim, s.dtype) for n, s in inputs_of(graph).items()},
        outputs={n: replace(s, shape=(), ranked=False) for n, s in tensors_of(graph.outputs, "output").items()},
    )
    for given in (graph, blind):
        fused = rewritten(given, fusion)[0]
        seen: list[Sizes] = []
        for sizes in other_sizes(graph):
            fits = all(
                all(not isinstance(d, int) or d == size for d, size in zip(s.shape, sizes[n], strict=True))
                for n, s in inputs_of(given).items()
            )
            if fits and sizes not in seen:
                seen.append(sizes)
                answered = assert_alike(given, fused, sizes)
                assert answered or len(seen) > 1


@EACH
def test_strict_sessions_give_the_bits_of_what_is_written(fusion: Rewrite) -> None:
    model, graph = parse(fusion.example, fusion.opset), example(fusion)
    options: dict[str, Any] = {"device": "cpu", "accuracy": "strict"}
    with infera_gpu.load(model, **options) as strict, infera_gpu.load(model, **options, fuse=False) as written:
        for seed in range(8):
            feeds = feeds_of(graph, written_sizes(graph), seed)
            for name, want in written.run(feeds).items():
                np.testing.assert_array_equal(strict.run(feeds)[name], want)


def in_type(graph: Graph, dtype: np.dtype[Any]) -> Graph:
    """The graph with what is float32 of another floating-point type."""

    def array(value: HostArray) -> HostArray:
        return value.astype(dtype) if value.dtype == FLOAT else value

    def typed(node: Node) -> Node:
        attrs = {k: array(v) if isinstance(v, np.ndarray) else v for k, v in node.attrs.items()}
        to = {"to": onnx_of_dtype(dtype)} if node.op == "Cast" and attrs["to"] == onnx_of_dtype(FLOAT) else {}
        return replace(node, attrs=attrs | to)

    inputs, outputs = (
        {n: replace(s, dtype=dtype) if s.dtype == FLOAT else s for n, s in tensors_of(of, "value").items()}
        for of in (graph.inputs, graph.outputs)
    )
    constants = {n: array(v) for n, v in graph.constants.items()}
    nodes = tuple(map(typed, graph.nodes))
    return replace(graph, nodes=nodes, inputs=inputs, outputs=outputs, constants=constants)


@EACH
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_changes_nothing_in_another_type(fusion: Rewrite, dtype: str) -> None:
    graph = in_type(example(fusion), np.dtype(dtype))
    assert_alike(graph, rewritten(graph, fusion)[0], written_sizes(graph))
