"""Copies, transposes and casts in Triton's interpreter, against NumPy."""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from infera_kernels.launch import Const, InterpreterLauncher
from tests.kernels.references import F32, ids, only
from tests.kernels.support import BFLOAT16, FLOATS, Guarded, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import elementwise, functions, layout, pointwise

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize(
    ("shape", "axes", "transposed"),
    [
        ((40, 70), (1, 0), True),
        ((3, 33, 34), (0, 2, 1), True),
        ((3, 33, 34), (2, 1, 0), False),
        ((9, 33, 34), (2, 1, 0), True),
        ((9, 10, 11, 3), (0, 3, 1, 2), False),
        ((2, 40, 3, 9), (0, 2, 3, 1), True),
        ((2, 3, 40, 16), (0, 2, 1, 3), False),
        ((2, 3, 2, 3, 2, 9), (5, 4, 3, 2, 1, 0), False),
        ((4, 1, 1, 9), (3, 2, 1, 0), False),
    ],
)
def test_transpose(
    shape: tuple[int, ...], axes: tuple[int, ...], transposed: bool, interpreter: InterpreterLauncher
) -> None:
    x = random(shape, F32).transpose(axes)
    out = Guarded(x.shape, F32)
    execute(elementwise.copy(x, out.array, interpreter))
    launch = only(interpreter, pointwise.pointwise_kernel)
    tile = launch.constexprs["ROWS"], launch.constexprs["COLS"]
    assert (tile == (32, 32)) == transposed
    out.check_guards()
    np.testing.assert_array_equal(out.array, x)


@pytest.mark.parametrize("step", [2, 3])
def test_strided_both_ways(step: int, interpreter: InterpreterLauncher) -> None:
    x = random((5, 40), np.float16)[::-1, 3::2]
    out = Guarded(x.shape, np.float16, step=step)
    execute(elementwise.copy(x, out.array, interpreter))
    out.check_guards()
    np.testing.assert_array_equal(out.array, x)


def test_offsets_beyond_32_bits(interpreter: InterpreterLauncher) -> None:
    small = random((2, 3), F32)
    far = np.lib.stride_tricks.as_strided(small, (1, 2, 3), (2**40, 12, 4))
    out = Guarded((1, 2, 3), F32)
    execute(elementwise.copy(far, out.array, interpreter))
    assert not only(interpreter, pointwise.pointwise_kernel).constexprs["WIDE"]
    tiling = pointwise.pick_tiling((2, 3), [(2**31, 1), (3, 1)])
    args = {"ins": (small,), "out": out.array, "dims": (3, 2), "rows": 2}
    args |= {"strides": (Const(1), 3), "out_strides": (Const(1), 3)}
    constexprs: dict[str, Any] = {
        "FUNCTIONS": (functions.identity,),
        "ARGS": (0, -1, -1),
        "PARAMETERS": (None, None),
        "TYPES": (None,),
    }
    constexprs |= {"ROW_DIMS": 2, "ROWS": tiling.tile[0], "COLS": 4, "WIDE": True}
    fn, call = interpreter.launch(pointwise.pointwise_kernel, (1,), args, constexprs)
    fn(*call)
    out.check_guards()
    np.testing.assert_array_equal(out.array[0], small)


CASTS = [np.float32, np.float16, BFLOAT16, np.float64, np.int32, np.int64, np.uint8, np.int8, np.bool_]


@pytest.mark.parametrize("target", CASTS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("source", CASTS, ids=lambda d: np.dtype(d).name)
def test_cast(source: Any, target: Any, interpreter: InterpreterLauncher) -> None:
    x = np.array([0, 0.25, 1, 1.75, 2.5, 3.01, 100, 127], np.float64).astype(source)
    out = Guarded(x.shape, target)
    assert elementwise.supports_copy(x, out.array)
    execute(elementwise.copy(x, out.array, interpreter))
    out.check_guards()
    np.testing.assert_array_equal(out.array, x.astype(target))


@pytest.mark.parametrize("target", [np.int8, np.int32, np.int64])
@pytest.mark.parametrize("source", FLOATS, ids=ids)
def test_casts_truncate_towards_zero(source: Any, target: Any, interpreter: InterpreterLauncher) -> None:
    x = np.array([-100.5, -1.75, -0.25, 0.75, 2.5], np.float32).astype(source)
    out = Guarded(x.shape, target)
    execute(elementwise.copy(x, out.array, interpreter))
    out.check_guards()
    np.testing.assert_array_equal(out.array, [int(v) for v in x])


@pytest.mark.parametrize("dtype", sorted(layout.STORED))
def test_copies_keep_extremes(dtype: str, interpreter: InterpreterLauncher) -> None:
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    if kind == np.bool_:
        x = np.array([True, False])
    elif kind.kind in "iu":
        x = np.array([np.iinfo(kind).min, np.iinfo(kind).max, 1], kind)
    else:
        limits = ml_dtypes.finfo(kind)
        x = np.array([limits.min, limits.max, limits.tiny, -0.0, np.inf], kind)
    out = Guarded(x.shape, kind)
    execute(elementwise.copy(x, out.array, interpreter))
    out.check_guards()
    np.testing.assert_array_equal(out.array, x)
