"""Products of 8-bit integers with a packed weight: exact sums, or what they are when scaled.

The left-hand side is read once, to the type that the tile multiplies. Unsigned words need values from 0 on, so each row
says what was taken from it (`shift`); weights of uint8 are kept less 128. What that and the weights' zero points change
is put right after the sums, from the sums of columns and rows:

    sum of (u + shift) (w - zero) = sum of u w + shift sum of (w - zero) - zero sum of u
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.parts import spans
from infera_kernels.jit.compiling import bound, bound_by_address, compiled, exact
from infera_kernels.jit.dot_tile import LEFT_TYPES, U8, DType, dot_tile, group
from infera_kernels.jit.microkernel import TILE

ROWS, COLUMNS = TILE.rows, TILE.columns

BLOCK_BYTES = 1 << 17
"""Of the left-hand side, which is read once for every panel."""

_NAN = np.array(np.nan, np.float32).view(np.int32)[()]


class Left(NamedTuple):
    """A left-hand side as tiles take it: `q` (M, K), filled up with zeros to whole words, of one of LEFT_TYPES, and
    `given` (M, 4), int32: what to add to a row, the sum of the row as it is, and 0 or a float32 NaN if it had one."""

    q: Array
    given: Array

    def part(self, rows: slice) -> Left:
        """These rows."""
        return Left(self.q[rows], self.given[rows])


class Weight(NamedTuple):
    """A right-hand side (K, N), packed."""

    panels: Array
    """(panels, words, COLUMNS, values of a word), int8: `pack`'s."""
    terms: Array
    """(2, panels * COLUMNS), int32: `terms`'."""

    def part(self, i: int, j: int) -> Weight:
        """These panels."""
        return Weight(self.panels[i:j], self.terms[:, i * COLUMNS : j * COLUMNS])


