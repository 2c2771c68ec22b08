"""A padded image laid out so that every tap of a strided convolution is a contiguous shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from infera_kernels.calls import Array, Call, Scratch

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Planes:
    """Zero-padded planes, split by stride phase: element (h, w) of the padded image is `grid[c, h % sh, w % sw,
    h // sh, w // sw]`. `flat` is the same memory with the last two axes merged and a tail, so that
    `flat_tap(i, j, n)` may run past the last row: its columns beyond the output's width are garbage to be ignored.
    """

    flat: Array
    grid: Array
    strides: Pair
    dilations: Pair
    before: Pair

    def tap(self, i: int, j: int, rows: slice, cols: int) -> Array:
        """(C, rows, cols): what kernel tap (i, j) meets under output rows `rows`."""
        (qh, ah), (qw, aw) = self._split(i, j)
        return self.grid[:, ah, aw, qh + rows.start : qh + rows.stop, qw : qw + cols]

    def flat_tap(self, i: int, j: int, count: int) -> Array:
        """(C, count): what kernel tap (i, j) meets, output rows `self.width` apart."""
        (qh, ah), (qw, aw) = self._split(i, j)
        start = qh * self.width + qw
        return self.flat[:, ah, aw, start : start + count]

    @property
    def width(self) -> int:
        """The distance between two rows."""
        return int(self.grid.shape[4])

    def _split(self, i: int, j: int) -> tuple[Pair, Pair]:
        return divmod(i * self.dilations[0], self.strides[0]), divmod(j * self.dilations[1], self.strides[1])

    def head(self, channels: int) -> Planes:
        """The first `channels` planes."""
        return replace(self, flat=self.flat[:channels], grid=self.grid[:channels])

    def clear(self) -> Call:
        """Zeroes everything; once is enough for all images of a run."""
        return (np.copyto, (self.flat, self.flat.dtype.type(0)))

    def load(self, x: Array) -> list[Call]:
        """Copies one image (C, H, W) in, a call for each phase."""
        calls: list[Call] = []
        for a in range(self.strides[0]):
            to_rows, from_rows = _phase(a, self.strides[0], self.before[0], x.shape[1], self.grid.shape[3])
            for b in range(self.strides[1]):
                to_cols, from_cols = _phase(b, self.strides[1], self.before[1], x.shape[2], self.width)
                target = self.grid[:, a, b, to_rows, to_cols]
                if target.size:
                    calls.append((np.copyto, (target, x[:, from_rows, from_cols])))
        return calls


def planes(
    scratch: Scratch,
    channels: int,
    out: Pair,
    kernel: Sequence[int],
    dtype: object,
    *,
    strides: Pair,
    dilations: Pair,
    before: Pair,
) -> Planes:
    """Room for `channels` padded planes, as far as a convolution with this output reads them."""
    reach = [(k - 1) * d // s for k, d, s in zip(kernel, dilations, strides, strict=True)]
    height, width = out[0] + reach[0], out[1] + reach[1]
    flat = scratch((channels, *strides, height * width + reach[1]), dtype)
    grid = flat[..., : height * width].reshape(channels, *strides, height, width)
    return Planes(flat, grid, strides, dilations, before)


def _phase(phase: int, stride: int, before: int, size: int, room: int) -> tuple[slice, slice]:
    """Where along one axis the elements of a phase go, and which they are."""
    first = max(0, -((phase - before) // stride))
    start = first * stride + phase - before
    count = max(0, min(room - first, -(-(size - start) // stride)))
    return slice(first, first + count), slice(start, start + (count - 1) * stride + 1 if count else start, stride)
