"""Matrix products in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import itertools
import os
from typing import Any
from unittest import mock

import numpy as np
import pytest

from infera_kernels.launch import Const, InterpreterLauncher, Target
from tests.kernels.references import F32, UNARY, ids, only
from tests.kernels.support import FLOATS, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import matmul, skinny, tiles
from infera_kernels.triton.matmul_kernel import matmul_kernel
from infera_kernels.tuning import Problem
from infera_kernels.tuning.cost import Strip

pytestmark = pytest.mark.kernels


def _largest_tile(kind: str) -> tiles.Tile:
    return max(tiles.TILES[kind], key=lambda t: t.m * t.n)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 70, 33), (17, 5, 64), (65, 33, 130), (3, 130, 0)], ids=lambda v: str(v)
)
def test_matmul(m: int, n: int, k: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    a, b, out = random((m, k), dtype), random((k, n), dtype, seed=1), Guarded((m, n), dtype)
    execute(matmul.matmul(a, b, out.array, interpreter))
    launch, kind = (
        only(interpreter, matmul_kernel if m > 1 else skinny.matvec_kernel),
        "ieee" if dtype == F32 else "half",
    )
    tile = tiles.pick_tile(m, n, k, 1, kind, interpreter.target)
    strip = skinny.pick_strip(Problem("matvec", kind, (1, n, k), "n"), interpreter.target)
    assert launch.constexprs["BN"] == (tile.n if m > 1 else strip.n)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize("kind", ["half", "tf32", "tf32x3", "ieee"])
def test_matmul_largest_tile(kind: str, interpreter: InterpreterLauncher) -> None:
    dtype = np.float16 if kind == "half" else np.float32
    tile = _largest_tile(kind)
    a, b, out = random((tile.m + 1, 40), dtype), random((40, tile.n + 1), dtype, seed=1), None
    out = Guarded((tile.m + 1, tile.n + 1), dtype)
    precision = "ieee" if kind == "half" else kind
    execute(matmul.matmul(a, b, out.array, interpreter, tile=tile, precision=precision))
    assert only(interpreter, matmul_kernel).grid == (4, 1, 1)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


def test_matmul_groups_of_tiles(interpreter: InterpreterLauncher) -> None:
    tile = tiles.TILES["ieee"][0]
    shape = 9 * tile.m + 1, 2 * tile.n + 1
    a, b, out = random((shape[0], 5), F32), random((5, shape[1]), F32, seed=1), Guarded(shape, F32)
    execute(matmul.matmul(a, b, out.array, interpreter, tile=tile))
    launch = only(interpreter, matmul_kernel)
    assert launch.grid == (10 * 3, 1, 1)
    assert launch.constexprs["GROUP"] < 10
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize("order", ["NN", "NT", "TN", "TT"])
def test_matmul_orders(order: str, interpreter: InterpreterLauncher) -> None:
    a = random((19, 34), F32) if order[0] == "N" else random((34, 19), F32).T
    b = random((34, 21), F32, seed=1) if order[1] == "N" else random((21, 34), F32, seed=1).T
    out = Guarded((19, 21), F32)
    execute(matmul.matmul(a, b, out.array, interpreter))
    args = only(interpreter, matmul_kernel).args
    assert args["a_k" if order[0] == "N" else "a_m"] == Const(1)
    assert args["b_n" if order[1] == "N" else "b_k"] == Const(1)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 5, 7), (3, 7, 4)),
        ((2, 3, 5, 7), (7, 4)),
        ((5, 7), (2, 1, 7, 4)),
        ((2, 1, 5, 7), (3, 7, 4)),
        ((2, 1, 2, 3, 5), (1, 3, 1, 5, 4)),
    ],
)
def test_matmul_batches(a: tuple[int, ...], b: tuple[int, ...], interpreter: InterpreterLauncher) -> None:
    x, y = random(a, F32), random(b, F32, seed=1)
    want = x.astype(np.float64) @ y.astype(np.float64)
    out = Guarded(want.shape, F32)
    execute(matmul.matmul(x, y, out.array, interpreter))
    only(interpreter, matmul_kernel)
    assert_close(out, want, error=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "clip"])
def test_matmul_epilogue(activation: str | None, dtype: Any, interpreter: InterpreterLauncher) -> None:
    a, b, bias = random((2, 20, 30), dtype), random((30, 18), dtype, seed=1), random((18,), dtype, seed=2)
    residual = random((20, 1), dtype, seed=3)
    out = Guarded((2, 20, 18), dtype, step=2)
    bounds = {"act_alpha": -0.5, "act_beta": 1.25} if activation == "clip" else {}
    execute(
        matmul.matmul(
            *(a, b, out.array, interpreter),
            bias=bias,
            residual=residual,
            alpha=0.5,
            beta=-2.0,
            activation=activation,
            **bounds,  # type: ignore[arg-type]
        )
    )
    only(interpreter, matmul_kernel)
    wide = [v.astype(np.float64) for v in (a, b, bias, residual)]
    want = 0.5 * (wide[0] @ wide[1]) + wide[2] - 2 * wide[3]
    assert_close(out, want if activation is None else UNARY[activation][0](want), error=1e-6)


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_one_row(dtype: Any, turned: bool, interpreter: InterpreterLauncher) -> None:
    """One row times many matrices, each with a row of its own."""
    a, bias, residual = random((3, 1, 77), dtype), random((37,), dtype, seed=2), random((3, 1, 37), dtype, seed=3)
    b = random((3, 37, 77), dtype, seed=1).swapaxes(1, 2) if turned else random((3, 77, 37), dtype, seed=1)
    out = Guarded((3, 1, 37), dtype, step=2)
    options: dict[str, Any] = {"bias": bias, "residual": residual, "alpha": 0.5, "beta": -2.0, "activation": "relu"}
    execute(matmul.matmul(a, b, out.array, interpreter, **options))
    launch = only(interpreter, skinny.matvec_kernel)
    assert launch.args["b_k" if turned else "b_n"] == Const(1)
    wide = [v.astype(np.float64) for v in (a, b, bias, residual)]
    assert_close(out, np.maximum(0.5 * (wide[0] @ wide[1]) + wide[2] - 2 * wide[3], 0), error=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("a", "b", "count", "kernel"),
    [
        ((1, 1100), (1100, 21), 3, "matvec_kernel"),
        ((5, 1029), (1029, 7), 3, "matmul_kernel"),
        ((2, 3, 1024), (1, 1024, 35), 4, "matmul_kernel"),
        ((2, 1, 2, 1500), (3, 1500, 5), 4, "matmul_kernel"),
    ],
)
def test_deep_sums_are_cut_into_parts(
    a: tuple[int, ...], b: tuple[int, ...], count: int, kernel: str, dtype: Any, interpreter: InterpreterLauncher
) -> None:
    x, y, bias = random(a, dtype, low=-1, high=1), random(b, dtype, low=-1, high=1, seed=1), random(b[-1:], dtype)
    want = x.astype(np.float64) @ y.astype(np.float64) * 0.5 + bias.astype(np.float64)
    out = Guarded(want.shape, dtype)
    partial = Guarded((count, want.size), F32)
    calls = matmul.matmul(x, y, out.array, interpreter, bias=bias, alpha=0.5, activation="abs", partial=partial.array)
    execute(calls)
    partial.check_guards()
    assert [launch.kernel for launch in interpreter.launches] == [kernel, "parts_kernel"]
    assert interpreter.launches[0].grid[1] == count
    assert_close(out, np.abs(want), error=2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(("n", "k"), [(21, 1100), (70, 64), (5, 1), (1, 513)])
def test_every_strip(n: int, k: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    """Whichever is chosen: more stages than steps, strips past both ends, either axis contiguous."""
    a, bias = random((1, k), dtype, low=0.1, high=1), random((n,), dtype, seed=2)
    for layout, some in skinny.SHAPES.items():
        b = random((n, k) if layout == "k" else (k, n), dtype, low=0.1, high=1, seed=1)
        b = b.T if layout == "k" else b
        want = a.astype(np.float64) @ b.astype(np.float64) + bias.astype(np.float64)
        for (wide, deep), stages in zip(some, itertools.cycle(skinny.STAGES)):
            strip, out = Strip(wide, deep, stages), Guarded((1, n), dtype)
            with mock.patch.object(matmul, "choose", lambda *_, strip=strip: strip):
                execute(matmul.matmul(a, b, out.array, interpreter, bias=bias))
            launch = interpreter.launches[-1]
            assert [launch.constexprs[name] for name in ("BN", "BK", "STAGES")] == [wide, deep, stages]
            assert_close(out, want, error=2e-6)


def test_small_shared_memory_takes_another_tile() -> None:
    a, b = random((128, 64), np.float16), random((64, 128), np.float16, seed=1)
    small = InterpreterLauncher(Target(86, 1, 99 * 1024))
    out = Guarded((128, 128), np.float16)
    execute(matmul.matmul(a, b, out.array, small))
    launch = only(small, matmul_kernel)
    assert [launch.constexprs[name] for name in ("BM", "BN", "BK")] == [128, 128, 64]
    assert launch.options["num_stages"] == 3
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize(
    ("residual", "rows"), [(None, 6), ((2, 3, 4), 6), ((3, 4), 3), ((3, 1), 3), ((4,), 6), ((2, 1, 1), 3)], ids=str
)
def test_one_matrix_for_a_whole_batch_is_one_tall_product(
    residual: tuple[int, ...] | None, rows: int, interpreter: InterpreterLauncher
) -> None:
    a, b, out = random((2, 3, 5), F32), random((1, 5, 4), F32, seed=1), Guarded((2, 3, 4), F32)
    added = None if residual is None else random(residual, F32, seed=2)
    execute(matmul.matmul(a, b, out.array, interpreter, residual=added))
    assert only(interpreter, matmul_kernel).args["M"] == rows
    assert_close(out, a.astype(np.float64) @ b + (0 if added is None else added), error=1e-6)


def test_rows_that_do_not_follow_each_other_stay_a_batch(interpreter: InterpreterLauncher) -> None:
    a, b, out = random((3, 2, 5), F32).transpose(1, 0, 2), random((5, 4), F32, seed=1), Guarded((2, 3, 4), F32)
    execute(matmul.matmul(a, b, out.array, interpreter))
    assert only(interpreter, matmul_kernel).args["M"] == 3
    assert_close(out, a.astype(np.float64) @ b, error=1e-6)


def normalised(a: Any, gain: Any, epsilon: float) -> Any:
    """In float64, rounded nowhere."""
    x = a.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * gain.astype(np.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (70, 33), (5, 2100)], ids=str)
def test_a_row_is_normalised(n: int, k: int, turned: bool, dtype: Any, interpreter: InterpreterLauncher) -> None:
    """Before the bias, the activation and the residual; with a gain of any stride, and numbers whose squares are
    beyond float16."""
    a, b = random((1, k), dtype, low=-500, high=500), random((n, k) if turned else (k, n), dtype, seed=1)
    gain, bias = random((2 * k,), dtype, seed=2, low=0.5, high=2)[::2], random((n,), dtype, seed=3)
    residual, out = random((1, n), dtype, seed=4), Guarded((1, n), dtype, step=2)
    how: dict[str, Any] = {"bias": bias, "residual": residual, "activation": "relu", "gain": gain, "epsilon": 7.0}
    execute(matmul.matmul(a, b.T if turned else b, out.array, interpreter, **how))
    only(interpreter, skinny.matvec_kernel)
    sums = normalised(a, gain, 7.0) @ (b.T if turned else b).astype(np.float64)
    assert_close(out, np.maximum(sums + bias.astype(np.float64) + residual.astype(np.float64), 0), error=4e-6)
