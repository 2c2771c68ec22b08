"""Elementwise chains: what goes into one, what stays out, and what comes apart again once shapes are known."""

from __future__ import annotations

import numpy as np
import pytest

import infera_gpu
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.ops.chain import parsed, spelled
from infera_gpu.passes import optimize
from infera_gpu.spec import tensors_of
from tests.text import parse

XZ = "(float[3, 5] x, float[3, 5] z) => (float[3, 5] y)"
CHAINS = {
    "two": (f"g {XZ} {{ a = Mul(x, z)  y = Exp(a) }}", ["Elementwise"]),
    "tree": (f"g {XZ} {{ a = Exp(x)  b = Neg(z)  c = Add(a, b)  y = Abs(c) }}", ["Elementwise"]),
    "used_twice_inside": (f"g {XZ} {{ a = Sub(x, z)  b = Mul(a, a)  y = Neg(b) }}", ["Elementwise"]),
    "clip": (
        f"g {XZ} <float l = {{-0.5}}, float h = {{0.5}}> {{ a = Add(x, z)  b = Clip(a, l, h)  y = Neg(b) }}",
        ["Elementwise"],
    ),
    "choice": (f"g {XZ} {{ m = Less(x, z)  a = Exp(x)  y = Where(m, a, z) }}", ["Less", "Elementwise"]),
    "one_alone": (f"g {XZ} {{ y = Add(x, z) }}", ["Add"]),
    "an_output_between": (
        "g (float[3] x) => (float[3] y, float[3] a) { a = Exp(x)  y = Neg(a) }",
        ["Exp", "Neg"],
    ),
    "read_elsewhere": (
        "g (float[3, 3] x) => (float[3, 3] y) { a = Exp(x)  b = Neg(a)  y = MatMul(a, b) }",
        ["Exp", "Neg", "MatMul"],
    ),
    "integers": ("g (int64[3] x) => (int64[3] y) { a = Add(x, x)  y = Neg(a) }", ["Add", "Neg"]),
    "halves": ("g (float16[3] x) => (float16[3] y) { a = Add(x, x)  y = Neg(a) }", ["Add", "Neg"]),
    "other_operators_between": (
        "g (float[3, 3] x) => (float[3, 3] y) { a = Exp(x)  b = Transpose(a)  y = Neg(b) }",
        ["Exp", "Transpose", "Neg"],
    ),
    "bounds_are_inputs": ("g (float[3] x, float l) => (float[3] y) { a = Exp(x)  y = Clip(a, l) }", ["Exp", "Clip"]),
}


@pytest.mark.parametrize(("text", "ops"), CHAINS.values(), ids=CHAINS)
def test_chains_of_floats_become_one_node(text: str, ops: list[str]) -> None:
    graph = load_graph(parse(text))
    rewritten = optimize(graph, registry())
    rewritten.check()
    assert [n.op for n in rewritten.nodes] == ops
    rng = np.random.default_rng(0)
    feeds = {k: rng.standard_normal(s.dims).astype(s.dtype) for k, s in tensors_of(graph.inputs, "input").items()}
    want, got = (infera_gpu.load(parse(text), device="cpu", jit=False, fuse=f).run(feeds) for f in (False, True))
    for name, expected in want.items():
        np.testing.assert_array_equal(got[name], expected)


