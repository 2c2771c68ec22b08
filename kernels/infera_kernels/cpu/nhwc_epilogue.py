"""What follows a channels-last convolution's sums: bias, residual, activation, while they are in cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.conv_epilogue import Activation, activator
from infera_kernels.cpu.nhwc_border import joined
from infera_kernels.cpu.nhwc_rows import flat, images, is_slice

TILE = 4097
"""Elements of a bias repeated for several pixels, or a few more: NumPy copies operands that lie in shorter rows, of
which two fit into the buffers of its iterators (8192 elements), before it adds them."""


class Finish(Protocol):
    """Calls that make activation(sums + b + residual), (..., O) each, in place or to `out`, of the shape of `sums`.

    Where `out` is given `sums` is (rows, W, O), and is overwritten.
    """

    def __call__(self, sums: Array, residual: Array | None, out: Array | None = None) -> list[Call]: ...


def epilogue(
    activation: Activation | None, b: Array | None, pixels: int, channels: int, like: Array, scratch: Scratch
) -> tuple[list[Call], Finish]:
    """The calls to make once, and what finishes blocks of at most `pixels`."""
    calls, apply = activator(activation, pixels * channels, like.dtype, scratch)
    repeated, tile = _repeated(b, pixels, channels, scratch)

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

    return [*calls, *repeated], finish


def beginning(
    b: Array | None, pixels: int, channels: int, scratch: Scratch
) -> tuple[list[Call], Callable[[Array, Array | None], list[Call]]]:
    """The calls to make once, and `begin(sums, residual)`: sums = b + residual, of at most `pixels`."""
    calls, tile = _repeated(b, pixels, channels, scratch)

    def begin(sums: Array, residual: Array | None) -> list[Call]:
        if b is None or tile is None:
            return [(np.copyto, (sums, sums.dtype.type(0) if residual is None else residual))]
        if residual is not None:
            return _add_bias(residual, b, tile, sums)
        if tile is b or not sums.flags.c_contiguous:
            return [(np.copyto, (sums, b))]
        return [(np.copyto, (y, part)) for y, part in _by_tile(tile, sums)]

    return calls, begin


def _repeated(b: Array | None, pixels: int, channels: int, scratch: Scratch) -> tuple[list[Call], Array | None]:
    """b for several pixels at a time, b itself where that is too long or there is one pixel, and what makes it."""
    repeat = min(pixels, -(-TILE // channels))
    if b is None or repeat == 1:
        return [], b
    tile = scratch((repeat * channels,), b.dtype)
    return [(np.copyto, (tile.reshape(repeat, channels), b))], tile


def _by_tile(tile: Array, *arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Contiguous arrays in rows as long as `tile`, and the rest of them, each with what of `tile` goes there."""
    flat = [a.reshape(-1) for a in arrays]
    whole = flat[0].size - flat[0].size % tile.size
    if whole:
        yield *(a[:whole].reshape(-1, tile.size) for a in flat), tile
    if whole < flat[0].size:
        yield *(a[whole:] for a in flat), tile[: flat[0].size - whole]


def _add_bias(x: Array, b: Array, tile: Array, y: Array) -> list[Call]:
    """y = x + b, where `tile` is b repeated."""
    if tile is b or not x.flags.c_contiguous:
        return [(np.add, (x, b, y))]
    if y.flags.c_contiguous:
        return [(np.add, (source, part, target)) for source, target, part in _by_tile(tile, x, y)]
    if y.ndim < 3:
        return [(np.add, (x, b, y))]
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
    their places. So are lines that are longer than y's, of which the rest is left out, and sums to which a residual is
    added, since it may lie where y does. Where y is a channel slice they are too, but for sums that no pass follows,
    and then copied: a pass over pixels that lie apart takes longer than both. `before`: bias and residual are there
    first (`begin`), and sums are added to them.
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
        before: bool = False,
    ) -> None:
        self.y = y.swapaxes(0, 1) if y.shape[1] == 1 else y  # images of one row are the rows of one
        self.line, self._pixels = line, min(line, y.shape[2])
        more = None if residual is None else flat(residual)
        pixels, channels = most * line, y.shape[3]
        self.once, self._finish = epilogue(activation, None if before else b, pixels, channels, y, scratch)
        self._last = None if before else more
        self._first, self._begin = more, None
        if before:
            once, self._begin = beginning(b, pixels, channels, scratch)
            self.once = [*self.once, *once]
        self._lying = flat(y) if joined(y) and line <= y.shape[2] else None
        self._moves = is_slice(y) and (activation is not None or b is not None)
        self.flat = None if self._moves or (residual is not None and not before) else self._lying
        self.aside = None if self.flat is not None else scratch((pixels, channels), y.dtype)

    def sums(self, first: int, last: int) -> Array:
        """Where the sums of lines [first, last) go, (pixels, O)."""
        if self.flat is not None:
            return self.flat[first * self.line : last * self.line]
        assert self.aside is not None
        return self.aside[: (last - first) * self.line]

    def begin(self, first: int, last: int) -> list[Call]:
        """The calls that set what sums are added to."""
        assert self._begin is not None
        sums, rest = self.sums(first, last), self._of(self._first, first, last)
        if rest is None or self.line == self._pixels:
            return self._begin(sums, rest)
        return self._begin(self._rows(sums), rest.reshape(-1, self._pixels, rest.shape[1], copy=False))

    def finish(self, first: int, last: int) -> list[Call]:
        """The calls that make of these sums what y holds."""
        sums, rest = self.sums(first, last), self._of(self._last, first, last)
        if self.flat is not None:
            return self._finish(sums, rest)
        if self._lying is not None:
            at = slice(first * self.line, last * self.line)
            return self._placed(sums[None], None if rest is None else rest[None], self._lying[None, at])
        rows = self._rows(sums)
        more = None if rest is None else rest.reshape(rows.shape, copy=False)
        return [
            call
            for i, row, end, at in images(first, last, self.y.shape[1])
            for call in self._placed(rows[at], None if more is None else more[at], self.y[i, row:end])
        ]

    def _placed(self, sums: Array, residual: Array | None, y: Array) -> list[Call]:
        """What is made of these sums, in y."""
        if self._moves:
            return [*self._finish(sums, residual), (np.copyto, (y, sums))]
        return self._finish(sums, residual, y)

    def _of(self, residual: Array | None, first: int, last: int) -> Array | None:
        return None if residual is None else residual[first * self._pixels : last * self._pixels]

    def _rows(self, sums: Array) -> Array:
        """(rows, W, O), without what lines are longer."""
        return sums.reshape(-1, self.line, sums.shape[1])[:, : self._pixels]
