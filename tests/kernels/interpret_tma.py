"""Matrix products whose factors come by tensor descriptors, in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher, Target
from tests.kernels.references import UNARY, ids, only
from tests.kernels.support import BFLOAT16, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import matmul
from infera_kernels.triton.tiles import TMA_TILES, TmaTile
from infera_kernels.triton.tma_kernel import tma_kernel

pytestmark = pytest.mark.kernels

HALVES = (np.dtype(np.float16), BFLOAT16)
TILE = TmaTile(32, 128, 64, 4, 3, 1)


def lying(shape: tuple[int, ...], dtype: Any, *, turned: bool = False, seed: int = 0) -> Array:
    """Random values with lines of whole 16 bytes, on 16 bytes; of NaN what is between."""
    *lead, rows, columns = (*shape[:-2], *shape[:-3:-1]) if turned else shape
    wide = np.empty((*lead, rows, -(-columns // 8) * 8 + 8), np.uint16)
    room = np.full(wide.nbytes + 16, 255, np.uint8)
    whole = room[-room.ctypes.data % 16 :][: wide.nbytes].view(dtype).reshape(wide.shape)
    array: Array = whole[..., :columns]
    array[...] = random((*lead, rows, columns), dtype, seed=seed)
    return array.swapaxes(-1, -2) if turned else array


@pytest.mark.parametrize("dtype", HALVES, ids=ids)
@pytest.mark.parametrize("order", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize(("m", "n", "k"), [(2, 3, 5), (33, 129, 65), (70, 40, 128)], ids=str)
def test_orders_and_odd_sizes(m: int, n: int, k: int, order: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    a = lying((m, k), dtype, turned=order[0] == "T")
    b = lying((k, n), dtype, turned=order[1] == "T", seed=1)
    out = Guarded((m, n), dtype)
    execute(matmul.matmul(a, b, out.array, interpreter, tile=TILE))
    launch = only(interpreter, tma_kernel)
    assert (launch.constexprs["A_TURNED"], launch.constexprs["B_TURNED"]) == (order[0] == "T", order[1] == "T")
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize("tma", [1, 2, 3])
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_fewer_programs_than_tiles(programs: int, tma: int) -> None:
    """More rows of tiles than are grouped."""
    dtype = np.dtype(np.float16)
    few = InterpreterLauncher(Target(100, programs, 1 << 20))
    tile = replace(TILE, n=16, stages=64, tma=tma)
    a, b, out = lying((9 * 32 + 1, 24), dtype), lying((24, 40), dtype, seed=1), Guarded((9 * 32 + 1, 40), dtype)
    execute(matmul.matmul(a, b, out.array, few, tile=tile))
    assert only(few, tma_kernel).grid == (programs, 1, 1)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize("tile", [t for t in TMA_TILES if t.tma == 1], ids=str)
def test_tiles(tile: TmaTile, interpreter: InterpreterLauncher) -> None:
    """Sums are finished strip by strip."""
    dtype = np.dtype(np.float16)
    size = tile.m + 1, tile.n + 9
    a, b, bias = lying((size[0], 72), dtype), lying((72, size[1]), dtype, seed=1), random(size[1:], dtype, seed=2)
    out = Guarded(size, dtype)
    execute(matmul.matmul(a, b, out.array, interpreter, bias=bias, tile=tile))
    only(interpreter, tma_kernel)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64) + bias.astype(np.float64), error=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 33, 40), (3, 40, 24)), ((3, 2, 9, 40), (40, 24)), ((5, 40), (4, 40, 24)), ((2, 9, 40), (1, 40, 24))],
)
def test_batches(a: tuple[int, ...], b: tuple[int, ...], interpreter: InterpreterLauncher) -> None:
    dtype = np.dtype(np.float16)
    x, y = lying(a, dtype, turned=True), lying(b, dtype, seed=1)
    want = x.astype(np.float64) @ y.astype(np.float64)
    wide = random(want.shape, dtype, seed=2)
    out = Guarded(want.shape, dtype)
    execute(matmul.matmul(x, y, out.array, interpreter, residual=wide, tile=TILE))
    only(interpreter, tma_kernel)
    assert_close(out, want + wide.astype(np.float64), error=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=ids)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "clip"])
def test_epilogue(activation: str | None, dtype: Any, interpreter: InterpreterLauncher) -> None:
    a, b, bias = lying((40, 32), dtype), lying((32, 136), dtype, seed=1), random((136,), dtype, seed=2)
    residual = random((40, 1), dtype, seed=3)
    out = Guarded((40, 136), dtype, step=2)
    bounds: dict[str, Any] = {"act_alpha": -0.5, "act_beta": 1.25} if activation == "clip" else {}
    options: dict[str, Any] = {"bias": bias, "residual": residual, "alpha": 0.5, "beta": -2.0, "tile": TILE, **bounds}
    execute(matmul.matmul(a, b, out.array, interpreter, activation=activation, **options))
    only(interpreter, tma_kernel)
    wide = [v.astype(np.float64) for v in (a, b, bias, residual)]
    want = 0.5 * (wide[0] @ wide[1]) + wide[2] - 2 * wide[3]
    assert_close(out, want if activation is None else UNARY[activation][0](want), error=1e-6)


def test_what_lies_between_lines_is_not_read(interpreter: InterpreterLauncher) -> None:
    """It is NaN."""
    dtype = np.dtype(np.float16)
    a, b, out = lying((33, 7), dtype), lying((7, 9), dtype, seed=1), Guarded((33, 9), dtype)
    assert a.base is not None
    execute(matmul.matmul(a, b, out.array, interpreter, tile=TILE))
    assert np.isfinite(out.array).all()
