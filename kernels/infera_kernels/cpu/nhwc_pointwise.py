"""1x1 convolution, channels last: a product straight from x, in blocks of pixels that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch, Split
from infera_kernels.cpu.aligned import aligned
from infera_kernels.cpu.blas import Inner
from infera_kernels.cpu.conv_epilogue import Activation
from infera_kernels.cpu.conv_planes import Pair
from infera_kernels.cpu.matmul import FEW_ROWS
from infera_kernels.cpu.nhwc_border import joined
from infera_kernels.cpu.nhwc_epilogue import Blocks
from infera_kernels.cpu.nhwc_product import block_bytes, gains, product, slice_of
from infera_kernels.cpu.nhwc_rows import flat, images, in_parts, longest, moved, spans
from infera_kernels.cpu.packed import added, depths, room
from infera_kernels.cpu.packed import pack as pack_weights

BLOCK_PIXELS = 384
"""Pixels of one block where weights are laid out once: few calls, and what follows them finds it in the cache."""


def pointwise(
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    scratch: Scratch,
    split: Split,
    pack: Pack | None,
    *,
    strides: Pair,
    group: int,
    loops: Inner | None,
    activation: Activation | None,
    residual: Array | None,
) -> list[Call]:
    """y = activation(conv(x, w) + b + residual) with w (O, C / group, 1, 1) and no padding; see `conv2d`.

    `loops` are given where weights that are packed may be laid out for them.
    """
    o, c = y.shape[3], x.shape[3]
    height, width = y.shape[1:3]
    count, dense = y.shape[0] * height * width, strides == (1, 1) and x.shape[1:3] == y.shape[1:3]
    line = 1 if dense and joined(y) else width
    fewest = -(-count // split.threads)
    by_address = loops if pack is not None and fewest > FEW_ROWS and gains(c, o) else None
    most = max(1, block_bytes() // (line * o * y.itemsize) if by_address is None else BLOCK_PIXELS // line)
    rows = min(most * line, fewest)
    weights = by_taps(w, group)[0, 0].transpose(1, 0, 2)[:, None]
    if pack is not None and by_address is not None:
        weights = laid_out(pack, by_address)
    elif pack is not None and rows > 1:
        weights = packed(pack, group, slice_of(rows, c // group, o // group))

    def part(start: int, stop: int) -> Iterator[Call]:
        step = longest(start, stop, most)
        blocks = Blocks(activation, b, residual, y, scratch, most=step, line=line, before=by_address is not None)
        space = None if by_address is None else room(step * line, c, scratch)
        gathered = None if dense else scratch((step, width, c), x.dtype)

        def calls() -> Iterator[Call]:
            yield from blocks.once
            for first, last in spans(start, stop, step):
                pixels = slice(first * line, last * line)
                if gathered is None:
                    source = flat(x)[pixels]
                else:
                    source = flat(gathered[: last - first])
                    for i, row, end, at in images(first, last, height):
                        seen = x[i, row * strides[0] : (end - 1) * strides[0] + 1 : strides[0], :: strides[1]]
                        yield moved(gathered[at], seen[:, :width])
                sums = blocks.sums(first, last)
                if by_address is None or space is None:
                    yield from product(grouped(source, group), weights, grouped(sums, group))
                else:
                    yield from blocks.begin(first, last)
                    ranges = [[source[:, begin:end]] for begin, end in pairwise(depths(c))]
                    yield added(ranges, weights, sums, space, by_address)
                yield from blocks.finish(first, last)

        return calls()

    return in_parts(count // line, split, part)


def laid_out(pack: Pack, loops: Inner, runs: int = 1) -> Array:
    """Weights (O, C, KH, KW) that never change, as `packed.pack`'s of a matrix (KH * KW * C, O)."""
    return pack(f"inner{runs}", lambda w: pack_weights(w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]), loops, runs))


def grouped(a: Array, group: int) -> Array:
    """(pixels, channels) as (group, pixels, channels / group)."""
    return a.reshape(a.shape[0], group, -1, copy=False).transpose(1, 0, 2)


def by_taps(w: Array, group: int) -> Array:
    """w (O, C / group, KH, KW) as (KH, KW, C / group, group, O / group), a view."""
    return w.reshape(group, -1, *w.shape[1:], copy=False).transpose(3, 4, 2, 0, 1)


def packed(pack: Pack, group: int, columns: int) -> Array:
    """The matrices (group, taps, O / group) of weights that never change: (group, slices, taps, columns)."""

    def build(w: Array) -> Array:
        taps = by_taps(w, group)
        parts = taps.reshape(*taps.shape[:4], -1, columns, copy=False).transpose(3, 4, 0, 1, 2, 5)
        made = aligned(parts.shape, w.dtype)
        np.copyto(made, parts)
        return made.reshape(*parts.shape[:2], -1, columns)

    return pack(f"columns{columns}", build)
