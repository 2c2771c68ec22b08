"""Values written where another node joins them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest

import infera_gpu
from infera_gpu import lower
from infera_gpu.graph import HostArray
from infera_gpu.plan import Plan
from infera_kernels.jit import installed
from tests.text import parse


@pytest.fixture(params=["cpu", "recording"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def numbers(*shape: int, seed: int = 0) -> HostArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def planned(text: str, device: str, feeds: Mapping[str, HostArray]) -> tuple[Plan, dict[str, HostArray]]:
    """The plan, and what the second of two runs gives."""
    with infera_gpu.load(parse(text), device=device, threads=1) as session:
        session.run({name: x + 1 for name, x in feeds.items()})
        return session.plan_for(feeds), session.run(feeds)


def labels(plan: Plan) -> list[str]:
    return [step.label.split()[0] for step in plan.steps]


def test_a_concat_of_what_is_computed_costs_no_step(device: str) -> None:
    text = """
    g (float[1, 2, 5] x) => (float[1, 6, 5] y) {
        a = Exp(x) b = Neg(x) c = Sin(x) y = Concat <axis = 1> (a, b, c)
    }"""
    x = numbers(1, 2, 5)
    plan, got = planned(text, device, {"x": x})
    assert labels(plan) == ["Exp", "Neg", "Sin"]
    assert plan.saved["into slots"] == 3 * x.nbytes
    assert "bytes without memory of their own: 120 into slots" in str(plan)
    np.testing.assert_allclose(got["y"], np.concatenate([np.exp(x), -x, np.sin(x)], 1), rtol=1e-6)


@pytest.mark.parametrize("factor", ["d", "r"])
def test_what_lies_in_a_joined_value_is_read_before_that_is_overwritten(factor: str, device: str) -> None:
    """Mul works in place of k, in the slot of y; what k joins is an output, and Mul may read it as well."""
    text = f"""
    g (float[1, 2, 4] x) => (float[1, 2, 4] r, float[3, 2, 4] y) <float d = {{-1.5}}> {{
        b = Exp(x)
        r = Relu(b)
        k = Concat <axis = 0> (r, b)
        m = Mul({factor}, k)
        t = Sin(x)
        y = Concat <axis = 0> (t, m)
    }}"""
    x = numbers(1, 2, 4)
    _, got = planned(text, device, {"x": x})
    b = np.exp(x)
    m = b * (b if factor == "r" else -1.5)
    np.testing.assert_allclose(got["r"], b, rtol=1e-6)
    np.testing.assert_allclose(got["y"], np.concatenate([np.sin(x), m, m]), rtol=1e-5)


def test_what_is_joined_again_and_again_is_written_once(device: str) -> None:
    """As in a DenseNet: each value is read by itself and as a part of every value joined after it."""
    text = """
    g (float[1, 2, 5] x) => (float[1, 6, 5] y, float[1, 2, 5] z) {
        a = Exp(x)
        b = Sin(a)
        ab = Concat <axis = 1> (a, b)
        t = Neg(ab)
        c = ReduceMean <axes = [1], keepdims = 1> (t)
        d = Add(c, a)
        y = Concat <axis = 1> (ab, d)
        z = Mul(b, d)
    }"""
    x = numbers(1, 2, 5)
    plan, got = planned(text, device, {"x": x})
    assert "Concat" not in labels(plan)
    assert "copy" not in labels(plan)
    a = np.exp(x)
    ab = np.concatenate([a, np.sin(a)], 1)
    d = a - ab.mean(1, keepdims=True)
    np.testing.assert_allclose(got["y"], np.concatenate([ab, d], 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["z"], np.sin(a) * d, rtol=1e-5, atol=1e-6)


def test_what_a_later_concat_joins_with_more_lies_there(device: str) -> None:
    """As PyTorch writes a DenseNet: every layer joins the outputs of all before it."""
    text = """
    g (float[1, 2, 5] x) => (float[1, 6, 5] y, float[1, 4, 5] z) {
        a = Exp(x)
        b = Sin(a)
        ab = Concat <axis = 1> (a, b)
        t = Neg(ab)
        ba = Concat <axis = 1> (b, a)
        z = Sub(t, ba)
        c = Add(a, b)
        y = Concat <axis = 1> (a, b, c)
    }"""
    x = numbers(1, 2, 5)
    plan, got = planned(text, device, {"x": x})
    assert [step for step in labels(plan) if step in ("Concat", "copy")] == ["Concat"], (
        "what is joined in another order"
    )
    a = np.exp(x)
    b = np.sin(a)
    np.testing.assert_allclose(got["y"], np.concatenate([a, b, a + b], 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["z"], np.concatenate([-(a + b)] * 2, 1), rtol=1e-5, atol=1e-6)


def test_inputs_constants_and_repeated_values_are_copied_into_place(device: str) -> None:
    text = """
    g (float[2, 3] x) => (float[9, 3] y) <float[1, 3] k = {7, 8, 9}> {
        a = Exp(x)
        y = Concat <axis = 0> (x, a, k, a, x)
    }"""
    x = numbers(2, 3)
    plan, got = planned(text, device, {"x": x})
    assert labels(plan) == ["Exp", "copy", "copy", "copy", "copy"]
    a, k = np.exp(x), np.array([[7, 8, 9]], np.float32)
    np.testing.assert_allclose(got["y"], np.concatenate([x, a, k, a, x]), rtol=1e-6)


def test_a_part_that_is_overwritten_elsewhere_keeps_its_value(device: str) -> None:
    """Neg could take over the memory of what it reads, were that not joined afterwards."""
    text = """
    g (float[4, 3] x) => (float[8, 3] y, float[4, 3] z) {
        a = Exp(x) n = Neg(a) z = Sin(n) b = Cos(z) y = Concat <axis = 0> (a, b)
    }"""
    x = numbers(4, 3)
    _, got = planned(text, device, {"x": x})
    z = np.sin(-np.exp(x))
    np.testing.assert_allclose(got["z"], z, rtol=1e-5)
    np.testing.assert_allclose(got["y"], np.concatenate([np.exp(x), np.cos(z)]), rtol=1e-5)


def test_what_is_computed_in_place_and_reshaped_reaches_its_slot() -> None:
    text = """
    g (float[2, 6] x) => (float[4, 3, 2] y) <int64[3] shape = {2, 3, 2}> {
        a = MatMul(x, w)
        b = Exp(a)
        c = Reshape(b, shape)
        d = Neg(c)
        y = Concat <axis = 0> (c, d)
    }""".replace("<int64[3]", "<float[6, 6] w = {" + ", ".join(str(i % 5) for i in range(36)) + "}, int64[3]")
    x = numbers(2, 6)
    plan, got = planned(text, "cpu", {"x": x})
    assert labels(plan) == ["MatMul", "Exp", "Neg"]
    assert plan.steps[0].outs[0].offset == plan.steps[1].outs[0].offset
    c = np.exp(x @ (np.arange(36) % 5).reshape(6, 6).astype(np.float32)).reshape(2, 3, 2)
    np.testing.assert_allclose(got["y"], np.concatenate([c, -c]), rtol=1e-5)


def test_strided_windows_are_for_kernels_that_write_and_read_them() -> None:
    """Softmax writes rows that lie together, Neg and Sin any; LayerNormalization reads what lies together."""
    text = """
    g (float[4, 6] x) => (float[4, 24] y, float[4, 6] z) <float[6] s = {1, 2, 3, 4, 5, 6}> {
        a = Softmax(x)
        b = Neg(x)
        c = Exp(x)
        z = LayerNormalization(c, s)
        d = Sin(x)
        y = Concat <axis = 1> (a, b, c, d)
    }"""
    x = numbers(4, 6)
    plan, got = planned(text, "cpu", {"x": x})
    copied = [step.label for step in plan.steps if step.kind == "copy"]
    assert copied == ["copy a", "copy c"]
    e = np.exp(x)
    want = np.concatenate([e / e.sum(1, keepdims=True), -x, e, np.sin(x)], 1)
    np.testing.assert_allclose(got["y"], want, rtol=1e-5)


def test_slots_that_would_need_more_memory_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of a joined value of 256 is there early, when two values of 300 rows are alive."""
    text = """
    g (float[1, 128] x) => (float[256, 128] y)
    <int64[2] wide = {300, 128}, int64[2] last = {255, 128}, int64[1] first = {0}> {
        a = Exp(x)
        e = Expand(x, wide)
        f = Exp(e)
        g = Sin(e)
        m = Mul(f, g)
        s = ReduceSum(m, first)
        b = Expand(s, last)
        c = Neg(b)
        y = Concat <axis = 0> (a, c)
    }"""
    x = numbers(1, 128)
    plan, got = planned(text, "cpu", {"x": x})
    assert plan.lower_bound < 700 * 128 * 4
    total = (np.exp(x) * np.sin(x)).sum(0) * 300
    np.testing.assert_allclose(got["y"], np.concatenate([np.exp(x), np.tile(-total, (255, 1))]), rtol=1e-4)
    monkeypatch.setattr(lower, "ATTEMPTS", 1)
    assert planned(text, "cpu", {"x": x})[0].lower_bound > 856 * 128 * 4


