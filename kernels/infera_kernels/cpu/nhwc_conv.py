"""Two-dimensional convolution on NumPy and its BLAS, channels last.

Four strategies, by shape: pointwise (a product straight from x), depthwise (multiply-adds of whole rows), Winograd
(3x3), and for the rest a block of columns (im2col) and a product. Every one applies the epilogue to a block while it is
in cache, and is split by rows of the output, or by its channels where the rows are few.
"""

from __future__ import annotations

from infera_kernels.calls import SERIAL, Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.nhwc_columns import columns
from infera_kernels.cpu.nhwc_depthwise import depthwise
from infera_kernels.cpu.nhwc_pointwise import pointwise
from infera_kernels.cpu.nhwc_rows import Window, in_parts
from infera_kernels.cpu.nhwc_winograd import tile_of, winograd

ROWS_OF_A_PART = 2
"""Rows of the output below which a part is made of channels."""


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
    w and b are contiguous, the others contiguous or channel slices of contiguous arrays. `pads` are (before, after) of
    each axis and at least 0. `pack` is given where w never changes and sums may be taken in another order.
    """
    if not y.size:
        return []
    out, kernel = (y.shape[1], y.shape[2]), (w.shape[2], w.shape[3])
    if group == 1 and y.shape[0] * y.shape[1] < ROWS_OF_A_PART * split.threads and y.shape[3] >= split.threads > 1:

        def part(start: int, stop: int) -> list[Call]:
            some = slice(start, stop)
            return conv2d(
                x, w[some], None if b is None else b[some], y[..., some], scratch, SERIAL, strides=strides, pads=pads,
                dilations=dilations, group=1, activation=activation,
                residual=None if residual is None else residual[..., some],
                pack=None if pack is None else lambda tag, build: pack(tag, build)[..., some],
            )  # fmt: skip

        return in_parts(y.shape[3], split, part)
    window = Window(out, kernel, strides, dilations, (pads[0][0], pads[1][0]))
    if group > 1 and w.shape[:2] == (group, 1):
        return depthwise(x, w, b, y, scratch, split, pack, window, activation=activation, residual=residual)
    if kernel == (1, 1) and window.fits(x):
        return pointwise(
            x, w, b, y, scratch, split, pack, strides=strides, group=group, activation=activation, residual=residual
        )
    tile = tile_of(w.shape, out, strides, dilations, group) if pack is not None else 0
    if tile and pack is not None:
        return winograd(x, w, b, y, scratch, split, pack, tile, window, activation=activation, residual=residual)
    return columns(
        x, w, b, y, scratch, split, pack, window, group=group, activation=activation, residual=residual
    )  # fmt: skip
