"""Examples and near misses of fusions, changed here and there: every pass together changes no result and no refusal.

Half of what a change makes is no model at all: then it is refused as written and refused with passes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from infera_gpu.devices import open_device
from infera_gpu.errors import InferaError
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.loader import load_graph
from infera_gpu.passes.fold import drop_dead
from infera_gpu.schemas import rules_of
from infera_gpu.session import Session
from infera_gpu.spec import OptionalSpec, TensorSpec
from tests.test_fusion_shapes import ALL, FLOAT, in_type, inputs_of
from tests.text import parse

TEXTS = [(f, text) for f in ALL for text in (f.example, *f.near_misses)]
FOUND = (2245, 2310, 3087, 5297, 7019, 7980, 10587, 16478, 21059, 32138, 32388, 32968)
"""Seeds that found a mistake."""
SEEDS = [
    *(*range(200), *FOUND),
    *(pytest.param(seed, marks=pytest.mark.large) for seed in range(200, 4000) if seed not in FOUND),
]
WAYS: tuple[tuple[str, bool], ...] = (("cpu", False), ("recording", False), ("cpu", True))
"""Devices, and whether their sessions are strict."""

FAMILIES = (
    ("Add", "Sub", "Mul", "Div", "Max", "Min"),
    ("Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Neg", "Abs", "Sqrt", "Reciprocal", "Softplus", "HardSigmoid"),
    ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceSumSquare"),
    ("Softmax", "LogSoftmax"),
    ("MaxPool", "AveragePool"),
)
"""Operators that may stand for each other, as far as their inputs go."""

SIZES: tuple[int | str, ...] = (0, 1, 1, 3, "P", "Q")

TOLERANCES = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-9}


@dataclass
class Draft:
    """A graph that changes, and what its symbols are in the run."""

    rng: random.Random
    graph: Graph
    sizes: dict[str, int] = field(default_factory=dict)

    def node(self) -> tuple[int, Node]:
        at = self.rng.randrange(len(self.graph.nodes))
        return at, self.graph.nodes[at]

    def put(self, at: int, node: Node) -> None:
        self.graph = replace(self.graph, nodes=(*self.graph.nodes[:at], node, *self.graph.nodes[at + 1 :]))

    def constant(self) -> tuple[str, HostArray] | None:
        floats = [(k, v) for k, v in self.graph.constants.items() if v.dtype.kind == "f" and v.size]
        return self.rng.choice(floats) if floats else None

    def set(self, name: str, value: HostArray) -> None:
        self.graph = replace(self.graph, constants={**self.graph.constants, name: value})


def another_output(d: Draft) -> None:
    _, node = d.node()
    name = d.rng.choice([o for o in node.outputs if o])
    d.graph = replace(d.graph, outputs={**d.graph.outputs, name: OptionalSpec()})


def reshaped_constant(d: Draft) -> None:
    if found := d.constant():
        name, value = found
        d.set(name, value.reshape(d.rng.choice([(1, *value.shape), (*value.shape, 1), (1, 1, *value.shape)])))


def widened_constant(d: Draft) -> None:
    if (found := d.constant()) and 1 in found[1].shape:
        name, value = found
        d.set(name, np.repeat(value, d.rng.choice([2, 3, 4]), axis=value.shape.index(1)))


def changed_constant(d: Draft) -> None:
    if found := d.constant():
        name, value = found[0], found[1].copy()
        value.flat[d.rng.randrange(value.size)] = d.rng.choice([0, 1, -1, 2, 0.5, 3, 1e-30, np.nan, np.inf, -np.inf])
        d.set(name, value)


def fed_constant(d: Draft) -> None:
    if found := d.constant():
        name, value = found
        constants = {k: v for k, v in d.graph.constants.items() if k != name}
        d.graph = replace(d.graph, constants=constants, inputs={**d.graph.inputs, name: TensorSpec(value.shape, FLOAT)})


def rewired(d: Draft) -> None:
    at, node = d.node()
    if node.inputs:
        before = [o for n in d.graph.nodes[:at] for o in n.outputs if o]
        i = d.rng.randrange(len(node.inputs))
        new = d.rng.choice([*before, *d.graph.inputs, *d.graph.constants])
        d.put(at, node.over((*node.inputs[:i], new, *node.inputs[i + 1 :])))


def swapped(d: Draft) -> None:
    at, node = d.node()
    if len(node.inputs) == 2:
        d.put(at, node.over(node.inputs[::-1]))


def another_operator(d: Draft) -> None:
    """With as many inputs, and no attribute that it has not: of other nodes no file would be loaded."""
    at, node = d.node()
    for family in FAMILIES:
        if node.qualified in family:
            op = d.rng.choice(family)
            rules = rules_of(op, d.graph.opset_of(node), node.domain)
            assert rules is not None
            least, most = rules.inputs
            if least <= len(node.inputs) <= most and node.attrs.keys() <= rules.attributes.keys():
                d.put(at, replace(node, op=op))


def another_attribute(d: Draft) -> None:
    at, node = d.node()
    numbers = [k for k, v in node.attrs.items() if k != "to" and isinstance(v, int | float | tuple)]
    if numbers:
        name = d.rng.choice(numbers)
        value: Any = node.attrs[name]
        if isinstance(value, tuple):
            new: Any = d.rng.choice([value[::-1], tuple(d.rng.choice([0, 1, 2, -1, -2]) for _ in value)])
        else:
            new = type(value)(d.rng.choice([0, 1, -1, -value, value + 1]))
        d.put(at, replace(node, attrs={**node.attrs, name: new}))


def resized(d: Draft) -> None:
    """All inputs' axes of one size, or one of them, get another; or a symbol that has it in the run."""
    axes = [(n, i) for n, s in inputs_of(d.graph).items() for i in range(s.ndim)]
    if not axes:
        return
    name, axis = d.rng.choice(axes)
    old, new, alone = inputs_of(d.graph)[name].shape[axis], d.rng.choice(SIZES), d.rng.random() < 0.5
    if isinstance(new, str):
        d.sizes[new] = old if isinstance(old, int) and d.rng.random() < 0.5 else d.rng.choice([1, 2, 3])

    def changed(of: str, spec: TensorSpec) -> TensorSpec:
        dims = enumerate(spec.shape)
        return replace(
            spec,
            shape=tuple(new if (of, i) == (name, axis) or (size == old and not alone) else size for i, size in dims),
        )

    d.graph = replace(d.graph, inputs={n: changed(n, s) for n, s in inputs_of(d.graph).items()})


