"""Matrix products and convolutions, channels last, with a packed weight, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from infera_kernels.calls import Array, Call
from infera_kernels.cpu.aligned import aligned
from infera_kernels.cpu.parts import spans
from infera_kernels.jit.compiling import bound_by_address, compiled
from infera_kernels.jit.functions import F
from infera_kernels.jit.microkernel import TILE, multiply_tile

ROWS, COLUMNS = TILE.rows, TILE.columns

DEPTH = 256
"""Rows of a panel, about, that all tiles of a block are multiplied with, one after the other: they stay in the
first-level cache, while the next ones come to the second-level cache."""

BLOCK_ROWS, BLOCK_BYTES = 132, 1 << 17
"""Least of the left-hand side in a block, which is read once for every panel, from the second-level cache where it
fits: its rows, eleven tiles with AVX-512, or its bytes. The weight is read once for every block."""

DEEP_BYTES = 1 << 20
"""Of the left-hand side in a block, from which on all panels are multiplied with as many of its columns before the next
ones are read: products are added to what is there, but all that is read for them fits the second-level cache."""


def _multiply(
    x: Any, image: int, line: int, pixel: int, offsets: Any, group: int, run: int, packed: Any, bias: Any,
    y: Any, lines: int, first: int, last: int, cols: int, chunk: int, together: int, deep: int, low: Any, high: Any,
) -> None:  # fmt: skip
    """y (images, lines, cols, N) at lines [first, last) of all images' lines.

    Output pixel (n, i, j) reads x from n * image + i * line + j * pixel on, in bytes. Blocks are `together` lines of
    `chunk` pixels, whose products with rows of a panel at a time, those of `group` taps or a piece of a run, are added
    up: panel by panel, or if `deep` range of rows by range of rows.
    """
    a, c = x.ctypes.data, y.ctypes.data
    b, starts, shifts = packed.ctypes.data, bias.ctypes.data, offsets.ctypes.data
    panels, panel, n = packed.shape[1], packed.strides[1], y.shape[3]
    another = packed.strides[0] if packed.shape[0] > 1 else 0
    taps, line_bytes, least, most = offsets.size, COLUMNS * packed.itemsize, F(-np.inf), F(np.inf)
    pieces = (run + DEPTH - 1) // DEPTH
    blocks = (taps + group - 1) // group * pieces
    for begin in range(first, last, together):
        end = min(begin + together, last)
        for left in range(0, cols, chunk):
            width = min(chunk, cols - left)
            tiles = (width + ROWS - 1) // ROWS
            higher = (width + tiles - 1) // tiles
            many = width - tiles * (higher - 1)
            apart = (line_bytes + (end - begin) * tiles - 1) // ((end - begin) * tiles)
            for turn in range(panels * blocks):
                p, block = (turn % panels, turn // panels) if deep else (turn // blocks, turn % blocks)
                tap, piece = block // pieces * group, block % pieces
                skipped = run * piece // pieces
                several, depth = min(group, taps - tap), run * (piece + 1) // pieces - skipped
                here, size = p * panel + (tap * run + skipped) * line_bytes, several * depth * line_bytes
                following = here + size
                if deep:
                    following = here + panel if p + 1 < panels else following - p * panel
                before, after = (least, most) if block + 1 < blocks else (low, high)
                for at in range(begin, end):
                    source = a + (at // lines) * image + (at % lines) * line + left * pixel + skipped * 4
                    target = c + (at // lines) * y.strides[0] + (at % lines) * y.strides[1]
                    target += left * y.strides[2] + p * COLUMNS * 4
                    weights = b + (at // lines) * another
                    ahead = weights + following + (at - begin) * tiles * apart * several * depth
                    for t in range(tiles):
                        rows = higher if t < many else higher - 1
                        multiply_tile(
                            rows, packed, source, pixel, shifts + tap * 8, several, depth, weights + here,
                            starts + p * COLUMNS * 4, target, y.strides[2], n - p * COLUMNS, block, before, after,
                            ahead, apart,
                        )  # fmt: skip
                        source += rows * pixel
                        target += rows * y.strides[2]
                        ahead += apart * several * depth


@compiled
def multiply_cached(
    rows: int, a: int, lda: int, depth: int, packed: Any, bias: Any, offsets: Any, c: int, ldc: int, columns: int
) -> None:
    """c (rows, columns) = bias + a (rows, depth) @ what was packed, at these addresses, with strides in bytes.

    For a part of a compiled function whose weights are in the cache: none are asked for ahead. `offsets` is one 0.
    """
    tiles, weights = (rows + ROWS - 1) // ROWS, packed.ctypes.data
    for p in range((columns + COLUMNS - 1) // COLUMNS):
        done = 0
        for t in range(tiles):
            count = rows * (t + 1) // tiles - done
            multiply_tile(
                count, packed, a + done * lda, lda, offsets.ctypes.data, 1, depth, weights + p * depth * COLUMNS * 4,
                bias.ctypes.data + p * COLUMNS * 4, c + done * ldc + p * COLUMNS * 4, ldc, columns - p * COLUMNS, 0,
                F(-np.inf), F(np.inf), weights, 0,
            )  # fmt: skip
            done += count


_MULTIPLY = {np.dtype(weights): compiled(_multiply) for weights in (np.float32, np.int8)}


def pack(w: Array) -> Array:
    """(K, N) as panels (ceil(N / COLUMNS), K, COLUMNS), filled up with zeros: float32, where it is int8 as that."""
    k, n = w.shape
    panels = -(-n // COLUMNS)
    made = aligned((panels, k, COLUMNS), np.int8 if w.dtype == np.int8 else np.float32)
    _fill(made, w)
    return made


def pack_each(matrices: Sequence[Array]) -> Array:
    """`pack` of matrices of one shape, one behind the other."""
    k, n = matrices[0].shape
    made = aligned((len(matrices), -(-n // COLUMNS), k, COLUMNS))
    for panels, w in zip(made, matrices, strict=True):
        _fill(panels, w)
    return made


def _fill(panels: Array, w: Array) -> None:
    """Panels of w, the last of which is filled up with zeros. They begin with cache lines, as vectors should."""
    k, n = w.shape
    whole, rest = divmod(n, COLUMNS)
    panels[:whole] = w[:, : whole * COLUMNS].reshape(k, whole, COLUMNS).transpose(1, 0, 2)
    if rest:
        panels[whole, :, :rest] = w[:, whole * COLUMNS :]
        panels[whole, :, rest:] = 0


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
    taps = len(offsets)
    group = max(1, DEPTH // run) if run * taps > DEPTH else taps
    window = max(1, min(steps[2], run * taps * 4))
    most = max(BLOCK_ROWS, BLOCK_BYTES // window // ROWS * ROWS)
    chunk = cols if cols <= most else _even(cols, most)
    together = max(1, most // chunk)
    bias = no_bias(packed) if bias is None else bias
    packed = packed.reshape(-1, *packed.shape[-3:])
    if len(packed) > 1:
        together = _even(lines, together, 1)
    deep = int(together * chunk * window > DEEP_BYTES)
    x = x[(None,) * (4 - x.ndim)]
    return bound_by_address(
        _MULTIPLY[packed.dtype], x, *steps, np.array(offsets, np.int64), group, run, packed, bias, y,
        lines, first, last, cols, chunk, together, deep, F(low), F(high),
    )  # fmt: skip


def _even(count: int, most: int, multiple: int = ROWS) -> int:
    """How many of `count` there are in each of as few parts as may be, about even ones of whole multiples."""
    parts = -(-count // most)
    return -(-count // (parts * multiple)) * multiple


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
