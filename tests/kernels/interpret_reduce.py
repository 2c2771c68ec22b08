"""Reductions in Triton's interpreter, against float64 NumPy and against `portable`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.calls import Call
from infera_kernels.launch import InterpreterLauncher
from infera_kernels.portable import reduce as portable
from tests.kernels.references import F32, ids
from tests.kernels.support import FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import reduce as triton_reduce
from infera_kernels.triton import reduce_walk
from infera_kernels.triton.normalizations import NORMALIZATIONS
from infera_kernels.triton.reductions import REDUCTIONS

pytestmark = pytest.mark.kernels

NUMBERS = [*FLOATS, *(np.dtype(name) for name in ("float64", "int8", "uint8", "int32", "uint32", "int64", "uint64"))]
Shape = tuple[int, ...]


class Scratch:
    """Guarded scratch, as much as is announced."""

    def __init__(self) -> None:
        self.given: list[Guarded] = []

    def __call__(self, shape: Any, dtype: Any = np.float32) -> Array:
        piece = Guarded(shape, dtype)
        self.given.append(piece)
        made: Array = piece.array
        return made


def reduced(kind: str, x: Array, axes: Shape, out: Guarded, interpreter: InterpreterLauncher) -> list[Call]:
    """The calls, after they were made."""
    scratch = Scratch()
    calls = triton_reduce.reduce(kind, x, axes, out.array, interpreter, scratch)
    asked = [(g.array.shape, g.array.dtype.name) for g in scratch.given]
    assert asked == triton_reduce.scratch_of(kind, x, axes)
    execute(calls)
    for piece in (*scratch.given, out):
        piece.check_guards()
    return calls


def shape_after(x: Array, axes: Shape) -> Shape:
    return tuple(d for a, d in enumerate(x.shape) if a not in axes)


def test_every_reduction_is_reached() -> None:
    steps = {s for names in triton_reduce.POSITIONS.values() for s in names}
    statistics = {name for n in NORMALIZATIONS.values() for name in n.statistics().values()}
    assert triton_reduce.PLAIN | steps | statistics == set(REDUCTIONS)


@pytest.mark.parametrize(
    ("shape", "axes", "tile"),
    [
        ((3, 5000), (1,), (1, 4096)),
        ((5000, 3), (0,), (4, 1024)),
        ((70, 33), (0,), (32, 128)),
        ((9, 130), (1,), (2, 256)),
        ((2, 65, 40), (1,), (32, 128)),
        ((2, 7, 65, 3), (1, 3), (16, 32)),
        ((5, 3, 70), (0, 2), (4, 128)),
        ((2, 3, 4, 5, 6), (1, 3), (32, 16)),
        ((1, 1, 1), (0, 1, 2), (1, 1)),
        ((6, 7), (), (32, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_sum(shape: Shape, axes: Shape, tile: Shape, dtype: Any, interpreter: InterpreterLauncher) -> None:
    x = random(shape, dtype, low=0.5)
    out = Guarded(shape_after(x, axes), dtype)
    reduced("sum", x, axes, out, interpreter)
    (launch,) = interpreter.launches
    assert (launch.constexprs["KEPT"], launch.constexprs["REDUCED"]) == tile
    assert_close(out, x.astype(np.float64).sum(axes), error=3e-7)


@pytest.mark.parametrize("kind", sorted(triton_reduce.PLAIN))
@pytest.mark.parametrize("dtype", NUMBERS, ids=ids)
def test_every_type(kind: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    x = random((3, 2, 5), dtype, low=1, high=9)
    out = Guarded((3, 5), dtype)
    assert triton_reduce.supports_reduction(kind, x, out.array, (1,))
    reduced(kind, x, (1,), out, interpreter)
    want = portable.reduction(np, kind, x, (1,), (3, 5))
    if dtype.kind in "iu":
        np.testing.assert_array_equal(out.array, want)
    else:
        np.testing.assert_allclose(out.array.astype(np.float64), want.astype(np.float64), rtol=8e-3)


@pytest.mark.parametrize("kind", sorted(triton_reduce.PLAIN - {"prod"}))
@pytest.mark.parametrize("shape", [(2, 7), (2, 5000)])
def test_infinities_and_nan(kind: str, shape: Shape, interpreter: InterpreterLauncher) -> None:
    x = np.concatenate([random(shape, F32, seed=i) for i in range(3)])
    x[0, 5], x[1, 3], x[2, :], x[3, 2:4], x[4, 1] = np.nan, np.inf, -np.inf, (np.inf, -np.inf), -np.inf
    out = Guarded((6,), F32)
    reduced(kind, x, (1,), out, interpreter)
    with np.errstate(all="ignore"):
        want = portable.reduction(np, kind, x.astype(np.float64), (1,), (6,))
    np.testing.assert_allclose(out.array, want, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(triton_reduce.PLAIN))
def test_nothing_to_reduce_gives_the_identity(kind: str, interpreter: InterpreterLauncher) -> None:
    x, out = np.zeros((3, 0), F32), Guarded((3,), F32)
    reduced(kind, x, (1,), out, interpreter)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out.array, portable.reduction(np, kind, x, (1,), (3,)))
    assert reduced(kind, np.zeros((0, 3), F32), (1,), Guarded((0,), F32), interpreter) == []


@pytest.mark.parametrize("kind", ["sum", "mean", "max", "log_sum_exp"])
@pytest.mark.parametrize(("shape", "parts"), [((70001,), 9), ((40001, 2), 10)])
def test_few_long_rows_are_shared(kind: str, shape: Shape, parts: int, interpreter: InterpreterLauncher) -> None:
    x = random(shape, F32, low=0, high=3)
    out = Guarded(shape[1:], F32)
    reduced(kind, x, (0,), out, interpreter)
    grids = [launch.grid[1] for launch in interpreter.launches]
    assert grids == [parts, 1] * (2 if kind == "log_sum_exp" else 1)
    assert_close(out, portable.reduction(np, kind, x.astype(np.float64), (0,), shape[1:]), error=2e-7)


def test_long_sums_keep_their_precision(interpreter: InterpreterLauncher) -> None:
    """Hundreds of tiles: a lane that added them up one after the other would be off by 1e-6."""
    x, out = np.broadcast_to(np.array([0.1], F32), (320 * 4096,)), Guarded((), F32)
    of, target = reduce_walk.source(x, (0,)), reduce_walk.dense(out.array, ())
    tiling = reduce_walk.pick_tiling(of, [target], 1)
    assert (tiling.along.tiles, tiling.parts) == (320, 1)
    family = REDUCTIONS["sum"]
    execute([triton_reduce.launch_pass(family, "float32", of, [target], tiling, interpreter, of.length, 0.0)])
    assert_close(out, np.asarray(np.float64(np.float32(0.1)) * x.size), error=2e-7)


@pytest.mark.parametrize("kind", triton_reduce.POSITIONS)
@pytest.mark.parametrize("dtype", NUMBERS, ids=ids)
def test_positions(kind: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    x = random((4, 37), dtype, low=0, high=5).round().astype(dtype)
    if dtype.kind != "i" and dtype.kind != "u":
        x[0, 4] = x[0, 9] = np.nan
        x[1] = -0.0
        x[1, ::3] = 0.0
        x[2, 20:] = np.inf
        x[3, 20:] = -np.inf
    elif dtype.kind == "i":
        x[0, 3:7], x[1, 4:9] = np.iinfo(dtype).min, np.iinfo(dtype).max
    else:
        x[1, 4:9] = np.iinfo(dtype).max
    for axis in (0, 1):
        out = Guarded(shape_after(x, (axis,)), np.int64)
        reduced(kind, x, (axis,), out, interpreter)
        how = {"largest": "max" in kind, "last": "last" in kind}
        np.testing.assert_array_equal(out.array, portable.arg_extremum(np, x, axis, **how).squeeze(axis))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_positions_in_shared_rows(dtype: Any, interpreter: InterpreterLauncher) -> None:
    x = random((1, 70001), dtype)
    x[0, [123, 69999]] = 5
    for kind, want in (("arg_max", 123), ("arg_max_last", 69999)):
        out = Guarded((1, 1), np.int64)
        reduced(kind, x, (1,), out, interpreter)
        assert out.array == want


def test_strides_of_any_kind(interpreter: InterpreterLauncher) -> None:
    whole = random((3, 4, 5, 12), F32)
    for x in (whole.transpose(3, 1, 0, 2), whole[::-1, ::2, 1:, ::-3], np.broadcast_to(whole[:, :1], whole.shape)):
        for axes in ((0,), (1, 3)):
            out = Guarded(tuple(1 if a in axes else d for a, d in enumerate(x.shape)), F32, step=2)
            reduced("sum", x, axes, out, interpreter)
            assert_close(out, x.astype(np.float64).sum(axes, keepdims=True), error=1e-6)


def test_offsets_beyond_32_bits(interpreter: InterpreterLauncher) -> None:
    small, out = random((3, 200), F32), Guarded((3,), F32)
    huge = np.lib.stride_tricks.as_strided(small, (3, 2**31 + 5), (800, 0))
    far = np.lib.stride_tricks.as_strided(small, (2, 3), (2**40, 4))
    for x, axis in ((huge, 1), (far, 0)):
        triton_reduce.reduce("sum", x, (axis,), out.array, interpreter, Scratch())
        of, target = reduce_walk.source(x, (axis,)), reduce_walk.dense(out.array, (3,))
        tiling = reduce_walk.pick_tiling(of, [target], 1)
        family = REDUCTIONS["sum"]
        _, (_, _, launch) = triton_reduce.launch_pass(family, "float32", of, [target], tiling, interpreter, 1, 0.0)
        assert launch.constexprs["WIDE"]
    reduced("sum", small, (1,), out, interpreter)
    (launch,) = interpreter.launches
    assert not launch.constexprs["WIDE"]
    out = Guarded((3,), F32)
    args = {**launch.args, "out": out.array}
    execute([interpreter.launch(triton_reduce.reduce_kernel, launch.grid, args, {**launch.constexprs, "WIDE": True})])
    assert_close(out, small.astype(np.float64).sum(1), error=1e-6)
