"""Convolutions in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.portable.conv import convolution, transposed_convolution
from tests.kernels.references import F32, FUNCTION_ERROR, UNARY, ids, only
from tests.kernels.support import FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import conv, depthwise, tiles
from infera_kernels.triton.pad_channels import pad_channels

pytestmark = pytest.mark.kernels

ERROR = 1e-6
"""What sums in float32 may lose, relative to the largest result."""


@dataclass(frozen=True)
class Layer:
    """A convolution of images (n, size..., channels) to `outputs` channels."""

    n: int
    size: tuple[int, ...]
    channels: int
    outputs: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    groups: int = 1
    transposed: bool = False

    @property
    def where(self) -> conv.Geometry:
        return conv.geometry(self.kernel, self.strides, self.dilations, self.pads)

    @property
    def out(self) -> tuple[int, ...]:
        axes = zip(self.size, self.kernel, self.strides, self.dilations, self.pads, strict=True)
        if self.transposed:
            return tuple((n - 1) * s + (k - 1) * d + 1 - sum(p) for n, k, s, d, p in axes)
        return tuple((n + sum(p) - (k - 1) * d - 1) // s + 1 for n, k, s, d, p in axes)

    @property
    def sums(self) -> tuple[int, int]:
        """Of one part."""
        return self.n * math.prod(self.out), self.outputs

    def arrays(self, dtype: Any) -> tuple[Array, Array, Array]:
        """Images and weights (outputs, kernel..., channels / groups), channels last, and the bias."""
        x = random((self.n, *self.size, self.channels), dtype)
        w = random((self.outputs, *self.kernel, self.channels // self.groups), dtype, seed=1)
        return x, w, random((self.outputs,), dtype, seed=2)

    def guarded(self, dtype: Any) -> Guarded:
        return Guarded((self.n, *self.out, self.outputs), dtype)

    def want(self, x: Array, w: Array, b: Array) -> Array:
        """In float64, channels last."""
        told: dict[str, Any] = {"strides": self.strides, "pads": self.pads, "dilations": self.dilations}
        wide = np.moveaxis(x, -1, 1).astype(np.float64)
        weights = np.moveaxis(w, -1, 1).astype(np.float64)
        if self.transposed:
            apart = weights.reshape(self.groups, -1, *weights.shape[1:]).swapaxes(1, 2)
            weights = apart.reshape(self.channels, -1, *self.kernel)
        fn = transposed_convolution if self.transposed else convolution
        made = fn(np, wide, weights, b.astype(np.float64), self.out, group=self.groups, **told)
        return np.moveaxis(made, 1, -1)


FLAT = Layer(2, (6, 7), 5, 18, (3, 2), (1, 2), (1, 2), ((1, 0), (2, 1)))
WALKED = Layer(1, (4, 5), 130, 7, (1, 2), (1, 1), (1, 1), ((1, 0), (1, 0)))
SPLIT = Layer(1, (3, 3), 128, 20, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
GROUPED = Layer(2, (5, 4), 6, 9, (3, 3), (2, 1), (1, 1), ((1, 1), (0, 2)), groups=3)
LINE = Layer(3, (11,), 3, 4, (4,), (3,), (2,), ((2, 3),))
VOLUME = Layer(1, (3, 4, 5), 2, 3, (2, 3, 2), (1, 2, 1), (1, 1, 2), ((1, 0), (1, 1), (0, 2)))
LAYERS = {"flat": FLAT, "walked": WALKED, "split": SPLIT, "grouped": GROUPED, "line": LINE, "volume": VOLUME}


def run(layer: Layer, dtype: Any, interpreter: InterpreterLauncher, **options: Any) -> list[str]:
    """Computes the layer, compares it, and returns the kernels that were launched."""
    x, w, b = layer.arrays(dtype)
    out = layer.guarded(dtype)
    parts = Guarded((4, *layer.sums), np.float32) if layer is SPLIT else None
    execute(
        conv.conv(
            x, w, out.array, interpreter, layer.where, groups=layer.groups, finish=conv.Finish(b),
            parts=parts and parts.array, transposed=layer.transposed, **options,
        )
    )  # fmt: skip
    assert_close(out, layer.want(x, w, b), error=ERROR)
    if parts is not None:
        parts.check_guards()
    return [launch.kernel for launch in interpreter.launches]


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("name", LAYERS)
def test_convolution(name: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    kernels = run(LAYERS[name], dtype, interpreter)
    assert kernels == ["conv_kernel"] + ["join_kernel"] * (name == "split")
    walked = name == "split" or (name == "walked" and dtype == F32)  # tiles of halves are deeper
    assert interpreter.launches[0].constexprs["FLAT"] == (not walked)


@pytest.mark.parametrize("kind", ["half", "ieee"])
@pytest.mark.parametrize("layer", [FLAT, WALKED, SPLIT], ids=["flat", "walked", "split"])
def test_every_tile(kind: str, layer: Layer, interpreter: InterpreterLauncher) -> None:
    dtype = np.float16 if kind == "half" else np.float32
    for tile in (tiles.TILES[kind][0], max(tiles.TILES[kind], key=lambda t: t.m * t.n)):
        interpreter.launches.clear()
        run(layer, dtype, interpreter, tile=tile)
        assert interpreter.launches[0].constexprs["BM"] == tile.m


def test_sums_are_split_where_outputs_are_few() -> None:
    def splits(n: int, side: int, channels: int, outputs: int, groups: int = 1) -> int:
        shapes = (n, side, side, outputs), (outputs, 3, 3, channels // groups)
        out, w = (np.empty(shape, np.float16) for shape in shapes)
        return conv.splits_of(out, w, groups)

    assert splits(1, 7, 512, 512) == 16
    assert splits(32, 7, 512, 512) == 2
    assert splits(1, 14, 256, 256) == splits(1, 28, 128, 128) == splits(1, 56, 64, 64) == 1
    assert splits(8, 56, 64, 64) == splits(1, 7, 512, 512, groups=128) == 1


TRANSPOSED = {
    "stride-2": Layer(2, (3, 4), 5, 6, (4, 4), (2, 2), (1, 1), ((1, 1), (1, 1)), transposed=True),
    "kernel-below-stride": Layer(1, (3, 2), 2, 3, (1, 2), (3, 4), (1, 1), ((0, 0), (0, 0)), transposed=True),
    "dilated": Layer(1, (4, 4), 3, 5, (3, 2), (2, 3), (3, 2), ((1, 2), (0, 1)), transposed=True),
    "stride-shares-a-divisor-with-dilation": Layer(1, (5,), 3, 4, (3,), (4,), (6,), ((2, 1),), transposed=True),
    "grouped": Layer(1, (3, 3), 4, 6, (3, 3), (2, 1), (1, 1), ((1, 0), (1, 1)), groups=2, transposed=True),
    "fewer-outputs-than-phases": Layer(1, (3, 2), 2, 3, (2, 3), (2, 5), (1, 1), ((0, 1), (3, 3)), transposed=True),
    "walked": Layer(1, (2, 2), 130, 4, (2, 2), (2, 2), (1, 1), ((0, 0), (0, 0)), transposed=True),
    "volume": Layer(1, (2, 3, 2), 2, 3, (2, 3, 3), (2, 1, 2), (1, 1, 1), ((0, 1), (1, 1), (1, 0)), transposed=True),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution(name: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    assert run(TRANSPOSED[name], dtype, interpreter) == ["conv_kernel"]


DEPTHWISE = {
    "plain": Layer(2, (5, 6), 7, 7, (3, 3), (1, 2), (1, 1), ((1, 1), (1, 0)), groups=7),
    "large-kernel": Layer(1, (7, 8), 8, 8, (5, 5), (1, 1), (1, 2), ((2, 2), (1, 1)), groups=8),
    "multiplied": Layer(1, (4, 4), 3, 9, (2, 2), (1, 1), (1, 1), ((0, 0), (0, 0)), groups=3),
    "many-channels": Layer(1, (3, 3), 70, 70, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), groups=70),
    "line": Layer(2, (9,), 4, 4, (3,), (2,), (2,), ((3, 0),), groups=4),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(name: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    layer = DEPTHWISE[name]
    x, w, b = layer.arrays(dtype)
    out = layer.guarded(dtype)
    execute(depthwise.depthwise(x, w, out.array, interpreter, layer.where, finish=conv.Finish(b)))
    launch = only(interpreter, depthwise.depthwise_kernel)
    assert launch.constexprs["UNROLL"] == (5 if name == "large-kernel" else layer.where.taps)
    assert_close(out, layer.want(x, w, b), error=ERROR)


def finished(layer: Layer, arrays: Sequence[Array], residual: Array, activation: str) -> Array:
    sums = layer.want(*arrays) + residual.astype(np.float64)
    return np.asarray(UNARY[activation][0](sums))


@pytest.mark.parametrize("activation", ["relu", "silu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("name", ["flat", "split", "depthwise"])
def test_what_follows(name: str, activation: str, interpreter: InterpreterLauncher) -> None:
    """act(sums + bias + residual), whichever kernel ends with it."""
    layer = DEPTHWISE["plain"] if name == "depthwise" else LAYERS[name]
    arrays = layer.arrays(F32)
    x, w, b = arrays
    out, residual = layer.guarded(F32), random((layer.n, *layer.out, layer.outputs), F32, seed=3)
    finish = conv.Finish(b, residual, activation)
    if name == "depthwise":
        calls = depthwise.depthwise(x, w, out.array, interpreter, layer.where, finish=finish)
    else:
        parts = np.full((4, *layer.sums), np.nan, np.float32) if name == "split" else None
        calls = conv.conv(x, w, out.array, interpreter, layer.where, finish=finish, parts=parts)
    execute(calls)
    assert_close(out, finished(layer, arrays, residual, activation), error=ERROR + FUNCTION_ERROR)


def test_any_strides(interpreter: InterpreterLauncher) -> None:
    """Channels first, every second pixel, weights in ONNX's order, an output that is a window into a larger array."""
    layer = FLAT
    x, w, b = layer.arrays(np.float32)
    planes = np.ascontiguousarray(np.moveaxis(x, -1, 1)).transpose(0, 2, 3, 1)
    weights = np.ascontiguousarray(np.moveaxis(w, -1, 1)).transpose(0, 2, 3, 1)
    room = np.full((layer.n, *layer.out, layer.outputs + 3), 7, np.float32)
    execute(
        conv.conv(planes, weights, room[..., 1:-2], interpreter, layer.where, finish=conv.Finish(np.repeat(b, 2)[::2]))
    )
    np.testing.assert_allclose(room[..., 1:-2], layer.want(x, w, b), atol=1e-5)
    assert (room[..., 0] == 7).all()
    assert (room[..., -2:] == 7).all()


