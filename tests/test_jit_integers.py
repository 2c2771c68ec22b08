"""Compiled products of 8-bit integers and quantisation: the same integers as NumPy's, and the same floats."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from infera_kernels import jit
from infera_kernels.calls import Call

if not jit.installed():
    pytest.skip("needs numba: pip install 'infera-gpu[jit]'", allow_module_level=True)

from infera_kernels.cpu import quant
from infera_kernels.cpu.conv import conv2d as floating_conv2d
from infera_kernels.jit import integers, quantise
from infera_kernels.jit.dot_tile import LEFT_TYPES
from infera_kernels.jit.integer_conv import conv2d
from infera_kernels.jit.microkernel import TILE

Array = np.ndarray[Any, np.dtype[Any]]
LEFTS = [pytest.param(t, id=t.name) for t in LEFT_TYPES]
TYPES = [pytest.param(np.dtype(t), id=t.__name__) for t in (np.uint8, np.int8)]


def run(calls: Sequence[Call]) -> None:
    with np.errstate(all="ignore"):
        for fn, args in calls:
            fn(*args)


def dirty(shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """Scratch: what is read before it is written shows."""
    return np.frombuffer(b"\x7f" * (int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape).copy()


def drawn(dtype: Any, *shape: int, seed: int = 0) -> Array:
    """All values of an 8-bit type, and rows and columns of nothing but its ends, whose products are the largest."""
    info = np.iinfo(dtype)
    made = np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)
    made[-1], made[:, 0] = info.max, info.min
    return made


def took(x: Array, zero: Array | None, left: Any) -> tuple[integers.Left, list[Call]]:
    made = integers.left_of((x.shape[0], x.shape[1]), dirty, left)
    return made, integers.take(x, zero, made)


def packed(w: Array, zero: Array | None, left: Any) -> integers.Weight:
    return integers.Weight(integers.pack(w, left), integers.terms(w, zero))


@pytest.mark.parametrize("left", LEFTS)
@pytest.mark.parametrize("m", [1, 2, TILE.rows - 1, TILE.rows, 2 * TILE.rows + 1])
@pytest.mark.parametrize("n", [1, TILE.lanes + 1, TILE.columns, 3 * TILE.columns - 5])
@pytest.mark.parametrize("k", [1, 38, 1003])
def test_product(left: Any, m: int, n: int, k: int) -> None:
    x, w = drawn(np.uint8, m, k), drawn(np.int8, k, n, seed=1)
    want = (x.astype(np.int32) - 117) @ w.astype(np.int32)
    taken, calls = took(x, np.array(117, np.int32), left)
    for parts in (1, 3):
        wide = np.full((m, n + 9), -7, np.int32)
        made = integers.product(taken, packed(w, None, left), wide[:, 4 : n + 4], parts=parts)
        run([*calls, *(call for part in reversed(made) for call in part)])
        np.testing.assert_array_equal(wide[:, 4 : n + 4], want)
        assert (np.delete(wide, range(4, n + 4), axis=1) == -7).all(), "written beside the product"


@pytest.mark.parametrize("left", LEFTS)
@pytest.mark.parametrize("x_type", [*TYPES, pytest.param(np.dtype(np.float32), id="float32")])
@pytest.mark.parametrize("w_type", TYPES)
@pytest.mark.parametrize("points", [0, 1, 37], ids=["none", "single", "columns"])
def test_zero_points(left: Any, x_type: Any, w_type: Any, points: int) -> None:
    m, k, n = 5, 515, 37
    source = drawn(np.uint8 if x_type == np.float32 else x_type, m, k)
    w = drawn(w_type, k, n, seed=1)
    a_zero = np.array(drawn(source.dtype, 2, 2, seed=2)[0, 1] if points else 0, np.int32)
    b_zero = drawn(w_type, points, 1, seed=3).reshape(-1) if points else None
    centred = source.astype(np.int32) - a_zero
    x, zero = (centred.astype(np.float32), None) if x_type == np.float32 else (source, a_zero)
    taken, calls = took(x, zero, left)
    y = np.empty((m, n), np.int32)
    run([*calls, *integers.product(taken, packed(w, b_zero, left), y)[0]])
    np.testing.assert_array_equal(y, centred @ (w.astype(np.int32) - (0 if b_zero is None else b_zero)))


@pytest.mark.parametrize("left", LEFTS)
def test_sums_are_scaled_as_numpy_does(left: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(-100, 156, (30, 400)).astype(np.float32), drawn(np.int8, 400, 70)
    scale, scales, bias = np.array(0.0371, np.float32), rng.random(70, np.float32), rng.random(70, np.float32) - 0.5
    sums = x.astype(np.int32) @ w.astype(np.int32)
    x[7, 3] = np.nan
    taken, calls = took(x, None, left)
    y = np.empty((30, 70), np.float32)
    columns = {"scales": integers.spread(scales, 70), "bias": integers.spread(bias, 70)}
    run([*calls, *integers.product(taken, packed(w, None, left), y, scale=scale, **columns)[0]])
    want = sums.astype(np.float32) * (scale * scales) + bias
    want[7] = np.nan
    np.testing.assert_array_equal(y, want)


AWKWARD = {
    "both_signs": np.linspace(-3, 5, 4001),
    "positive": np.linspace(1, 5, 33),
    "negative": np.linspace(-5, -1, 5001),
    "ties": np.arange(-255, 256) / 2,
    "zeros": np.array([0.0, -0.0, 0.0]),
    "subnormal": np.array([1e-41, -3e-41]),
    "large": np.array([3e38, -3e38, 1.0]),
    "nan": np.array([1, -np.nan, 2, np.nan, -4]),
    "one_nan": np.array([1, np.nan, 2]),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_quantised_as_numpy_does(name: str) -> None:
    x = AWKWARD[name].astype(np.float32)
    want, got = (np.empty_like(x), np.empty((), np.float32)), (np.empty_like(x), np.empty((), np.float32))
    limits = dirty((2,))
    run(quant.dynamic_centre(x, *want, dirty))
    run([quantise.dynamic_range(x, got[1], limits), *quantise.centre(x, got[0], got[1], limits)])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    if not np.isnan(x).any():
        zero, bytes_want, bytes_got = np.array(3, np.float32), dirty(x.shape, np.int8), dirty(x.shape, np.int8)
        run(quant.quantize(x, got[1], zero, bytes_want, dirty))
        run(quantise.quantize(x, got[1], zero, bytes_got))
        np.testing.assert_array_equal(bytes_got, bytes_want)
    for again in (False, True):
        held, scale, bounds = x.copy(), np.array(0.5, np.float32), (-100, 155)
        run(quant.centre(x, scale, bounds, want[0], dirty, dequantize=again))
        run(quantise.centre(held, held, scale, np.array(bounds, np.float32), dequantize=again))
        np.testing.assert_array_equal(held, want[0])


@pytest.mark.parametrize("q_type", TYPES)
def test_requantised_as_numpy_does(q_type: Any) -> None:
    sums = np.random.default_rng(0).integers(-(2**24), 2**24, (7, 50)).astype(np.int32)
    sums[0] = np.arange(-25, 25)
    factor = np.geomspace(1e-6, 0.5, 50, dtype=np.float32)
    factor[::2] = 0.5
    zero, want, got = np.array(3, np.float32), np.empty((7, 50), q_type), np.empty((7, 50), q_type)
    run(quant.requantize(sums, factor, zero, want, dirty))
    run(quantise.requantize(sums, factor, zero, got))
    np.testing.assert_array_equal(got, want)


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, int, int, int], dict[str, Any]]] = {
    "3x3": ((2, 3, 9, 10), (5, 3, 3, 3), {"pads": ((1, 1), (1, 1))}),
    "uneven": ((3, 4, 8, 7), (40, 4, 3, 2), {"strides": (2, 3), "pads": ((1, 0), (0, 2))}),
    "dilated": ((1, 6, 12, 12), (9, 6, 3, 3), {"pads": ((2, 2), (3, 3)), "dilations": (2, 3)}),
    "grouped": ((2, 6, 9, 8), (9, 2, 3, 3), {"groups": 3, "pads": ((1, 1), (1, 1))}),
    "pointwise": ((2, 5, 5, 7), (67, 5, 1, 1), {}),
    "blocks": ((1, 70, 60, 64), (24, 70, 3, 3), {}),
    "depthwise": ((2, 24, 9, 10), (24, 1, 3, 3), {"groups": 24, "strides": (2, 1), "pads": ((1, 1), (1, 0))}),
}


@pytest.mark.parametrize("left", LEFTS)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("w_type", TYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(left: Any, x_type: Any, w_type: Any, name: str) -> None:
    shape, kernel, given = CONVOLUTIONS[name]
    options: Any = {"strides": (1, 1), "pads": ((0, 0), (0, 0)), "dilations": (1, 1), "groups": 1, **given}
    x = drawn(x_type, shape[0] * shape[1], *shape[2:]).reshape(shape)
    w = np.random.default_rng(1).integers(0, 128, kernel).astype(w_type)
    w_zero = np.arange(kernel[0]).astype(w_type)
    bias = np.arange(kernel[0], dtype=np.int32) * 100
    out = tuple(
        (d + sum(p) - (k - 1) * r - 1) // s + 1
        for d, k, p, r, s in zip(
            shape[2:], kernel[2:], options["pads"], options["dilations"], options["strides"], strict=True
        )
    )
    sums = np.empty((shape[0], kernel[0], *out))
    floats = x.astype(np.float64) - 3, w - w_zero.reshape(-1, 1, 1, 1).astype(np.float64), bias.astype(np.float64)
    group = {("group" if k == "groups" else k): v for k, v in options.items()}
    run(floating_conv2d(*floats, sums, dirty, **group))
    factor, zero = np.geomspace(1e-4, 1e-2, kernel[0], dtype=np.float32), np.array(7, np.float32)
    want = dirty(sums.shape, np.int8)
    run(quant.requantize(sums.astype(np.int32), factor.reshape(-1, 1, 1), zero, want, dirty))
    for last, parts in ((False, 1), (True, 3)):
        y = dirty(np.moveaxis(sums, 1, -1).shape if last else sums.shape, np.int8)
        source = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x
        calls, made = conv2d(
            source, 3, w_zero, bias, factor, zero, y, dirty, kernel=kernel, last=last,
            pack=lambda tag, build: build(w), parts=parts, left=left, **options,
        )  # fmt: skip
        run([*calls, *(call for part in reversed(made) for call in part)])
        np.testing.assert_array_equal(np.moveaxis(y, -1, 1) if last else y, want)


@pytest.mark.parametrize("features", [("avx2",), ()], ids=["avx2", "none"])
def test_narrower_vectors(features: Sequence[str], tmp_path: Any) -> None:
    """Tiles as they are on a lesser processor."""
    chosen = "zero_points or as_numpy or 3x3 or depthwise"
    script = (
        "import llvmlite.binding.targets as b, llvmlite.binding, pytest, sys\n"
        f"llvmlite.binding.get_host_cpu_features = lambda: b.FeatureMap(dict.fromkeys({features!r}, True))\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {__file__!r}, '-k', {chosen!r}]))"
    )
    env = {**os.environ, "INFERA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
