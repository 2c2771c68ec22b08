"""What follows a channels-last convolution's sums: bias, residual, activation, in place while they are in cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.conv_epilogue import Activation, activator

Finish: TypeAlias = Callable[[Array, Array | None], list[Call]]
"""`finish(sums, residual)`, both (pixels, O): the calls that make activation(sums + b + residual), in place."""

TILE = 1024
"""Elements of a bias repeated for several pixels, so that inner loops are long."""


def epilogue(
    activation: Activation | None, b: Array | None, pixels: int, channels: int, like: Array, scratch: Scratch
) -> tuple[list[Call], Finish]:
    """The calls to make once, and `finish` for blocks of at most `pixels`."""
    calls, apply = activator(activation, pixels * channels, like.dtype, scratch)
    repeat = min(pixels, max(1, TILE // channels))
    tile = b
    if b is not None and repeat > 1:
        tile = scratch((repeat * channels,), b.dtype)
        calls = [*calls, (np.copyto, (tile.reshape(repeat, channels), b))]

    def finish(sums: Array, residual: Array | None) -> list[Call]:
        made: list[Call] = []
        if tile is not None and b is not None:
            made += _add_bias(sums, b, tile)
        if residual is not None:
            made.append((np.add, (sums, residual, sums)))
        return made + apply(sums)

    return calls, finish


def _add_bias(sums: Array, b: Array, tile: Array) -> list[Call]:
    if tile is b or not sums.flags.c_contiguous:
        return [(np.add, (sums, b, sums))]
    line = sums.reshape(-1)
    whole = line.size - line.size % tile.size
    parts = (line[:whole].reshape(-1, tile.size), tile), (line[whole:], tile[: line.size - whole])
    return [(np.add, (part, bias, part)) for part, bias in parts if part.size]
