"""What the cases of elementwise, matrix, reduction, shape, indexing and quantisation operators leave untested."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from infera_gpu.graph import HostArray, Node
from infera_gpu.op import Op, Site
from infera_gpu.ops import registry
from infera_gpu.spec import spec_of
from infera_kernels.cpu import activation, elementwise, quant
from tests.buffers import GuardedBuffers


def find(name: str, opset: int = 21, domain: str = "") -> Op:
    op = registry().find(domain, name, opset)
    assert op is not None
    return op


def site_of(op: Op, *ins: HostArray | None, known: Sequence[int] = (), n_outs: int = 1, **attrs: Any) -> Site:
    """The operator on these inputs, of which those that `infer` needs and the `known` ones are constant."""
    node = Node(
        op.name,
        tuple("" if x is None else f"in{i}" for i, x in enumerate(ins)),
        tuple(f"out{i}" for i in range(n_outs)),
        attrs,
        op.domain,
        "n",
    )
    specs = tuple(None if x is None else spec_of(x) for x in ins)
    values = tuple(x if i in known or i in op.values else None for i, x in enumerate(ins))
    site = Site(node, op.fill(node), specs, values)
    return Site(node, site.attrs, specs, values, tuple(s for s in op.infer(site) if s is not None))


def compute(op: Op, *ins: HostArray | None, n_outs: int = 1, **attrs: Any) -> tuple[HostArray, ...]:
    return op.outputs(np, site_of(op, *ins, n_outs=n_outs, **attrs), ins)


def run_kernel(op: Op, *ins: HostArray | None, known: Sequence[int] = (), n_outs: int = 1, **attrs: Any) -> Any:
    """The outputs of the CPU kernel."""
    site = site_of(op, *ins, known=known, n_outs=n_outs, **attrs)
    kernel = op.kernels["cpu"]
    assert kernel.supports(site)
    buffers = GuardedBuffers(ins, site.outs, site.values)
    calls = list(kernel.bind(site, buffers))
    buffers.fill(ins)
    with np.errstate(all="ignore"):
        for fn, args in calls:
            fn(*args)
    buffers.check()
    return buffers.outs


# ---- erf, Gelu

erf: Callable[[HostArray], HostArray] = np.frompyfunc(math.erf, 1, 1)
GRID = np.concatenate([np.linspace(-12, 12, 60001), np.geomspace(1e-38, 1e30, 500), -np.geomspace(1e-38, 1e30, 500)])
GRID32 = GRID.astype(np.float32)


def test_erf_is_within_three_float32_ulps_everywhere() -> None:
    (got,) = run_kernel(find("Erf"), GRID32)
    want = erf(GRID32.astype(np.float64)).astype(np.float64)
    assert np.abs(got - want).max() < 1.8e-7
    far = np.abs(GRID32) >= 4.25
    np.testing.assert_array_equal(got[far], np.sign(GRID32[far]))
    small = np.abs(GRID32) < 1e-3
    np.testing.assert_allclose(got[small], want[small], rtol=3e-7, atol=1e-44)


@pytest.mark.parametrize(("domain", "opset"), [("", 20), ("infera", 1)])
def test_gelu_follows_its_definition_and_is_exact_in_its_tails(domain: str, opset: int) -> None:
    op = find("Gelu", opset, domain)
    x = GRID32.astype(np.float64)
    want = 0.5 * x * (1 + erf(x / math.sqrt(2)).astype(np.float64))
    (fast,), (plain,) = run_kernel(op, GRID32), compute(op, GRID32)
    for got in (fast, plain):
        assert (np.abs(got - want) <= 2e-7 * np.maximum(1, np.abs(x))).all()
        np.testing.assert_array_equal(got[x > 6], GRID32[x > 6])
    assert not fast[x < -6.1].any(), "beyond erf's last digit the error must not grow with x"


def test_gelu_tanh_follows_its_definition() -> None:
    op = find("Gelu", 1, "infera")
    x = np.linspace(-12, 12, 5001)
    want = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    for got in (
        *run_kernel(op, x.astype(np.float32), approximate="tanh"),
        *compute(op, x.astype(np.float32), approximate="tanh"),
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["Erf", "Gelu", "Sigmoid", "Softplus", "Mish", "Elu"])
def test_nan_stays_nan_and_infinity_is_its_limit(name: str) -> None:
    op = find(name)
    x = np.array([np.nan, np.inf], np.float32)
    (got,) = run_kernel(op, x)
    (want,) = compute(op, x)
    assert np.isnan(got[0])
    assert got[1] == want[1]


def test_softplus_keeps_its_relative_accuracy_where_it_is_tiny() -> None:
    x = np.linspace(-80, 20, 4001, dtype=np.float32)
    (got,) = run_kernel(find("Softplus"), x)
    np.testing.assert_allclose(got, np.logaddexp(x.astype(np.float64), 0), rtol=1e-6)


# ---- blocks

SHAPES = [(), (1,), (0, 3), (7,), (5, 3), (2, 3, 4), (3, 1, 5), (1, 40), (4, 33), (2, 2, 2, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 4, 16, 1000])
@pytest.mark.parametrize("strided", [False, True])
def test_blocks_cover_every_element_once(shape: tuple[int, ...], size: int, strided: bool) -> None:
    counts = np.zeros((*shape[:-1], shape[-1] * 2) if shape else (), np.int64)
    view = counts[..., ::2] if strided and shape else counts[..., : shape[-1]] if shape else counts
    other = np.zeros(view.shape, np.int64)
    for a, b in elementwise.blocks(view, other, size=size):
        assert a.shape == b.shape
        assert a.size <= size
        a += 1
        b += 1
    assert (view == 1).all()
    assert (other == 1).all()
    assert counts.sum() == view.size


def test_programs_have_their_definitions() -> None:
    from infera_kernels.portable.activation import FUNCTIONS

    assert set(activation.PROGRAMS) == set(FUNCTIONS)


# ---- products

ACTS: dict[str, Callable[[HostArray], HostArray]] = {
    "": lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "gelu": lambda v: 0.5 * v * (1 + erf(v * math.sqrt(0.5)).astype(np.float64)),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "tanh": np.tanh,
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "silu": lambda v: v / (1 + np.exp(-v)),
}


@pytest.mark.parametrize("act", ACTS, ids=lambda a: a or "none")
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (1, 1)])
def test_fused_matmul_is_its_formula(act: str, trans_a: int, trans_b: int) -> None:
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((2, 5, 8)), rng.standard_normal((8, 3))
    bias, residual = rng.standard_normal(3), rng.standard_normal((2, 5, 3))
    want = ACTS[act](0.5 * (a @ b) + bias) + residual
    ins = [np.ascontiguousarray(v, np.float32) for v in (a.swapaxes(1, 2) if trans_a else a, b.T if trans_b else b)]
    ins += [bias.astype(np.float32), residual.astype(np.float32)]
    attrs: dict[str, Any] = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "activation": act}
    op = find("FusedMatMul", 1, "infera")
    for got in (*run_kernel(op, *ins, known=(1, 2), **attrs), *compute(op, *ins, **attrs)):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transpose", [(0, 1, 3, 2), (2, 1, 0, 3), (3, 2, 1, 0)], ids=str)
def test_matmul_reads_any_strides(transpose: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    a = rng.standard_normal((4, 3, 5, 6)).astype(np.float32).transpose(transpose)
    b = rng.standard_normal((*a.shape[:2], 7, a.shape[3])).astype(np.float32).swapaxes(2, 3)
    op = find("MatMul")
    site = site_of(op, a, b)
    buffers = GuardedBuffers((), site.outs, ())
    buffers.ins = (a, b)
    for fn, args in op.kernels["cpu"].bind(site, buffers):
        fn(*args)
    buffers.check()
    np.testing.assert_allclose(buffers.outs[0], a.astype(np.float64) @ b.astype(np.float64), atol=1e-5)


@pytest.mark.parametrize("k", [0, 1, 7, 258, 259, 3001])
@pytest.mark.parametrize("reach", [1, 40, 255])
def test_exact_ranges_cover_k_and_bound_every_sum(k: int, reach: int) -> None:
    rng = np.random.default_rng(k)
    b = rng.integers(-reach, reach + 1, (k, 5)).astype(np.int16)
    for known in (None, b):
        ranges = quant.exact_ranges(k, 255, reach, known)
        assert [i for i, _ in ranges[1:]] == [j for _, j in ranges[:-1]]
        assert (ranges[0][0], ranges[-1][1]) == (0, k)
        worst = np.full((k, 5), reach) if known is None else np.abs(known.astype(int))
        assert all(255 * worst[i:j].sum(0).max(initial=0) <= quant.EXACT for i, j in ranges)
    assert len(quant.exact_ranges(k, 255, reach, b)) <= len(quant.exact_ranges(k, 255, reach))


@pytest.mark.parametrize("known", [(), (1, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("fill", [0, 255, None])
def test_matmul_integer_is_exact(known: tuple[int, ...], fill: int | None) -> None:
    rng = np.random.default_rng(11)
    a, b = (rng.integers(0, 256, s).astype(np.uint8) for s in ((4, 1500), (1500, 3)))
    if fill is not None:
        a[...] = b[...] = fill
    a_zero, b_zero = np.array([0, 255, 128, 1], np.uint8), np.array([0, 255, 7], np.uint8)
    want = (a.astype(np.int64) - a_zero[:, None].astype(np.int64)) @ (b.astype(np.int64) - b_zero.astype(np.int64))
    op = find("MatMulInteger")
    for got in (*run_kernel(op, a, b, a_zero, b_zero, known=known), *compute(op, a, b, a_zero, b_zero)):
        np.testing.assert_array_equal(got, want)


# ---- quantisation and conversion


def test_dynamic_quantization_saturates_what_rounds_past_its_range() -> None:
    rng = np.random.default_rng(0)
    op, rounded_up = find("DynamicQuantizeLinear"), 0
    for _ in range(300):
        x = np.array([-rng.integers(1, 255), 255], np.float32)
        x[1] += x[0]
        x -= np.float32(0.5)
        x[1] = max(x[1], 0)
        got = run_kernel(op, x, n_outs=3)
        want = compute(op, x, n_outs=3)
        rounded_up += int(np.rint(x[1] / want[1]) + want[2].astype(int) > 255)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g, w)
    assert rounded_up, "no example reached the clamp"


@pytest.mark.parametrize(("dtype", "codes"), [(ml_dtypes.int4, (-8, 7)), (ml_dtypes.uint4, (0, 15))])
def test_four_bit_quantization_saturates_and_comes_back(dtype: Any, codes: tuple[int, int]) -> None:
    x = np.array([-100, -0.3, 0, 0.26, 0.5, 100], np.float32)
    scale, zero = np.array(0.25, np.float32), np.array(1, dtype)
    (q,) = compute(find("QuantizeLinear"), x, scale, zero)
    np.testing.assert_array_equal(q.astype(int), np.clip([-9999, 0, 1, 2, 3, 9999], *codes))
    (back,) = compute(find("DequantizeLinear"), q, scale, zero)
    np.testing.assert_array_equal(back, (q.astype(np.float32) - 1) * 0.25)


@pytest.mark.parametrize("code", range(17, 21))
@pytest.mark.parametrize("saturate", [0, 1])
def test_float8_casts_as_the_specification_does(code: int, saturate: int) -> None:
    x = np.array([0.01, -3.3, 448, 500, -1e9, 57344, 1e9, np.inf, -np.inf, np.nan, 0], np.float32)
    node = helper.make_node("Cast", ["x"], ["y"], to=code, saturate=saturate)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node, helper.make_node("Cast", ["y"], ["z"], to=1)],
        "g",
        [value("x", TensorProto.FLOAT, x.shape)],
        [value("z", TensorProto.FLOAT, x.shape)],
    )
    want = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])).run(None, {"x": x})
    assert isinstance(want, list)
    (got,) = compute(find("Cast", 19), x, to=code, saturate=saturate)
    np.testing.assert_array_equal(got.astype(np.float32), want[0])


def test_text_is_read_and_written() -> None:
    text = np.array(["1.5", "-2", "inf", "NaN"], object)
    (numbers,) = compute(find("Cast"), text, to=1)
    np.testing.assert_array_equal(numbers, np.array([1.5, -2, np.inf, np.nan], np.float32))
    (written,) = compute(find("Cast"), numbers, to=8)
    assert written.tolist() == ["1.5", "-2", "INF", "NaN"]
    assert compute(find("Cast"), np.array([True, False]), to=8)[0].tolist() == ["1", "0"]
    assert compute(find("Gather"), text, np.array([1]))[0].tolist() == ["-2"]
    assert compute(find("Equal"), text, np.array(["-2"], object))[0].tolist() == [False, True, False, False]


def test_an_integer_sum_wraps_without_a_warning() -> None:
    top = np.array(127, np.int8)
    for got in (*compute(find("Add"), top, top), *run_kernel(find("Add"), top, top)):
        assert got == -2


# ---- views

VIEWS = [(op, case) for op in registry() if op.view for case in op.cases if not isinstance(case.ins[0], np.ndarray)]


@pytest.mark.parametrize(("op", "case"), [pytest.param(o, c, id=f"{o.qualified}-{c.id}") for o, c in VIEWS])
def test_view_of_a_strided_input_is_a_view_or_refuses(op: Op, case: Any) -> None:
    spec, *rest = case.ins
    wide = np.arange(spec.size * 2, dtype=np.float32).reshape(*spec.dims[:-1], -1) if spec.size and spec.ndim else None
    dense = np.arange(spec.size, dtype=np.float32).reshape(spec.dims)
    for x in (dense, dense.copy(order="F"), *(() if wide is None else (wide[..., ::2],))):
        site = site_of(op, x, *rest, n_outs=case.n_outs, **case.attrs)
        assert op.view is not None
        try:
            got = op.view(x, site)
        except ValueError:
            assert not x.flags.c_contiguous, "a contiguous input must always do"
            continue
        views = got if isinstance(got, tuple) else (got,)
        for part, want in zip(views, op.outputs(np, site, (x, *rest)), strict=False):
            assert np.shares_memory(part, x) or not part.size
            np.testing.assert_array_equal(part, want)


# ---- slices


@pytest.mark.parametrize("size", range(4))
def test_every_slice_is_the_specifications(size: int) -> None:
    """Bounds below 0 count from the end, then are clamped: for a positive step to [0, size], for a negative one the
    start to [0, size - 1] and the end to [-1, size - 1]."""
    x = np.arange(size, dtype=np.float32)
    for start, end, step in product(range(-6, 7), range(-6, 7), (-2, -1, 1, 2)):
        low, high = (b + size if b < 0 else b for b in (start, end))
        if step > 0:
            kept = range(min(max(low, 0), size), min(max(high, 0), size), step)
        else:
            kept = range(min(max(low, 0), size - 1), min(max(high, -1), size - 1), step)
        op, bounds = find("Slice"), [np.array([v]) for v in (start, end, 0, step)]
        (got,) = compute(op, x, *bounds)
        assert got.tolist() == [x[i] for i in kept], (start, end, step)
        assert site_of(op, x, *bounds).outs[0].dims == got.shape