def test_parts_of_a_split_are_windows(device: str) -> None:
    text = """
    g (float[4, 6] x) => (float[4, 2] y) {
        e = Exp(x)
        a, b, c = Split <axis = 1> (e)
        s = Mul(a, b)
        y = Add(s, c)
    }"""
    x = numbers(4, 6)
    plan, got = planned(text, device, {"x": x})
    assert "Split" not in labels(plan)
    a, b, c = np.split(np.exp(x), 3, 1)
    np.testing.assert_allclose(got["y"], a * b + c, rtol=1e-5)


@pytest.mark.parametrize(
    ("view", "last", "shape"),
    [
        ("b = Slice(y, st, en, ax)", "o = Exp(b)", "2, 2"),
        ("a, b = Split <axis = 1> (y)", "o = Exp(b)", "2, 2"),
        ("b = Unsqueeze(y, ax)", "o = Exp(b)", "2, 1, 4"),
        ("b = Transpose <perm = [1, 0]> (y) d = Slice(b, st, en, ax)", "o = Exp(d)", "4, 1"),
        ("o = Transpose <perm = [1, 0]> (y)", "", "4, 2"),
    ],
)
@pytest.mark.parametrize("fuse", [True, False])
def test_a_value_whose_views_are_read_later_is_not_overwritten(
    view: str, last: str, shape: str, fuse: bool, device: str
) -> None:
    """n could lie in the slot that r passes back to y, in place: but another view of y is still to be read."""
    text = f"""
    g (float[2, 4] x, float[8] w) => (float[{shape}] o, float[16] c)
        <int64[1] s = {{8}}, int64[1] st = {{1}}, int64[1] en = {{3}}, int64[1] ax = {{1}}> {{
        y = Tanh(x)
        {view}
        r = Reshape(y, s)
        n = Relu(r)
        c = Concat <axis = 0> (n, w)
        {last}
    }}"""
    model = parse(text)
    feeds = {"x": numbers(2, 4), "w": numbers(8)}
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(["o", "c"], feeds)
    with infera_gpu.load(model, device=device, threads=1, fuse=fuse) as session:
        for _ in range(2):
            got = session.run(feeds)
            for name, value in zip(("o", "c"), want, strict=True):
                np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", ["float", "double", "int32", "int64", "float16"])
