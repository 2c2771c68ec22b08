"""Normalisations over any axes in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from infera_kernels.calls import Call
from infera_kernels.launch import InterpreterLauncher
from tests.kernels.references import F32, ids
from tests.kernels.support import FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import functions, normalize
from infera_kernels.triton.normalizations import NORMALIZATIONS

pytestmark = pytest.mark.kernels

Shape = tuple[int, ...]
EPS = 0.01


def _length(bounded: Callable[[Array], Array]) -> Callable[[Array, Shape], Array]:
    return lambda x, axes: x / bounded((x * x).sum(axes, keepdims=True))


def _softmax(x: Array, axes: Shape) -> Array:
    e = np.exp(x - x.max(axes, keepdims=True))
    return np.asarray(e / e.sum(axes, keepdims=True))


def _first_largest(x: Array, axes: Shape) -> Array:
    (axis,) = axes
    return np.asarray(np.expand_dims(x.argmax(axis), axis) == np.indices(x.shape)[axis], np.float64)


REFERENCES: dict[str, Callable[[Array, Shape], Array]] = {
    "affine": lambda x, a: x,
    "layer": lambda x, a: (x - x.mean(a, keepdims=True)) / np.sqrt(x.var(a, keepdims=True) + EPS),
    "rms": lambda x, a: x / np.sqrt((x * x).mean(a, keepdims=True) + EPS),
    "mean_variance": lambda x, a: (x - x.mean(a, keepdims=True)) / (x.std(a, keepdims=True) + EPS),
    "softmax": _softmax,
    "log_softmax": lambda x, a: np.log(_softmax(x, a)),
    "hardmax": _first_largest,
    "length_1": lambda x, a: x / np.abs(x).sum(a, keepdims=True),
    "length_2": _length(np.sqrt),
    "length_at_least": _length(lambda s: np.maximum(np.sqrt(s), EPS)),
    "length_within": _length(lambda s: np.clip(np.sqrt(s), EPS, np.finfo(np.float32).max)),
    "length_and": _length(lambda s: np.sqrt(s) + EPS),
    "root_of_at_least": _length(lambda s: np.sqrt(np.maximum(s, EPS))),
    "root_of_within": _length(lambda s: np.sqrt(np.clip(s, EPS, np.finfo(np.float32).max))),
    "root_of_sum": _length(lambda s: np.sqrt(s + EPS)),
}


def scratch(shape: Any, dtype: Any = np.float32) -> Array:
    made: Array = Guarded(shape, dtype).array
    return made


def normalized(kind: str, x: Array, axes: Shape, out: Guarded, interpreter: Any, **arrays: Any) -> list[Call]:
    """The calls, after they were made."""
    calls = normalize.normalize(kind, x, axes, out.array, interpreter, scratch, eps=EPS, **arrays)
    execute(calls)
    return calls


def test_every_kind_has_a_reference() -> None:
    assert REFERENCES.keys() == NORMALIZATIONS.keys()


@pytest.mark.parametrize(
    ("shape", "axes", "fits"),
    [((3, 7, 5), (1,), True), ((2, 5, 33), (2,), True), ((3, 2500, 2), (1,), False), ((1, 20000), (1,), False)],
    ids=str,
)
@pytest.mark.parametrize("kind", REFERENCES)
def test_kinds(kind: str, shape: Shape, axes: Shape, fits: bool, interpreter: InterpreterLauncher) -> None:
    x, out = random(shape, F32), Guarded(shape, F32)
    apart = not (fits and NORMALIZATIONS[kind].at_once)
    launches = 1 + apart * len(NORMALIZATIONS[kind].statistics())
    assert len(normalized(kind, x, axes, out, interpreter)) == launches
    assert_close(out, REFERENCES[kind](x.astype(np.float64), axes), error=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    [
        *((kind, (2, 3, 40), dtype) for kind in ("layer", "rms") for dtype in FLOATS),
        ("layer", (1, 1, 17000), FLOATS[0]),
        ("rms", (1, 1, 17000), FLOATS[1]),
    ],
    ids=ids,
)
def test_sums_and_what_follows(kind: str, shape: Shape, dtype: Any, interpreter: InterpreterLauncher) -> None:
    batch, rows, length = shape
    x, skip, plus, weight, bias = (
        random(s, dtype, seed=i) for i, s in enumerate((shape, shape[1:], shape[2:], shape[2:], (rows, 1)))
    )
    wide = x.astype(np.float64) + skip.astype(np.float64) + plus.astype(np.float64)
    if length > 16384:  # what does not fit is rounded to the type of the sums
        wide = wide.astype(np.float32).astype(dtype).astype(np.float64)
    (out, sums), (center, scale) = (
        (Guarded(shape, dtype) for _ in range(2)),
        (Guarded((batch * rows,), F32) for _ in range(2)),
    )
    arrays = {"sums": sums.array, "center": center.array, "scale": scale.array, "activation": functions.silu}
    normalized(kind, x, (2,), out, interpreter, skip=skip, plus=plus, weight=weight, bias=bias, **arrays)
    y = REFERENCES[kind](wide, (2,)) * weight.astype(np.float64) + bias.astype(np.float64)
    loose = 4e-3 if length > 16384 and dtype != F32 else 3e-6
    assert_close(out, y / (1 + np.exp(-y)), error=loose)
    assert_close(sums, wide, error=2 * loose)
    mean = wide.mean(2) if kind == "layer" else np.zeros((batch, rows))
    if kind == "layer" or length <= 16384:
        assert_close(center, mean.reshape(-1), error=1e-5 if dtype == F32 else 1e-2)
    spread = wide.var(2) if kind == "layer" else (wide * wide).mean(2)
    assert_close(scale, 1 / np.sqrt(spread.reshape(-1) + EPS), error=loose)


@pytest.mark.parametrize("shape", [(2, 4, 3, 35), (1, 2, 3, 6000)])
@pytest.mark.parametrize("last", [False, True])
def test_groups_of_channels(last: bool, shape: Shape, interpreter: InterpreterLauncher) -> None:
    """Channels first and last, weights of channels: (batch, groups, size, inner) or (batch, inner, groups, size)."""
    axes: Shape = (1, 3) if last else (2, 3)
    whole = random(shape, F32)
    x = np.ascontiguousarray(whole.transpose(0, 3, 1, 2)) if last else whole
    factor = shape[1:3] if last else (*shape[1:3], 1)
    weight, bias = random(factor, F32, seed=1), random(factor, F32, seed=2)
    out = Guarded(x.shape, F32)
    normalized("layer", x, axes, out, interpreter, weight=weight, bias=bias)
    assert_close(out, REFERENCES["layer"](x.astype(np.float64), axes) * weight + bias, error=3e-6)


def test_strides_of_any_kind(interpreter: InterpreterLauncher) -> None:
    whole = random((3, 4, 5, 12), F32)
    for x in (whole.transpose(3, 1, 0, 2), whole[::-1, ::2, 1:, ::-3]):
        for axes in ((0,), (1, 3)):
            out = Guarded(x.shape, F32, step=2)
            normalized("layer", x, axes, out, interpreter)
            assert_close(out, REFERENCES["layer"](x.astype(np.float64), axes), error=3e-6)


@pytest.mark.parametrize("kind", ["softmax", "log_softmax"])
@pytest.mark.parametrize("length", [9, 20000])
def test_softmax_infinities(kind: str, length: int, interpreter: InterpreterLauncher) -> None:
    x = random((5, length, 1), F32, low=-8, high=8)
    x[0, : length // 2] = x[1, 1:] = x[2] = x[4, ::2] = -np.inf
    x[3, length - 1] = np.nan
    out = Guarded(x.shape, F32)
    normalized(kind, x, (1,), out, interpreter)
    with np.errstate(all="ignore"):
        assert_close(out, REFERENCES[kind](x.astype(np.float64), (1,)), error=1e-6)


@pytest.mark.parametrize("kind", REFERENCES)
def test_scratch_is_what_is_announced(kind: str, interpreter: InterpreterLauncher) -> None:
    for dims, axes in (((3, 7), (1,)), ((2, 70001), (1,)), ((2, 9000, 3), (1,)), ((0, 3), (1,))):
        x = np.broadcast_to(np.float32(1), dims)
        asked: list[tuple[Shape, Any]] = []

        def ask(shape: Any, dtype: Any = np.float32) -> Array:
            asked.append((tuple(shape), dtype))  # noqa: B023
            return scratch(shape, dtype)

        normalize.normalize(kind, x, axes, np.empty(dims, F32), interpreter, ask)
        assert asked == normalize.scratch_of(kind, x, axes)
        assert math.prod(dims) or not asked
