"""A step of attention over few new tokens: rotation, growing caches and attention in one pass over the past.

Strides are of (batch, group, row, column), those of queries and results of (batch, group, member, row, column): heads
that share a group's keys are members. They come in units, see `attention_kernels`.
"""

import triton
import triton.language as tl

from infera_kernels.triton.indexing import rounded, store_type, wide


@triton.jit
def _head(base, batch, group, steps, UNITS: tl.constexpr):
    """Where the matrix of a batch's entry and a group begins."""
    return base + (batch * steps[0] * UNITS[0] + group * steps[1] * UNITS[1])


@triton.jit
def _members(member, steps, UNITS: tl.constexpr):
    """Offsets of members, for `_tile`."""
    return (member.to(tl.int64) * steps[2] * UNITS[2])[:, None]


@triton.jit
def _part(begin, end, split, BN: tl.constexpr, SPLITS: tl.constexpr):
    """The rows of one of the parts into which whole blocks are dealt."""
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BN), SPLITS) * BN
    first = tl.minimum(begin + split * share, end)
    return first, tl.minimum(first + share, end)


@triton.jit
def _tile(matrix, row, column, steps, UNITS: tl.constexpr):
    """Addresses of a matrix' elements, rows by columns: along the last two axes."""
    LAST: tl.constexpr = len(steps) - 1
    row, column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    return matrix + (row * steps[LAST - 1] * UNITS[LAST - 1] + column * steps[LAST] * UNITS[LAST])


