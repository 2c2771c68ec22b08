"""The k best in Triton's interpreter, against `portable`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.portable import reduce as portable
from tests.kernels.references import F32, ids
from tests.kernels.support import FLOATS, Array, Guarded, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import top_k

pytestmark = pytest.mark.kernels

TYPES = [*FLOATS, *(np.dtype(t) for t in ("int8", "uint8", "int16", "int32", "uint32"))]


def check(x: Array, k: int, axis: int, interpreter: InterpreterLauncher) -> None:
    """Both directions, values and places, the same bits; scratch as it is announced."""
    for largest in (True, False):
        want = portable.top_k(np, x, k, axis, largest=largest)
        values, places, pieces = Guarded(want[0].shape, x.dtype, step=2), Guarded(want[0].shape, np.int64), []

        def scratch(shape: Any, dtype: Any = np.float32) -> Array:
            pieces.append(Guarded(shape, dtype))  # noqa: B023
            made: Array = pieces[-1].array  # noqa: B023
            return made

        execute(top_k.top_k(x, k, axis, values.array, places.array, interpreter, scratch, largest=largest))
        assert [(p.array.shape, p.array.dtype.name) for p in pieces] == top_k.scratch_of(x, k, axis)
        for piece in (*pieces, values, places):
            piece.check_guards()
        np.testing.assert_array_equal(places.array, want[1])
        np.testing.assert_array_equal(values.array, want[0])


@pytest.mark.parametrize("dtype", TYPES, ids=ids)
def test_ties_and_types(dtype: Any, interpreter: InterpreterLauncher) -> None:
    x = random((3, 19), dtype, low=0, high=5).round().astype(dtype)
    if dtype.kind in "iu":
        x[0, 3:7], x[1, 4:9] = np.iinfo(dtype).min, np.iinfo(dtype).max
    check(x, 7, 1, interpreter)
    check(x, 2, 0, interpreter)


def test_infinities_zeros_and_nan(interpreter: InterpreterLauncher) -> None:
    x = random((2, 21), F32)
    x[0, [3, 8, 9]], x[0, [4, 5]], x[0, 7] = np.nan, np.inf, -np.inf
    x[1], x[1, ::3], x[1, 5] = 0.0, -0.0, -np.nan
    check(x, 21, 1, interpreter)


@pytest.mark.parametrize(
    ("shape", "axis", "k"),
    [((1,), 0, 1), ((5, 1), 1, 1), ((7, 8), 1, 2), ((40, 3, 5), 1, 3), ((2, 3, 33), 0, 1), ((2, 100), 1, 100)],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], axis: int, k: int, interpreter: InterpreterLauncher) -> None:
    check(random(shape, F32), k, axis, interpreter)
    assert len(interpreter.launches) == 2


def test_strides_of_any_kind(interpreter: InterpreterLauncher) -> None:
    whole = random((5, 6, 14), F32)
    for x in (whole.transpose(2, 0, 1), whole[::-1, ::2, ::-3]):
        for axis in range(3):
            check(x, 2, axis, interpreter)


@pytest.mark.parametrize(
    ("shape", "axis", "k", "launches"),
    [((2, 70), 1, 3, 2), ((300, 2), 0, 5, 3), ((1, 1000), 1, 8, 4), ((3, 33), 1, 1, 2)],
    ids=str,
)
def test_long_rows_are_searched_in_chunks(
    shape: tuple[int, ...],
    axis: int,
    k: int,
    launches: int,
    interpreter: InterpreterLauncher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(top_k, "_LONGEST", 32)
    monkeypatch.setattr(top_k, "_CHUNK", 32)
    x = random(shape, np.int32, low=0, high=50)
    check(x, k, axis, interpreter)
    assert len(interpreter.launches) == 2 * launches


def test_what_is_not_supported() -> None:
    assert top_k.supports_top_k(np.empty((2, 5000), F32), 1024, 1)
    assert not top_k.supports_top_k(np.empty((2, 5000), F32), 1025, 1)
    assert not top_k.supports_top_k(np.empty((2, 5), np.int64), 3, 1)
    assert not top_k.supports_top_k(np.empty((), F32), 1, 0)
    with pytest.raises(ValueError, match="no kernel for 2 of float64"):
        top_k.top_k(np.empty(3), 2, 0, None, None, InterpreterLauncher(), np.empty, largest=True)
