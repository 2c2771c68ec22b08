"""Generated from the declarations: a fusion fires once on its example, never on a near miss, and changes no result."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

import infera_gpu
from infera_gpu.devices import open_device
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import FUSIONS, LAST, QUANTIZED, SIBLINGS, Fired
from infera_gpu.passes.engine import Either, Fusion, Rewrite, apply, node
from infera_gpu.passes.pattern import Arg, P
from infera_gpu.passes.siblings import Siblings, joined
from infera_gpu.running import optimized
from infera_gpu.session import Session
from infera_gpu.spec import TensorSpec, tensors_of
from tests.text import parse

ALL: tuple[Rewrite, ...] = (*QUANTIZED, *FUSIONS, *SIBLINGS, *LAST)
EXAMPLES = [pytest.param(f, id=f.name) for f in ALL]
NEAR_MISSES = [
    pytest.param(f, text, id=f"{f.name}-{text.split('(')[0].strip()}") for f in ALL for text in f.near_misses
]


def rewritten_by(graph: Graph, rewrite: Rewrite) -> tuple[Graph, int]:
    if isinstance(rewrite, Siblings):
        return joined(graph, rewrite)
    assert isinstance(rewrite, Fusion)
    return apply(graph, rewrite)


def test_fusions_have_names_of_their_own() -> None:
    assert len({f.name for f in ALL}) == len(ALL) > 0


@pytest.mark.parametrize("fusion", EXAMPLES)
def test_fires_once_on_its_example_and_changes_no_result(fusion: Rewrite) -> None:
    graph = load_graph(parse(fusion.example, fusion.opset))
    rewritten, times = rewritten_by(graph, fusion)
    assert times == 1
    rewritten.check()
    assert rewritten_by(rewritten, fusion)[1] == 0
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal([d if isinstance(d, int) else 2 for d in spec.shape]).astype(spec.dtype)
        for name, spec in tensors_of(graph.inputs, "input").items()
    }
    want = Session(graph, open_device("cpu"), fuse=False).run(feeds)
    got = Session(rewritten, open_device("cpu"), fuse=False).run(feeds)
    for name, expected in want.items():
        np.testing.assert_allclose(got[name], expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("fusion", "text"), NEAR_MISSES)
def test_never_fires_on_a_near_miss(fusion: Rewrite, text: str) -> None:
    graph = load_graph(parse(text, fusion.opset))
    assert rewritten_by(graph, fusion) == (graph, 0)


@pytest.mark.parametrize("fusion", [pytest.param(f, id=f.name) for f in ALL if " = Shape(" in f.example])
@pytest.mark.parametrize(("part", "times"), [("start = 0", 1), ("start = 1", 0), ("start = 0, end = 1", 0)])
def test_a_part_of_a_shape_is_another_value(fusion: Rewrite, part: str, times: int) -> None:
    graph = load_graph(parse(fusion.example.replace(" = Shape(", f" = Shape <{part}> ("), fusion.opset))
    rewritten, fired = rewritten_by(graph, fusion)
    if times:
        assert fired == times
    else:  # what is fused may go on reading any shape
        assert not fired or any(n.op == "Shape" for n in rewritten.nodes)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_reductions_over_no_axes_are_no_normalization(op: str) -> None:
    fusion = next(f for f in ALL if f.name == op)
    centered = "m = ReduceMean <noop_with_empty_axes = 1> (x, none)  c = Sub(x, m)" if op == "layer_norm" else ""
    text = f"""
        g (float[2, 3] x) => (float[2, 3] y) <int64[0] none = {{}}, float two = {{2}}, float e = {{1}}> {{
            {centered or "c = Identity(x)"}
            s = Pow(c, two)
            v = ReduceMean <noop_with_empty_axes = 1> (s, none)
            a = Add(v, e)
            r = Sqrt(a)
            y = Div(c, r)
        }}"""
    graph = load_graph(parse(text, 18))
    assert rewritten_by(graph, fusion) == (graph, 0)


def spellings(arg: Arg) -> Iterator[Arg]:
    """What the alternatives in a pattern amount to, one by one."""
    if isinstance(arg, Either):
        for alternative in arg.args:
            yield from spellings(alternative)
    elif isinstance(arg, P):
        for op in arg.names:
            for args in itertools.product(*map(spellings, arg.args)):
                yield node(op, *args)
    else:
        yield arg


def is_of_x_alone(arg: Arg) -> bool:
    """Whether a pattern has no other value and no attributes that a guard would read."""
    if isinstance(arg, str):
        return arg == "x"
    return not isinstance(arg, P | Either) or (not getattr(arg, "node", "") and all(map(is_of_x_alone, arg.args)))


def written(pattern: P) -> Graph:
    """The graph of a pattern of x and numbers alone."""
    nodes: list[Node] = []
    constants: dict[str, HostArray] = {}

    def value(arg: Arg) -> str:
        if isinstance(arg, P):
            inputs = tuple(map(value, arg.args))
            domain, _, op = str(arg.ops).rpartition(".")
            nodes.append(Node(op, inputs, (f"v{len(nodes)}",), domain=domain))
            return nodes[-1].outputs[0]
        if isinstance(arg, float):
            constants[f"c{arg}"] = np.array(arg, np.float32)
            return f"c{arg}"
        return str(arg)

    spec = TensorSpec((3, 7), np.dtype(np.float32))
    y = value(pattern)
    return Graph(tuple(nodes), {"x": spec}, {y: spec}, constants, {"": 17})


SPELLINGS = [
    pytest.param(f, spelling, id=f"{f.name}-{i}")
    for f in FUSIONS
    if all(map(is_of_x_alone, f.patterns))
    for i, spelling in enumerate(itertools.chain.from_iterable(map(spellings, f.patterns)))
]


@pytest.mark.parametrize(("fusion", "spelling"), SPELLINGS)
def test_every_spelling_is_recognised(fusion: Fusion, spelling: P) -> None:
    graph = written(spelling)
    rewritten, times = apply(graph, fusion)
    assert times == 1
    x = np.linspace(-4, 4, 21, dtype=np.float32).reshape(3, 7)
    want, got = (
        next(iter(Session(g, open_device("cpu"), fuse=False).run({"x": x}).values())) for g in (graph, rewritten)
    )
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("fusion", EXAMPLES)
def test_passes_tell_all_that_they_do(fusion: Rewrite) -> None:
    graph = load_graph(parse(fusion.example, fusion.opset))
    for name in ("cpu", "recording"):
        told: list[Fired] = []
        made = optimized(graph, open_device(name), told.append)
        counts = [
            Counter(n.qualified for n in graph.nodes),
            *(count for fired in told for count in (fired.before, fired.after)),
            Counter(n.qualified for n in made.nodes),
        ]
        assert counts[::2] == counts[1::2]  # a pass begins where the one before it ended
        assert told or [n.op for n in made.nodes] == [n.op for n in graph.nodes]


def test_every_fused_operator_is_declared() -> None:
    for fusion in ALL:
        rewritten, _ = rewritten_by(load_graph(parse(fusion.example, fusion.opset)), fusion)
        for n in rewritten.nodes:
            assert registry().find(n.domain, n.op, rewritten.opset_of(n)), n.qualified


def test_identities_vanish_but_outputs_keep_their_names() -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Identity(x)  b = Relu(a)  y = Identity(b) }")
    session = infera_gpu.load(model, device="cpu")
    assert [n.op for n in session.graph.nodes] == ["Relu", "Identity"]
    np.testing.assert_array_equal(session.run({"x": np.array([-1, 2], np.float32)})["y"], [0, 2])


def test_constant_arithmetic_is_folded_and_dead_nodes_dropped() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { b = Add(a, a)  y = Mul(x, b)  dead = Neg(x) }"
    )
    session = infera_gpu.load(model, device="cpu")
    assert [n.op for n in session.graph.nodes] == ["Mul"]
    np.testing.assert_array_equal(session.run({"x": np.array([1, 1], np.float32)})["y"], [2, 4])


def test_what_draws_is_not_folded() -> None:
    """Dropout in training, of a constant: what it drops is another choice in every run."""
    graph = load_graph(
        parse("""g (float[64] x) => (float[64] y) <int64[1] s = {64}, float r = {0.5}, bool t = {1}> {
            a = ConstantOfShape <value = float[1] {1.0}> (s)
            b = Dropout(a, r, t)
            y = Add(b, x)
        }""")
    )
    with Session(graph, open_device("cpu")) as session:
        first, second = (session.run({"x": np.zeros(64, np.float32)})["y"] for _ in range(2))
    assert set(first) == set(second) == {0, 2}
    assert (first != second).any()


@pytest.mark.parametrize(
    "activation",
    ["Relu", "Sigmoid", "Tanh", "Softplus", "HardSigmoid <alpha = 0.3>", "LeakyRelu <alpha = 0.2>", "HardSwish"],
)
@pytest.mark.parametrize("residual", ["1, 2, 2, 2", "1, 2, 1, 1", "3, 2, 2, 2"])
def test_a_residual_may_broadcast_before_any_activation(activation: str, residual: str) -> None:
    """What the residual's shape is shows when the model is planned: the fused node then becomes its parts again."""
    model = parse(
        f"""
        g (float[1, 1, 3, 3] x, float[{residual}] r) => (float[N, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {{1, -2, 3, -4, 5, 6, -7, 8}}> {{
            a = Conv(x, w)
            b = Add(r, a)
            y = {activation}(b)
        }}"""
    )
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 1, 3, 3), "r": tuple(map(int, residual.split(",")))}
    feeds = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    want = infera_gpu.load(model, device="cpu", fuse=False).run(feeds)["y"]
    session = infera_gpu.load(model, device="cpu")
    assert [n.op for n in session.graph.nodes] == ["FusedConv"]
    np.testing.assert_allclose(session.run(feeds)["y"], want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(("through", "fused"), [("float16", True), ("int32", False)])
def test_a_norm_in_single_precision_between_halves_is_one_node(through: str, fused: bool) -> None:
    """As Llama's exporters write it: the casts around it are what the operator does by itself."""
    code = {"float16": 10, "int32": 6}[through]
    model = parse(
        f"""
        g ({through}[B, 8] x) => ({through}[B, 8] y) <float two = {{2}}, float e = {{1e-6}}, int64[1] last = {{-1}}> {{
            w = Cast <to = 1> (x)
            s = Pow(w, two)
            v = ReduceMean(s, last)
            a = Add(v, e)
            r = Sqrt(a)
            i = Reciprocal(r)
            n = Mul(w, i)
            y = Cast <to = {code}> (n)
        }}""",
        18,
    )
    session = infera_gpu.load(model, device="cpu")
    ops = [n.op for n in session.graph.nodes]
    assert ops == (["RMSNormalization"] if fused else ["Cast", "RMSNormalization", "Cast"])
    x = np.linspace(-3, 4, 16).reshape(2, 8).astype(through)
    want = infera_gpu.load(model, device="cpu", fuse=False).run({"x": x})["y"]
    np.testing.assert_allclose(session.run({"x": x})["y"], want, rtol=2e-3)


def test_transposes_that_cancel_stand_between_no_other_fusion() -> None:
    text = """
        g (float[1, 2, 4, 4] x) => (float[1, 2, 3, 3] y, float[1, 2, 3, 3] z)
        <float[2, 2, 2, 2] w = {1, -2, 3, -4, 5, 6, -7, 8, 1, 2, 3, 4, 5, 6, 7, 8}, float[2] s = {2, 3}> {
            a = Conv(x, w)
            b = Transpose <perm = [0, 2, 3, 1]> (a)
            c = Transpose <perm = [0, 3, 1, 2]> (b)
            y = BatchNormalization(c, s, s, s, s)
            z = Relu(y)
        }"""
    session, parts = (infera_gpu.load(parse(text), device="cpu", fuse=f) for f in (True, False))
    assert [n.op for n in session.graph.nodes] == ["Conv", "Relu"]
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)
    for name, want in parts.run({"x": x}).items():
        np.testing.assert_allclose(session.run({"x": x})[name], want, rtol=2e-6, atol=1e-5)


