"""Running sums and products in Triton's interpreter, against `portable`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.portable import reduce as portable
from tests.kernels.references import F32
from tests.kernels.support import BFLOAT16, ROUNDING, Array, Guarded, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import scan

pytestmark = pytest.mark.kernels


def scanned(kind: str, x: Array, axis: int, interpreter: Any, **how: bool) -> Array:
    """The result, with scratch as it is announced."""
    out, pieces = Guarded(x.shape, x.dtype, step=2), []

    def scratch(shape: Any, dtype: Any = np.float32) -> Array:
        piece = Guarded(shape, dtype)
        pieces.append(piece)
        made: Array = piece.array
        return made

    execute(scan.scan(kind, x, axis, out.array, interpreter, scratch, **how))
    assert [(p.array.shape, p.array.dtype.name) for p in pieces] == scan.scratch_of(x, axis)
    for piece in (*pieces, out):
        piece.check_guards()
    made: Array = out.array
    return made


def expected(kind: str, x: Array, axis: int, **how: bool) -> Array:
    wide = x.astype(np.float64) if x.dtype.kind not in "iu" else x
    made = portable.scan(np, f"cum{kind}", wide, axis, identity=scan.SCANS[kind].start, **how)
    return np.asarray(made)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("dtype", sorted(scan.TYPES))
@pytest.mark.parametrize("kind", scan.SCANS)
def test_types(kind: str, dtype: str, exclusive: bool, reverse: bool, interpreter: InterpreterLauncher) -> None:
    x = random((2, 9, 3), F32, low=1, high=3)
    x = x.astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    how = {"exclusive": exclusive, "reverse": reverse}
    for axis in (0, 1, 2):
        got, want = scanned(kind, x, axis, interpreter, **how), expected(kind, x, axis, **how)
        if x.dtype.kind in "iu":
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=2 * ROUNDING.get(dtype, 1e-15) + 1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "parts"),
    [((3, 5000), 1, [1]), ((5000, 3), 0, [1]), ((70001,), 0, [9, 1, 9]), ((1, 40001, 2), 1, [10, 1, 10])],
    ids=str,
)
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_tiles_and_parts(
    shape: tuple[int, ...], axis: int, parts: list[int], exclusive: bool, turned: bool, interpreter: InterpreterLauncher
) -> None:
    x = random(shape, np.int64, low=-9, high=9)
    x = x[::-1] if turned else x
    got = scanned("sum", x, axis, interpreter, exclusive=exclusive, reverse=turned)
    assert [launch.grid[1] for launch in interpreter.launches] == parts
    np.testing.assert_array_equal(got, expected("sum", x, axis, exclusive=exclusive, reverse=turned))


def test_what_follows_infinities_and_nan(interpreter: InterpreterLauncher) -> None:
    x = np.ones((3, 6000), F32)
    x[0, 40], x[1, 4500], x[2, 100], x[2, 200] = np.inf, np.nan, np.inf, -np.inf
    for exclusive in (False, True):
        got = scanned("sum", x, 1, interpreter, exclusive=exclusive, reverse=False)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(got, expected("sum", x, 1, exclusive=exclusive, reverse=False))