def test_nothing_is_launched_for_nothing(interpreter: InterpreterLauncher) -> None:
    empty = np.empty((0, 3, 3, 2), np.float32)
    where = conv.geometry((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    assert conv.conv(empty, np.empty((2, 1, 1, 2), np.float32), empty, interpreter, where) == []
    assert depthwise.depthwise(empty, np.empty((2, 1, 1, 1), np.float32), empty, interpreter, where) == []


def test_what_has_no_kernel_is_named(interpreter: InterpreterLauncher) -> None:
    x, w = np.empty((1, 3, 3, 2), np.float64), np.empty((2, 1, 1, 2), np.float64)
    where = conv.geometry((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    with pytest.raises(ValueError, match=r"conv: no kernel for float64\[1, 3, 3, 2\], float64\[2, 1, 1, 2\]"):
        conv.conv(x, w, x, interpreter, where)
    x, w = x.astype(np.float32), w.astype(np.float32)
    with pytest.raises(ValueError, match="precision 'fast' is none of"):
        conv.conv(x, w, x, interpreter, where, precision="fast")


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_padded_channels(dtype: Any, interpreter: InterpreterLauncher) -> None:
    x, out = random((2, 17, 9, 3), dtype), Guarded((2, 17, 9, 4), dtype)
    planes = np.ascontiguousarray(np.moveaxis(x, -1, 1)).transpose(0, 2, 3, 1)
    execute(pad_channels(planes, out.array, interpreter))
    assert_close(out, np.concatenate([x, np.zeros((2, 17, 9, 1), x.dtype)], axis=-1).astype(np.float64))
