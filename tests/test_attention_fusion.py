"""Attention in one operator: what exporters write becomes it, and it computes what its parts do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.op import Site
from infera_gpu.ops import registry
from infera_gpu.ops.fused_attention import OPS as FUSED
from infera_gpu.spec import spec_of
from infera_kernels.cpu import attention as cpu
from tests.buffers import GuardedBuffers
from tests.cases import compute, inputs_of, site_of
from tests.text import parse

HEADS = """
    s = Constant <value_ints = [0, 0, 3, 4]> ()
    a = Reshape(x, s)
    q = Transpose <perm = [0, 2, 1, 3]> (a)
    b = Reshape(z, s)
    k = Transpose <perm = [0, 2, 3, 1]> (b)
    c = Reshape(z, s)
    v = Transpose <perm = [0, 2, 1, 3]> (c)"""
MERGED = """
    o = Transpose <perm = [0, 2, 1, 3]> (p)
    t = Constant <value_ints = [0, 0, 12]> ()
    y = Reshape(o, t)"""
SCORES = {
    "plain": "w = Softmax <axis = -1> (e)",
    "last_axis_by_number": "w = Softmax <axis = 3> (e)",
    "divided": "f = Div(e, r)  w = Softmax <axis = -1> (f)",
    "mask": "f = Mul(r, e)  g = Add(f, m)  w = Softmax <axis = -1> (g)",
    "mask_of_two_terms": "n = Add(m, m)  g = Add(n, e)  w = Softmax <axis = -1> (g)",
    "two_masks": "n = Add(m, m)  f = Add(e, m)  g = Add(n, f)  w = Softmax <axis = -1> (g)",
    "kept": "f = Where(l, e, low)  w = Softmax <axis = -1> (f)",
    "filled": "f = Where(l, low, e)  g = Add(m, f)  w = Softmax <axis = -1> (g)",
    "capped": "f = Mul(r, e)  h = Div(f, r)  i = Tanh(h)  j = Mul(i, r)  g = Add(j, m)  w = Softmax <axis = -1> (g)",
    "cap_by_factors": "h = Mul(e, iv)  i = Tanh(h)  j = Mul(r, i)  f = Where(l, j, low)  w = Softmax <axis = -1> (f)",
    "guarded": "f = Add(e, m)  g = Softmax <axis = -1> (f)  h = IsNaN(g)  w = Where(h, zero, g)",
}


def model(scores: str, q: str = "q") -> Any:
    """Three heads of four elements over x and z."""
    return parse(f"""
        g (float[B, M, 12] x, float[B, N, 12] z, float[B, 1, M, N] m, bool[B, 1, M, N] l) => (float[B, M, 12] y)
        <float r = {{0.7}}, float iv = {{1.4285714}}, float low = {{-1e30}}, float zero = {{0}}> {{
            {HEADS}
            e = MatMul({q}, k)
            {scores}
            p = MatMul(w, v)
            {MERGED}
        }}""")


def feeds(rng: np.random.Generator, m: int = 5, n: int = 7) -> dict[str, Any]:
    seen = rng.random((2, 1, m, n)) < 0.6
    seen[0, 0, 0] = False
    made = {
        "x": rng.standard_normal((2, m, 12)).astype(np.float32),
        "z": rng.standard_normal((2, n, 12)).astype(np.float32),
        "m": np.where(seen, 0, -np.inf).astype(np.float32),
        "l": seen,
    }
    return made


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_what_exporters_write_is_one_operator_between_views(scores: str) -> None:
    session, parts = (infera_gpu.load(model(scores), device="cpu", fuse=f) for f in (True, False))
    assert [n.op for n in session.graph.nodes if n.op not in ("Reshape", "Transpose", "Add")] == ["Attention"]
    given = feeds(np.random.default_rng(0))
    got, want = session.run(given)["y"], parts.run(given)["y"]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.nanmax(np.abs(want)))
    (plan,) = session.plans(given)
    assert "copy" not in [step.kind for step in plan.steps]


@pytest.mark.parametrize("transposed", [False, True])
def test_scores_as_onnxruntime_optimises_them(transposed: bool) -> None:
    flip = "kk = Transpose <perm = [0, 1, 3, 2]> (k)" if transposed else ""
    keys = "kk" if transposed else "k"
    product = f"{flip}  e = com.microsoft.FusedMatMul <alpha = 0.3, transB = {transposed:d}> (q, {keys})"
    optimised = model("f = Add(e, m)  w = Softmax <axis = -1> (f)")
    nodes = parse(f"g (float[1] q, float[1] k) => (float[1] e) {{ {product} }}").graph.node
    place = [n.output[0] for n in optimised.graph.node].index("e")
    del optimised.graph.node[place]
    for i, node in enumerate(nodes):
        optimised.graph.node.insert(place + i, node)
    session, parts = (infera_gpu.load(optimised, device="cpu", fuse=f) for f in (True, False))
    (found,) = (n for n in session.graph.nodes if n.op == "Attention")
    assert found.attrs["scale"] == pytest.approx(0.3)
    given = feeds(np.random.default_rng(0))
    got, want = session.run(given)["y"], parts.run(given)["y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.nanmax(np.abs(want)))


def test_a_scale_on_both_operands_is_one_on_the_scores() -> None:
    text = "w = Softmax <axis = -1> (e)"
    scaled = model(text, "u")
    node = parse("g (float[1] q, float[1] r) => (float[1] u) { u = Mul(q, r) }").graph.node[0]
    scaled.graph.node.insert(3, node)
    session = infera_gpu.load(scaled, device="cpu")
    (found,) = (n for n in session.graph.nodes if n.op == "Attention")
    assert found.attrs["scale"] == pytest.approx(0.7)
    assert "Mul" not in [n.op for n in session.graph.nodes]


_HEAD_SIZE = """
    g (float[B, 2, S, 8] q, float[B, 2, T, 8] k, float[B, 2, T, 8] v) => (float[B, 2, S, 8] y)
    <int64[1] last = {-1}, int64[1] end = {9223372036854775807}, float one = {1}> {
        shape = Shape(q)
        size = Slice(shape, last, end)
        wide = Cast <to = 1> (size)
        root = Sqrt(wide)
        inverse = Div(one, root)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        a = Sqrt(inverse)
        qs = Mul(q, a)
        b = Sqrt(inverse)
        ks = Mul(kt, b)
        scores = MatMul(qs, ks)
        w = Softmax(scores)
        y = MatMul(w, v)
    }"""


@pytest.mark.parametrize(
    ("size", "outputs", "ops"),
    [
        ("8", "", {"Transpose", "Attention"}),
        ("8", ", int64[1] size", {"Shape", "Slice", "Transpose", "Attention"}),
        ("D", "", None),
    ],
    ids=["known", "size_is_an_output", "unknown"],
)
def test_a_scale_made_of_the_size_of_heads_is_a_number_where_that_is_known(
    size: str, outputs: str, ops: set[str] | None
) -> None:
    """As PyTorch's TorchScript exporter writes scaled_dot_product_attention, whose other sizes are not known."""
    text = _HEAD_SIZE.replace("S, 8] q", f"S, {size}] q").replace("T, 8] k", f"T, {size}] k")
    text = text.replace("8] y)", f"8] y{outputs})")
    session, parts = (infera_gpu.load(parse(text, 17), device="cpu", fuse=f) for f in (True, False))
    made = {n.op for n in session.graph.nodes}
    assert made == ops or (ops is None and {"Cast", "Mul"} < made)
    rng = np.random.default_rng(0)
    given = {k: rng.standard_normal((2, 2, n, 8)).astype(np.float32) for k, n in (("q", 5), ("k", 7), ("v", 7))}
    for name, want in parts.run(given).items():
        np.testing.assert_allclose(session.run(given)[name], want, rtol=2e-6, atol=2e-6)