def pack(w: Array, left: DType = LEFT_TYPES[0]) -> Array:
    """8-bit w (K, N) for products with a left-hand side of a type: `Weight.panels`."""
    (k, n), words, panels = w.shape, -(-w.shape[0] // group(left)), -(-w.shape[1] // COLUMNS)
    made = np.zeros((words * group(left), panels * COLUMNS), np.int8)
    made[:k, :n] = w if w.dtype == np.int8 else (w ^ np.uint8(128)).view(np.int8)
    return np.ascontiguousarray(made.reshape(words, group(left), panels, COLUMNS).transpose(2, 0, 3, 1))


def terms(w: Array, zero: Array | None) -> Array:
    """8-bit w (K, N) and its zero points, one or N: the sums of w less those, and the zero points of what is packed."""
    (k, n), point = w.shape, 0 if zero is None else np.asarray(zero, np.int32)
    made = np.zeros((2, -(-n // COLUMNS) * COLUMNS), np.int32)
    made[0, :n] = w.sum(0, dtype=np.int32) - k * point
    made[1, :n] = point - (0 if w.dtype == np.int8 else 128)
    return made


def spread(values: Array, n: int) -> Array:
    """One float32 value or n, as n filled up with zeros to whole panels."""
    made = np.zeros(-(-n // COLUMNS) * COLUMNS, np.float32)
    made[:n] = values.reshape(-1)
    return made


@compiled
def _take_integers(x: Any, zero: Any, lift: Any, q: Any, given: Any) -> None:
    """q = x + lift, for 8-bit x less a zero point."""
    length, shift = x.shape[1], np.int32(-lift - zero[()])
    for i in range(x.shape[0]):
        source, target = x[i], q[i]
        total = np.int32(0)
        for c in range(length):
            value = np.int32(np.int32(source[c]) + lift)
            total = np.int32(total + value)
            target[c] = value
        for c in range(length, target.size):
            target[c] = 0
        given[i, 0], given[i, 1], given[i, 2] = shift, total, 0


@compiled
def _take_floats(x: Any, raised: bool, q: Any, given: Any) -> None:
    """q = x less what is least in a row, 0 where nothing is below; as it is where it is not to be `raised`."""
    length = x.shape[1]
    for i in range(x.shape[0]):
        source, target = x[i], q[i]
        least, other = np.int32(0), np.int32(0)
        for c in range(length):
            least = min(least, np.int32(source[c]))
            other |= np.int32(source[c] != source[c])
        if not raised:
            least = np.int32(0)
        total = np.int32(0)
        for c in range(length):
            value = np.int32(np.int32(source[c]) - least)
            total = np.int32(total + value)
            target[c] = value
        for c in range(length, target.size):
            target[c] = 0
        given[i, 0], given[i, 1], given[i, 2] = least, total, _NAN if other else 0


def left_of(shape: tuple[int, int], scratch: Scratch, left: DType = LEFT_TYPES[0]) -> Left:
    """Room for a left-hand side (M, K)."""
    words = -(-shape[1] // group(left))
    return Left(scratch((shape[0], words * group(left)), left), scratch((shape[0], 4), np.int32))


def take(x: Array, zero: Array | None, made: Left) -> list[Call]:
    """x (M, K), contiguous, as a left-hand side: 8-bit integers less a zero point, int32 and 0-d, or float32 that holds
    such differences: a row has integers, no two of them, and none from 0, further than 255 apart, or NaN."""
    raised = made.q.dtype == U8
    if x.dtype == np.float32:
        return [bound(_take_floats, x, raised, *made)]
    lift = np.int32(128 if raised and x.dtype == np.int8 else 0)
    return [bound(_take_integers, x, np.zeros((), np.int32) if zero is None else zero, lift, *made)]


def _product(
    q: Any, offsets: Any, given: Any, packed: Any, terms: Any, scaled: bool, scale: Any, scales: Any, bias: Any, y: Any,
    chunk: int,
) -> None:  # fmt: skip
    """As `product`, in blocks of `chunk` rows; `offsets` is one 0."""
    m, n = y.shape
    a, b, c, rows = q.ctypes.data, packed.ctypes.data, y.ctypes.data, given.ctypes.data
    sums, zeros = terms.ctypes.data, terms.ctypes.data + terms.strides[0]
    for begin in range(0, m, chunk):
        height = min(chunk, m - begin)
        tiles = (height + ROWS - 1) // ROWS
        for p in range(packed.shape[0]):
            done, shift = 0, p * COLUMNS * 4
            for t in range(tiles):
                more, at = height * (t + 1) // tiles - done, begin + done
                dot_tile(
                    more, q, a + at * q.strides[0], q.strides[0], offsets.ctypes.data, 1, packed.shape[1],
                    b + p * packed.strides[0],
                    rows + at * given.strides[0], sums + shift, zeros + shift,
                    scaled, scale[()], scales.ctypes.data + shift, bias.ctypes.data + shift,
                    c + at * y.strides[0] + shift, y.strides[0], n - p * COLUMNS,
                )  # fmt: skip
                done += more


_PRODUCTS = {left: exact(_product) for left in LEFT_TYPES}
_ONE, _START = np.array(1, np.float32), np.zeros(1, np.int64)


def product(
    x: Left,
    w: Weight,
    y: Array,
    *,
    scale: Array | None = None,
    scales: Array | None = None,
    bias: Array | None = None,
    parts: int = 1,
) -> list[list[Call]]:
    """y (M, N) = x @ w in as many parts, its rows contiguous: int32, or with `scales`, float32, times (scale scales),
    plus the bias. `scale` is one value, 1 where it is left out; `scales` and `bias` are `spread`'s.
    Large weights are split by columns, so that each part reads its own."""
    (m, k), panels = x.q.shape, len(w.panels)
    chunk = max(ROWS, BLOCK_BYTES // (k * x.q.itemsize) // ROWS * ROWS)
    none = np.zeros(w.terms.shape[1], np.float32)
    by_columns = panels >= 2 * parts
    made = []
    for i, j in spans(panels if by_columns else m, parts):
        rows, some = (slice(None), slice(i, j)) if by_columns else (slice(i, j), slice(0, panels))
        columns = slice(some.start * COLUMNS, some.stop * COLUMNS)
        row = tuple((none if a is None else a)[columns] for a in (scales, bias))
        weight, target = w.part(some.start, some.stop), y[rows, columns]
        made.append(
            [
                bound_by_address(
                    _PRODUCTS[x.q.dtype], x.q[rows], _START, x.given[rows], *weight, scales is not None,
                    _ONE if scale is None else scale.reshape(()), *row, target.view(np.float32), chunk,
                )
            ]
        )  # fmt: skip
    return made
