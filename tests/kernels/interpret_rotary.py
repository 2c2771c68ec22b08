"""Rotary embedding in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from tests.kernels.references import F32, ids, only
from tests.kernels.support import FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton.rotary import rotary, rotary_kernel, supports_rotary

pytestmark = pytest.mark.kernels

ERROR = 1e-6


def turned(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """The definition, in float64."""
    x, cos, sin = (v.astype(np.float64) for v in (x, cos, sin))
    half, made = x.shape[-1] // 2, np.empty(x.shape)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    a, b = x[..., first], x[..., second]
    whole = cos.shape[-1] == x.shape[-1]
    c, d, s, t = (v[..., part] if whole else v for v in (cos, sin) for part in (first, second))
    made[..., first], made[..., second] = a * c - b * s, b * d + a * t
    return made


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
@pytest.mark.parametrize("size", [2, 40, 128])
def test_tables(size: int, per_pair: bool, interleaved: bool, dtype: Any, interpreter: InterpreterLauncher) -> None:
    width = size // 2 if per_pair else size
    x, out = random((2, 3, 17, size), dtype), Guarded((2, 3, 17, size), dtype)
    cos, sin = random((17, width), dtype, seed=1), random((2, 1, 17, width), dtype, seed=2)
    execute(rotary(x, cos, sin, out.array, interpreter, interleaved=interleaved))
    launch = only(interpreter, rotary_kernel)
    assert launch.constexprs["PER_PAIR"] == per_pair
    assert launch.constexprs["PAIRS"] == max(1, {2: 1, 40: 32, 128: 64}[size])
    assert_close(out, turned(x, cos, sin, interleaved), error=ERROR)


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_of_a_projection(interleaved: bool, interpreter: InterpreterLauncher) -> None:
    """Columns of a wider matrix in, every second element of the output."""
    x = random((2, 5, 96), F32)[..., 32:64].reshape(2, 5, 4, 8).swapaxes(1, 2)
    cos, sin = random((5, 4), F32, seed=1), random((5, 4), F32, seed=2)
    out = Guarded((2, 4, 5, 8), F32, step=2)
    execute(rotary(x, cos, sin, out.array, interpreter, interleaved=interleaved))
    assert only(interpreter, rotary_kernel).constexprs["X_UNIT"] == 8
    assert_close(out, turned(x, cos, sin, interleaved), error=ERROR)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_positions(kind: Any, interpreter: InterpreterLauncher) -> None:
    x, cos, sin = random((2, 3, 5, 8), F32), random((50, 4), F32, seed=1), random((50, 4), F32, seed=2)
    places = np.array([[3, 1, 4, 1, 5], [49, 48, 0, 60, -3]], kind)
    out = Guarded(x.shape, F32)
    execute(rotary(x, cos, sin, out.array, interpreter, interleaved=False, places=places[:, None]))
    at = np.clip(places, 0, 49)[:, None]
    assert_close(out, turned(x, cos[at], sin[at], False), error=ERROR)


def test_positions_that_go_on_from_one(interpreter: InterpreterLauncher) -> None:
    x, cos, sin = random((2, 3, 5, 8), F32), random((50, 4), F32, seed=1), random((50, 4), F32, seed=2)
    last, out = np.array([7, 2], np.int32), Guarded((2, 3, 5, 8), F32)
    how = {"interleaved": True, "places": last[:, None, None], "shift": -4, "along": 2}
    execute(rotary(x, cos, sin, out.array, interpreter, **how))  # type: ignore[arg-type]
    at = (np.maximum(last - 4, 0)[:, None] + np.arange(5))[:, None]
    assert_close(out, turned(x, cos[at], sin[at], True), error=ERROR)


def test_what_is_refused() -> None:
    x, table = random((2, 5, 8), F32), random((5, 4), F32)
    assert supports_rotary(x, table, table, x)
    assert not supports_rotary(x[..., :7], table, table, x[..., :7])
    assert not supports_rotary(x, table[:, :3], table[:, :3], x)
    assert not supports_rotary(x, table.astype(np.float16), table, x)
    with pytest.raises(ValueError, match="no kernel for"):
        rotary(x, random((3, 4), F32), table, x, InterpreterLauncher(), interleaved=False)
