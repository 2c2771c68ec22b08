"""Scaled dot-product attention: a block of scores stays in the second-level cache from the first product to the last.

Keys and values of a head are packed into panels that `multiply_tile` reads, once for all queries that see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import copy
from infera_kernels.cpu.parts import spans
from infera_kernels.jit.compiling import bound_by_address, compiled, inlined, widest_vectors
from infera_kernels.jit.functions import F, exp
from infera_kernels.jit.gemm import multiply_cached
from infera_kernels.jit.microkernel import F32, I64, TILE, VECTOR, add_columns, address_of, load, spread
from infera_kernels.jit.rows import FLAT_BELOW

LANES, ROWS, COLUMNS = TILE.lanes, TILE.rows, TILE.columns

BLOCK = 1 << 14
"""Scores of a block, about: 64 KB, which leaves room for panels in the second-level cache."""

AXES = 3
"""Leading axes of operands: batch, heads of keys, and the heads of queries that each of them serves, for one."""

NAN, UNSEEN = 1, 2
ZERO = {"": 0, "nan": NAN, "unseen": UNSEEN}
"""Which rows become 0, as the `Options` of cpu.attention say it -> what the compiled function is told."""


@intrinsic
def _floats(context: Any, address: Any) -> Any:
    """What `carray` makes an array of, at this address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.intp), generate