def another_type(d: Draft) -> None:
    if all(s.dtype == FLOAT for s in inputs_of(d.graph).values()):
        outputs = d.graph.outputs
        d.graph = replace(in_type(replace(d.graph, outputs={}), np.dtype(d.rng.choice(["f8", "f2"]))), outputs=outputs)


CHANGES: tuple[Callable[[Draft], None], ...] = (
    *(another_output, another_output, reshaped_constant, widened_constant, changed_constant, fed_constant, rewired),
    *(swapped, another_operator, another_attribute, resized, resized, another_type),
)


def drawn(seed: int) -> tuple[str, Graph, dict[str, HostArray]]:
    """What was changed, the graph, and its feeds."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    fusion, text = rng.choice(TEXTS)
    graph = load_graph(parse(text, fusion.opset))
    d = Draft(rng, replace(graph, outputs=dict.fromkeys(graph.outputs, OptionalSpec())))
    changes = [rng.choice(CHANGES) for _ in range(rng.choice([1, 1, 2, 3]))]
    with np.errstate(over="ignore"):
        for change in changes:
            change(d)

    def fed(name: str, spec: TensorSpec) -> HostArray:
        if name in graph.constants:
            return graph.constants[name].astype(spec.dtype)
        dims = [s if isinstance(s, int) else d.sizes.setdefault(str(s), 2) for s in spec.shape]
        if spec.dtype.kind == "b":
            return numbers.random(dims) < 0.5
        if spec.dtype.kind in "iu":
            return numbers.integers(0, 4, dims).astype(spec.dtype)
        return numbers.standard_normal(dims).astype(spec.dtype)

    feeds = {n: fed(n, s) for n, s in inputs_of(d.graph).items()}
    return f"{fusion.name}: {', '.join(c.__name__ for c in changes)}", drop_dead(d.graph), feeds


def answer(graph: Graph, feeds: Mapping[str, HostArray], device: str, strict: bool, fuse: bool) -> Any:
    """Results, or why there are none."""
    try:
        with np.errstate(all="ignore"), Session(graph, open_device(device, strict=strict), fuse=fuse) as session:
            return session.run(feeds)
    except InferaError as error:
        return error


@pytest.mark.parametrize("seed", SEEDS)
def test_passes_change_nothing(seed: int) -> None:
    what, graph, feeds = drawn(seed)
    for device, strict in WAYS:
        want, got = (answer(graph, feeds, device, strict, fuse) for fuse in (False, True))
        context = f"seed {seed}, {what}, {device}{', strict' if strict else ''}"
        if isinstance(want, InferaError):  # which a Reshape may be of no elements, whose sizes nobody can tell
            assert isinstance(got, InferaError) or any(0 in feed.shape for feed in feeds.values()), context
            continue
        assert not isinstance(got, InferaError), f"{context}: {got}"
        for name, expected in want.items():
            assert (got[name].shape, got[name].dtype) == (expected.shape, expected.dtype), context
            finite = np.isfinite(expected) if expected.dtype.kind == "f" else np.ones(expected.shape, np.bool_)
            np.testing.assert_array_equal(got[name][~finite], expected[~finite], err_msg=context)
            peak = float(np.abs(expected[finite]).astype(np.float64).max(initial=1e-2))
            within = TOLERANCES.get(expected.dtype.name, 0.0) * peak
            np.testing.assert_allclose(got[name][finite], expected[finite], rtol=0, atol=within, err_msg=context)
