"""Gathers and maps by tables in Triton's interpreter, against NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from tests.kernels.references import F32, ids, only
from tests.kernels.support import BFLOAT16, FLOATS, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import gather, mapped, scatter
from infera_kernels.triton.terms import AxisMap

pytestmark = pytest.mark.kernels

MOVED = (F32, BFLOAT16, np.dtype(np.int64), np.dtype(np.uint8), np.dtype(np.bool_))


@pytest.mark.parametrize("dtype", MOVED, ids=ids)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_along_every_axis(axis: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    x = random((7, 5, 33), dtype, low=0, high=100)
    indices = random((2, 9), np.int32, low=-x.shape[axis], high=x.shape[axis] - 0.01)
    want = np.take(x, indices, axis)
    out = Guarded(want.shape, dtype)
    execute(gather.gather(x, indices, out.array, interpreter, axis=axis))
    only(interpreter, gather.gather_kernel)
    out.check_guards()
    np.testing.assert_array_equal(out.array, want)


def test_long_rows_are_walked_in_tiles(interpreter: InterpreterLauncher) -> None:
    x, indices = random((50, 1030), F32), np.array([[3, -1], [0, 49]])
    out = Guarded((2, 2, 1030), F32)
    execute(gather.gather(x, indices, out.array, interpreter, axis=0))
    out.check_guards()
    np.testing.assert_array_equal(out.array, x[indices])
    launch = only(interpreter, gather.gather_kernel)
    assert launch.constexprs["COLS"] == 128


@pytest.mark.parametrize("bad", [5, -6, 2**31, -(2**40)])
def test_an_index_out_of_range_reads_nothing(bad: int, interpreter: InterpreterLauncher) -> None:
    """x ends where memory does: reading past it would end the process."""
    x, indices = random((5, 3), F32), np.array([4, bad, -5])
    want = np.stack([x[4], np.zeros(3, F32), x[0]])
    out = Guarded((3, 3), F32)
    execute(gather.gather(x, indices, out.array, interpreter, axis=0))
    np.testing.assert_array_equal(out.array, want)
    tuples = np.stack([indices, np.array([0, 2, 1])], axis=1)
    out = Guarded((3,), F32)
    execute(gather.gather_nd(x, tuples, out.array, interpreter, batch_dims=0))
    np.testing.assert_array_equal(out.array, [x[4, 0], 0, x[0, 1]])
    out = Guarded((3, 3), F32)
    execute(gather.gather(x, indices, out.array, interpreter, axis=0, last_outside=True))
    np.testing.assert_array_equal(out.array, x[[4, 4, 4]])


def test_strided_inputs_are_gathered_where_they_lie(interpreter: InterpreterLauncher) -> None:
    x = random((9, 40, 6), np.float16)[::-1, 3::2].transpose(2, 0, 1)
    indices = random((5, 8), np.int64, low=-9, high=8.99)[:, ::2]
    out = Guarded((6, 5, 4, 19), np.float16, step=2)
    execute(gather.gather(x, indices, out.array, interpreter, axis=1))
    out.check_guards()
    np.testing.assert_array_equal(out.array, np.take(x, indices, 1))


def test_elements_and_tuples(interpreter: InterpreterLauncher) -> None:
    x = random((4, 6, 7), F32)
    chosen = random((4, 3, 5), np.int64, low=-6, high=5.99)
    out = Guarded(chosen.shape, F32)
    execute(gather.gather_elements(x, chosen, out.array, interpreter, axis=1))
    np.testing.assert_array_equal(out.array, np.take_along_axis(x[:, :, :5], chosen, 1))
    tuples = random((4, 8, 2), np.int32, low=-6, high=5.99)
    out = Guarded((4, 8), F32)
    execute(gather.gather_nd(x, tuples, out.array, interpreter, batch_dims=1))
    np.testing.assert_array_equal(out.array, x[np.arange(4)[:, None], tuples[..., 0], tuples[..., 1]])


def _same(table: Any) -> Any:
    return table


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("axes", [(0,), (1, 2), (2,), (0, 1, 2)], ids=str)
def test_weighted_maps(axes: tuple[int, ...], dtype: Any, interpreter: InterpreterLauncher) -> None:
    x, rng = random((3, 5, 34), dtype), np.random.default_rng(1)
    maps, want = [], x.astype(np.float64)
    for axis in axes:
        index, weights = rng.integers(0, x.shape[axis], (7, 2)), rng.uniform(-1, 1, (7, 2))
        maps.append(AxisMap(axis, index, weights))
        column = (-1, *(1,) * (2 - axis))
        taps = [np.take(want, index[:, k], axis) * weights[:, k].reshape(column) for k in range(2)]
        want = taps[0] + taps[1]
    out = Guarded(want.shape, dtype)
    execute(mapped.mapped(x, out.array, interpreter, maps, _same))
    only(interpreter, mapped.mapped_kernel)
    assert_close(out, want, error=1e-6)


@pytest.mark.parametrize("dtype", MOVED, ids=ids)
@pytest.mark.parametrize("given", [False, True], ids=["number", "array"])
def test_what_is_outside_is_filled(given: bool, dtype: Any, interpreter: InterpreterLauncher) -> None:
    x = random((4, 5, 33), dtype, low=0, high=9).transpose(0, 2, 1)
    maps = [AxisMap(a, np.pad(np.arange(x.shape[a]), (2, 3), constant_values=-1)[:, None]) for a in (1, 2)]
    fill = np.ones((1,), dtype) if given else 1
    out = Guarded((4, 38, 10), dtype)
    execute(mapped.mapped(x, out.array, interpreter, maps, _same, fill=fill))
    out.check_guards()
    np.testing.assert_array_equal(out.array, np.pad(x, ((0, 0), (2, 3), (2, 3)), constant_values=1))


@pytest.mark.parametrize("bad", [7, -8, 2**40])
@pytest.mark.parametrize("dtype", MOVED, ids=ids)
def test_the_last_update_of_a_position_counts(dtype: Any, bad: int, interpreter: InterpreterLauncher) -> None:
    x, updates = random((7, 5, 9), dtype, low=0, high=100), random((6, 5, 9), dtype, low=0, high=100, seed=1)
    indices = np.array([3, 0, -4, bad, 3, 6])
    want = x.copy()
    for i, update in zip(indices, updates, strict=True):
        if -7 <= i < 7:
            want[i] = update
    for axis in (None, 0):
        out, last = Guarded(x.shape, dtype), Guarded((7 if axis is None else x.size,), np.int32)
        chosen = indices[:, None] if axis is None else np.broadcast_to(indices[:, None, None], updates.shape)
        numbers = scatter.Numbers(last.array, np.array(-1, np.int32))
        execute(scatter.scatter(x, chosen, updates, out.array, interpreter, axis=axis, numbers=numbers))
        for guarded in (out, last):
            guarded.check_guards()
        np.testing.assert_array_equal(out.array, want)


def test_updates_are_written_where_the_data_is(interpreter: InterpreterLauncher) -> None:
    """As of a cache that grows: no copy of what is there, and distinct positions need no numbers."""
    x, updates = random((2, 3, 40, 8), F32), random((2, 3, 2, 8), F32, seed=1)
    tuples = np.array([[[[b, h, t] for t in (7, -1)] for h in range(3)] for b in range(2)])
    want = x.copy()
    want[:, :, [7, -1]] = updates
    execute(scatter.scatter(x, tuples, updates, x, interpreter, numbers=None))
    only(interpreter, scatter.scatter_kernel)
    np.testing.assert_array_equal(x, want)