@intrinsic
def _scale_line(context: Any, source: Any, columns: Any, factor: Any, target: Any) -> Any:
    """target = factor * source, lines of TILE.columns at these addresses. Of `source` the first `columns` are read, the
    others count as 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, columns, factor, target = args
        held = [cgutils.alloca_once(builder, VECTOR) for _ in range(TILE.vectors)]
        for place in held:
            builder.store(ir.Constant(VECTOR, None), place)
        add_columns(builder, [held], [source], columns)
        times = spread(builder, factor)
        _store(builder, [builder.fmul(times, builder.load(place)) for place in held], target)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.intp), generate


def _store(builder: Any, line: Sequence[Any], address: Any) -> None:
    for v, value in enumerate(line):
        builder.store(value, address_of(builder, address, v * LANES * 4, VECTOR), align=4)


@intrinsic
def _turn_lines(context: Any, source: Any, stride: Any, count: Any, columns: Any, factor: Any, target: Any) -> Any:
    """target[c, r] = factor * source[r, c], LANES x LANES, with `target` in a panel; strides in bytes. Of `source` the
    first `count` lines and `columns` are read, the others count as 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, stride, count, columns, factor, target = args
        held = [[cgutils.alloca_once(builder, VECTOR)] for _ in range(LANES)]
        there = [builder.icmp_signed("<", ir.Constant(I64, r), count) for r in range(LANES)]
        steps = [builder.select(t, ir.Constant(I64, r), ir.Constant(I64, 0)) for r, t in enumerate(there)]
        for (place,) in held:
            builder.store(ir.Constant(VECTOR, None), place)
        add_columns(builder, held, [builder.add(source, builder.mul(stride, s)) for s in steps], columns)
        times = spread(builder, factor)
        made = [
            builder.select(t, builder.fmul(times, builder.load(place)), ir.Constant(VECTOR, None))
            for t, (place,) in zip(there, held, strict=True)
        ]
        for c, value in enumerate(_transposed(builder, made)):
            builder.store(value, address_of(builder, target, c * COLUMNS * 4, VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 4, types.float32, types.intp), generate


@intrinsic
def _raise(context: Any, row: Any, lines: Any, mask: Any, further: Any, columns: Any) -> Any:
    """The largest value, but for NaNs, of the so many lines of TILE.columns at this address, after the first `columns`
    values there were added to those of two masks, where these have an address other than 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, lines, *masks, columns = args
        held, tops = ([cgutils.alloca_once(builder, VECTOR) for _ in range(TILE.vectors)] for _ in range(2))
        for top in tops:
            builder.store(ir.Constant(VECTOR, [float("-inf")] * LANES), top)
        with cgutils.for_range(builder, lines) as loop:
            before = builder.mul(loop.index, ir.Constant(I64, COLUMNS))
            shift = builder.mul(before, ir.Constant(I64, 4))
            line = builder.add(row, shift)
            for v, place in enumerate(held):
                builder.store(load(builder, line, v * LANES * 4), place)
            for mask in masks:
                with builder.if_then(builder.icmp_signed("!=", mask, ir.Constant(I64, 0))):
                    add_columns(builder, [held], [builder.add(mask, shift)], builder.sub(columns, before))
                    _store(builder, [builder.load(place) for place in held], line)
            for place, top in zip(held, tops, strict=True):
                builder.store(_larger(builder, builder.load(place), builder.load(top)), top)
        most = builder.load(tops[0])
        for top in tops[1:]:
            most = _larger(builder, builder.load(top), most)
        step = LANES // 2
        while step:
            other = builder.shuffle_vector(most, most, _places([(i + step) % LANES for i in range(LANES)]))
            most, step = _larger(builder, other, most), step // 2
        return builder.extract_element(most, ir.Constant(ir.IntType(32), 0))

    return types.float32(*(types.intp,) * 5), generate


def _larger(builder: Any, x: Any, y: Any) -> Any:
    """Of two vectors, the second where one is a NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _places(order: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)


def _transposed(builder: Any, lines: Sequence[Any]) -> list[Any]:
    """As many vectors as each has lanes, a power of two: halves, then halves of those change places."""
    lines, step = list(lines), len(lines) // 2
    while step:
        low = [j if not j & step else len(lines) + j - step for j in range(len(lines))]
        high = [j + step if not j & step else len(lines) + j for j in range(len(lines))]
        for i in range(len(lines)):
            if not i & step:
                a, b = lines[i], lines[i + step]
                lines[i], lines[i + step] = (builder.shuffle_vector(a, b, _places(order)) for order in (low, high))
        step //= 2
    return lines


@inlined
def _address(x: Any, i: int, j: int, k: int) -> Any:
    """Of the matrix of `x` at these places of its leading axes, along which one goes for all."""
    i = i if x.shape[0] > 1 else 0
    j = j if x.shape[1] > 1 else 0
    k = k if x.shape[2] > 1 else 0
    return x.ctypes.data + i * x.strides[0] + j * x.strides[1] + k * x.strides[2]


@inlined
def _row(mask: Any, i: int, j: int, k: int, query: int) -> Any:
    """The address of a query's row of a mask, one of which may go for all; 0 where there is no mask."""
    if mask.size == 0:
        return 0
    return _address(mask, i, j, k) + (query if mask.shape[3] > 1 else 0) * mask.strides[3]


@compiled
def _pack(source: int, x: Any, factor: Any, panels: Any) -> None:
    """The panels of factor * the matrix of `x` (..., K, N) that begins at this address; one of its axes is contiguous.

    `panels` (ceil(N / COLUMNS) * K + LANES, COLUMNS) has lines to spare: a transposition writes LANES of them, which
    what belongs there then overwrites.
    """
    (depth, columns), (down, right) = x.shape[3:], x.strides[3:]
    for p in range((columns + COLUMNS - 1) // COLUMNS):
        first, target = source + p * COLUMNS * right, panels.ctypes.data + p * depth * COLUMNS * 4
        left = columns - p * COLUMNS
        if columns == 1 or right == 4:
            for k in range(depth):
                _scale_line(first + k * down, left, factor, target + k * COLUMNS * 4)
        else:
            for k in range(0, depth, LANES):
                for c in range(0, COLUMNS, LANES):
                    here, there = first + min(c, left - 1) * right + k * 4, target + (k * COLUMNS + c) * 4
                    _turn_lines(here, right, left - c, depth - k, factor, there)


@compiled
def _weigh(row: Any, top: Any) -> Any:
    """row = softmax(row), whose largest value is `top`; the sum of its powers."""
    widest_vectors()
    total = F(0)
    for c in range(row.size):
        below = row[c] - top
        power = F(0) if below < FLAT_BELOW else exp(below)
        row[c] = power
        total += power
    share = F(1) / total
    for c in range(row.size):
        row[c] *= share
    return total


@compiled
def _has_nan(row: Any) -> Any:
    found = False
    for c in range(row.size):
        found |= np.isnan(row[c])
    return found


@compiled
def _attend(
    q: Any, kt: Any, v: Any, mask: Any, further: Any, out: Any, scale: Any, zero: int, blocks: int, first: int,
    last: int, offsets: Any, nothing: Any, keys: Any, values: Any, scores: Any, gone: Any,
) -> None:  # fmt: skip
    """Of each head's queries, cut into so many blocks, those from `first` to before `last`, counted over all heads.

    q (..., M, D), kt (..., D, N), v (..., N, E), two masks (..., M or 1, N) or empty, and out (..., M, E) have AXES
    leading axes; of all but `out` one goes for all. `nothing` and `offsets` are for `multiply_cached`. Scratch:
    `keys` and `values` for `_pack`, `scores` (rows of a block, N filled up to whole lines), and `gone`, one for each of
    its rows.
    """
    heads, repeats, m, e = out.shape[1:]
    depth, n = kt.shape[3:]
    width, line = scores.shape[1], scores.strides[0]
    lost = carray(_floats(gone.ctypes.data), gone.size)
    packed_keys = packed_values = 0
    for unit in range(first, last):
        head, block = unit // blocks, unit % blocks
        i, j, k = head // (heads * repeats), head // repeats % heads, head % repeats
        begin, end = m * block // blocks, m * (block + 1) // blocks
        rows = end - begin
        source, step = _address(q, i, j, k) + begin * q.strides[3], q.strides[3]
        target = _address(out, i, j, k) + begin * out.strides[3]
        at = _address(kt, i, j, k)
        if at != packed_keys:
            _pack(at, kt, scale, keys)
            packed_keys = at
        at = _address(v, i, j, k)
        if at != packed_values:
            _pack(at, v, F(1), values)
            packed_values = at
        multiply_cached(rows, source, step, depth, keys, nothing, offsets, scores.ctypes.data, line, width)
        for r in range(rows):
            here = scores.ctypes.data + r * line
            row = carray(_floats(here), width)
            for c in range(n, width):
                row[c] = F(-np.inf)
            masks = _row(mask, i, j, k, begin + r), _row(further, i, j, k, begin + r)
            top = _raise(here, width // COLUMNS, masks[0], masks[1], n)
            lost[r] = F(zero == UNSEEN and top == F(-np.inf) and not _has_nan(row))
            total = _weigh(row, top)
            if zero == NAN:
                lost[r] = F(np.isnan(total))
        multiply_cached(rows, scores.ctypes.data, line, n, values, nothing, offsets, target, out.strides[3], e)
        if zero:
            for r in range(rows):
                if lost[r]:
                    row = carray(_floats(target + r * out.strides[3]), e)
                    for c in range(e):
                        row[c] = F(0)


def attention(
    q: Array,
    kt: Array,
    v: Array,
    out: Array,
    scratch: Scratch,
    *,
    scale: float = 1.0,
    zero: str = "",
    masks: Sequence[Array] = (),
    parts: int = 1,
) -> tuple[list[Call], list[list[Call]]]:
    """out = softmax(scale q kt + masks) v: calls to make first, then up to `parts` lists that may run side by side.

    Arguments, all float32, are those of `cpu.attention`; `out` has at most `AXES` leading axes, and its rows are
    contiguous. There are up to two masks. Keys are scaled where they are packed, and weights divided by their sum
    before the last product.
    """
    first: list[Call] = []
    added = [_wide(mask, kt.shape[-1], scratch, first) for mask in masks]
    added += [np.empty((0, 0), np.float32)] * (2 - len(added))
    (m, e), n, depth = out.shape[-2:], kt.shape[-1], q.shape[-1]
    if not _is_dense(q, -1):
        q = _copied(q, scratch, first)
    kt, v = (x if _is_dense(x, -1) or _is_dense(x, -2) else _copied(x, scratch, first) for x in (kt, v))
    q, kt, v, mask, further, out = (x[(None,) * (AXES + 2 - x.ndim)] for x in (q, kt, v, *added, out))
    heads, tiles = out.size // (m * e), -(-m // ROWS)
    width = -(-n // COLUMNS) * COLUMNS
    blocks = min(tiles, -(-m * width // BLOCK))
    while heads * blocks % parts and blocks < tiles:
        blocks += 1
    nothing, offsets = np.zeros(max(width, -(-e // COLUMNS) * COLUMNS), np.float32), np.zeros(1, np.int64)
    spread: list[list[Call]] = []
    for a, b in spans(heads * blocks, parts):
        keys, values = (
            scratch((-(-columns // COLUMNS) * lines + LANES, COLUMNS), np.float32)
            for lines, columns in ((depth, n), (n, e))
        )
        scores, gone = scratch((-(-m // blocks), width), np.float32), scratch((-(-m // blocks),), np.float32)
        spread.append([
            bound_by_address(
                _attend, q, kt, v, mask, further, out, F(scale), ZERO[zero], blocks, a, b, offsets, nothing, keys,
                values, scores, gone,
            )
        ])  # fmt: skip
    return first, spread


def _is_dense(x: Array, axis: int) -> bool:
    """Whether elements lie one behind the other along it."""
    return bool(x.shape[axis] == 1 or x.strides[axis] == x.itemsize)


def _copied(x: Array, scratch: Scratch, first: list[Call]) -> Array:
    dense = scratch(x.shape, x.dtype)
    first.append(copy(dense, x))
    return dense


def _wide(mask: Array, keys: int, scratch: Scratch, first: list[Call]) -> Array:
    """The mask with at least two axes, as wide as the scores and contiguous along them."""
    if mask.ndim == 0 or mask.shape[-1] != keys or not _is_dense(mask, -1):
        wide = scratch((*mask.shape[:-1], keys), np.float32)
        first.append(copy(wide, mask))
        mask = wide
    return mask if mask.ndim > 1 else mask[None]