def test_groups_are_found_where_others_ask_for_the_shape_and_the_channels_come_by_a_gemm() -> None:
    """As PyTorch writes a U-Net: a time embedding of a shape that nothing says is added to channels, and a Shape is
    read by an attention too."""
    text = """
        g (float[B, C, 3, 5] image, float[N, 6] time, int64[2] size) => (float[B, 4, 3, 5] y, int64[4] asked)
        <float[4, 2, 1, 1] w = {1, 2, 3, 4, -1, -2, 0.5, 1}, float[6, 4] v = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1,
         2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, int64[1] two = {2}, int64[1] three = {3},
         int64[3] groups = {0, 2, -1}, float[2] one = {1, 1}, float[2] zero = {0, 0},
         float[4, 1, 1] s = {1, 2, -0.5, 3}, float[4, 1, 1] b = {0, 1, 2, -3}> {
            c = Conv(image, w)
            f = Reshape(time, size)
            h = Gemm(f, v)
            i = Unsqueeze(h, two)
            j = Unsqueeze(i, three)
            x = Add(c, j)
            r = Reshape(x, groups)
            n = InstanceNormalization(r, one, zero)
            t = Shape(x)
            u = Reshape(n, t)
            m = Mul(u, s)
            y = Add(m, b)
            asked = Mul(t, t)
        }"""
    session, parts = (infera_gpu.load(parse(text), device="cpu", fuse=f) for f in (True, False))
    assert "GroupNormalization" in [n.op for n in session.graph.nodes]
    rng = np.random.default_rng(0)
    feeds = {
        "image": rng.standard_normal((2, 2, 3, 5)).astype(np.float32),
        "time": rng.standard_normal((2, 6)).astype(np.float32),
        "size": np.array([2, 6]),
    }
    for name, want in parts.run(feeds).items():
        np.testing.assert_allclose(session.run(feeds)[name], want, rtol=1e-4, atol=1e-5)


