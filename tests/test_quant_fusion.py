"""Quantised models on the CPU: what becomes a product of integers, what does not, and that its sums are exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infera_gpu
from infera_gpu.graph import HostArray, Node
from infera_gpu.loader import load_graph
from infera_gpu.op import Site
from infera_gpu.ops import registry
from infera_gpu.passes import optimize
from infera_gpu.spec import spec_of
from infera_kernels.cpu import quant
from tests.buffers import GuardedBuffers
from tests.text import parse

X = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)


def sessions(text: str) -> tuple[infera_gpu.Session, infera_gpu.Session]:
    """A graph as it is fused, and as it stands."""
    return infera_gpu.load(parse(text), device="cpu"), infera_gpu.load(parse(text), device="cpu", fuse=False)


def operators(session: infera_gpu.Session) -> Counter[str]:
    return Counter(n.qualified for n in session.graph.nodes)


# ---- activations quantised on the way

DYNAMIC = """
    dynamic (float[4, 6] x) => ({outs})
    <int8[6, 2] b = {{1, 2, -3, 4, 5, 127, -128, 0, 9, 8, 7, 6}}, float[2] w = {{0.5, 0.25}}, int8[2] p = {{3, -7}},
     float[2] c = {{0.5, -1}}, float v = {{0.3}},
     uint8[6, 3] d = {{1, 2, 3, 4, 5, 255, 0, 0, 9, 8, 7, 6, 1, 2, 3, 4, 5, 6}}> {{
        q, s, z = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, b, z, p)
        f = Cast <to = 1> (i)
        m = Mul(s, w)
        t = Mul(f, m)
        y = Add(c, t)
        j = MatMulInteger(q, d, z)
        g = Cast <to = 1> (j)
        n = Mul(v, s)
        u = Mul(n, g)
        {rest}
    }}"""


def test_several_products_share_one_quantised_activation() -> None:
    fused, plain = sessions(DYNAMIC.format(outs="float[4, 2] y, float[4, 3] u", rest=""))
    assert operators(fused) == {"infera.DynamicCentre": 1, "infera.NarrowMatMul": 2}
    want = plain.run({"x": X})
    for name, got in fused.run({"x": X}).items():
        np.testing.assert_array_equal(got, want[name])


@pytest.mark.parametrize(
    ("outs", "rest"),
    [
        pytest.param("float[4, 2] y, uint8[4, 6] q", "", id="integers_are_an_output"),
        pytest.param("float[4, 2] y, uint8 z", "", id="zero_point_is_an_output"),
        pytest.param("float[4, 2] y, float[4, 6] r", "r = DequantizeLinear(q, s, z)", id="dequantised_too"),
        pytest.param(
            "float[4, 2] y, int32[6, 6] r", "k = Transpose(q)  r = MatMulInteger(k, q, z, z)", id="transposed"
        ),
    ],
)
def test_integers_that_others_read_stay(outs: str, rest: str) -> None:
    fused, plain = sessions(DYNAMIC.format(outs=outs, rest=rest))
    assert operators(fused)["DynamicQuantizeLinear"] == 1
    want = plain.run({"x": X})
    for name, got in fused.run({"x": X}).items():
        np.testing.assert_allclose(got, want[name], rtol=1e-6)


def test_scales_may_be_outputs() -> None:
    fused, plain = sessions(DYNAMIC.format(outs="float[4, 2] y, float s", rest=""))
    assert operators(fused) == {"infera.DynamicCentre": 1, "infera.NarrowMatMul": 1}
    want = plain.run({"x": X})
    for name, got in fused.run({"x": X}).items():
        np.testing.assert_array_equal(got, want[name])


@pytest.mark.parametrize(
    ("kinds", "made"),
    [
        (("cupy",), set()),
        (("triton", "cupy"), {"DynamicQuantizeLinear", "com.microsoft.MatMulIntegerToFloat"}),
    ],
)
def test_integers_stay_where_products_take_them(kinds: tuple[str, ...], made: set[str]) -> None:
    graph = load_graph(parse(DYNAMIC.format(outs="float[4, 2] y, float[4, 3] u", rest="")))
    found = {n.qualified for n in optimize(graph, registry(), kinds=kinds).nodes}
    assert made <= found
    assert {name for name in found if name.startswith("infera.")} <= {"infera.Elementwise"}
    assert ("MatMulInteger" in found) == (not made)


@pytest.mark.kernels
def test_a_value_that_a_product_of_integers_reads_stays_one() -> None:
    graph = load_graph(parse(pairs("float[4, 2] y, float[4, 6] r", rest="r = Relu(a)")))
    found = [n.op for n in optimize(graph, registry(), kinds=("triton",)).nodes]
    assert sorted(found) == ["DequantizeLinear", "MatMulIntegerToFloat", "QuantizeLinear", "Relu"]


def test_what_is_quantised_and_dequantised_alone_is_one_node() -> None:
    graph = load_graph(
        parse(
            """
            g (float[4, 6] x) => (float[4, 6] y) <float s = {0.03}, uint8 z = {120}> {
                q = QuantizeLinear(x, s, z)
                a = DequantizeLinear(q, s, z)
                b = DequantizeLinear(q, s, z)
                y = Mul(a, b)
            }"""
        )
    )
    assert [n.op for n in optimize(graph, registry(), kinds=("triton",)).nodes] == ["Centre", "Mul"]


# ---- quantise-dequantise pairs

PAIRS = """
    pairs (float[4, 6] x) => ({outs})
    <float s = {{0.03}}, {kind} z = {{{zero}}}, float s2 = {{0.04}}, {kind} z2 = {{{other}}},
     int8[6, 2] w = {{1, 2, -3, 4, 5, 127, -128, 0, 9, 8, 7, 6}}, float[2] t = {{0.5, 0.25}}, int8[2] p = {{3, -7}}> {{
        q = QuantizeLinear(x, s, z)
        a = DequantizeLinear(q, {back})
        b = DequantizeLinear(w, t, p)
        y = MatMul(a, b)
        {rest}
    }}"""


def pairs(
    outs: str = "float[4, 2] y", *, kind: str = "uint8", zero: int = 120, back: str = "s, z", rest: str = ""
) -> str:
    return PAIRS.format(outs=outs, kind=kind, zero=zero, other=zero - 1 if zero else 1, back=back, rest=rest)


def exact(x: HostArray, kind: type, zero: int) -> HostArray:
    """The product of `pairs` in float64."""
    info = np.iinfo(kind)
    q = np.clip(np.rint(x / np.float32(0.03)) + zero, info.min, info.max).astype(np.float64) - zero
    w = np.array([1, 2, -3, 4, 5, 127, -128, 0, 9, 8, 7, 6], np.float64).reshape(6, 2) - [3, -7]
    made: HostArray = q @ w * np.float64(np.float32(0.03)) * [0.5, 0.25]
    return made


@pytest.mark.parametrize(
    ("kind", "zero"), [(np.uint8, 0), (np.uint8, 120), (np.uint8, 255), (np.int8, -128), (np.int8, 5)]
)
def test_product_of_pairs_is_exact_up_to_its_scaling(kind: type, zero: int) -> None:
    fused, _ = sessions(pairs(kind=np.dtype(kind).name, zero=zero))
    assert operators(fused) == {"infera.Centre": 1, "infera.NarrowMatMul": 1}
    x = 5 * X
    want = exact(x, kind, zero)
    np.testing.assert_allclose(fused.run({"x": x})["y"], want, rtol=3 * 2.0**-24)


def test_dequantised_value_that_others_read_is_made_from_the_same_integers() -> None:
    fused, plain = sessions(pairs("float[4, 2] y, float[4, 6] r", rest="r = Neg(a)"))
    assert operators(fused) == {"infera.Centre": 1, "infera.NarrowMatMul": 1, "infera.Elementwise": 1}
    got, want = fused.run({"x": X}), plain.run({"x": X})
    np.testing.assert_array_equal(got["r"], want["r"])
    np.testing.assert_allclose(got["y"], exact(X, np.uint8, 120), rtol=3 * 2.0**-24)


def test_a_pair_alone_is_one_step() -> None:
    fused, plain = sessions(pairs("float[4, 6] a"))
    assert operators(fused) == {"infera.Centre": 1}
    x = np.concatenate([X.ravel()[:20], np.array([1e30, -1e30, np.inf, -np.inf], np.float32)]).reshape(4, 6)
    np.testing.assert_array_equal(fused.run({"x": x})["a"], plain.run({"x": x})["a"])


@pytest.mark.parametrize("back", ["s2, z", "s, z2", "s2, z2"])
def test_other_parameters_on_the_way_back_keep_the_integers(back: str) -> None:
    fused, plain = sessions(pairs(back=back))
    assert operators(fused)["QuantizeLinear"] == 1
    np.testing.assert_allclose(fused.run({"x": X})["y"], plain.run({"x": X})["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("type", ["uint16", "int16"])
def test_wider_integers_are_left_alone(type: str) -> None:
    text = f"""
        wide (float[4, 6] x) => (float[4, 6] a) <float s = {{0.03}}, {type} z = {{7}}> {{
            q = QuantizeLinear(x, s, z)
            a = DequantizeLinear(q, s, z)
        }}"""
    with infera_gpu.load(parse(text, opset=21), device="cpu") as session:
        assert operators(session) == {"QuantizeLinear": 1, "DequantizeLinear": 1}


def test_strict_sessions_scale_weights_before_the_product() -> None:
    text = """
        narrow (float[4, 6] x) => (float[4, 2] y)
        <int8[6, 2] b = {1, 2, -3, 4, 5, 127, -128, 0, 9, 8, 7, 6}, float[1, 2] s = {0.5, 0.3}> {
            f = Cast <to = 1> (b)
            w = Mul(f, s)
            y = MatMul(x, w)
        }"""
    found = [operators(infera_gpu.load(parse(text), device="cpu", accuracy=a)) for a in ("fast", "strict")]
    assert found == [{"infera.NarrowMatMul": 1}, {"MatMul": 1}]
    with infera_gpu.load(parse(pairs()), device="cpu", accuracy="strict") as session:
        assert operators(session) == {"infera.Centre": 1, "MatMul": 1}


# ---- tables

DEQUANTIZED = "e = DequantizeLinear(w, s, z)"
SCALED = "f = Cast <to = 1> (w)  e = Mul({}, f)"


@pytest.mark.parametrize("ids", ["", "2", "2, 3"], ids=["one", "vector", "matrix"])
@pytest.mark.parametrize(
    ("made", "gathers"),
    [
        (DEQUANTIZED, 1),
        *((SCALED.format(scale), 2 if scale == "rows" else 1) for scale in ("s", "one", "rows", "cols")),
    ],
)
def test_rows_of_a_table_are_gathered_as_bytes(made: str, gathers: int, ids: str) -> None:
    text = f"""
        table (int64[{ids}] i) => (float[{ids}{", " if ids else ""}3] y)
        <int8[4, 3] w = {{1, 2, -3, 4, 5, 127, -128, 0, 9, 8, 7, 6}}, float s = {{0.3}}, int8 z = {{7}},
         float[1, 1] one = {{0.7}}, float[4, 1] rows = {{0.5, 0.3, 2, 7}}, float[1, 3] cols = {{0.5, 0.3, 2}}> {{
            {made}
            y = Gather(e, i)
        }}"""
    fused, plain = sessions(text)
    assert operators(fused)["Gather"] == gathers
    assert {a.dtype.name for n in fused.graph.nodes if n.op == "Gather" for a in constants(fused, n)} <= (
        {"int8"} if gathers == 1 else {"int8", "float32"}
    )
    feeds = {"i": np.resize(np.array([3, -1, 0, 1, 2, 3]), [int(d) for d in ids.split(", ") if d])}
    np.testing.assert_array_equal(fused.run(feeds)["y"], plain.run(feeds)["y"])


def constants(session: infera_gpu.Session, n: Node) -> list[HostArray]:
    return [session.graph.constants[i] for i in n.inputs if i in session.graph.constants]


def test_columns_of_a_table_are_gathered_as_they_were() -> None:
    text = """
        columns (int64[2] i) => (float[4, 2] y)
        <int8[4, 3] w = {1, 2, -3, 4, 5, 127, -128, 0, 9, 8, 7, 6}, float s = {0.3}, int8 z = {7}> {
            e = DequantizeLinear(w, s, z)
            y = Gather <axis = 1> (e, i)
        }"""
    fused, _ = sessions(text)
    assert operators(fused) == {"Gather": 1}


# ---- exactness


def product(a: HostArray, b: HostArray, zero: HostArray | None, reach: int) -> HostArray:
    """a @ (b - zero) by NarrowMatMul with scales of 1."""
    op = registry().find("infera", "NarrowMatMul", 1)
    assert op is not None
    one = np.ones((), np.float32)
    ins = (a, b, one, zero, one)
    node = Node("NarrowMatMul", ("a", "b", "s", "" if zero is None else "z", "t"), ("y",), {"reach": reach}, "infera")
    specs = tuple(None if x is None else spec_of(x) for x in ins)
    site = Site(node, op.fill(node), specs, (None, b, one, zero, None))
    site = Site(node, site.attrs, specs, site.values, tuple(s for s in op.infer(site) if s is not None))
    buffers = GuardedBuffers(ins, site.outs, site.values)
    calls = list(op.kernels["cpu"].bind(site, buffers))
    buffers.fill(ins)
    for fn, args in calls:
        fn(*args)
    buffers.check()
    made: HostArray = buffers.outs[0]
    return made


@pytest.mark.parametrize("k", [1, 257, 258, 513, 515, 1030, 5000])
@pytest.mark.parametrize(("a", "b", "zero"), [(255, -128, 0), (255, -128, 127), (-255, 127, -128), (1, 1, 0)])
def test_sums_are_exact_at_the_extremes(k: int, a: int, b: int, zero: int) -> None:
    left = np.full((3, k), a, np.float32)
    left[1, ::2] -= np.sign(a)
    right = np.full((k, 70), b, np.int8)
    right[::3, 1] += 1 if b < 0 else -1
    want = (left.astype(np.int64) @ (right.astype(np.int64) - zero)).astype(np.float32)
    np.testing.assert_array_equal(product(left, right, np.array(zero, np.int8), 255), want)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 1500),
    n=st.integers(1, 300),
    signed=st.booleans(),
    columns=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_product_is_that_of_the_integers(m: int, k: int, n: int, signed: bool, columns: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    info = np.iinfo(np.int8 if signed else np.uint8)
    a = rng.integers(-255, 256, (m, k)).astype(np.float32)
    b = rng.integers(info.min, info.max + 1, (k, n)).astype(info.dtype)
    zero = rng.integers(info.min, info.max + 1, (n,) if columns else ()).astype(info.dtype)
    want = a.astype(np.int64) @ (b.astype(np.int64) - zero.astype(np.int64))
    np.testing.assert_array_equal(product(a, b, zero, 255), want.astype(np.float32))


def test_parts_of_a_product_are_its_panels() -> None:
    rng = np.random.default_rng(5)
    a = rng.integers(-255, 256, (24, 600)).astype(np.float32)
    b = rng.integers(-128, 128, (600, 2000))
    want = (a.astype(np.int64) @ b).astype(np.float32)
    for threads in (1, 2, 3):
        out = np.full(want.shape, np.nan, np.float32)
        ranges, packed = quant.exact_ranges(600, 255, 128, b), quant.packed_panels(b)
        parts = quant.matmul_panels(a, packed, out, ranges, np.empty, threads=threads)
        assert len(parts) == threads
        for calls in reversed(parts):
            for fn, args in calls:
                fn(*args)
        np.testing.assert_array_equal(out, want)


def test_small_products_are_one_part() -> None:
    a, out = np.zeros((6, 300), np.float32), np.zeros((6, 300), np.float32)
    packed = quant.packed_panels(np.zeros((300, 300), int))
    assert len(quant.matmul_panels(a, packed, out, [(0, 300)], np.empty, threads=4)) == 1


@pytest.mark.parametrize("k", [0, 1, 5, 512])
def test_panels_hold_every_column(k: int) -> None:
    n, width = 3 * quant.PANEL + 3, quant.PANEL
    for least, most, dtype in ((-128, 127, np.int8), (-255, 255, np.int16)):
        b = np.resize(np.linspace(least, most, 97).round().astype(int), (k, n))
        packed = quant.packed_panels(b)
        assert packed.dtype == dtype or not k
        for i in range(0, n, width):
            part = b[:, i : i + width]
            np.testing.assert_array_equal(packed[k * i : k * (i + part.shape[1])].reshape(part.shape), part)


@pytest.mark.parametrize("n", [1, 40, 64, 300, 2000])
@pytest.mark.parametrize(("rows", "k"), [(1, 0), (1, 96), (2, 1024), (5, 96), (24, 1100), (70, 300), (70, 5)])
@pytest.mark.parametrize("wide", [False, True])
def test_one_packed_form_serves_any_number_of_rows(rows: int, k: int, n: int, wide: bool) -> None:
    rng = np.random.default_rng(rows)
    a = rng.integers(-255, 256, (rows, k)).astype(np.float32)
    b = rng.integers(-255 if wide else -128, 256 if wide else 128, (k, n))
    out = np.full((rows, n), -1, np.int32)
    (calls,) = quant.matmul_panels(a, quant.packed_panels(b), out, quant.exact_ranges(k, 255, 255), np.empty)
    for fn, args in calls:
        fn(*args)
    np.testing.assert_array_equal(out, a.astype(np.int64) @ b)


def test_weights_are_packed_once_whatever_shapes_come() -> None:
    weights = np.resize(np.arange(-127, 128), (96, 640)).astype(np.int8)
    model = parse("""
        g (float[B, 96] x) => (float[B, 640] y) <int8[96, 640] w = {0}> {
            q, s, z = DynamicQuantizeLinear(x)
            i = MatMulInteger(q, w, z)
            f = Cast <to = 1> (i)
            y = Mul(f, s)
        }""")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    session = infera_gpu.load(model, device="cpu", jit=False)
    session.run({"x": np.ones((1, 96), np.float32)})
    for rows in (2, 4, 16, 64, 200, 1000):
        session.run({"x": np.ones((rows, 96), np.float32)})
    assert session.packed_bytes <= 1.1 * weights.nbytes


def test_a_scalar_stays_one_where_scales_have_an_axis() -> None:
    fused, plain = sessions("""
        g (float x) => (float y, float z) <float[1] s = {0.1}, uint8[1] p = {3}> {
            q = QuantizeLinear(x, s, p)
            y = DequantizeLinear(q, s, p)
            z = DequantizeLinear(q, s, p)
        }""")
    want = plain.run({"x": np.float32(1.23)})
    for name, got in fused.run({"x": np.float32(1.23)}).items():
        assert got.shape == ()
        assert got == want[name]


def test_integers_are_quantised_too() -> None:
    fused, plain = sessions("""
        g (int32[4] x) => (float[4] y) <float s = {0.5}, uint8 z = {3}> {
            q = QuantizeLinear(x, s, z)
            y = DequantizeLinear(q, s, z)
        }""")
    x = np.array([-900, 1, 40, 900], np.int32)
    np.testing.assert_array_equal(fused.run({"x": x})["y"], plain.run({"x": x})["y"])


def test_tables_keep_the_axes_that_their_scale_adds() -> None:
    fused, plain = sessions("""
        g (int64[2] i) => (float[2, 3, 2] y) <int8[3, 2] t = {1, 2, -3, 4, 5, 127}, float[1, 1, 1] s = {0.5}> {
            f = Cast <to = 1> (t)
            m = Mul(f, s)
            y = Gather(m, i)
        }""")
    i = np.array([0, -1])
    np.testing.assert_array_equal(fused.run({"i": i})["y"], plain.run({"i": i})["y"])
