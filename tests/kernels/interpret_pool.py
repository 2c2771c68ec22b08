"""Pools in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.portable.pool import average_pool, lp_pool, max_pool
from tests.kernels.references import ids, only
from tests.kernels.support import BFLOAT16, FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import conv, global_pool, pool

pytestmark = pytest.mark.kernels

ERROR = 1e-6
"""What sums in float32 may lose, relative to the largest result."""

WINDOW: dict[str, Any] = {
    "kernel": (3, 2), "strides": (2, 1), "dilations": (1, 2), "pads": ((1, 1), (0, 1)),
}  # fmt: skip
SHAPE, OUT = (2, 7, 6, 70), (2, 4, 5, 70)


def where() -> conv.Geometry:
    return conv.geometry(*(WINDOW[name] for name in ("kernel", "strides", "dilations", "pads")))


def first(x: Array) -> Array:
    """In float64, channels first."""
    return np.moveaxis(x, -1, 1).astype(np.float64)


def want(kind: str, x: Array, *, p: int = 1, include_pad: bool = False) -> Array:
    if kind == "max":
        made = max_pool(np, first(x), OUT[1:3], **WINDOW)[0]
    elif kind == "average":
        made = average_pool(np, first(x), OUT[1:3], include_pad=include_pad, **WINDOW)
    else:
        made = lp_pool(np, first(x), OUT[1:3], p=p, **WINDOW)
    return np.moveaxis(made, 1, -1)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("max", {}),
        ("average", {}),
        ("average", {"include_pad": True}),
        *(("lp", {"p": p}) for p in (1, 2, 3)),
    ],
    ids=str,
)
def test_windows(kind: str, options: dict[str, Any], dtype: Any, interpreter: InterpreterLauncher) -> None:
    x, out = random(SHAPE, dtype), Guarded(OUT, dtype)
    pads_after = [after for _, after in WINDOW["pads"]]
    execute(pool.pool(kind, x, out.array, interpreter, where(), pads_after=pads_after, **options))
    launch = only(interpreter, pool.pool_kernel)
    assert (launch.constexprs["KIND"], launch.constexprs["BN"]) == (kind, 64)
    assert_close(out, want(kind, x, **options), error=0 if kind == "max" else ERROR)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_maxima_are_nan_where_something_is(dtype: Any, interpreter: InterpreterLauncher) -> None:
    x, out, index = random(SHAPE, dtype), Guarded(OUT, dtype), Guarded(OUT, np.int64)
    x[0, 3, 2, ::3] = np.nan
    x[1, :, :, 5] = -np.inf
    execute(pool.pool("max", x, out.array, interpreter, where(), index=index.array))
    assert_close(out, want("max", x))
    index.check_guards()
    positions = np.moveaxis(max_pool(np, first(x), OUT[1:3], **WINDOW)[1], 1, -1)
    finite = np.isfinite(out.array.astype(np.float64))  # of padding alone, nobody asks where it lies
    np.testing.assert_array_equal(index.array[finite], positions[finite])


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_maxima_of_bytes(dtype: str, interpreter: InterpreterLauncher) -> None:
    bounds = np.iinfo(dtype)
    x, out = random(SHAPE, dtype, low=bounds.min, high=bounds.max), Guarded(OUT, dtype)
    execute(pool.pool("max", x, out.array, interpreter, where()))
    out.check_guards()
    np.testing.assert_array_equal(
        out.array, np.moveaxis(max_pool(np, np.moveaxis(x, -1, 1), OUT[1:3], **WINDOW)[0], 1, -1)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("planes", [False, True], ids=["channels-last", "channels-first"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 70), (1, 40, 33, 5)], ids=str)
def test_whole_images(shape: tuple[int, ...], planes: bool, dtype: Any, interpreter: InterpreterLauncher) -> None:
    x = random(shape, dtype)
    wide = first(x)
    seen = np.ascontiguousarray(np.moveaxis(x, -1, 1)).transpose(0, 2, 3, 1) if planes else x
    scratch = global_pool.parts_of(x)
    assert scratch == (None if shape[0] == 2 else (1, 2, 5))
    for kind, p in (("max", 1), ("average", 1), ("lp", 1), ("lp", 2), ("lp", 3)):
        interpreter.launches.clear()
        out, parts = Guarded((shape[0], shape[-1]), dtype), scratch and Guarded(scratch, np.float32)
        execute(global_pool.global_pool(kind, seen, out.array, interpreter, parts=parts and parts.array, p=p))
        assert len(interpreter.launches) == (2 if parts else 1)
        reference = {
            "max": wide.max(axis=(2, 3)),
            "average": wide.mean(axis=(2, 3)),
            "lp": (np.abs(wide) ** p).sum(axis=(2, 3)) ** (1 / p),
        }[kind]
        scale = float(np.abs(wide).mean() / max(np.abs(reference).max(), 1e-9)) if kind == "average" else 1.0
        assert_close(out, reference, error=0 if kind == "max" else ERROR * max(scale, 1.0))


def test_a_maximum_of_a_whole_image_is_nan_where_something_is(interpreter: InterpreterLauncher) -> None:
    x, out = random((2, 5, 4, 3), BFLOAT16), Guarded((2, 3), BFLOAT16)
    x[1, 2, 2, 1] = np.nan
    x[0, :, :, 2] = -np.inf
    execute(global_pool.global_pool("max", x, out.array, interpreter))
    assert_close(out, x.astype(np.float64).max(axis=(1, 2)))


def test_what_has_no_kernel_is_named(interpreter: InterpreterLauncher) -> None:
    x = np.empty((1, 4, 4, 2), np.float64)
    with pytest.raises(ValueError, match=r"pool: no max for float64\[1, 4, 4, 2\]"):
        pool.pool("max", x, x, interpreter, where())
    with pytest.raises(ValueError, match=r"global_pool: none for float64\[1, 4, 4, 2\]"):
        global_pool.global_pool("max", x, x[:, 0, 0], interpreter)