def test_the_size_of_what_nobody_else_needs_is_not_known_in_advance() -> None:
    """Whether the product fits is for planning to say."""
    text = """
        g (float[B, 3] x, float[N, 4] w) => (float[1] y) <int64[1] last = {1}> {
            p = MatMul(x, w)
            s = Shape(p)
            n = Gather(s, last)
            y = Cast <to = 1> (n)
        }"""
    assert next(iter(infera_gpu.load(parse(text, 17), device="cpu").graph.nodes)).op == "MatMul"


def test_strict_sessions_keep_the_parts() -> None:
    session = infera_gpu.load(model(SCORES["mask"]), device="cpu", accuracy="strict")
    assert "Softmax" in [n.op for n in session.graph.nodes]


def test_a_mask_wider_than_the_scores_brings_the_parts_back() -> None:
    text = """
        g (float[1, M, 4] q, float[1, 4, N] k, float[1, N, 4] v, float[K, N] m) => (float[1, K, 4] y) {
            a = MatMul(q, k)
            b = Add(a, m)
            c = Softmax <axis = -1> (b)
            y = MatMul(c, v)
        }"""
    rng = np.random.default_rng(0)
    given = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"q": (1, 1, 4), "k": (1, 4, 6), "v": (1, 6, 4), "m": (5, 6)}.items()
    }
    fused, parts = (infera_gpu.load(parse(text), device="cpu", fuse=f) for f in (True, False))
    assert [n.op for n in fused.graph.nodes] == ["Attention"]
    np.testing.assert_allclose(fused.run(given)["y"], parts.run(given)["y"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", FUSED[0].cases, ids=lambda c: c.id)
def test_the_parts_compute_what_the_operator_does(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (op,) = FUSED
    ins = inputs_of(op, case)
    site = site_of(op, case, ins)
    monkeypatch.setattr("infera_gpu.ops.fused_attention._lead", lambda site: None)
    assert op.expand is not None
    expansion = op.expand(site)
    assert expansion is not None
    values = {n: x for n, x in zip(site.node.inputs, ins, strict=True) if n} | dict(expansion.constants)
    for node in expansion.nodes:
        part = registry().find(node.domain, node.op, max(17, node.opset))
        assert part is not None
        given = [values[i] for i in node.inputs]
        at = Site(node, part.fill(node), tuple(map(spec_of, given)), tuple(given), opset=17)
        with np.errstate(all="ignore"):
            values[node.outputs[0]], *_ = part.outputs(np, at, given)
    (want,) = compute(op, site, ins)
    got = values[site.node.outputs[0]]
    assert got is not None
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def spread(threads: int, dims: Sequence[int], *, causal: bool) -> tuple[int, np.ndarray[Any, Any]]:
    """How many parts attention is split into, and what it gives."""
    rng = np.random.default_rng(0)
    b, h, m, n, d = dims
    q, k, v = (rng.standard_normal((b, h, rows, d)).astype(np.float32) for rows in (m, n, n))
    spec = spec_of(q)
    buffers = GuardedBuffers([q, k, v], [spec], [None] * 3, threads=threads)
    buffers.fill([q, k, v])
    given = *(x for x in buffers.ins if x is not None), buffers.outs[0]
    operands = given[0], given[1].swapaxes(-1, -2), given[2], given[3]
    options = cpu.Options(scale=0.3)
    if causal:
        first, parts = cpu.causal(*operands, buffers.scratch, options, before=n - m, parts=threads)
    else:
        first, parts = cpu.attention(*operands, buffers.scratch, options, parts=threads)
    for fn, args in [*first, *buffers.parallel(parts)]:
        fn(*args)
    buffers.check()
    return len(parts), buffers.outs[0].copy()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(1, 8, 96, 160, 8), (3, 2, 130, 130, 4), (1, 1, 400, 400, 4)])
def test_parts_side_by_side_compute_what_one_does(dims: tuple[int, ...], causal: bool) -> None:
    (one, want), (three, got) = spread(1, dims, causal=causal), spread(3, dims, causal=causal)
    assert one == 1
    assert causal or three == 3
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_few_scores_stay_on_one_thread() -> None:
    assert spread(3, (1, 2, 8, 8, 4), causal=False)[0] == 1


BY_MULTIPLICATION = """
    s = Mul(e, r)
    shape = Shape(s)
    sizes = Cast <to = 6> (shape)
    m1 = Slice(sizes, two, three, none)
    m0 = Squeeze(m1, none)
    n1 = Slice(sizes, three, four, none)
    n0 = Squeeze(n1, none)
    i = Range(first, m0, step)
    rows = Unsqueeze(i, one_axis)
    j = Range(first, n0, step)
    h = Sub(j, n0)
    columns = Add(h, m0)
    seen = GreaterOrEqual(rows, columns)
    f = Cast <to = 1> (seen)
    target = Concat <axis = 0> (units, m1, n1)
    wide = Cast <to = 7> (target)
    b = Reshape(f, wide)
    g = Mul(s, b)
    o1 = Sub(one, b)
    o2 = Mul(o1, low)
    o3 = Sub(g, o2)
    o4 = Add(o3, m)
    w = Softmax <axis = -1> (o4)"""


@pytest.mark.parametrize(("batches", "rows", "keys"), [((2, 2), 5, 7), ((1, 3), 1, 4), ((3, 1), 4, 4), ((0, 1), 2, 3)])
def test_a_mask_multiplied_in_that_asks_scores_for_their_shape_is_a_condition(
    batches: tuple[int, int], rows: int, keys: int
) -> None:
    """TensorFlow's GPT-2, by transformers."""
    text = parse(f"""
        g (float[P, 3, M, 4] q, float[Q, 3, 4, N] k, float[Q, 3, N, 4] v, float[1, N] m) => (float[R, 3, M, 4] y)
        <float r = {{0.7}}, float low = {{10000}}, float one = {{1}}, int64[1] none = {{0}}, int64[1] one_axis = {{1}},
         int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] four = {{4}}, int32 first = {{0}}, int32 step = {{1}},
         int32[2] units = {{1, 1}}> {{
            e = MatMul(q, k)
            {BY_MULTIPLICATION}
            y = MatMul(w, v)
        }}""")
    session, parts, strict = (
        infera_gpu.load(text, device="cpu", **how) for how in ({}, {"fuse": False}, {"accuracy": "strict"})
    )
    assert "Attention" in {n.op for n in session.graph.nodes}
    assert "MatMul" not in {n.op for n in session.graph.nodes}
    assert "Attention" not in {n.op for n in strict.graph.nodes}
    rng = np.random.default_rng(0)
    shapes = {"q": (batches[0], 3, rows, 4), "k": (batches[1], 3, 4, keys), "v": (batches[1], 3, keys, 4)}
    given: dict[str, Any] = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    given["m"] = np.where(np.arange(keys)[None] == 0, -10000, 1e-9).astype(np.float32)
    want = parts.run(given)["y"]
    for got in (session.run(given)["y"], strict.run(given)["y"]):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
