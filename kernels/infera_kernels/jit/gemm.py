"""Matrix products and convolutions, channels last, with a packed weight, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_kernels.calls import Array, Call
from infera_kernels.cpu.parts import spans
from infera_kernels.jit.compiling import bound_by_address, compiled
from infera_kernels.jit.functions import F
from infera_kernels.jit.microkernel import TILE, multiply_tile

ROWS, COLUMNS = TILE.rows, TILE.columns

BLOCK_BYTES = (1 << 17, 1 << 21)
"""Least and most of the left-hand side in a block. It is read once for every panel, from the second-level cache where
it fits; the packed weight is read once for every block, so that large weights ask for large blocks."""


def _multiply(
    x: Any, image: int, line: int, pixel: int, offsets: Any, run: int, packed: Any, bias: Any,
    y: Any, lines: int, first: int, last: int, cols: int, chunk: int, together: int, low: Any, high: Any,
) -> None:  # fmt: skip
    """y (images, lines, cols, N) at lines [first, last) of all images' lines.

    Output pixel (n, i, j) reads x from n * image + i * line + j * pixel on, in bytes. Blocks are `together` lines of
    `chunk` pixels.
    """
    a, c = x.ctypes.data, y.ctypes.data
    b, starts, shifts = packed.ctypes.data, bias.ctypes.data, offsets.ctypes.data
    panels, panel, n = packed.shape[1], packed.strides[1], y.shape[3]
    another = packed.strides[0] if packed.shape[0] > 1 else 0
    for begin in range(first, last, together):
        end = min(begin + together, last)
        for left in range(0, cols, chunk):
            width = min(chunk, cols - left)
            tiles = (width + ROWS - 1) // ROWS
            for p in range(panels):
                for at in range(begin, end):
                    source = a + (at // lines) * image + (at % lines) * line + left * pixel
                    target = c + (at // lines) * y.strides[0] + (at % lines) * y.strides[1] + left * y.strides[2]
                    weights = b + (at // lines) * another + p * panel
                    done = 0
                    for t in range(tiles):
                        rows = width * (t + 1) // tiles - done
                        multiply_tile(
                            rows, packed, source + done * pixel, pixel, shifts, offsets.size, run, weights,
                            starts + p * COLUMNS * 4, target + done * y.strides[2] + p * COLUMNS * 4, y.strides[2],
                            n - p * COLUMNS, low, high,
                        )  # fmt: skip
                        done += rows


_MULTIPLY = {np.dtype(weights): compiled(_multiply) for weights in (np.float32, np.int8)}


def pack(w: Array) -> Array:
    """(K, N) as panels (ceil(N / COLUMNS), K, COLUMNS), filled up with zeros: float32, where it is int8 as that."""
    k, n = w.shape
    panels = -(-n // COLUMNS)
    made = np.zeros((k, panels * COLUMNS), np.int8 if w.dtype == np.int8 else np.float32)
    made[:, :n] = w
    return np.ascontiguousarray(made.reshape(k, panels, COLUMNS).transpose(1, 0, 2))


def pack_bias(b: Array) -> Array:
    """(N,), filled up with zeros to whole panels."""
    made = np.zeros(-(-b.size // COLUMNS) * COLUMNS, np.float32)
    made[: b.size] = b.reshape(-1)
    return made


def multiply(
    x: Array,
    packed: Array,
    bias: Array | None,
    y: Array,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    steps: tuple[int, int, int],
    offsets: Sequence[int] = (0,),
    run: int,
    part: tuple[int, int] | None = None,
) -> Call:
    """y = clamp(bias + the products of windows of x with `packed`, low, high).

    y (images, lines, cols, N), N contiguous. `packed` is `pack` of (taps * run, N), or one for each image; `bias` is
    `pack_bias`'s. The window of output (n, i, j) begins n * steps[0] + i * steps[1] + j * steps[2] bytes into x, and
    has a run of `run` values at each of `offsets`, in bytes. `part` is a range of the images' lines.
    """
    images, lines, cols, n = y.shape
    if cols == 1:  # tiles step from column to column, and NumPy gives an axis of one any stride
        y = as_strided(y, y.shape, (*y.strides[:2], n * y.itemsize, y.itemsize))
    first, last = part or (0, images * lines)
    window = max(1, min(steps[2], run * len(offsets) * 4))
    block = min(max(BLOCK_BYTES[0], packed.nbytes // 4), BLOCK_BYTES[1])
    chunk = cols if cols * window <= block else max(ROWS, block // window // ROWS * ROWS)
    together = max(1, block // (chunk * window))
    bias = no_bias(packed) if bias is None else bias
    packed = packed.reshape(-1, *packed.shape[-3:])
    x = x[(None,) * (4 - x.ndim)]
    return bound_by_address(
        _MULTIPLY[packed.dtype], x, *steps, np.array(offsets, np.int64), run, packed, bias, y, lines, first, last, cols,
        chunk, together, F(low), F(high),
    )  # fmt: skip


def product(
    a: Array,
    packed: Array,
    bias: Array | None,
    y: Array,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    parts: int = 1,
) -> list[list[Call]]:
    """y (M, N) = clamp(a (M, K) @ w + bias, low, high) in as many parts; rows of `a` and `y` are contiguous.
    Large weights are split by columns, so that each part reads its own."""
    m, k = a.shape
    bias = no_bias(packed) if bias is None else bias
    by_columns = len(packed) >= 2 * parts
    made = []
    for i, j in spans(len(packed) if by_columns else m, parts):
        rows = slice(None) if by_columns else slice(i, j)
        panels = slice(i, j) if by_columns else slice(None)
        columns = slice(i * COLUMNS, j * COLUMNS) if by_columns else slice(None)
        target = y[rows, columns][None, None]
        steps = (0, 0, a.strides[0])
        made.append([multiply(a[rows], packed[panels], bias[columns], target, low=low, high=high, steps=steps, run=k)])
    return made


def no_bias(packed: Array) -> Array:
    """For as many columns as `packed` has."""
    return np.zeros(packed.shape[-3] * COLUMNS, np.float32)
