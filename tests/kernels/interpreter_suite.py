"""Every kernel in Triton's interpreter, against float64 NumPy. Run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import Const, InterpreterLauncher, Launch, Target
from tests.kernels.support import BFLOAT16, FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import elementwise, matmul, norm, pointwise, softmax, tiles

pytestmark = pytest.mark.kernels

F32 = np.dtype(np.float32)
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


UNARY: dict[str, tuple[Callable[[Array], Array], float, float]] = {
    "abs": (np.abs, -9, 9),
    "ceil": (np.ceil, -9, 9),
    "clip": (lambda x: np.clip(x, -0.5, 1.25), -9, 9),
    "elu": (lambda x: np.where(x < 0, np.expm1(x), x), -9, 9),
    "erf": (_erf, -4, 4),
    "exp": (np.exp, -9, 9),
    "floor": (np.floor, -9, 9),
    "gelu": (lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), -9, 9),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), -9, 9),
    "hard_sigmoid": (lambda x: np.clip(0.2 * x + 0.5, 0, 1), -9, 9),
    "hard_swish": (lambda x: x * np.clip(x / 6 + 0.5, 0, 1), -9, 9),
    "leaky_relu": (lambda x: np.where(x < 0, 0.01 * x, x), -9, 9),
    "log": (np.log, 0.01, 50),
    "neg": (np.negative, -9, 9),
    "reciprocal": (lambda x: 1 / x, 0.1, 9),
    "relu": (lambda x: np.maximum(x, 0), -9, 9),
    "sigmoid": (_sigmoid, -20, 20),
    "silu": (lambda x: x * _sigmoid(x), -20, 20),
    "softplus": (lambda x: np.logaddexp(0, x), -20, 20),
    "sqrt": (np.sqrt, 0, 50),
    "tanh": (np.tanh, -9, 9),
}

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "min": np.minimum,
    "max": np.maximum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}

FUNCTION_ERROR = 4e-7
"""What a float32 evaluation may lose relative to the largest result, rounding of the result aside."""


@pytest.fixture
def launcher() -> InterpreterLauncher:
    return InterpreterLauncher()


def only(launcher: InterpreterLauncher, kernel: Any) -> Launch:
    """The single launch that ran, of this kernel."""
    (launch,) = launcher.launches
    assert launch.kernel == kernel.__name__
    return launch


def ids(value: object) -> str | None:
    return value.name if isinstance(value, np.dtype) else None


# Pointwise


def test_every_operation_has_a_reference() -> None:
    assert set(UNARY) | {"logical_not"} == set(elementwise.UNARY)
    assert set(BINARY) == set(elementwise.BINARY)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("op", UNARY)
def test_unary(op: str, dtype: Any, launcher: InterpreterLauncher) -> None:
    reference, low, high = UNARY[op]
    x, out = random((3, 43), dtype, low=low, high=high), Guarded((3, 43), dtype)
    given = {"alpha": -0.5, "beta": 1.25} if op == "clip" else {}
    execute(elementwise.unary(op, x, out.array, launcher, **given))
    only(launcher, pointwise.pointwise_kernel)
    assert_close(out, reference(x.astype(np.float64)), error=FUNCTION_ERROR)


@pytest.mark.parametrize("op", ["relu", "clip", "tanh", "gelu", "sigmoid", "exp", "sqrt", "log", "neg", "erf"])
def test_unary_specials(op: str, launcher: InterpreterLauncher) -> None:
    x = np.array([np.nan, np.inf, 0.0, 1e-30, 80.0], F32)
    out = Guarded(x.shape, F32)
    execute(elementwise.unary(op, x, out.array, launcher))
    with np.errstate(all="ignore"):
        reference = (lambda v: v) if op == "clip" else UNARY[op][0]
        assert_close(out, reference(x.astype(np.float64)).astype(F32), error=1e-6)


def test_tanh_keeps_small_values(launcher: InterpreterLauncher) -> None:
    x = np.float32(10.0) ** -np.arange(1, 30, dtype=F32)
    out = Guarded(x.shape, F32)
    execute(elementwise.unary("tanh", x, out.array, launcher))
    np.testing.assert_allclose(out.array, np.tanh(x.astype(np.float64)), rtol=2e-7)


@pytest.mark.parametrize("size", [1, 3, 1023, 1024, 1025, 2049])
def test_unary_sizes(size: int, launcher: InterpreterLauncher) -> None:
    x, out = random((size,), F32), Guarded((size,), F32)
    execute(elementwise.unary("neg", x, out.array, launcher))
    assert_close(out, -x)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_unary_integers(dtype: Any, launcher: InterpreterLauncher) -> None:
    x, out = random((5, 7), dtype, low=-(2.0**30), high=2.0**30), Guarded((5, 7), dtype)
    execute(elementwise.unary("neg", x, out.array, launcher))
    out.check_guards()
    np.testing.assert_array_equal(out.array, -x)


def test_logical_not(launcher: InterpreterLauncher) -> None:
    x, out = random((37,), np.float32) > 0, Guarded((37,), np.bool_)
    execute(elementwise.unary("logical_not", x, out.array, launcher))
    out.check_guards()
    np.testing.assert_array_equal(out.array, ~x)


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.bool_)], ids=ids)
@pytest.mark.parametrize("op", BINARY)
def test_binary(op: str, dtype: Any, launcher: InterpreterLauncher) -> None:
    entry = elementwise.BINARY[op]
    result = np.dtype(entry.result or dtype)
    x, y = random((4, 1, 9), np.float32, low=-3, high=3), random((5, 9), np.float32, low=0.5, high=3, seed=1)
    if op == "pow":
        x = np.abs(x)
    x, y = (x > 0, y > 1.5) if dtype == np.bool_ else (x.astype(dtype), y.astype(dtype))
    y[0, :4] = x[0, 0, :4]
    out = Guarded((4, 5, 9), result)
    if dtype.name not in entry.dtypes:
        assert not elementwise.supports_binary(op, x, y, out.array)
        with pytest.raises(ValueError, match=f"{op}: no kernel"):
            elementwise.binary(op, x, y, out.array, launcher)
        return
    assert elementwise.supports_binary(op, x, y, out.array)
    execute(elementwise.binary(op, x, y, out.array, launcher))
    only(launcher, pointwise.pointwise_kernel)
    if result.name in ("float32", "float16", "bfloat16"):
        assert_close(out, BINARY[op](x.astype(np.float64), y.astype(np.float64)), error=FUNCTION_ERROR)
    else:
        out.check_guards()
        np.testing.assert_array_equal(out.array, BINARY[op](x, y))


def test_pow_signs_and_limits(launcher: InterpreterLauncher) -> None:
    values = np.array([-np.inf, -2.5, -1, -0.0, 0.0, 0.5, 1, 2, np.inf, np.nan], F32)
    exponents = np.array([-np.inf, -3, -2, -0.5, 0, 0.5, 1, 2, 3, 1e9, np.inf, np.nan], F32)
    x, y = np.meshgrid(values, exponents, indexing="ij")
    out = Guarded(x.shape, F32)
    execute(elementwise.binary("pow", x, y, out.array, launcher))
    out.check_guards()
    with np.errstate(all="ignore"):
        want = np.power(x, y)
    np.testing.assert_allclose(np.abs(out.array), np.abs(want), rtol=2e-7)
    numbers = ~np.isnan(want) & (want != 0)
    np.testing.assert_array_equal(np.signbit(out.array[numbers]), np.signbit(want[numbers]))


@pytest.mark.parametrize("op", ["min", "max"])
def test_nan_is_not_dropped(op: str, launcher: InterpreterLauncher) -> None:
    x, y = np.array([np.nan, 1, np.nan], F32), np.array([1, np.nan, np.nan], F32)
    out = Guarded((3,), F32)
    execute(elementwise.binary(op, x, y, out.array, launcher))
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
def test_broadcasting(a: tuple[int, ...], b: tuple[int, ...], launcher: InterpreterLauncher) -> None:
    x, y = random(a, F32), random(b, F32, seed=1)
    for left, right in ((x, y), (y, x)):
        out = Guarded(np.broadcast_shapes(a, b), F32)
        execute(elementwise.binary("sub", left, right, out.array, launcher))
        assert_close(out, np.asarray(left - right))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16, np.int64, np.bool_, np.uint8])
def test_where(dtype: Any, launcher: InterpreterLauncher) -> None:
    condition = random((3, 1, 8), np.float32) > 0
    x, y = random((5, 8), dtype, low=0, high=100), random((3, 5, 1), dtype, low=0, high=100, seed=1)
    out = Guarded((3, 5, 8), dtype)
    assert elementwise.supports_where(condition, x, y, out.array)
    execute(elementwise.where(condition, x, y, out.array, launcher))
    out.check_guards()
    np.testing.assert_array_equal(out.array, np.where(condition, x, y))


# Copies


@pytest.mark.parametrize(
    ("shape", "axes", "transposed"),
    [
        ((40, 70), (1, 0), True),
        ((3, 33, 34), (0, 2, 1), True),
        ((3, 33, 34), (2, 1, 0), False),
        ((9, 33, 34), (2, 1, 0), True),
        ((9, 10, 11, 3), (0, 3, 1, 2), False),
        ((2, 40, 3, 9), (0, 2, 3, 1), True),
        ((2, 3, 40, 16), (0, 2, 1, 3), False),
        ((2, 3, 2, 3, 2, 9), (5, 4, 3, 2, 1, 0), False),
        ((4, 1, 1, 9), (3, 2, 1, 0), False),
    ],
)
def test_transpose(
    shape: tuple[int, ...], axes: tuple[int, ...], transposed: bool, launcher: InterpreterLauncher
) -> None:
    x = random(shape, F32).transpose(axes)
    out = Guarded(x.shape, F32)
    execute(elementwise.copy(x, out.array, launcher))
    launch = only(launcher, pointwise.pointwise_kernel)
    tile = launch.constexprs["ROWS"], launch.constexprs["COLS"]
    assert (tile == (32, 32)) == transposed
    out.check_guards()
    np.testing.assert_array_equal(out.array, x)


@pytest.mark.parametrize("step", [2, 3])
def test_strided_both_ways(step: int, launcher: InterpreterLauncher) -> None:
    x = random((5, 40), np.float16)[::-1, 3::2]
    out = Guarded(x.shape, np.float16, step=step)
    execute(elementwise.copy(x, out.array, launcher))
    out.check_guards()
    np.testing.assert_array_equal(out.array, x)


def test_offsets_beyond_32_bits(launcher: InterpreterLauncher) -> None:
    small = random((2, 3), F32)
    far = np.lib.stride_tricks.as_strided(small, (1, 2, 3), (2**40, 12, 4))
    out = Guarded((1, 2, 3), F32)
    execute(elementwise.copy(far, out.array, launcher))
    assert not only(launcher, pointwise.pointwise_kernel).constexprs["WIDE"]
    tiling = pointwise.pick_tiling((2, 3), [(2**31, 1), (3, 1)])
    args = {"a": small, "b": None, "c": None, "out": out.array, "dims": (3, 2), "rows": 2}
    args |= {"a_strides": (Const(1), 3), "b_strides": None, "c_strides": None, "out_strides": (Const(1), 3)}
    constexprs = {"FN": elementwise.f.identity, "ROW_DIMS": 2, "ROWS": tiling.tile[0], "COLS": 4, "WIDE": True}
    fn, call = launcher.launch(pointwise.pointwise_kernel, (1,), {**args, "alpha": None, "beta": None}, constexprs)
    fn(*call)
    out.check_guards()
    np.testing.assert_array_equal(out.array[0], small)


CASTS = [np.float32, np.float16, BFLOAT16, np.float64, np.int32, np.int64, np.uint8, np.int8, np.bool_]


@pytest.mark.parametrize("target", CASTS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("source", CASTS, ids=lambda d: np.dtype(d).name)
def test_cast(source: Any, target: Any, launcher: InterpreterLauncher) -> None:
    x = np.array([0, 0.25, 1, 1.75, 2.5, 3.01, 100, 127], np.float64).astype(source)
    out = Guarded(x.shape, target)
    assert elementwise.supports_copy(x, out.array)
    execute(elementwise.copy(x, out.array, launcher))
    out.check_guards()
    np.testing.assert_array_equal(out.array, x.astype(target))


# Rows


def _softmax(x: Array, log: bool) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True)
    return shifted - np.log(total) if log else np.exp(shifted) / total


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 1), (1, 1)),
        ((5,), (1, 8)),
        ((37, 7), (64, 8)),
        ((2, 3, 65), (8, 128)),
        ((3, 1024), (1, 1024)),
        ((2, 1025), (1, 2048)),
        ((2, 20000), None),
    ],
    ids=str,
)
def test_softmax(
    shape: tuple[int, ...], tile: tuple[int, int] | None, dtype: Any, log: bool, launcher: InterpreterLauncher
) -> None:
    x, out = random(shape, dtype, low=-8, high=8), Guarded(shape, dtype)
    execute(softmax.softmax(x, out.array, launcher, log=log))
    launch = only(launcher, softmax.softmax_online_kernel if tile is None else softmax.softmax_kernel)
    if tile is not None:
        assert (launch.constexprs["ROWS"], launch.constexprs["COLS"]) == tile
    assert_close(out, _softmax(x.astype(np.float64), log), error=1e-6)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("cols", [9, 20000])
def test_softmax_infinities(cols: int, log: bool, launcher: InterpreterLauncher) -> None:
    x = random((5, cols), F32, low=-8, high=8)
    x[0, : cols // 2] = -np.inf
    x[1, 1:] = -np.inf
    x[2] = -np.inf
    x[3, cols - 1] = np.nan
    x[4, ::2] = -np.inf
    out = Guarded(x.shape, F32)
    execute(softmax.softmax(x, out.array, launcher, log=log))
    with np.errstate(all="ignore"):
        assert_close(out, _softmax(x.astype(np.float64), log), error=1e-6)


def test_softmax_of_padded_rows(launcher: InterpreterLauncher) -> None:
    wide = random((6, 40), F32)
    out = Guarded((6, 30), F32)
    execute(softmax.softmax(wide[:, :30], out.array, launcher))
    assert only(launcher, softmax.softmax_kernel).args["x_stride"] == 40
    assert_close(out, _softmax(wide[:, :30].astype(np.float64), False), error=1e-6)
    with pytest.raises(ValueError, match="not contiguous"):
        softmax.softmax(wide[:, ::2][:, :20], Guarded((6, 20), F32).array, launcher)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("shape", "long"), [((1, 1), False), ((9, 33), False), ((2, 5, 768), False), ((2, 20000), True)]
)
@pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms", "rms without weight"])
def test_norm(kind: str, shape: tuple[int, ...], long: bool, dtype: Any, launcher: InterpreterLauncher) -> None:
    x, out = random(shape, dtype, low=90, high=110), Guarded(shape, dtype)
    weight, bias = random(shape[-1:], dtype, seed=1), random(shape[-1:], dtype, seed=2)
    wide = x.astype(np.float64)
    rows = math.prod(shape[:-1])
    mean, inv_std = Guarded((rows, 1), F32), Guarded((rows, 1), F32)
    if kind.startswith("layer"):
        given = None if "without" in kind else bias
        calls = norm.layer_norm(x, weight, given, out.array, launcher, mean=mean.array, inv_std=inv_std.array)
        centre = wide.mean(-1, keepdims=True)
        scale = 1 / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        want = (wide - centre) * scale * weight.astype(np.float64) + (0 if given is None else bias.astype(np.float64))
    else:
        given = None if "without" in kind else weight
        calls = norm.rms_norm(x, given, out.array, launcher)
        want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
        want = want if given is None else want * weight.astype(np.float64)
    execute(calls)
    only(launcher, norm.norm_long_kernel if long else norm.norm_kernel)
    assert_close(out, want, error=4e-6)
    if kind.startswith("layer"):
        assert_close(mean, centre.reshape(-1, 1), error=1e-6)
        assert_close(inv_std, scale.reshape(-1, 1), error=4e-6)


def test_norm_over_two_axes(launcher: InterpreterLauncher) -> None:
    x, out, weight = random((3, 4, 5), F32), Guarded((3, 4, 5), F32), random((4, 5), F32, seed=1)
    execute(norm.rms_norm(x, weight, out.array, launcher, axis=1))
    wide = x.astype(np.float64)
    assert_close(out, wide / np.sqrt((wide**2).mean((1, 2), keepdims=True) + 1e-6) * weight, error=1e-6)


# Matrices


def _largest_tile(kind: str) -> tiles.Tile:
    return max(tiles.TILES[kind], key=lambda t: t.m * t.n)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 70, 33), (17, 5, 64), (65, 33, 130), (3, 130, 0)], ids=lambda v: str(v)
)
def test_matmul(m: int, n: int, k: int, dtype: Any, launcher: InterpreterLauncher) -> None:
    a, b, out = random((m, k), dtype), random((k, n), dtype, seed=1), Guarded((m, n), dtype)
    execute(matmul.matmul(a, b, out.array, launcher))
    launch = only(launcher, matmul.matmul_kernel)
    tile = tiles.pick_tile(m, n, 1, "ieee" if dtype == F32 else "half", launcher.target)
    assert (launch.constexprs["BM"], launch.constexprs["BN"]) == (tile.m, tile.n)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize("kind", ["half", "tf32", "tf32x3", "ieee"])
def test_matmul_largest_tile(kind: str, launcher: InterpreterLauncher) -> None:
    dtype = np.float16 if kind == "half" else np.float32
    tile = _largest_tile(kind)
    a, b, out = random((tile.m + 1, 40), dtype), random((40, tile.n + 1), dtype, seed=1), None
    out = Guarded((tile.m + 1, tile.n + 1), dtype)
    precision = "ieee" if kind == "half" else kind
    execute(matmul.matmul(a, b, out.array, launcher, tile=tile, precision=precision))
    assert only(launcher, matmul.matmul_kernel).grid == (4, 1, 1)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize("order", ["NN", "NT", "TN", "TT"])
def test_matmul_orders(order: str, launcher: InterpreterLauncher) -> None:
    a = random((19, 34), F32) if order[0] == "N" else random((34, 19), F32).T
    b = random((34, 21), F32, seed=1) if order[1] == "N" else random((21, 34), F32, seed=1).T
    out = Guarded((19, 21), F32)
    execute(matmul.matmul(a, b, out.array, launcher))
    args = only(launcher, matmul.matmul_kernel).args
    assert args["a_k" if order[0] == "N" else "a_m"] == Const(1)
    assert args["b_n" if order[1] == "N" else "b_k"] == Const(1)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 5, 7), (3, 7, 4)),
        ((2, 3, 5, 7), (7, 4)),
        ((5, 7), (2, 1, 7, 4)),
        ((2, 1, 5, 7), (3, 7, 4)),
        ((2, 1, 2, 3, 5), (1, 3, 1, 5, 4)),
    ],
)
def test_matmul_batches(a: tuple[int, ...], b: tuple[int, ...], launcher: InterpreterLauncher) -> None:
    x, y = random(a, F32), random(b, F32, seed=1)
    want = x.astype(np.float64) @ y.astype(np.float64)
    out = Guarded(want.shape, F32)
    execute(matmul.matmul(x, y, out.array, launcher))
    only(launcher, matmul.matmul_kernel)
    assert_close(out, want, error=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "clip"])
def test_matmul_epilogue(activation: str | None, dtype: Any, launcher: InterpreterLauncher) -> None:
    a, b, bias = random((2, 20, 30), dtype), random((30, 18), dtype, seed=1), random((18,), dtype, seed=2)
    residual = random((20, 1), dtype, seed=3)
    out = Guarded((2, 20, 18), dtype, step=2)
    bounds = {"act_alpha": -0.5, "act_beta": 1.25} if activation == "clip" else {}
    execute(
        matmul.matmul(
            *(a, b, out.array, launcher),
            bias=bias,
            residual=residual,
            alpha=0.5,
            beta=-2.0,
            activation=activation,
            **bounds,  # type: ignore[arg-type]
        )
    )
    only(launcher, matmul.matmul_kernel)
    wide = [v.astype(np.float64) for v in (a, b, bias, residual)]
    want = 0.5 * (wide[0] @ wide[1]) + wide[2] - 2 * wide[3]
    assert_close(out, want if activation is None else UNARY[activation][0](want), error=1e-6)


def test_small_shared_memory_takes_another_tile() -> None:
    a, b = random((128, 64), np.float16), random((64, 128), np.float16, seed=1)
    small = InterpreterLauncher(Target(86, 1, 99 * 1024))
    out = Guarded((128, 128), np.float16)
    execute(matmul.matmul(a, b, out.array, small))
    constexprs = only(small, matmul.matmul_kernel).constexprs
    assert (constexprs["BM"], constexprs["BN"], constexprs["BK"]) == (128, 128, 32)
    assert_close(out, a.astype(np.float64) @ b.astype(np.float64), error=1e-6)


# Nothing to do


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_outputs_launch_nothing(shape: tuple[int, ...], launcher: InterpreterLauncher) -> None:
    x, out = np.zeros(shape, F32), np.zeros(shape, F32)
    calls = [*elementwise.unary("relu", x, out, launcher), *softmax.softmax(x, out, launcher)]
    calls += norm.rms_norm(x, None, out, launcher)
    assert calls == []
    assert matmul.matmul(np.zeros((0, 3), F32), np.zeros((3, 4), F32), np.zeros((0, 4), F32), launcher) == []