def test_statistics_that_no_weight_can_take_stay_and_warn_nobody() -> None:
    """Warnings are errors in tests: a variance below zero is the model's own matter, and a run's."""
    text = """
        g (float[1, 1, 2, 2] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 1, 1] w = {1, 2}, float[2] s = {1, 1}, float[2] b = {0, 0}, float[2] v = {-4, 4}> {
            c = Conv(x, w)
            y = BatchNormalization <epsilon = 0.0> (c, s, b, b, v)
        }"""
    session = infera_gpu.load(parse(text), device="cpu")
    got = session.run({"x": np.ones((1, 1, 2, 2), np.float32)})["y"]
    assert np.isnan(got[0, 0]).all()
    np.testing.assert_allclose(got[0, 1], 1, rtol=1e-6)


def test_what_a_subgraph_captures_stays_where_transposes_cancel() -> None:
    text = """
        g (float[2, 3] x, bool k) => (float[2, 3] y, float[2, 3] z) {
            a = Transpose <perm = [1, 0]> (x)
            b = Transpose <perm = [1, 0]> (a)
            y = If (k) <
                then_branch = yes () => (float[2, 3] t) { t = Neg(b) },
                else_branch = no () => (float[2, 3] e) { e = Abs(b) }
            >
            z = Exp(b)
        }"""
    session = infera_gpu.load(parse(text), device="cpu")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    got = session.run({"x": x, "k": np.array(True)})
    np.testing.assert_array_equal(got["y"], -x)
    np.testing.assert_allclose(got["z"], np.exp(x), rtol=1e-6)
