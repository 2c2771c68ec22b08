"""Growing caches in Triton's interpreter, against NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from tests.kernels.references import ids, only
from tests.kernels.support import BFLOAT16, FLOATS, Array, Guarded, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton.cache import append, append_kernel, supports_append

pytestmark = pytest.mark.kernels


def appended(past: Array | None, new: Array, rows: int, starts: list[int]) -> Array:
    """The definition, matrix by matrix of (batch, heads, rows, size)."""
    made = np.zeros((*new.shape[:2], rows, new.shape[3]), new.dtype)
    for b, start in enumerate(starts):
        if past is not None:
            kept = min(start, past.shape[2])
            made[b, :, :kept] = past[b, :, :kept]
        made[b, :, start : start + new.shape[2]] = new[b]
    return made


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(("rows", "size"), [(10, 8), (10, 40), (130, 80)], ids=str)
def test_one_length_a_row(rows: int, size: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    past, new = random((3, 2, 7, size), dtype), random((3, 2, 2, size), dtype, seed=1)
    last, out = np.array([8, 1, 4], np.int32), Guarded((3, 2, rows, size), dtype)
    execute(append(past, new, out.array, interpreter, lengths=last.reshape(3, 1, 1, 1), shift=-1))
    launch = only(interpreter, append_kernel)
    assert launch.constexprs["OUT_UNITS"][1] == min(16, size & -size)
    out.check_guards()
    np.testing.assert_array_equal(out.array, appended(past, new, rows, [7, 0, 3]))


def test_after_the_whole_past(interpreter: InterpreterLauncher) -> None:
    past, new = random((2, 3, 5, 4), np.float32), random((2, 4, 3, 4), np.float32, seed=1).swapaxes(1, 2)
    out = Guarded((2, 3, 9, 4), np.float32, step=2)
    execute(append(past, new, out.array, interpreter, shift=5))
    out.check_guards()
    np.testing.assert_array_equal(out.array, np.concatenate((past, new), axis=2))


def test_without_a_past(interpreter: InterpreterLauncher) -> None:
    new, out = random((2, 3, 4, 4), BFLOAT16), Guarded((2, 3, 6, 4), BFLOAT16)
    execute(append(None, new, out.array, interpreter))
    np.testing.assert_array_equal(out.array, appended(None, new, 6, [0, 0]))
    assert not append(None, new, np.empty((2, 3, 0, 4), BFLOAT16), interpreter)
    assert not supports_append(None, new, np.empty((2, 3, 6, 5), BFLOAT16))
    with pytest.raises(ValueError, match="no kernel for"):
        append(None, new, np.empty((2, 2, 6, 4), BFLOAT16), interpreter)