def test_the_negative_of_a_column_is_written_into_a_column(columns: int, dtype: str, device: str) -> None:
    """Steps of any size in and out; NumPy's own negative is wrong for some."""
    text = f"""
    g ({dtype}[7, {columns}] x) => ({dtype}[7, 2] y)
        <int64[1] st = {{0}}, int64[1] en = {{1}}, int64[1] nd = {{2}}, int64[1] ax = {{1}}> {{
        a = Slice(x, st, en, ax)
        b = Slice(x, en, nd, ax)
        n = Neg(a)
        m = Neg(b)
        y = Concat <axis = 1> (n, m)
    }}"""
    names = {"float": np.float32, "double": np.float64, "int32": np.int32, "int64": np.int64, "float16": np.float16}
    x = np.arange(7 * columns).reshape(7, columns).astype(names[dtype])
    _, got = planned(text, device, {"x": x})
    np.testing.assert_array_equal(got["y"], -x[:, :2])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "jit",
    [False, pytest.param(True, marks=pytest.mark.skipif(not installed(), reason="needs numba: the extra jit"))],
)
def test_convolutions_and_pools_write_into_a_concat_of_channels(jit: bool, batch: int) -> None:
    rng = np.random.default_rng(0)
    w = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", (64, 64, 1, 1)), ("b", (64, 64, 3, 3)))}
    model = parse(
        f"""g (float[{batch}, 64, 28, 28] x) => (float[{batch}, 64, 26, 26] y) {{
        s = Conv (x, a)
        p = Conv (s, a)
        p1 = Relu (p)
        q = Conv <pads = [1, 1, 1, 1]> (s, b)
        q1 = Relu (q)
        m = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (s)
        c = Concat <axis = 1> (p1, q1, m)
        y = Conv (c, d)
        }}""",
        17,
    )
    w["d"] = rng.standard_normal((64, 192, 3, 3)).astype(np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in w.items())
    x = rng.standard_normal((batch, 64, 28, 28)).astype(np.float32)
    with infera_gpu.load(model, device="cpu", jit=jit) as joined, infera_gpu.load(model, fuse=False) as apart:
        plan, (got, want) = joined.plan_for({"x": x}), (s.run({"x": x})["y"] for s in (joined, apart))
    assert "FusedConvNHWC" in labels(plan)
    assert jit or "Concat" not in labels(plan)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
