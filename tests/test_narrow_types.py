"""Narrow and complex types where neither onnxruntime nor onnx's reference has an answer: against plain formulas."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import infera_gpu
from infera_gpu.compat.types import type_name
from infera_gpu.errors import PlanError
from infera_gpu.op import Case
from infera_gpu.ops import registry
from infera_gpu.ops._families import NARROW
from infera_gpu.spec import DType, onnx_of_dtype
from tests.cases import compute, inputs_of, site_of
from tests.test_opset_audit import NEWEST
from tests.test_type_audit import DTYPES, converted, kind
from tests.text import parse

FLOAT8 = tuple(dtype for dtype, since in NARROW.items() if since == 19)


def outcome(name: str, *ins: Any, opset: int = 28, **attrs: Any) -> Any:
    op = registry().find("", name, opset)
    assert op is not None
    case = Case("narrow", ins, attrs, opset=opset)
    given = inputs_of(op, case)
    return compute(op, site_of(op, case, given), given)[0]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("scale", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_products_of_float8_are_those_of_what_they_stand_for(dtype: DType, scale: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-3, 3, shape).astype(dtype) for shape in ((3, 8), (8, 5)))
    scales = [np.array(v, scale) for v in (0.5, 0.25, 0.125)]
    zero = np.zeros((), dtype)
    got = outcome("QLinearMatMul", a, scales[0], zero, b, scales[1], zero, scales[2], zero)
    want = a.astype(np.float64) @ b.astype(np.float64)  # the scales cancel, and the products are exact
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float32).astype(dtype).astype(np.float64))


def test_products_of_float8_saturate() -> None:
    dtype = np.dtype(ml_dtypes.float8_e4m3fn)
    one, zero, many = np.array(1, np.float32), np.zeros((), dtype), np.full((1, 4), 200).astype(dtype)
    got = outcome("QLinearMatMul", many, one, zero, -many.reshape(4, 1), one, zero, one, zero)
    assert got.astype(float).tolist() == [[-448]]


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_complex_values_are_resized_in_both_parts(mode: str) -> None:
    rng = np.random.default_rng(1)
    real, imaginary = rng.standard_normal((2, 4, 5))
    scales = np.array([1.7, 0.6], np.float32)
    got = outcome("Resize", real + 1j * imaginary, None, scales, mode=mode)
    parts = [outcome("Resize", x, None, scales, mode=mode) for x in (real, imaginary)]
    np.testing.assert_allclose(got, parts[0] + 1j * parts[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("source", "target"), [(ml_dtypes.int4, np.int8), (ml_dtypes.uint2, ml_dtypes.uint4), (np.int64, object)]
)
def test_bits_are_not_reinterpreted_as_more_or_fewer(source: Any, target: Any) -> None:
    with pytest.raises(PlanError, match="the elements differ in size"):
        outcome("BitCast", np.ones(3).astype(source), to=onnx_of_dtype(np.dtype(target)))


def test_types_are_spelt_as_onnx_spells_them() -> None:
    assert {name: type_name(dtype) for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}


REAL = {name[7:-1]: dtype for name, dtype in DTYPES.items() if dtype.kind != "c"}
WIDTHS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4}


def wrapped(values: Any, name: str, dtype: DType) -> Any:
    """Whole numbers as the type holds them: low bits of integers, the nearest power of two that is not below."""
    if dtype == np.bool_:
        return values != 0
    if kind(dtype) == "i":
        bits = WIDTHS.get(name, 8 * dtype.itemsize)
        low = values.astype(np.int64) & ((1 << bits) - 1) if bits < 64 else values.astype(np.int64)
        return np.where(low >> (bits - 1), low - (1 << bits), low) if bits < 64 and not name.startswith("u") else low
    return np.exp2(np.ceil(np.log2(values))) if name == "float8e8m0" else values


@pytest.mark.parametrize("target", REAL)
@pytest.mark.parametrize("source", REAL)
def test_cast_from_any_type_to_any_other(source: str, target: str) -> None:
    """Small whole numbers, which every float holds; into unsigned types and powers of two, those that are positive."""
    positive = target.startswith("u") or "float8e8m0" in (source, target)
    values = np.array([1, 2, 3, 4] if positive else [1, 2, 3, 6, -1, -3, -4, 0], np.float64)
    text = [str(int(v)) for v in values]
    x = np.array(text, object) if source == "string" else converted(values, REAL[source])
    got = outcome("Cast", x, opset=NEWEST, to=onnx_of_dtype(REAL[target]))
    assert got.dtype == REAL[target]
    held = values if source == "string" else x.astype(np.float64)
    if target == "string":
        assert got.tolist() == [str(int(v)) for v in held]
    else:
        want = wrapped(held, target, REAL[target])
        np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


@pytest.mark.parametrize("back", ["q", "a", "y"])
@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 120), ("int8", -3)])
def test_nan_is_the_lowest_integer(dtype: str, zero: int, back: str) -> None:
    """As in onnxruntime: whether the integers exist, stay floats, or are multiplied."""
    types = {"q": f"{dtype}[1, 4]", "a": "float[1, 4]", "y": "float[1, 2]"}
    model = parse(f"""
        g (float[1, 4] x) => ({types[back]} {back})
        <int8[4, 2] w = {{1, 2, -3, 4, 5, 127, 2, 1}}, float s = {{0.05}}, {dtype} z = {{{zero}}},
         float[2] t = {{0.5, 0.25}}, int8[2] p = {{0, -3}}> {{
            q = QuantizeLinear(x, s, z)
            a = DequantizeLinear(q, s, z)
            b = DequantizeLinear <axis = 1> (w, t, p)
            y = MatMul(a, b)
        }}""")
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    q = np.array([[-8 + zero, low, high, low]])
    a = (q - zero).astype(np.float32) * np.float32(0.05)
    w = np.array([[1, 2], [-3, 4], [5, 127], [2, 1]])
    want = {"q": q, "a": a, "y": a @ ((w - [0, -3]) * [0.5, 0.25])}[back]
    x = np.array([[-0.4, np.nan, np.inf, -np.inf]], np.float32)
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("cpu", {}),
        ("cpu", {"accuracy": "strict"}),
        ("cpu", {"fuse": False}),
        ("recording", {}),
    )
    for device, options in ways:
        got = infera_gpu.load(model, device=device, **options).run({"x": x})[back]
        np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=f"{device} {options}")