@triton.jit
def _load(matrix, row, there, steps, SIZE: tl.constexpr, PADDED: tl.constexpr, UNITS: tl.constexpr):
    """The rows of SIZE elements that are there, zeros elsewhere."""
    column = tl.arange(0, PADDED)
    at = _tile(matrix, row, column, steps, UNITS)
    return tl.load(at, mask=there[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _store(matrix, row, x, there, steps, SIZE: tl.constexpr, PADDED: tl.constexpr, UNITS: tl.constexpr):
    """Stores the rows that are there."""
    column = tl.arange(0, PADDED)
    tl.store(_tile(matrix, row, column, steps, UNITS), x, mask=there[:, None] & (column < SIZE)[None, :])


@triton.jit
def _angles(cos, sin, place, pair, turning, cos_steps, sin_steps):
    """Cosines and sines of pairs of rows, those of no angle where nothing turns."""
    row, pair = place.to(tl.int64)[:, None], pair.to(tl.int64)[None, :]
    c = tl.load(cos + (row * cos_steps[0] + pair * cos_steps[1]), mask=turning, other=1.0)
    s = tl.load(sin + (row * sin_steps[0] + pair * sin_steps[1]), mask=turning, other=0.0)
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def _turned(
    x,
    matrix,
    row,
    there,
    place,
    cos,
    sin,
    steps,
    cos_steps,
    sin_steps,
    UNITS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The rows x of the matrix with the pairs (a, b) of their first 2 HALF elements as (a cos - b sin, b cos + a sin),
    by row `place` of the tables, in float32, rounded as stored."""
    ROWS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    if INTERLEAVED:
        pair = tl.arange(0, SIZE // 2)
        turning = there[:, None] & (pair < HALF)[None, :]
        c, s = _angles(cos, sin, place, pair, turning, cos_steps, sin_steps)
        a, b = tl.split(x.to(tl.float32).reshape(ROWS, SIZE // 2, 2))
        first, second = tl.where(turning, a * c - b * s, a), tl.where(turning, b * c + a * s, b)
        made = tl.join(first, second).reshape(ROWS, SIZE)
    else:
        column = tl.arange(0, SIZE)
        first = column < HALF
        partner = tl.where(first, column + HALF, column - HALF)
        turning = there[:, None] & (column < 2 * HALF)[None, :]
        c, s = _angles(cos, sin, place, tl.where(first, column, column - HALF), turning, cos_steps, sin_steps)
        y = tl.load(_tile(matrix, row, partner, steps, UNITS), mask=turning, other=0.0).to(tl.float32)
        made = x.to(tl.float32) * c + tl.where(first[None, :], -y, y) * s
    return rounded(made, x.dtype)


@triton.jit
def _scores(x, y, BM: tl.constexpr):
    """Of rows of queries and of keys."""
    if BM == 1:
        return tl.sum(x * y, axis=1)[None, :]
    else:
        return tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def _weighed(s, z, acc, peak, total, BM: tl.constexpr):
    """Sums, peaks and totals with the values `z` of scores `s`, powers of two, added."""
    risen = tl.maximum(peak, tl.max(s, axis=1))
    # A row that has seen nothing but -inf has no peak yet: -inf - -inf would be NaN.
    shift = tl.where(risen == float("-inf"), 0.0, risen)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(peak - shift)
    if BM == 1:
        acc = acc * fade[:, None] + tl.sum(tl.trans(p) * z, axis=0)[None, :]
    else:
        acc = tl.dot(p.to(z.dtype), z, acc * fade[:, None], input_precision="ieee")
    return acc, risen, total * fade + tl.sum(p, axis=1)


@triton.jit(do_not_specialize_on_alignment=["before", "keys", "kept", "rows", "table_rows"])
def decode_kernel(
    q,
    k,
    v,
    past_k,
    past_v,
    out,
    present_k,
    present_v,
    peaks,
    totals,
    lengths,
    cos,
    sin,
    places,
    groups,
    members,
    before,
    keys,
    kept,
    rows,
    table_rows,
    scale,
    q_steps,
    k_steps,
    v_steps,
    past_k_steps,
    past_v_steps,
    out_steps,
    present_k_steps,
    present_v_steps,
    lengths_step,
    cos_steps,
    sin_steps,
    place_steps,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    NEW: tl.constexpr,
    NEW_PADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FROM_END: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEYS_IN_PLACE: tl.constexpr,
    VALUES_IN_PLACE: tl.constexpr,
    Q_UNITS: tl.constexpr,
    K_UNITS: tl.constexpr,
    V_UNITS: tl.constexpr,
    PAST_K_UNITS: tl.constexpr,
    PAST_V_UNITS: tl.constexpr,
    OUT_UNITS: tl.constexpr,
    PRESENT_K_UNITS: tl.constexpr,
    PRESENT_V_UNITS: tl.constexpr,
):
    """All queries of a group against a part of its keys, which go from past to present on the way, unless the present
    keys or values lie in the place of the past ones; the last part has the new ones, too. Sums of several parts are
    joined by `attention_kernels.combine_kernel`."""
    program = tl.program_id(0)
    split = program % SPLITS
    matrix = (program // SPLITS).to(tl.int64)
    batch = matrix // groups
    group = matrix % groups
    seen = keys
    start = before
    if lengths is not None:
        count = tl.load(lengths + batch * lengths_step).to(tl.int32) + 1
        seen = tl.minimum(tl.maximum(count, 0), keys)
        if FROM_END:
            start = tl.minimum(tl.maximum(count - NEW, 0), rows)

    row = tl.arange(0, BM)
    query = row % NEW
    inside = row < members * NEW
    new = tl.arange(0, NEW_PADDED)
    added = new < tl.where(split == SPLITS - 1, NEW, 0)
    q = _head(q, batch, group, q_steps, Q_UNITS) + _members(row // NEW, q_steps, Q_UNITS)
    k = _head(k, batch, group, k_steps, K_UNITS)
    v = _head(v, batch, group, v_steps, V_UNITS)
    present_k = _head(present_k, batch, group, present_k_steps, PRESENT_K_UNITS)
    present_v = _head(present_v, batch, group, present_v_steps, PRESENT_V_UNITS)
    x = _load(q, query, inside, q_steps, D, D_PADDED, Q_UNITS)
    y = _load(k, new, added, k_steps, D, D_PADDED, K_UNITS)
    z = _load(v, new, added, v_steps, E, E_PADDED, V_UNITS)
    if cos is not None:
        q_place, k_place = start + query, start + new
        if places is not None:
            places += batch * place_steps[0]
            q_place = tl.load(places + query * place_steps[1], mask=inside, other=0)
            k_place = tl.load(places + new * place_steps[1], mask=added, other=0)
        q_place = tl.minimum(tl.maximum(q_place, 0), table_rows - 1)
        k_place = tl.minimum(tl.maximum(k_place, 0), table_rows - 1)
        x = _turned(x, q, query, inside, q_place, cos, sin, q_steps, cos_steps, sin_steps, Q_UNITS, HALF, INTERLEAVED)
        y = _turned(y, k, new, added, k_place, cos, sin, k_steps, cos_steps, sin_steps, K_UNITS, HALF, INTERLEAVED)
    held = added & (start + new < rows)
    _store(present_k, start + new, y, held, present_k_steps, D, D_PADDED, PRESENT_K_UNITS)
    _store(present_v, start + new, z, held, present_v_steps, E, E_PADDED, PRESENT_V_UNITS)

    x = wide(x)
    visible = (added & (start + new < seen))[None, :]
    if CAUSAL:
        visible = visible & (new[None, :] <= query[:, None])
    s = tl.where(visible, _scores(x, wide(y), BM) * scale, float("-inf"))
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, E_PADDED), tl.float32)
    acc, peak, total = _weighed(s, wide(z), acc, peak, total, BM)

    key = tl.arange(0, BN)
    if past_k is not None:
        begin, stop = _part(0, start, split, BN, SPLITS)
        past_k = _head(past_k, batch, group, past_k_steps, PAST_K_UNITS)
        past_v = _head(past_v, batch, group, past_v_steps, PAST_V_UNITS)
        for first in range(begin, stop, BN):
            at = first + key
            known = at < tl.minimum(stop, kept)
            old_k = _load(past_k, at, known, past_k_steps, D, D_PADDED, PAST_K_UNITS)
            old_v = _load(past_v, at, known, past_v_steps, E, E_PADDED, PAST_V_UNITS)
            if not KEYS_IN_PLACE:
                _store(present_k, at, old_k, at < stop, present_k_steps, D, D_PADDED, PRESENT_K_UNITS)
            if not VALUES_IN_PLACE:
                _store(present_v, at, old_v, at < stop, present_v_steps, E, E_PADDED, PRESENT_V_UNITS)
            old = _scores(x, wide(old_k), BM) * scale
            old = tl.where((at < tl.minimum(stop, seen))[None, :], old, float("-inf"))
            acc, peak, total = _weighed(old, wide(old_v), acc, peak, total, BM)

    if not (KEYS_IN_PLACE and VALUES_IN_PLACE):
        begin, stop = _part(start + NEW, rows, split, BN, SPLITS)
        empty_k = tl.zeros((BN, D_PADDED), present_k.dtype.element_ty)
        empty_v = tl.zeros((BN, E_PADDED), present_v.dtype.element_ty)
        for first in range(begin, stop, BN):
            at = first + key
            if not KEYS_IN_PLACE:
                _store(present_k, at, empty_k, at < stop, present_k_steps, D, D_PADDED, PRESENT_K_UNITS)
            if not VALUES_IN_PLACE:
                _store(present_v, at, empty_v, at < stop, present_v_steps, E, E_PADDED, PRESENT_V_UNITS)

    e = tl.arange(0, E_PADDED)
    shown = inside[:, None] & (e < E)[None, :]
    if SPLITS > 1:
        at = (matrix * SPLITS + split) * (members * NEW) + row
        tl.store(peaks + at, peak, mask=inside)
        tl.store(totals + at, total, mask=inside)
        tl.store(out + (at[:, None] * E + e[None, :]), acc, mask=shown)
    else:
        out = _head(out, batch, group, out_steps, OUT_UNITS) + _members(row // NEW, out_steps, OUT_UNITS)
        weighed = tl.where(peak[:, None] == float("-inf"), 0.0, acc / total[:, None])
        tl.store(_tile(out, query, e, out_steps, OUT_UNITS), store_type(weighed, out), mask=shown)
