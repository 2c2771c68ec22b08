"""Softmax and normalisation in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from tests.kernels.references import F32, ids, only
from tests.kernels.support import FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import elementwise, matmul, norm, softmax

pytestmark = pytest.mark.kernels


def _softmax(x: Array, log: bool) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True)
    return np.asarray(shifted - np.log(total) if log else np.exp(shifted) / total)


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
    shape: tuple[int, ...], tile: tuple[int, int] | None, dtype: Any, log: bool, interpreter: InterpreterLauncher
) -> None:
    x, out = random(shape, dtype, low=-8, high=8), Guarded(shape, dtype)
    execute(softmax.softmax(x, out.array, interpreter, log=log))
    launch = only(interpreter, softmax.softmax_online_kernel if tile is None else softmax.softmax_kernel)
    if tile is not None:
        assert (launch.constexprs["ROWS"], launch.constexprs["COLS"]) == tile
    assert_close(out, _softmax(x.astype(np.float64), log), error=1e-6)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("cols", [9, 20000])
def test_softmax_infinities(cols: int, log: bool, interpreter: InterpreterLauncher) -> None:
    x = random((5, cols), F32, low=-8, high=8)
    x[0, : cols // 2] = -np.inf
    x[1, 1:] = -np.inf
    x[2] = -np.inf
    x[3, cols - 1] = np.nan
    x[4, ::2] = -np.inf
    out = Guarded(x.shape, F32)
    execute(softmax.softmax(x, out.array, interpreter, log=log))
    with np.errstate(all="ignore"):
        assert_close(out, _softmax(x.astype(np.float64), log), error=1e-6)


def test_softmax_of_padded_rows(interpreter: InterpreterLauncher) -> None:
    wide = random((6, 40), F32)
    out = Guarded((6, 30), F32)
    execute(softmax.softmax(wide[:, :30], out.array, interpreter))
    assert only(interpreter, softmax.softmax_kernel).args["x_stride"] == 40
    assert_close(out, _softmax(wide[:, :30].astype(np.float64), False), error=1e-6)
    with pytest.raises(ValueError, match="not contiguous"):
        softmax.softmax(wide[:, ::2][:, :20], Guarded((6, 20), F32).array, interpreter)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("shape", "long"), [((1, 1), False), ((9, 33), False), ((2, 5, 768), False), ((2, 20000), True)]
)
@pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms", "rms without weight"])
def test_norm(kind: str, shape: tuple[int, ...], long: bool, dtype: Any, interpreter: InterpreterLauncher) -> None:
    x, out = random(shape, dtype, low=90, high=110), Guarded(shape, dtype)
    weight, bias = random(shape[-1:], dtype, seed=1), random(shape[-1:], dtype, seed=2)
    wide = x.astype(np.float64)
    rows = math.prod(shape[:-1])
    mean, inv_std = Guarded((rows, 1), F32), Guarded((rows, 1), F32)
    if kind.startswith("layer"):
        given = None if "without" in kind else bias
        calls = norm.layer_norm(
            x, weight, given, out.array, interpreter, np.empty, mean=mean.array, inv_std=inv_std.array
        )
        centre = wide.mean(-1, keepdims=True)
        scale = 1 / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        want = (wide - centre) * scale * weight.astype(np.float64) + (0 if given is None else bias.astype(np.float64))
    else:
        given = None if "without" in kind else weight
        calls = norm.rms_norm(x, given, out.array, interpreter, np.empty)
        want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
        want = want if given is None else want * weight.astype(np.float64)
    execute(calls)
    assert len(interpreter.launches) == (1 if not long else 3 if kind.startswith("layer") else 2)
    assert interpreter.launches[-1].kernel == "normalize_kernel"
    assert_close(out, want, error=4e-6)
    if kind.startswith("layer"):
        assert_close(mean, centre.reshape(-1, 1), error=1e-6)
        assert_close(inv_std, scale.reshape(-1, 1), error=4e-6)


def test_norm_over_two_axes(interpreter: InterpreterLauncher) -> None:
    x, out, weight = random((3, 4, 5), F32), Guarded((3, 4, 5), F32), random((4, 5), F32, seed=1)
    execute(norm.rms_norm(x, weight, out.array, interpreter, axis=1))
    wide = x.astype(np.float64)
    assert_close(out, wide / np.sqrt((wide**2).mean((1, 2), keepdims=True) + 1e-6) * weight, error=1e-6)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_outputs_launch_nothing(shape: tuple[int, ...], interpreter: InterpreterLauncher) -> None:
    x, out = np.zeros(shape, F32), np.zeros(shape, F32)
    calls = [*elementwise.unary("relu", x, out, interpreter), *softmax.softmax(x, out, interpreter)]
    calls += norm.rms_norm(x, None, out, interpreter)
    assert calls == []
    assert matmul.matmul(np.zeros((0, 3), F32), np.zeros((3, 4), F32), np.zeros((0, 4), F32), interpreter) == []
