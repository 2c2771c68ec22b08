"""Products with weights of few bits in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.portable.quant import unpacked
from tests.kernels.references import ids
from tests.kernels.support import FLOATS, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import nbits

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "k", "kernels"),
    [
        (3, 21, 100, ["nbits_kernel"]),
        (1, 5, 2100, ["nbits_kernel"]),
        (9, 37, 50, ["widen_kernel", "matmul_kernel"] * 3),
    ],
)
def test_nbits(
    rows: int,
    columns: int,
    k: int,
    kernels: list[str],
    bits: int,
    dtype: Any,
    interpreter: InterpreterLauncher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = -(-k // 32)
    held = random((columns, blocks, 32 * bits // 8), np.uint8, low=0, high=255.9)
    scale, zero = random((columns, blocks), dtype, low=0.01, high=0.1), random((columns, blocks), dtype, seed=1)
    a, bias, out = random((rows, k), dtype, seed=2), random((columns,), dtype, seed=3), Guarded((rows, columns), dtype)
    monkeypatch.setattr(nbits, "_WIDE_BYTES", 16 * k * out.array.itemsize)
    weight = nbits.Weight(nbits.repacked(held, blocks, bits), scale, zero, bits)
    shape = nbits.wide_columns(columns, k, out.array.itemsize), k
    wide = Guarded(shape, dtype) if rows > nbits.FEW_ROWS else None
    execute(nbits.nbits_matmul(a, weight, bias, out.array, wide and wide.array, interpreter))
    assert [launch.kernel for launch in interpreter.launches] == kernels
    q = unpacked(np, held, bits).astype(np.float64)
    w = ((q - zero.astype(np.float64)[:, :, None]) * scale.astype(np.float64)[:, :, None]).reshape(columns, -1)[:, :k]
    if wide is not None:
        wide.check_guards()
        w = w.astype(dtype).astype(np.float64)
    assert_close(out, a.astype(np.float64) @ w.T + bias.astype(np.float64), error=2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(("rows", "k"), [(1, 100), (8, 2100)])
def test_rows_are_normalised_and_a_residual_is_added(
    rows: int, k: int, dtype: Any, interpreter: InterpreterLauncher
) -> None:
    blocks, columns, epsilon = -(-k // 32), 21, 0.25
    held = random((columns, blocks, 16), np.uint8, low=0, high=255.9)
    weight = nbits.Weight(
        nbits.repacked(held, blocks, 4), random((columns, blocks), dtype, low=0.01, high=0.1), None, 4
    )
    a, gain = random((rows, k), dtype, seed=2), random((k,), dtype, seed=3, low=0.5, high=2)
    residual, out = random((rows, columns), dtype, seed=4), Guarded((rows, columns), dtype)
    how: dict[str, Any] = {"residual": residual, "gain": gain, "epsilon": epsilon}
    execute(nbits.nbits_matmul(a, weight, None, out.array, None, interpreter, **how))
    assert [launch.kernel for launch in interpreter.launches] == ["nbits_kernel"]
    q = unpacked(np, held, 4).astype(np.float64) - 8
    w = (q * weight.scale.astype(np.float64)[:, :, None]).reshape(columns, -1)[:, :k]
    x = a.astype(np.float64)
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + epsilon) * gain.astype(np.float64)
    assert_close(out, x @ w.T + residual.astype(np.float64), error=4e-6)


def test_wide_weights_do_not_normalise(interpreter: InterpreterLauncher) -> None:
    a, out, wide = (np.zeros(shape, np.float32) for shape in ((9, 32), (9, 4), (4, 32)))
    weight = nbits.Weight(np.zeros((4, 1, 16), np.uint8), np.ones((4, 1), np.float32), None, 4)
    with pytest.raises(ValueError, match="normalises up to 8 rows, not 9 that meet wide weights"):
        nbits.nbits_matmul(a, weight, None, out, wide, interpreter, gain=np.ones(32, np.float32))