def test_devices_without_its_kernel_keep_the_parts() -> None:
    graph = load_graph(parse(CHAINS["two"][0]))
    assert [n.op for n in optimize(graph, registry(), kinds=("cupy",)).nodes] == ["Mul", "Exp"]


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        pytest.param((3, 5), ["Elementwise"], id="same"),
        pytest.param((5,), ["Sigmoid", "Elementwise"], id="row"),
        pytest.param((3, 1), ["Sigmoid", "Elementwise"], id="column"),
        pytest.param((2, 3, 5), ["Exp", "Elementwise"], id="wider"),
    ],
)
def test_steps_of_another_shape_come_apart(shape: tuple[int, ...], steps: list[str]) -> None:
    """A gate of one value a row is computed once a row."""
    axes = ", ".join(f"D{i}" for i in range(len(shape)))
    body = "a = Exp(x)  b = Sigmoid(g)  c = Mul(a, b)  y = Neg(c)"
    model = parse(f"g (float[N, M] x, float[{axes}] g) => (float[] y) {{ {body} }}")
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((3, 5), np.float32), "g": rng.standard_normal(shape, np.float32)}
    session = infera_gpu.load(model, device="cpu", jit=False)
    assert [n.op for n in session.graph.nodes] == ["Elementwise"]
    assert [n.op for n in (p.node for p in session.plan_for(feeds).segment.nodes)] == steps
    want = infera_gpu.load(model, device="cpu", jit=False, fuse=False).run(feeds)["y"]
    np.testing.assert_array_equal(session.run(feeds)["y"], want)


def test_what_is_known_while_planning_is_computed_then() -> None:
    """The size of an input is known once its shape is, and what is made of it is not computed in every run."""
    text = """
        g (float[N, 4] x) => (float[N, 4] y) {
            s = Shape(x)
            f = Cast <to = 1> (s)
            l = ReduceMax <axes = [0], keepdims = 0> (f)
            r = Sqrt(l)
            d = Div(x, r)
            y = Tanh(d)
        }"""
    session = infera_gpu.load(parse(text), device="cpu")
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    assert len(session.plan_for({"x": (3, 4)}).steps) == 1
    np.testing.assert_allclose(session.run({"x": x})["y"], np.tanh(x / 2), rtol=1e-6)


def test_arithmetic_before_opset_7_stays_apart() -> None:
    """Its operands need not be aligned at the last axis."""
    model = parse(
        """
        g (float[2, 3] x, float[2] z) => (float[2, 3] y) {
            a = Exp(x)
            b = Add <broadcast = 1, axis = 0> (a, z)
            y = Neg(b)
        }""",
        6,
    )
    feeds = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "z": np.array([1, -1], np.float32)}
    session = infera_gpu.load(model, device="cpu")
    assert [n.op for n in session.graph.nodes] == ["Exp", "Add", "Neg"]
    np.testing.assert_allclose(session.run(feeds)["y"], -(np.exp(feeds["x"]) + feeds["z"][:, None]), rtol=1e-6)


def test_a_body_may_be_given_other_types_than_it_declares() -> None:
    """The Cast of a loop's body is none where it declares what it casts to, and needed for what it is given."""
    body = "b (int64 i, bool c, float h) => (bool d, float16 k) { d = Identity(c)  f = Cast <to = 10> (h)  k = Neg(f) }"
    text = f"g (float16[2] x) => (float16[2] y) <int64 n = {{3}}> {{ y = Loop <body = {body}> (n, , x) }}"
    graph = optimize(load_graph(parse(text.replace("float h", "float16 h"))), registry())
    assert [n.op for n in graph.nodes[0].subgraphs[0][1].nodes] == ["Identity", "Cast", "Neg"]


@pytest.mark.parametrize("expression", ["Conv x0", "Neg t0", "Neg x1", "Neg y0", ""])
def test_an_expression_that_is_none_is_refused(expression: str) -> None:
    model = parse(f'g (float[3] x) => (float[3] y) {{ y = infera.Elementwise <expression = "{expression}"> (x) }}')
    with pytest.raises(infera_gpu.PlanError, match="expression"):
        infera_gpu.load(model, device="cpu", fuse=False).run({"x": np.zeros(3, np.float32)})


def test_expressions_are_spelled_as_they_are_read() -> None:
    text = "LeakyRelu:alpha=0.1 x0; Clip:min=-inf,max=6.0 t0; Gelu:approximate=tanh x1; Where x2 t1 t2"
    assert spelled(parsed(text, 3), 3) == text


