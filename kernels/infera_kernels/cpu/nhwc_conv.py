"""Two-dimensional convolution on NumPy and its BLAS, channels last.

Six strategies, by shape: pointwise (a product straight from x), depthwise (multiply-adds of channels), shifted sums
(few output channels), Winograd (3x3), and for the rest products of windows that OpenBLAS' own loops read where they
lie, or, where these may not be called, a block of columns (im2col) and a product. Every one applies the epilogue to a
block while it is in cache, and is split by rows of the output, or by its channels where the rows are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from infera_kernels.calls import SERIAL, Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.nhwc_border import whole_tiles
from infera_kernels.cpu.nhwc_columns import columns, copies_taps
from infera_kernels.cpu.nhwc_depthwise import depthwise, whole_folds
from infera_kernels.cpu.nhwc_pointwise import pointwise
from infera_kernels.cpu.nhwc_rows import Window, in_parts
from infera_kernels.cpu.nhwc_shifted import shifted
from infera_kernels.cpu.nhwc_windows import reads, whole_panels, windows
from infera_kernels.cpu.nhwc_winograd import finishes_early, tile_of, winograd
from infera_kernels.cpu.packed import inner
from infera_kernels.cpu.parts import worth

FEW_OUTPUTS = 4
"""Output channels up to which a product for each tap and a sum of planes is faster than columns, ..."""

SOME_INPUTS = 8
"""... and input channels from which it is."""

FEW_INPUTS = 4
"""Input channels up to which those that come first are read as they lie: an image's."""

ROWS_OF_A_PART = 2
"""Rows of the output, of all images, below which a part is made of channels."""

PRODUCT_NS, ELEMENT_NS = 0.03, 0.2
"""What a multiply-add takes, and an element to be read or written, about."""

CHANNELS_OF_A_PART = 16
"""The fewest channels of such a part."""


