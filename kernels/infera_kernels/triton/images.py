"""Images (N, spatial..., C) of up to three spatial axes as kernels see them: always three, sizes and strides as tuples.

A view with channels last stands for any order in memory: kernels take every stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from infera_kernels.launch import Const
from infera_kernels.triton.layout import Dims, coalesce, element_strides, fold, fold_one, next_power_of_two

SPATIAL = 3
VECTOR_BYTES = 16
"""The widest load of a thread."""

UNHINTED = (
    *("M", "F", "C", "groups", "splits", "parts", "pixels", "size", "out_size", "rows", "ends", "plane", "steps"),
    *(f"{name}_{of}" for name in ("x", "w", "out", "residual", "index") for of in ("strides", "c", "f", "n", "part")),
    "bias_f",
)
"""Parameters whose alignment nobody needs to know, as what makes loads wide counts in units: so binaries are few."""

Pads = Sequence[tuple[int, int]]
"""(before, after) of each spatial axis."""


@triton.jit
def pixel_of(index, size):
    """The coordinates (n, d, h, w) of a linear index over images of this size."""
    w = index % size[2]
    index = index // size[2]
    h = index % size[1]
    index = index // size[1]
    return index // size[0], index % size[0], h, w


@triton.jit
def pixel_offset(n, d, h, w, strides, UNIT: tl.constexpr):
    """Where a pixel lies; `strides` of (n, d, h, w) count UNIT elements, which the compiler so knows to divide them."""
    offset = n.to(tl.int64) * strides[0] + d.to(tl.int64) * strides[1]
    return (offset + h.to(tl.int64) * strides[2] + w.to(tl.int64) * strides[3]) * UNIT


@triton.jit
def within(d, h, w, size):
    """Whether coordinates lie inside an image of this size."""
    return (d >= 0) & (d < size[0]) & (h >= 0) & (h < size[1]) & (w >= 0) & (w < size[2])


@triton.jit
def walked(pixels, channels, BM: tl.constexpr, BN: tl.constexpr):
    """(pixels, channels) of this program's tile of BM x BN, channels of the same pixels first, and which are there."""
    tiles_n = tl.cdiv(channels, BN)
    tile = tl.program_id(0)
    m = tile // tiles_n * BM + tl.arange(0, BM)
    c = tile % tiles_n * BN + tl.arange(0, BN)
    return m, c, (m < pixels)[:, None] & (c < channels)[None, :]


def three(values: Sequence[int], fill: int) -> Dims:
    """One value for each of three spatial axes; `fill` for those that the image lacks, which come first."""
    return (*(fill,) * (SPATIAL - len(values)), *values)


def constants(values: Sequence[int]) -> tuple[Const, ...]:
    """What is compiled in."""
    return tuple(map(Const, values))


def unit_of(count: int, array: Any) -> int:
    """A power of two that divides `count`, no more than the array's elements of one load: masks that are told so let
    loads be wide."""
    return math.gcd(count, VECTOR_BYTES // array.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Image:
    """An array (N, spatial..., C): sizes and strides, in elements, of (n, d, h, w, c).

    Of axes with one element the stride is 0, that of channels 1, and that of images what it is.
    """

    dims: Dims
    strides: Dims
    itemsize: int

    @property
    def size(self) -> Dims:
        """Of the three spatial axes."""
        return self.dims[1:4]

    @property
    def pixels(self) -> int:
        """Of all images."""
        return math.prod(self.dims[:4])

    @property
    def channels(self) -> int:
        return self.dims[4]

    @property
    def unit(self) -> int:
        """A power of two that divides the distances between pixels, no more than the elements of one load.

        1 where channels are not neighbours: then nothing is loaded that widely.
        """
        if self.strides[4] != 1:
            return 1
        return math.gcd(*self.strides[:4], VECTOR_BYTES // self.itemsize)

    def in_lines(self) -> Image:
        """The same pixels as images of one line, where they are evenly spaced; else itself."""
        dims, (strides,) = coalesce(self.size, [self.strides[1:4]])
        if len(dims) > 1:
            return self
        line = (self.strides[0], 0, 0, strides[0], self.strides[4])
        return Image((self.dims[0], 1, 1, dims[0], self.channels), line, self.itemsize)

    def arguments(self, name: str) -> dict[str, Any]:
        """The parameters `<name>_strides` of pixels, counted in units, and `<name>_c`, the stride of channels."""
        unit = self.unit
        return {f"{name}_strides": fold(s // unit for s in self.strides[:4]), f"{name}_c": fold_one(self.strides[4])}


def image_of(array: Any) -> Image:
    """An array (N, spatial..., C) with one to three spatial axes."""
    shape = tuple(array.shape)
    missing = SPATIAL + 2 - len(shape)
    *strides, channel = (0 if d == 1 else s for d, s in zip(shape, element_strides(array), strict=True))
    return Image(
        (shape[0], *(1,) * missing, *shape[1:]),
        (element_strides(array)[0], *(0,) * missing, *strides[1:], channel if shape[-1] > 1 else 1),
        int(array.dtype.itemsize),
    )


_TILE = 1024
"""Elements of a tile of pixels x channels: eight a thread."""

_WIDEST = 64
"""Channels of a tile, ..."""

_PLANAR = 256
"""... and its pixels where channels lie in planes: there pixels are neighbours."""

_UNROLLED = 9
"""Taps that are loaded together: all of a small kernel, a line of a larger one."""


def unrolled(kernel: Dims) -> int:
    """How many turns of a loop over the taps of a kernel become one."""
    taps = math.prod(kernel)
    return taps if taps <= _UNROLLED else min(kernel[-1], _UNROLLED)


def tile_of(image: Image) -> tuple[int, int]:
    """(pixels, channels) of the tiles that a kernel without tensor cores walks an image in."""
    channels = next_power_of_two(image.channels)
    if image.strides[4] == 1:
        columns = min(channels, _WIDEST)
        return _TILE // columns, columns
    rows = min(next_power_of_two(image.pixels), _PLANAR)
    return rows, min(channels, _TILE // rows)
