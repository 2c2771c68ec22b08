"""Einsums as products, sums and other orders of axes: what the parts compute, and where there are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import infera_gpu
from infera_gpu.graph import HostArray
from infera_gpu.op import Case, Op, Site
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec, spec_of
from tests.cases import assert_close, compute, inputs_of, site_of
from tests.text import parse

_FOUND = registry().find("", "Einsum", 17)
assert _FOUND is not None
EINSUM: Op = _FOUND

LETTERS = "abcdefg"


def parts_of(site: Site, ins: tuple[HostArray | None, ...]) -> tuple[list[str], HostArray] | None:
    """The operators that stand for a node, and what they compute; None where it stays whole."""
    assert EINSUM.expand is not None
    expansion = EINSUM.expand(site)
    if expansion is None:
        return None
    values = dict(zip(site.node.inputs, ins, strict=True)) | dict(expansion.constants)
    for node in expansion.nodes:
        part = registry().find(node.domain, node.op, site.opset)
        assert part is not None
        given = [values[i] for i in node.inputs]
        at = Site(node, part.fill(node), tuple(map(_spec, given)), tuple(given), opset=site.opset)
        assert [spec_of(a) for a in part.outputs(np, at, given)] == [*part.infer(at)]
        values[node.outputs[0]], *_ = part.outputs(np, at, given)
    made = values[site.node.outputs[0]]
    assert made is not None
    return [node.op for node in expansion.nodes], made


def _spec(a: HostArray | None) -> TensorSpec:
    assert a is not None
    return spec_of(a)


@pytest.mark.parametrize("case", EINSUM.cases, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("opset", [12, 17])
def test_the_parts_compute_what_the_operator_does(case: Case, dtype: str, opset: int) -> None:
    ins = tuple(None if x is None else x.astype(dtype) for x in inputs_of(EINSUM, case))
    site = site_of(EINSUM, replace(case, opset=opset), ins)
    found = parts_of(site, ins)
    half = np.dtype(dtype).itemsize == 2
    assert (found is None) == (case.id == "trace" or (half and case.id == "sums_alone"))
    if found is not None:
        tol = {"float32": 1e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        assert_close(found[1], compute(EINSUM, site, ins)[0], tol, case.id)


def drawn(rng: np.random.Generator) -> tuple[str, tuple[HostArray, ...]]:
    """An equation of one or two operands without diagonals, some axes of size 1 where the other's is longer, and its
    operands."""
    sizes = dict(zip(LETTERS, rng.integers(1, 5, len(LETTERS)).tolist(), strict=True))
    terms = ["".join(rng.permutation([*LETTERS])[: rng.integers(0, 5)]) for _ in range(rng.integers(1, 3))]
    used = sorted({*"".join(terms)})
    output = "".join(rng.permutation(used)[: rng.integers(0, len(used) + 1)]) if used else ""
    short = {*rng.permutation(used)[: rng.integers(0, 2)].tolist()} if used and len(terms) == 2 else set()
    dims = [[1 if k in short and i == 0 else sizes[k] for k in term] for i, term in enumerate(terms)]
    ins = tuple(rng.uniform(-2, 2, d) for d in dims)
    return f"{','.join(terms)}->{output}", ins


@pytest.mark.parametrize("seed", range(150))
def test_any_equation(seed: int) -> None:
    equation, ins = drawn(np.random.default_rng(seed))
    site = site_of(EINSUM, Case("drawn", tuple(map(spec_of, ins)), {"equation": equation}), ins)
    found = parts_of(site, ins)
    assert found is not None
    (want,) = compute(EINSUM, site, ins)
    assert found[1].shape == want.shape
    np.testing.assert_allclose(found[1], want, rtol=1e-12, atol=1e-12, err_msg=equation)


@pytest.mark.parametrize(
    ("equation", "shapes", "ops"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)], ["MatMul"]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)], ["MatMul"]),
        ("bsd,ed->bse", [(2, 3, 4), (5, 4)], ["Transpose", "MatMul"]),
        ("abcd,cde->abe", [(2, 3, 4, 5), (4, 5, 6)], ["Reshape", "Reshape", "MatMul"]),
        ("ij->ij", [(2, 3)], ["Identity"]),
        ("ii->i", [(3, 3)], None),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], None),
        ("ij,jk->ik", [(0, 3), (3, 4)], None),
    ],
)
def test_there_are_no_more_parts_than_it_takes(
    equation: str, shapes: list[tuple[int, ...]], ops: list[str] | None
) -> None:
    ins = tuple(np.ones(shape, np.float32) for shape in shapes)
    site = site_of(EINSUM, Case("given", tuple(map(spec_of, ins)), {"equation": equation}), ins)
    found = parts_of(site, ins)
    assert (None if found is None else found[0]) == ops


def test_integers_stay_whole() -> None:
    ins = tuple(np.ones((2, 2), np.int64) for _ in range(2))
    assert parts_of(site_of(EINSUM, Case("i", tuple(map(spec_of, ins)), {"equation": "ij,jk->ik"}), ins), ins) is None


@pytest.mark.parametrize("device", ["cpu", "recording"])
@pytest.mark.parametrize("opset", [12, 13, 21])
def test_sums_are_of_the_models_opset(device: str, opset: int) -> None:
    text = """
        g (float[2, 3, 4] x, float[4, 5] w) => (float[2, 5] y, float[2] z) {
            y = Einsum <equation = "bij,jk->bk"> (x, w)
            z = Einsum <equation = "bij->b"> (x)
        }"""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 4), np.float32), rng.standard_normal((4, 5), np.float32)
    with infera_gpu.load(parse(text, opset), device=device) as session:
        got = session.run({"x": x, "w": w})
    np.testing.assert_allclose(got["y"], np.einsum("bij,jk->bk", x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["z"], x.sum((1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("recording", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_a_plan_has_kernels_alone(device: str, dtype: str) -> None:
    text = f"""
        g ({dtype}[2, 3, 4, 5] x, {dtype}[4, 5, 6] w) => ({dtype}[2, 3, 6] y) {{
            y = Einsum <equation = "abcd,cde->abe"> (x, w)
        }}"""
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.uniform(-1, 1, shape).astype(np.float16 if dtype == "float16" else np.float32)
        for name, shape in {"x": (2, 3, 4, 5), "w": (4, 5, 6)}.items()
    }
    with infera_gpu.load(parse(text, 17), device=device) as session:
        got = session.run(feeds)["y"]
        steps = [step for plan in session.plans(feeds) for step in plan.steps]
    want = np.einsum("abcd,cde->abe", *(x.astype(np.float64) for x in feeds.values()))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 if dtype == "float" else 1e-2)
    if device == "recording":
        assert not [step for step in steps if step.uncapturable]
