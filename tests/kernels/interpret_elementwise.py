"""Elementwise operations in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from tests.kernels.references import BINARY, F32, FUNCTION_ERROR, UNARY, ids, only
from tests.kernels.support import BFLOAT16, FLOATS, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import elementwise, pointwise
from infera_kernels.triton.terms import Term

pytestmark = pytest.mark.kernels


def test_every_operation_has_a_reference() -> None:
    of_floats = {name for name, e in elementwise.UNARY.items() if "float32" in e.dtypes and e.result is None}
    assert set(UNARY) == of_floats
    assert set(BINARY) == set(elementwise.BINARY)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("op", UNARY)
def test_unary(op: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    reference, low, high = UNARY[op]
    x, out = random((3, 43), dtype, low=low, high=high), Guarded((3, 43), dtype)
    given = {"alpha": -0.5, "beta": 1.25} if op == "clip" else {}
    execute(elementwise.unary(op, x, out.array, interpreter, **given))
    only(interpreter, pointwise.pointwise_kernel)
    assert_close(out, reference(x.astype(np.float64)), error=FUNCTION_ERROR)


@pytest.mark.parametrize("op", ["relu", "clip", "tanh", "gelu", "sigmoid", "exp", "sqrt", "log", "neg", "erf"])
def test_unary_specials(op: str, interpreter: InterpreterLauncher) -> None:
    x = np.array([np.nan, np.inf, 0.0, 1e-30, 80.0], F32)
    out = Guarded(x.shape, F32)
    execute(elementwise.unary(op, x, out.array, interpreter))
    with np.errstate(all="ignore"):
        reference = (lambda v: v) if op == "clip" else UNARY[op][0]
        assert_close(out, reference(x.astype(np.float64)).astype(F32), error=1e-6)


def test_tanh_keeps_small_values(interpreter: InterpreterLauncher) -> None:
    x = np.float32(10.0) ** -np.arange(1, 30, dtype=F32)
    out = Guarded(x.shape, F32)
    execute(elementwise.unary("tanh", x, out.array, interpreter))
    np.testing.assert_allclose(out.array, np.tanh(x.astype(np.float64)), rtol=2e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_zeros_have_the_other_sign(dtype: str, interpreter: InterpreterLauncher) -> None:
    out = Guarded((2,), dtype)
    execute(elementwise.unary("neg", np.asarray([0.0, -0.0], dtype), out.array, interpreter))
    assert np.signbit(out.array).tolist() == [True, False]


@pytest.mark.parametrize("op", ["sin", "cos", "tan"])
def test_angles_of_every_size(op: str, interpreter: InterpreterLauncher) -> None:
    """Beside multiples of pi/2, where most digits of the difference are those of pi, and up to the largest float32."""
    rng = np.random.default_rng(0)
    multiples = np.concatenate([np.arange(-80, 80), rng.integers(-(2**13), 2**13, 300), rng.integers(0, 2**23, 300)])
    spread = np.ldexp(rng.uniform(0.5, 1, 2000), rng.integers(-40, 129, 2000)) * rng.choice([-1, 1], 2000)
    ends = [0.0, -0.0, 1e-40, np.finfo(F32).max, 12000, np.nextafter(F32.type(12000), np.inf), -12001]
    for some in (multiples * (np.pi / 2), spread, ends, [np.nan, np.inf, -np.inf]):
        x = np.asarray(some).astype(F32)
        out = Guarded(x.shape, F32)
        execute(elementwise.unary(op, x, out.array, interpreter))
        out.check_guards()
        with np.errstate(invalid="ignore"):
            want = UNARY[op][0](x.astype(np.float64))
        np.testing.assert_allclose(out.array, want, rtol=5 * 2.0**-24 if op != "tan" else 9 * 2.0**-24)
        np.testing.assert_array_equal(np.signbit(out.array[x == 0]), np.signbit(want[x == 0]))


@pytest.mark.parametrize("size", [1, 3, 1023, 1024, 1025, 2049])
def test_unary_sizes(size: int, interpreter: InterpreterLauncher) -> None:
    x, out = random((size,), F32), Guarded((size,), F32)
    execute(elementwise.unary("neg", x, out.array, interpreter))
    assert_close(out, -x)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_unary_integers(dtype: Any, interpreter: InterpreterLauncher) -> None:
    x, out = random((5, 7), dtype, low=-(2.0**30), high=2.0**30), Guarded((5, 7), dtype)
    execute(elementwise.unary("neg", x, out.array, interpreter))
    out.check_guards()
    np.testing.assert_array_equal(out.array, -x)


def test_logical_not(interpreter: InterpreterLauncher) -> None:
    x, out = random((37,), np.float32) > 0, Guarded((37,), np.bool_)
    execute(elementwise.unary("logical_not", x, out.array, interpreter))
    out.check_guards()
    np.testing.assert_array_equal(out.array, ~x)


OPERANDS = (*FLOATS, *map(np.dtype, ("int32", "int64", "uint8", "bool")))


@pytest.mark.parametrize("dtype", OPERANDS, ids=ids)
@pytest.mark.parametrize("op", BINARY)
def test_binary(op: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    entry = elementwise.BINARY[op]
    result = np.dtype(entry.result or dtype)
    x, y = random((4, 1, 9), np.float32, low=-3, high=3), random((5, 9), np.float32, low=0.5, high=3, seed=1)
    if op == "pow" or dtype == np.uint8:
        x = np.abs(x)
    x, y = (x > 0, y > 1.5) if dtype == np.bool_ else (x.astype(dtype), y.astype(dtype))
    y[0, :4] = x[0, 0, :4]
    if np.dtype(dtype).kind in "iu":
        y = np.maximum(y, 1)
    out = Guarded((4, 5, 9), result)
    if dtype.name not in entry.dtypes:
        assert not elementwise.supports_binary(op, x, y, out.array)
        with pytest.raises(ValueError, match=f"{op}: no kernel"):
            elementwise.binary(op, x, y, out.array, interpreter)
        return
    assert elementwise.supports_binary(op, x, y, out.array)
    execute(elementwise.binary(op, x, y, out.array, interpreter))
    only(interpreter, pointwise.pointwise_kernel)
    if result.name in ("float32", "float16", "bfloat16"):
        assert_close(out, BINARY[op](x.astype(np.float64), y.astype(np.float64)), error=FUNCTION_ERROR)
    else:
        out.check_guards()
        want = BINARY[op](x, y)
        np.testing.assert_array_equal(out.array, np.trunc(want) if op == "div" else want)


def test_integers_divided_by_zero_are_zero(interpreter: InterpreterLauncher) -> None:
    x, y = np.array([-7, 7, 5], np.int32), np.array([0, -2, 0], np.int32)
    for op, want in (("div", [0, -3, 0]), ("fmod", [0, 1, 0]), ("mod", [0, -1, 0])):
        out = Guarded((3,), np.int32)
        execute(elementwise.binary(op, x, y, out.array, interpreter))
        np.testing.assert_array_equal(out.array, want)


def test_pow_signs_and_limits(interpreter: InterpreterLauncher) -> None:
    values = np.array([-np.inf, -2.5, -1, -0.0, 0.0, 0.5, 1, 2, np.inf, np.nan], F32)
    exponents = np.array([-np.inf, -3, -2, -0.5, 0, 0.5, 1, 2, 3, 1e9, np.inf, np.nan], F32)
    x, y = np.meshgrid(values, exponents, indexing="ij")
    out = Guarded(x.shape, F32)
    execute(elementwise.binary("pow", x, y, out.array, interpreter))
    out.check_guards()
    with np.errstate(all="ignore"):
        want = np.power(x, y)
    np.testing.assert_allclose(np.abs(out.array), np.abs(want), rtol=2e-7)
    numbers = ~np.isnan(want) & (want != 0)
    np.testing.assert_array_equal(np.signbit(out.array[numbers]), np.signbit(want[numbers]))


@pytest.mark.parametrize("op", ["min", "max"])
def test_nan_is_not_dropped(op: str, interpreter: InterpreterLauncher) -> None:
    x, y = np.array([np.nan, 1, np.nan], F32), np.array([1, np.nan, np.nan], F32)
    out = Guarded((3,), F32)
    execute(elementwise.binary(op, x, y, out.array, interpreter))
    assert np.isnan(out.array).all()


SHAPES = [
    ((), (), 1, 1),
    ((7,), (), 1, 8),
    ((1000,), (1000,), 1, 1000),
    ((33, 130), (130,), 8, 130),
    ((6, 5), (6, 1), 8, 8),
    ((2, 3, 5, 7), (3, 1, 1), 16, 64),
    ((2, 1, 3, 1, 2, 5), (1, 4, 1, 2, 2, 1), 64, 8),
]


@pytest.mark.parametrize(("a", "b"), [s[:2] for s in SHAPES])
def test_broadcasting(a: tuple[int, ...], b: tuple[int, ...], interpreter: InterpreterLauncher) -> None:
    x, y = random(a, F32), random(b, F32, seed=1)
    for left, right in ((x, y), (y, x)):
        out = Guarded(np.broadcast_shapes(a, b), F32)
        execute(elementwise.binary("sub", left, right, out.array, interpreter))
        assert_close(out, np.asarray(left - right))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16, np.int64, np.bool_, np.uint8])
def test_where(dtype: Any, interpreter: InterpreterLauncher) -> None:
    condition = random((3, 1, 8), np.float32) > 0
    x, y = random((5, 8), dtype, low=0, high=100), random((3, 5, 1), dtype, low=0, high=100, seed=1)
    out = Guarded((3, 5, 8), dtype)
    chosen = (Term("where", (0, 1, 2)),)
    assert elementwise.supports(chosen, (condition, x, y), out.array)
    execute(elementwise.expression(chosen, (condition, x, y), out.array, interpreter))
    out.check_guards()
    np.testing.assert_array_equal(out.array, np.where(condition, x, y))


def test_chains_are_one_launch(interpreter: InterpreterLauncher) -> None:
    """Casts and comparisons inside, an operand used twice, broadcasting both ways, halves rounded where cast."""
    x, bias = random((5, 1, 33), np.float16, low=-4, high=4), random((4, 1), F32, seed=1)
    ids = random((33,), np.int64, low=-2, high=3)
    terms = (
        Term("cast", (0,), dtype="float32"),
        Term("add", (3, 1)),
        Term("cast", (2,), dtype="float32"),
        Term("less", (4, 5)),
        Term("leaky_relu", (4,), 0.25),
        Term("clip", (5,), -1.0, 1.5),
        Term("where", (6, 7, 8)),
        Term("mul", (9, 9)),
        Term("cast", (10,), dtype="bfloat16"),
    )
    out = Guarded((5, 4, 33), BFLOAT16)
    execute(elementwise.expression(terms, (x, bias, ids), out.array, interpreter))
    only(interpreter, pointwise.pointwise_kernel)
    total, wide = x.astype(F32) + bias, ids.astype(F32)
    chosen = np.where(total < wide, np.where(total < 0, np.float32(0.25) * total, total), np.clip(wide, -1, 1.5))
    out.check_guards()
    np.testing.assert_array_equal(out.array, (chosen * chosen).astype(BFLOAT16))


def test_casts_inside_a_chain_round(interpreter: InterpreterLauncher) -> None:
    x = random((777,), F32, low=-100, high=100)
    for half in (np.dtype(np.float16), BFLOAT16, np.dtype(np.int32)):
        out = Guarded((777,), F32)
        terms = (Term("cast", (0,), dtype=half.name), Term("cast", (1,), dtype="float32"))
        execute(elementwise.expression(terms, (x,), out.array, interpreter))
        out.check_guards()
        np.testing.assert_array_equal(out.array, x.astype(half).astype(F32))


def test_types_that_do_not_go_together_are_refused(interpreter: InterpreterLauncher) -> None:
    x, n, out = random((7,), F32), random((7,), np.int32), Guarded((7,), F32)
    for term in (Term("add", (0, 1)), Term("where", (0, 0, 0)), Term("less", (0, 0)), Term("exp", (1,))):
        assert not elementwise.supports((term,), (x, n), out.array)
        with pytest.raises(ValueError, match=f"{term.name}: no kernel"):
            elementwise.expression((term,), (x, n), out.array, interpreter)


@pytest.mark.parametrize(
    "op", ["tanh", "asin", "acosh", "sinh", "atanh", "erf", "gelu", "softplus", "pow", "rint", "selu"]
)
def test_double_precision(op: str, interpreter: InterpreterLauncher) -> None:
    x = np.linspace(0.01, 0.99, 41) + (op == "acosh")
    out = Guarded(x.shape, np.float64)
    if op == "pow":
        execute(elementwise.binary(op, x, x, out.array, interpreter))
        want = x**x
    else:
        execute(elementwise.unary(op, x, out.array, interpreter))
        want = UNARY[op][0](x)
    out.check_guards()
    np.testing.assert_allclose(out.array, want, rtol=1e-13)