LAUNCHED = {
    "types": (
        "g (int64[3] x, float[3] z) => (float[3] y) { f = Cast <to = 1> (x)  m = Less(f, z)  y = Where(m, f, z) }",
        ["Elementwise"],
    ),
    "halves": ("g (float16[3] x) => (float16[3] y) { a = Add(x, x)  y = Neg(a) }", ["Elementwise"]),
    "integers": ("g (int64[3] x) => (int64[3] y) { a = Add(x, x)  y = Neg(a) }", ["Elementwise"]),
    "bytes_have_no_sign": ("g (uint8[3] x) => (uint8[3] y) { a = Add(x, x)  y = Max(a, x) }", ["Elementwise"]),
    "row": (
        "g (float[N, 5] x, float[5] z) => (float[N, 5] y) { s = Sigmoid(z)  a = Mul(x, s)  y = Add(a, x) }",
        ["Elementwise"],
    ),
    "known_apart": (
        "g (float[3, 5] x) => (float[3, 5] y) <float[5] w = {1, 2, 3, 4, 5}> { s = Exp(w)  a = Mul(x, s)  y = Neg(a) }",
        ["Elementwise"],
    ),
    "bounds_are_inputs": ("g (float[3] x, float l) => (float[3] y) { a = Exp(x)  y = Clip(a, l) }", ["Exp", "Clip"]),
    "comparison": ("g (float[3] x) => (bool[3] y) { a = Exp(x)  b = Greater(a, x)  y = Not(b) }", ["Elementwise"]),
    "no_kernel_for_a_step": (
        "g (int64[3] x, float[3] z) => (int64[3] y) { a = Pow(x, z)  y = Neg(a) }",
        ["Pow", "Neg"],
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize(("text", "ops"), LAUNCHED.values(), ids=LAUNCHED)
def test_chains_on_a_gpu_are_one_launch_whatever_their_types(text: str, ops: list[str]) -> None:
    session = infera_gpu.load(parse(text), device="recording")
    shape = {None: 3}
    rng = np.random.default_rng(0)
    feeds = {
        k: rng.uniform(1, 5, [d if isinstance(d, int) else shape[None] for d in s.shape]).astype(s.dtype)
        for k, s in tensors_of(session.graph.inputs, "input").items()
    }
    (plan,) = session.plans(feeds)
    assert [s.placed.op.name for s in plan.steps if s.placed] == ops
    want = infera_gpu.load(parse(text), device="cpu", fuse=False).run(feeds)
    for name, got in session.run(feeds).items():
        np.testing.assert_allclose(got, want[name], rtol=1e-6)


@pytest.mark.kernels
def test_a_chain_that_no_kernel_takes_comes_apart() -> None:
    """Seven axes are more than kernels walk."""
    axes = ", ".join("2" * 7)
    model = parse(f"g (float[{axes}] x, float z) => (float[{axes}] y) {{ a = Add(x, z)  b = Exp(a)  y = Mul(b, z) }}")
    session = infera_gpu.load(model, device="recording")
    assert [n.op for n in session.graph.nodes] == ["Elementwise"]
    (plan,) = session.plans({"x": np.ones((2,) * 7, np.float32), "z": np.float32(2)})
    assert [s.placed.op.name for s in plan.steps if s.placed] == ["Add", "Exp", "Mul"]


@pytest.mark.kernels
def test_scales_that_a_quantiser_makes_are_multiplied_in_the_chain() -> None:
    """What is known of a value's type may be less than what an operator demands."""
    text = """
        g (float[3, 4] x) => (float[3, 4] y) <float s = {0.5}> {
            q, t, z = DynamicQuantizeLinear(x)
            f = Cast <to = 1> (q)
            u = Mul(t, s)
            y = Mul(f, u)
        }"""
    session = infera_gpu.load(parse(text), device="recording")
    found = [n.op for n in session.graph.nodes]
    assert "Mul" not in found
    assert found.count("Elementwise") == 1
