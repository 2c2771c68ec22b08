"""What follows a channels-last convolution's sums: bias, residual, activation, while they are in cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.conv_epilogue import Activation, activator
from infera_kernels.cpu.nhwc_border import joined
from infera_kernels.cpu.nhwc_rows import flat, images

TILE = 1024
"""Elements of a bias repeated for several pixels, so that inner loops are long."""


class Finish(Protocol):
    """Calls that make activation(sums + b + residual), (..., O) each, in place or to `out`, of the shape of `sums`.

    Where `out` is given `sums` is (rows, W, O), contiguous, and is overwritten.
    """

    def __call__(self, sums: Array, residual: Array | None, out: Array | None = None) -> list[Call]: ...


def epilogue(
    activation: Activation | None, b: Array | None, pixels: int, channels: int, like: Array, scratch: Scratch
) -> tuple[list[Call], Finish]:
    """The calls to make once, and what finishes blocks of at most `pixels`."""
    calls, apply = activator(activation, pixels * channels, like.dtype, scratch)
    repeat = min(pixels, max(1, TILE // channels))
    tile = b
    if b is not None and repeat > 1:
        tile = scratch((repeat * channels,), b.dtype)
        calls = [*calls, (np.copyto, (tile.reshape(repeat, channels), b))]

    def finish(sums: Array, residual: Array | None, out: Array | None = None) -> list[Call]:
        passes: list[Callable[[Array, Array], list[Call]]] = []
        if tile is not None and b is not None:
            passes.append(lambda x, y: _add_bias(x, b, tile, y))
        if residual is not None:
            passes.append(lambda x, y: [(np.add, (x, residual, y))])
        if activation is not None:
            passes.append(apply)
        if out is not None and not passes:
            passes.append(lambda x, y: [(np.copyto, (y, x))])
        *before, last = passes or [lambda x, y: []]
        made = [call for step in before for call in step(sums, sums)]
        return made + last(sums, sums if out is None else out)

    return calls, finish


def _add_bias(x: Array, b: Array, tile: Array, y: Array) -> list[Call]:
    """y = x + b, where `tile` is b repeated."""
    if tile is b or not x.flags.c_contiguous:
        return [(np.add, (x, b, y))]
    if y.flags.c_contiguous:
        flat_x, flat_y = x.reshape(-1), y.reshape(-1)
        whole = flat_x.size - flat_x.size % tile.size
        first, rest = slice(0, whole), slice(whole, None)
        parts = (
            (flat_x[first].reshape(-1, tile.size), tile, flat_y[first].reshape(-1, tile.size)),
            (flat_x[rest], tile[: flat_x.size - whole], flat_y[rest]),
        )
        return [(np.add, part) for part in parts if part[0].size]
    rows, width, channels = y.shape
    together = max(n for n in range(1, tile.size // channels + 1) if width % n == 0)
    if y.strides[1] != channels * y.itemsize or together == 1:
        return [(np.add, (x, b, y))]
    x, y = (a.reshape(rows, -1, together * channels, copy=False) for a in (x, y))
    return [(np.add, (x, tile[: together * channels], y))]


class Blocks:
    """Blocks of y (N, H, W, O), in lines of `line` pixels that are numbered through all images: their sums, and what
    is made of them.

    Where y lies within a border they are computed aside, a line being a row of it, and the last pass writes them to
    their places.
    """

    def __init__(
        self,
        activation: Activation | None,
        b: Array | None,
        residual: Array | None,
        y: Array,
        scratch: Scratch,
        *,
        most: int,
        line: int,
    ) -> None:
        self.y = y.swapaxes(0, 1) if y.shape[1] == 1 else y  # images of one row are the rows of one
        self.residual, self.line = None if residual is None else flat(residual), line
        self.once, self._finish = epilogue(activation, b, most * line, y.shape[3], y, scratch)
        self.flat = flat(y) if joined(y) else None
        self.aside = None if self.flat is not None else scratch((most * line, y.shape[3]), y.dtype)

    def sums(self, first: int, last: int) -> Array:
        """Where the sums of lines [first, last) go, (pixels, O)."""
        if self.flat is not None:
            return self.flat[first * self.line : last * self.line]
        assert self.aside is not None
        return self.aside[: (last - first) * self.line]

    def finish(self, first: int, last: int) -> list[Call]:
        """The calls that make of these sums what y holds."""
        sums = self.sums(first, last)
        rest = None if self.residual is None else self.residual[first * self.line : last * self.line]
        if self.flat is not None:
            return self._finish(sums, rest)
        rows = sums.reshape(-1, *self.y.shape[2:])
        more = None if rest is None else rest.reshape(rows.shape, copy=False)
        return [
            call
            for i, row, end, at in images(first, last, self.y.shape[1])
            for call in self._finish(rows[at], None if more is None else more[at], self.y[i, row:end])
        ]
