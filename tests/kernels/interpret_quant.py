"""Quantisation and products of 8-bit integers in Triton's interpreter, against NumPy, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.portable import quant as portable
from infera_kernels.portable.conv import convolution
from tests.kernels.references import F32, only
from tests.kernels.support import BFLOAT16, Guarded, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import dynamic, integer_conv, integer_matmul, integer_sums, integer_weight, quantise, tiles

pytestmark = pytest.mark.kernels

Array = np.ndarray[Any, np.dtype[Any]]


def bytes_of(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Array:
    info = np.iinfo(dtype)
    return random(shape, dtype, low=info.min, high=info.max + 0.99, seed=seed)


def exact(a: Array, b: Array, a_zero: Array | int = 0, b_zero: Array | int = 0) -> Array:
    return (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_halves_go_to_even_numbers_and_the_rest_is_saturated(dtype: str, interpreter: InterpreterLauncher) -> None:
    x = np.concatenate([np.arange(-9, 9, 0.5), [1e9, -1e9, np.inf, -np.inf, 0.49999997, 65535.5]]).astype(np.float32)
    scale, zero, out = np.array(1, np.float32), np.array(3, dtype), Guarded(x.shape, dtype)
    execute(quantise.quantise(x, scale, zero, out.array, interpreter))
    out.check_guards()
    only(interpreter, quantise.quantise_kernel)
    np.testing.assert_array_equal(out.array, portable.quantize(np, x, scale, zero, np.dtype(dtype)))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_half_precision_is_quantised_in_float32(dtype: Any, interpreter: InterpreterLauncher) -> None:
    x, scale, out = random((5, 33), dtype), np.array(0.037, dtype), Guarded((5, 33), np.int8)
    execute(quantise.quantise(x, scale, None, out.array, interpreter))
    np.testing.assert_array_equal(out.array, portable.quantize(np, x, scale, None, np.dtype(np.int8)))


def test_nan_is_the_lowest_integer(interpreter: InterpreterLauncher) -> None:
    x, out = np.array([np.nan, 1.0, np.inf], np.float32), Guarded((3,), F32)
    scale, zero = np.array(0.5, np.float32), np.array(3, np.int8)
    execute(quantise.centre(x, scale, zero, out.array, interpreter, low=-128, high=127, times=True))
    np.testing.assert_array_equal(out.array, np.array([-65.5, 1, 62], np.float32))


@pytest.mark.parametrize(("size", "launches"), [(1, 1), (8192, 1), (8193, 2), (40000, 2)])
def test_dynamic_ranges(size: int, launches: int, interpreter: InterpreterLauncher) -> None:
    x, parts = random((size,), F32, low=-3, high=5), dynamic.range_parts(size)
    q, scale, zero = Guarded((size,), np.uint8), Guarded((), F32), Guarded((), np.uint8)
    ranges = Guarded((2, parts), F32) if parts else None
    execute(dynamic.dynamic_quantise(*(x, q.array, scale.array, zero.array, ranges and ranges.array, interpreter)))
    assert len(interpreter.launches) == launches
    for made, want in zip((q, scale, zero), portable.dynamic_quantize(np, x), strict=True):
        made.check_guards()
        np.testing.assert_array_equal(made.array, want)


@pytest.mark.parametrize("right", ["int8", "uint8"])
@pytest.mark.parametrize("left", ["int8", "uint8"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (17, 35, 130), (3, 5, 0), (2, 33, 128)], ids=str)
def test_products_are_exact(m: int, n: int, k: int, left: str, right: str, interpreter: InterpreterLauncher) -> None:
    a, b, out = bytes_of((m, k), left), bytes_of((k, n), right, 1), Guarded((m, n), np.int32)
    a_zero, b_zero = bytes_of((m,), left, 2), bytes_of((n,), right, 3)
    execute(integer_matmul.integer_matmul(a, b, out.array, interpreter, a_zero=a_zero, b_zero=b_zero))
    out.check_guards()
    args = only(interpreter, integer_matmul.integer_matmul_kernel).constexprs
    assert args["ROW_SUMS"]
    assert args["COLUMN_SUMS"]
    want = exact(a, b, a_zero.astype(np.int64)[:, None], b_zero.astype(np.int64))
    np.testing.assert_array_equal(out.array, want)


@pytest.mark.parametrize(("kind", "middle"), [("int8", 0), ("uint8", 128)])
@pytest.mark.parametrize("zero", ["none", "middle", "columns"])
def test_packed_weights(kind: str, middle: int, zero: str, interpreter: InterpreterLauncher) -> None:
    a, b, out = bytes_of((5, 3, 37), np.uint8), bytes_of((37, 19), kind, 1), Guarded((5, 3, 19), np.int32)
    weight = integer_weight.Weight(
        integer_weight.packed_weight(b), integer_weight.column_sums(b), unsigned=kind == "uint8"
    )
    a_zero = np.array(77, np.uint8)
    b_zero = {"none": None, "middle": np.array(middle, kind), "columns": bytes_of((19,), kind, 3)}[zero]
    execute(
        integer_matmul.integer_matmul(
            *(a, weight, out.array, interpreter), a_zero=a_zero, b_zero=b_zero, signed_zeros=zero == "middle"
        )
    )
    launch = only(interpreter, integer_matmul.integer_matmul_kernel)
    assert launch.args["M"] == 15
    assert not launch.constexprs["COLUMN_SUMS"]
    assert launch.constexprs["ROW_SUMS"] == (zero == "columns" or (zero == "none" and middle > 0))
    np.testing.assert_array_equal(out.array, exact(a, b, 77, 0 if b_zero is None else b_zero.astype(np.int64)))


def test_batches_of_both(interpreter: InterpreterLauncher) -> None:
    a, b = bytes_of((2, 1, 5, 9), np.uint8), bytes_of((3, 9, 4), np.int8, 1)
    out = Guarded((2, 3, 5, 4), np.int32)
    execute(integer_matmul.integer_matmul(a, b, out.array, interpreter, a_zero=np.array(3, np.uint8)))
    out.check_guards()
    np.testing.assert_array_equal(out.array, exact(a, b, 3))


def test_sums_are_quantised_again(interpreter: InterpreterLauncher) -> None:
    a, b, out = bytes_of((19, 40), np.int8), bytes_of((40, 21), np.int8, 1), Guarded((19, 21), np.uint8, step=2)
    rows, columns = random((19,), F32, low=0.01, high=0.1), random((21,), F32, low=0.01, high=0.1, seed=1)
    scale, zero = np.array(2.3, np.float32), np.array(101, np.uint8)
    scaling = integer_sums.Scaling(rows, columns, scale, zero, alpha=0.5)
    execute(integer_matmul.integer_matmul(a, b, out.array, interpreter, scaling=scaling))
    out.check_guards()
    factor = np.float32(0.5) * rows[:, None] * columns / scale
    want = portable.requantize(np, exact(a, b).astype(np.int32), factor, zero)
    np.testing.assert_array_equal(out.array, want)


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(("kind", "left"), [("int8", "uint8"), ("uint8", "int8")])
@pytest.mark.parametrize("group", [1, 2])
def test_convolutions_are_exact(group: int, kind: str, left: str, last: bool, interpreter: InterpreterLauncher) -> None:
    """More channels than a block is deep, asymmetric padding of zero points, strides and dilations."""
    x, w = bytes_of((2, 2 * 35, 5, 4), left), bytes_of((6, 2 * 35 // group, 2, 3), kind, 1)
    x_zero, w_zero = np.array(7, left), bytes_of((6,), kind, 2)
    geometry: dict[str, Any] = {"strides": (2, 1), "dilations": (1, 2), "pads": ((1, 0), (2, 1))}
    want = convolution(
        *(np, x.astype(np.float64) - 7, w.astype(np.float64) - w_zero.astype(np.float64)[:, None, None, None]),
        *(None, (3, 3)),
        group=group,
        **geometry,
    )
    out = Guarded((2, 3, 3, 6) if last else (2, 6, 3, 3), np.int32)
    seen = out.array.transpose(0, 3, 1, 2) if last else out.array
    if last:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    filters = integer_conv.Filters(
        integer_conv.packed_filters(w), integer_conv.filter_sums(w), (6, 70 // group, 2, 3), kind == "uint8"
    )
    options: dict[str, Any] = {**geometry, "group": group, "x_zero": x_zero, "w_zero": w_zero}
    tile = tiles.Tile(16, 16, 32, 4, 3)
    execute(integer_conv.integer_conv(x, filters, seen, interpreter, tile=tile, **options))
    out.check_guards()
    launch = only(interpreter, integer_conv.integer_conv_kernel)
    assert launch.grid == (2 * group, 1, 1)
    assert launch.constexprs["BK"] == 32
    np.testing.assert_array_equal(seen, want)