def conv2d(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    *,
    strides: Pair,
    pads: tuple[Pair, Pair],
    dilations: Pair,
    group: int,
    activation: Activation | None = None,
    residual: Array | None = None,
    pack: Pack | None = None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual).

    x (N, H, W, C), w (O, C / group, KH, KW), b (O,) or None, y and residual (N, OH, OW, O), of one floating dtype.
    w and b are contiguous, the others contiguous or channel slices of contiguous arrays. Where `writes_rows` y may lie
    within a border, where `reads_strided` x may have any strides. `pads` are (before, after) of each axis and at least
    0: where there are none, x may be larger than the windows reach. The residual may be y itself. `pack` is given where
    w never changes and sums may be taken in another order.
    """
    if not y.size:
        return []
    if x.shape[1] == y.shape[1] == w.shape[2] == 1 and pads[0] == (0, 0):  # images of one row are the rows of one
        x, y = x.swapaxes(0, 1), y.swapaxes(0, 1)
        residual = None if residual is None else residual.swapaxes(0, 1)
        strides, dilations = (1, strides[1]), (1, dilations[1])
    out, kernel = (y.shape[1], y.shape[2]), (w.shape[2], w.shape[3])
    split = worth(PRODUCT_NS * y.size * w[0].size + ELEMENT_NS * (x.size + y.size), split)
    if group == 1 and _by_channels(y, split.threads):

        def part(start: int, stop: int) -> list[Call]:
            some = slice(start, stop)
            return conv2d(
                x, w[some], None if b is None else b[some], y[..., some], scratch, SERIAL, strides=strides, pads=pads,
                dilations=dilations, group=1, activation=activation,
                residual=None if residual is None else residual[..., some],
                pack=None if pack is None else _pack_of(pack, some),
            )  # fmt: skip

        return in_parts(y.shape[3], split, part)
    window = Window(out, kernel, strides, dilations, (pads[0][0], pads[1][0]))
    if _is_depthwise(w.shape, group):
        return depthwise(x, w, b, y, scratch, split, pack, window, activation=activation, residual=residual)
    loops = inner() if group == 1 and pack is not None and x.dtype == np.float32 else None
    if kernel == (1, 1) and window.fits(x):
        return pointwise(
            x, w, b, y, scratch, split, pack, strides=strides, group=group, loops=loops, activation=activation,
            residual=residual,
        )  # fmt: skip
    if _is_shifted(w.shape, strides, group):
        return shifted(x, w, b, y, scratch, split, window, activation=activation, residual=residual)
    direct = loops is not None and reads(w.shape, window)
    tile = 0 if pack is None else tile_of(w.shape, y.shape[0], out, strides, dilations, group, direct=direct)
    if tile and pack is not None:
        return winograd(
            x, w, b, y, scratch, split, pack, tile, window, loops=loops, activation=activation, residual=residual
        )  # fmt: skip
    if direct and pack is not None and loops is not None:
        return windows(
            x, w, b, y, scratch, split, pack, window, loops=loops, activation=activation, residual=residual
        )  # fmt: skip
    return columns(
        x, w, b, y, scratch, split, pack, window, group=group, activation=activation, residual=residual
    )  # fmt: skip


def border_of(
    size: Pair, w: Sequence[int], images: int, out: Pair, *, strides: Pair, pads: tuple[Pair, Pair], dilations: Pair,
    group: int,
) -> tuple[Pair, Pair] | None:  # fmt: skip
    """The border, (before, after) of each axis, within which `conv2d` reads images of `size` (H, W) without a copy: the
    padding, or more where it computes more than the output. None where it reads them without or copies in any case."""
    if not any(map(any, pads)) or _is_shifted(w, strides, group):
        return None
    if _is_depthwise(w, group):
        return whole_folds(size, w, out, strides=strides, pads=pads, dilations=dilations)
    window = Window(out, (w[2], w[3]), strides, dilations, (0, 0))
    if tile := _tile(w, images, window, group):
        return None if math.prod(dilations) > 1 else whole_tiles(size, out, pads, tile)
    if _is_direct(w, window, group):
        left, right = pads[1]
        whole = whole_panels(window)
        return pads[0], (left, max(right, whole.seen(1, whole.out[1]) - size[1] - left))
    return pads


def writes_rows(w: Sequence[int], group: int) -> bool:
    """Whether `conv2d` writes to a y within a border, in the last pass of its epilogue if there is one."""
    return not _is_depthwise(w, group) and not (group == 1 and w[0] <= FEW_OUTPUTS)


def writes_slices(
    w: Sequence[int], images: int, out: Pair, *, strides: Pair, dilations: Pair, group: int,
    activation: Activation | None, residual: bool,
) -> bool:  # fmt: skip
    """Whether `conv2d` with constant weights writes to a channel slice as fast as to a y that is copied there."""
    if _is_shifted(w, strides, group):
        return False
    tile = _tile(w, images, Window(out, (w[2], w[3]), strides, dilations, (0, 0)), group)
    return not tile or finishes_early(activation, residual)


def reads_strided(w: Sequence[int], out: Pair, *, strides: Pair, dilations: Pair, group: int) -> bool:
    """Whether `conv2d` reads few channels as fast where they come first: it copies taps one by one in any case."""
    window = Window(out, (w[2], w[3]), strides, dilations, (0, 0))
    few = w[1] <= FEW_INPUTS and math.prod(w[2:]) > 1 and copies_taps(w, group)
    return few and not _is_direct(w, window, group)


def _is_direct(w: Sequence[int], window: Window, group: int) -> bool:
    """Whether constant float32 weights are multiplied by windows that are read where they lie, unless tiles pay."""
    return group == 1 and window.kernel != (1, 1) and inner() is not None and reads(w, window)


def _tile(w: Sequence[int], images: int, window: Window, group: int) -> int:
    """`tile_of` constant float32 weights."""
    direct = _is_direct(w, window, group)
    return tile_of((w[0], w[1], w[2], w[3]), images, window.out, window.strides, window.dilations, group, direct=direct)


def _is_depthwise(w: Sequence[int], group: int) -> bool:
    return group > 1 and tuple(w[:2]) == (group, 1)


def _is_shifted(w: Sequence[int], strides: Sequence[int], group: int) -> bool:
    return (
        tuple(strides) == (1, 1) and group == 1 and w[0] <= FEW_OUTPUTS and w[1] >= SOME_INPUTS and math.prod(w[2:]) > 1
    )


def _pack_of(pack: Pack, channels: slice) -> Pack:
    """Packs the weights of some output channels."""
    return lambda tag, build: pack(f"{tag} {channels.start}:{channels.stop}", lambda w: build(w[channels]))


def _by_channels(y: Array, threads: int) -> bool:
    """Whether a part is made of channels of y: rows are few, or weights outnumber the pixels they meet."""
    if threads == 1 or y.shape[3] < CHANNELS_OF_A_PART * threads:
        return False
    rows = y.shape[0] * y.shape[1]
    return bool(rows < ROWS_OF_A_PART * threads or rows * y.shape[2] < y.shape[3])
