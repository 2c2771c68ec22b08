"""Gated products in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import itertools
import os
from typing import Any
from unittest import mock

import numpy as np
import pytest

from infera_kernels.launch import Const, InterpreterLauncher
from tests.kernels.references import F32, UNARY, ids, only
from tests.kernels.support import FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import elementwise, gated, matmul, skinny
from infera_kernels.triton.gated_kernels import gated_kernel, gated_row_kernel
from infera_kernels.tuning.cost import Strip

pytestmark = pytest.mark.kernels

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu")


def wanted(a: Array, gate: Array, up: Array, activation: str | None = "silu") -> Array:
    """In float64, rounded nowhere."""
    x, g, u = (v.astype(np.float64) for v in (a, gate, up))
    gates: Array = x @ g
    made: Array = (gates if activation is None else UNARY[activation][0](gates)) * (x @ u)
    return made


def matrices(k: int, n: int, dtype: Any, *, turned: bool = False, low: float = -1) -> list[Array]:
    """Both, with columns that are contiguous, or rows."""
    some = [random((n, k) if turned else (k, n), dtype, low=low, high=1, seed=seed) for seed in (1, 2)]
    return [w.T for w in some] if turned else some


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 70, 33), (2, 3, 5), (17, 5, 64), (65, 33, 130), (3, 130, 0), (1, 9, 0)], ids=str
)
def test_sizes(m: int, n: int, k: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    a, (gate, up), out = random((m, k), dtype), matrices(k, n, dtype), Guarded((m, n), dtype)
    execute(gated.gated(a, gate, up, out.array, interpreter, activation="silu"))
    only(interpreter, gated_kernel if m > 1 else gated_row_kernel)
    assert_close(out, wanted(a, gate, up), error=4e-6)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str | None, rows: int, interpreter: InterpreterLauncher) -> None:
    a, (gate, up), out = random((rows, 30), F32), matrices(30, 18, F32), Guarded((rows, 18), F32, step=2)
    execute(gated.gated(a, gate, up, out.array, interpreter, activation=activation))
    assert_close(out, wanted(a, gate, up, activation), error=4e-6)


@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("order", ["NN", "NT", "TN", "TT"])
def test_each_matrix_lies_as_it_likes(order: str, rows: int, interpreter: InterpreterLauncher) -> None:
    gate, up = (matrices(34, 21, F32, turned=way == "T")[i] for i, way in enumerate(order))
    a, out = random((rows, 34), F32), Guarded((rows, 21), F32)
    execute(gated.gated(a, gate, up, out.array, interpreter, activation="silu"))
    args = only(interpreter, gated_kernel if rows > 1 else gated_row_kernel).args
    for name, way in zip(("gate", "up"), order, strict=True):
        assert args[f"{name}_n" if way == "N" else f"{name}_k"] == Const(1)
    assert_close(out, wanted(a, gate, up), error=4e-6)


@pytest.mark.parametrize(
    ("shape", "axes", "rows", "batch"),
    [((2, 3, 5), (0, 1, 2), 6, None), ((3, 2, 5), (1, 0, 2), 3, (2,)), ((4, 3, 2, 5), (1, 2, 0, 3), 4, (6,))],
    ids=str,
)
def test_rows_that_follow_each_other_are_one_product(
    shape: tuple[int, ...], axes: tuple[int, ...], rows: int, batch: Any, interpreter: InterpreterLauncher
) -> None:
    a, (gate, up) = random(shape, F32).transpose(axes), matrices(5, 4, F32)
    out = Guarded((*a.shape[:-1], 4), F32)
    execute(gated.gated(a, gate, up, out.array, interpreter, activation="silu"))
    args = only(interpreter, gated_kernel).args
    assert (args["M"], args["batch"]) == (rows, batch)
    assert_close(out, wanted(a, gate, up), error=4e-6)


def test_a_value_of_any_strides(interpreter: InterpreterLauncher) -> None:
    gate, up = (w[::2, ::3] for w in matrices(44, 51, F32))
    for a in (random((22, 9), F32).T, random((9, 66), F32)[:, ::3], random((9, 22), F32)[::-1]):
        out = Guarded((9, 17), F32, step=3)
        execute(gated.gated(a, gate, up, out.array, interpreter, activation="gelu"))
        assert_close(out, wanted(a, gate, up, "gelu"), error=4e-6)


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_every_tile(kind: str, interpreter: InterpreterLauncher) -> None:
    """Past both ends, with sums that are no multiple of a block, and with ones that are."""
    dtype, precision = (np.float16, "ieee") if kind == "half" else (np.float32, kind)
    for tile, extra in zip(gated.GATED_TILES[kind], itertools.cycle((0, 3))):
        m, n, k = tile.m + 1, tile.n // 2 + 1, tile.k + extra
        a, (gate, up), out = random((m, k), dtype, low=-1, high=1), matrices(k, n, dtype), Guarded((m, n), dtype)
        execute(gated.gated(a, gate, up, out.array, interpreter, activation="silu", tile=tile, precision=precision))
        launch = interpreter.launches[-1]
        assert launch.grid == (4, 1, 1)
        assert launch.constexprs["WHOLE_K"] == (extra == 0)
        assert_close(out, wanted(a, gate, up), error=4e-6)


def test_groups_of_tiles(interpreter: InterpreterLauncher) -> None:
    tile = gated.GATED_TILES["ieee"][0]
    m, n = 9 * tile.m + 1, tile.n + 1
    a, (gate, up), out = random((m, 5), F32), matrices(5, n, F32), Guarded((m, n), F32)
    execute(gated.gated(a, gate, up, out.array, interpreter, activation="silu", tile=tile))
    assert only(interpreter, gated_kernel).grid == (10 * 3, 1, 1)
    assert_close(out, wanted(a, gate, up), error=4e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(("n", "k"), [(21, 1100), (70, 64), (5, 1), (1, 513)])
def test_every_strip(n: int, k: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    """Whichever is chosen: more stages than steps, strips past both ends, either axis contiguous."""
    a = random((1, k), dtype, low=0.01, high=0.1)
    for layout, some in skinny.SHAPES.items():
        gate, up = matrices(k, n, dtype, turned=layout == "k", low=0.1)
        for (wide, deep), stages in zip(some, itertools.cycle(skinny.STAGES)):
            strip, out = Strip(wide, deep, stages), Guarded((1, n), dtype)
            with mock.patch.object(gated, "choose", lambda *_, strip=strip: strip):
                execute(gated.gated(a, gate, up, out.array, interpreter, activation="silu"))
            launch = interpreter.launches[-1]
            assert [launch.constexprs[name] for name in ("BN", "BK", "STAGES")] == [wide // 2, deep, stages]
            assert_close(out, wanted(a, gate, up), error=4e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_no_number_is_as_in_three_launches(rows: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    a, (gate, up) = random((rows, 6), dtype, low=0.5, high=1), matrices(6, 8, dtype)
    for i, (g, u) in enumerate(itertools.product((np.inf, -np.inf, np.nan, 1), (np.inf, np.nan))):
        gate[0, i], up[1, i] = g, u
    made, gates, ups, product = (Guarded((rows, 8), dtype) for _ in range(4))
    execute(gated.gated(a, gate, up, made.array, interpreter, activation="silu"))
    execute(matmul.matmul(a, gate, gates.array, interpreter, activation="silu"))
    execute(matmul.matmul(a, up, ups.array, interpreter))
    execute(elementwise.binary("mul", gates.array, ups.array, product.array, interpreter))
    np.testing.assert_array_equal(made.array.astype(np.float32), product.array.astype(np.float32))
    assert np.isnan(made.array.astype(np.float32)).any()


def test_sums_are_rounded_once(interpreter: InterpreterLauncher) -> None:
    """The parts, 4096 + 2 and 1 + 2 ** -11, are no numbers of float16."""
    a, gate, up = (
        np.ones((2, 2), np.float16),
        np.array([[4096], [2]], np.float16),
        np.array([[1], [2**-11]], np.float16),
    )
    out = Guarded((2, 1), np.float16)
    execute(gated.gated(a, gate, up, out.array, interpreter))
    np.testing.assert_array_equal(out.array, np.float16(4098 * (1 + 2**-11)))
    assert out.array[0, 0] != np.float16(4098) * np.float16(1 + 2**-11)


def test_nothing_is_launched_for_nothing(interpreter: InterpreterLauncher) -> None:
    gate, up = matrices(4, 3, F32)
    assert gated.gated(np.ones((0, 4), F32), gate, up, np.ones((0, 3), F32), interpreter) == []
    assert gated.gated(np.ones((2, 4), F32), gate[:, :0], up[:, :0], np.ones((2, 0), F32), interpreter) == []


@pytest.mark.parametrize(
    ("gate", "up", "activation"),
    [((4, 3), (4, 2), "silu"), ((1, 4, 3), (1, 4, 3), "silu"), ((5, 3), (5, 3), "silu"), ((4, 3), (4, 3), "isnan")],
    ids=str,
)
def test_what_it_does_not_cover_is_refused(
    gate: tuple[int, ...], up: tuple[int, ...], activation: str, interpreter: InterpreterLauncher
) -> None:
    a, out = np.ones((2, 4), F32), np.ones((2, 3), F32)
    with pytest.raises(ValueError, match="gated: no kernel for"):
        gated.gated(a, np.ones(gate, F32), np.ones(up, F32), out, interpreter, activation=activation)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_invariant_rows_are_the_same_bits(dtype: Any, interpreter: InterpreterLauncher) -> None:
    a, (gate, up) = random((40, 130), dtype, low=-1, high=1), matrices(130, 21, dtype)
    whole = Guarded((40, 21), dtype)
    execute(gated.gated(a, gate, up, whole.array, interpreter, activation="silu", invariant=True))
    for count in (1, 3):
        out = Guarded((count, 21), dtype)
        execute(gated.gated(a[:count], gate, up, out.array, interpreter, activation="silu", invariant=True))
        assert out.array.tobytes() == whole.array[:count].tobytes()
    assert len({(launch.kernel, str(launch.constexprs)) for launch in interpreter.launches}) == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (70, 33), (5, 2100)], ids=str)
def test_a_row_is_normalised(n: int, k: int, turned: bool, dtype: Any, interpreter: InterpreterLauncher) -> None:
    a, (gate, up), out = random((1, k), dtype), matrices(k, n, dtype, turned=turned), Guarded((1, n), dtype)
    gain = random((2 * k,), dtype, seed=3, low=0.5, high=2)[::2]
    execute(gated.gated(a, gate, up, out.array, interpreter, activation="silu", gain=gain, epsilon=0.25))
    only(interpreter, gated_row_kernel)
    x = a.astype(np.float64)
    x = x / np.sqrt((x * x).mean() + 0.25) * gain.astype(np.float64)
    assert_close(out, wanted(x, gate, up), error=4e-6)


def test_nothing_is_not_normalised(interpreter: InterpreterLauncher) -> None:
    """A row of no elements has no mean."""
    a, (gate, up), out = random((1, 0), F32), matrices(0, 9, F32), Guarded((1, 9), F32)
    execute(gated.gated(a, gate, up, out.array, interpreter, gain=random((0,), F32), epsilon=0.25))
    assert_close(out, np.zeros((1, 9)), error=0)
