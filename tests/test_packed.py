"""Products with weights that are laid out once for OpenBLAS' inner loops."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from infera_kernels.calls import SERIAL, Array, Call, Split, one_after_the_other
from infera_kernels.cpu import aligned, blas, packed
from tests.buffers import Guarded

LOOPS = packed.inner()
known = pytest.mark.skipif(LOOPS is None, reason="NumPy calls a BLAS whose inner loops are not known")


def backwards(parts: Sequence[Iterable[Call]]) -> list[Call]:
    return one_after_the_other(parts[::-1])


def scratch(shape: Sequence[int], dtype: object = np.float32) -> Array:
    """Poisoned."""
    return np.full(shape, np.nan, np.float32)


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


SHAPES = [(4, 256, 1024), (7, 1000, 333), (128, 768, 768), (129, 257, 65), (33, 3072, 5), (5, 7, 4001), (64, 300, 1)]


@known
@pytest.mark.parametrize("split", [SERIAL, Split(3, backwards)], ids=["serial", "three"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_that_of_float64(shape: tuple[int, int, int], strided: bool, split: Split) -> None:
    assert LOOPS is not None
    m, k, n = shape
    a, w, bias, out = normal(m, k + 5)[:, 2 : 2 + k], normal(k, n), normal(n), Guarded((m, n), np.float32, rows=strided)
    laid_out = packed.pack(w, LOOPS)
    for fn, args in packed.fused(a, laid_out, out.array, scratch, split, loops=LOOPS, alpha=0.5, bias=bias):
        fn(*args)
    out.check("product")
    want = 0.5 * (a.astype(np.float64) @ w) + bias
    np.testing.assert_allclose(out.array, want, rtol=0, atol=2e-6 * np.abs(want).max())


@known
def test_weights_begin_with_a_cache_line() -> None:
    assert LOOPS is not None
    for n in range(1, 9):
        assert packed.pack(normal(3, n), LOOPS).ctypes.data % aligned.LINE == 0


@known
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python 3.13 collects arguments of ctypes")
def test_garbage_collection_looks_at_nothing_in_a_bound_product() -> None:
    """A session keeps thousands, and what a collection looks at is what a request waits for."""
    assert LOOPS is not None
    m, k, n = 40, 700, 900  # several ranges of rows and of columns
    a, out = normal(m, k), np.zeros((m, n), np.float32)
    laid_out = packed.pack(normal(k, n), LOOPS)
    gc.collect()
    before = len(gc.get_objects())
    made = [packed.fused(a, laid_out, out, scratch, loops=LOOPS)[1][0] for _ in range(100)]
    for _ in range(4):  # tuples in tuples are let go one level at a time
        gc.collect()
    assert len(gc.get_objects()) - before <= len(made) + 50


Accuracy = Literal["fast", "strict"]


def session(accuracy: Accuracy) -> infera_gpu.Session:
    """y = x w, of any number of rows."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 300])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 700])],
        [numpy_helper.from_array(normal(300, 700), "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return infera_gpu.load(made, device="cpu", accuracy=accuracy, jit=False)


def products_by_address(monkeypatch: pytest.MonkeyPatch, rows: int, accuracy: Accuracy = "fast") -> int:
    """How many products a run makes by OpenBLAS' inner loops; its result is checked."""
    made = 0
    fused = packed.fused

    def counted(*args: Any, **named: Any) -> list[Call]:
        nonlocal made
        made += 1
        return fused(*args, **named)

    monkeypatch.setattr(packed, "fused", counted)
    x = normal(rows, 300)
    with session(accuracy) as opened:
        (y,) = opened.run({"x": x}).values()
    np.testing.assert_allclose(y, x @ normal(300, 700), rtol=0, atol=2e-4)
    return made


@known
def test_few_rows_are_multiplied_by_laid_out_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products_by_address(monkeypatch, 17)


@known
def test_many_rows_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not products_by_address(monkeypatch, packed.MOST_ROWS + 1)


def test_strict_products_are_blas_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not products_by_address(monkeypatch, 17, "strict")


@pytest.mark.parametrize("rows", [17, packed.MOST_ROWS + 1])
def test_what_is_no_number_is_none_times_0(rows: int) -> None:
    """However many rows there are, and so whichever way weights are laid out."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.0)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 300])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 700])],
        [numpy_helper.from_array(normal(300, 700), "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = normal(rows, 300)
    x[0, 0] = np.nan
    with infera_gpu.load(made, device="cpu", jit=False) as opened:
        (y,) = opened.run({"x": x}).values()
    assert np.isnan(y[0]).all()
    assert not y[1:].any()


def test_loops_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = blas.Inner(lambda *args: None, lambda *args: None, lambda *args: None)
    monkeypatch.setattr(packed, "inner", packed.inner.__wrapped__)
    monkeypatch.setattr(blas.OpenBlas, "inner", lambda self: other)
    assert packed.inner() is None
    products_by_address(monkeypatch, 17)


def test_where_numpy_hides_its_loops_another_openblas_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package scipy-openblas64, of a version whose loops are known; it is of x86-64 as NumPy's is."""
    if LOOPS is None:
        pytest.skip("the processor has no loops that are known")
    asked: list[blas.OpenBlas] = []
    inner = blas.OpenBlas.inner

    def hidden(self: blas.OpenBlas) -> blas.Inner | None:
        asked.append(self)
        return None if self is blas.openblas() else inner(self)

    monkeypatch.setattr(blas.OpenBlas, "inner", hidden)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    monkeypatch.setattr(packed, "inner", packed.inner.__wrapped__)
    found = packed.inner()
    assert found is not None
    assert len(asked) == 2
    assert os.environ["OPENBLAS_NUM_THREADS"] == "7"
    assert blas.openblas() is asked[0]
    monkeypatch.setattr(blas, "find_spec", lambda name: None)
    assert packed.inner() is None


@pytest.mark.parametrize(("name", "other"), [("version", "0.4.0"), ("architecture", "Zen")])
def test_what_is_told_of_the_blas_changes_with_it(monkeypatch: pytest.MonkeyPatch, name: str, other: str) -> None:
    found = blas.openblas()
    if found is None:
        pytest.skip("NumPy calls another BLAS")
    before = blas.spoken()
    with monkeypatch.context() as patch:
        patch.setattr(found, name, other)
        assert blas.spoken() != before
    another = SimpleNamespace(**{"version": found.version, "architecture": found.architecture, name: other})
    monkeypatch.setattr(blas, "_with_loops", lambda: (another, None))
    assert blas.spoken() != before


def test_an_unknown_version_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = blas.openblas()
    if found is None:
        pytest.skip("NumPy calls another BLAS")
    monkeypatch.setattr(found, "version", "0.4.0")
    assert found.inner() is None
