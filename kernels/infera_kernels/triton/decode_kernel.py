"""A step of attention over few new tokens: rotation, growing caches and attention in one pass over the past.

Strides are of (batch, group, row, column), those of queries and results of (batch, group, member, row, column): heads
that share a group's keys are members. They come in units, see `attention_kernels`.
"""

import triton
import triton.language as tl

from infera_kernels.triton.indexing import INTERPRETED, rounded, store_type


@triton.jit
def _head(base, batch, group, steps, UNITS: tl.constexpr):
    """Where the matrix of a batch's entry and a group begins."""
    return base + (batch * steps[0] * UNITS[0] + group * steps[1] * UNITS[1])


@triton.jit
def _rows(base, row, steps, UNITS: tl.constexpr):
    """Where rows begin, along the last axis but one."""
    return base + row * steps[len(steps) - 2] * UNITS[len(steps) - 2]


@triton.jit
def _members(base, member, query, steps, UNITS: tl.constexpr):
    """Where rows of members begin."""
    return base + (member * steps[2] * UNITS[2] + query * steps[3] * UNITS[3])


@triton.jit
def _columns(column, steps, UNITS: tl.constexpr):
    return column * steps[len(steps) - 1] * UNITS[len(steps) - 1]


@triton.jit
def _wide(x):
    """What products take: in the interpreter, which computes half precision wrongly, float32."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _turned(
    rows,
    inside,
    place,
    cos,
    sin,
    steps,
    cos_steps,
    sin_steps,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    UNITS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The rows that are inside, zeros elsewhere; of 2 HALF columns the pairs (a, b) become (a cos - b sin, b cos +
    a sin) by the tables' rows `place`, in float32, rounded as stored."""
    d = tl.arange(0, D_PADDED)[None, :].to(tl.int64)
    known = inside[:, None] & (d < D)
    x = tl.load(rows[:, None] + _columns(d, steps, UNITS), mask=known, other=0.0)
    if cos is None:
        return x
    else:
        if INTERLEAVED:
            first = d % 2 == 0
            partner = d ^ 1
            pair = d // 2
        else:
            first = d < HALF
            partner = tl.where(first, d + HALF, d - HALF)
            pair = tl.where(first, d, d - HALF)
        turning = inside[:, None] & (d < 2 * HALF)
        y = tl.load(rows[:, None] + _columns(partner, steps, UNITS), mask=turning, other=0.0).to(tl.float32)
        c = tl.load(cos + (place[:, None] * cos_steps[0] + pair * cos_steps[1]), mask=turning, other=1.0)
        s = tl.load(sin + (place[:, None] * sin_steps[0] + pair * sin_steps[1]), mask=turning, other=0.0)
        made = x.to(tl.float32) * c.to(tl.float32) + tl.where(first, -y, y) * s.to(tl.float32)
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
    Q_UNITS: tl.constexpr,
    K_UNITS: tl.constexpr,
    V_UNITS: tl.constexpr,
    PAST_K_UNITS: tl.constexpr,
    PAST_V_UNITS: tl.constexpr,
    OUT_UNITS: tl.constexpr,
    PRESENT_K_UNITS: tl.constexpr,
    PRESENT_V_UNITS: tl.constexpr,
):
    """All queries of a group against a part of its keys, which go from past to present on the way; the last part has
    the new ones, too. Sums of several parts are joined by `attention_kernels.combine_kernel`."""
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
    d = tl.arange(0, D_PADDED)
    e = tl.arange(0, E_PADDED)
    far_d, far_e = d.to(tl.int64), e.to(tl.int64)

    row = tl.arange(0, BM)
    query = row % NEW
    inside = row < members * NEW
    new = tl.arange(0, NEW_PADDED)
    added = new < tl.where(split == SPLITS - 1, NEW, 0)
    q_place = start + query
    k_place = start + new
    if places is not None:
        places += batch * place_steps[0]
        q_place = tl.load(places + query * place_steps[1], mask=inside, other=0)
        k_place = tl.load(places + new * place_steps[1], mask=added, other=0)
    q_place = tl.minimum(tl.maximum(q_place, 0), table_rows - 1).to(tl.int64)
    k_place = tl.minimum(tl.maximum(k_place, 0), table_rows - 1).to(tl.int64)
    q_at = _members(
        _head(q, batch, group, q_steps, Q_UNITS), (row // NEW).to(tl.int64), query.to(tl.int64), q_steps, Q_UNITS
    )
    k_at = _rows(_head(k, batch, group, k_steps, K_UNITS), new.to(tl.int64), k_steps, K_UNITS)
    v_at = _rows(_head(v, batch, group, v_steps, V_UNITS), new.to(tl.int64), v_steps, V_UNITS)
    x = _turned(q_at, inside, q_place, cos, sin, q_steps, cos_steps, sin_steps, D, D_PADDED, Q_UNITS, HALF, INTERLEAVED)
    y = _turned(k_at, added, k_place, cos, sin, k_steps, cos_steps, sin_steps, D, D_PADDED, K_UNITS, HALF, INTERLEAVED)
    z = tl.load(
        v_at[:, None] + _columns(far_e, v_steps, V_UNITS)[None, :], mask=added[:, None] & (e < E)[None, :], other=0.0
    )
    present_k = _head(present_k, batch, group, present_k_steps, PRESENT_K_UNITS)
    present_v = _head(present_v, batch, group, present_v_steps, PRESENT_V_UNITS)
    to_k = _columns(far_d, present_k_steps, PRESENT_K_UNITS)[None, :]
    to_v = _columns(far_e, present_v_steps, PRESENT_V_UNITS)[None, :]
    held = added & (start + new < rows)
    at = (start + new).to(tl.int64)
    tl.store(
        _rows(present_k, at, present_k_steps, PRESENT_K_UNITS)[:, None] + to_k, y, mask=held[:, None] & (d < D)[None, :]
    )
    tl.store(
        _rows(present_v, at, present_v_steps, PRESENT_V_UNITS)[:, None] + to_v, z, mask=held[:, None] & (e < E)[None, :]
    )

    x = _wide(x)
    visible = (added & (start + new < seen))[None, :]
    if CAUSAL:
        visible = visible & (new[None, :] <= query[:, None])
    s = tl.where(visible, _scores(x, _wide(y), BM) * scale, float("-inf"))
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, E_PADDED), tl.float32)
    acc, peak, total = _weighed(s, _wide(z), acc, peak, total, BM)

    key = tl.arange(0, BN)
    if past_k is not None:
        share = tl.cdiv(tl.cdiv(start, BN), SPLITS) * BN
        begin = tl.minimum(split * share, start)
        stop = tl.minimum(begin + share, start)
        limit = tl.minimum(stop, seen)
        past_k = _head(past_k, batch, group, past_k_steps, PAST_K_UNITS)
        past_v = _head(past_v, batch, group, past_v_steps, PAST_V_UNITS)
        from_k = _columns(far_d, past_k_steps, PAST_K_UNITS)[None, :]
        from_v = _columns(far_e, past_v_steps, PAST_V_UNITS)[None, :]
        for block in range(begin, stop, BN):
            column = block + key
            far = column.to(tl.int64)
            there = (column < stop)[:, None]
            known = (column < tl.minimum(stop, kept))[:, None]
            old_k = tl.load(
                _rows(past_k, far, past_k_steps, PAST_K_UNITS)[:, None] + from_k,
                mask=known & (d < D)[None, :],
                other=0.0,
            )
            old_v = tl.load(
                _rows(past_v, far, past_v_steps, PAST_V_UNITS)[:, None] + from_v,
                mask=known & (e < E)[None, :],
                other=0.0,
            )
            tl.store(
                _rows(present_k, far, present_k_steps, PRESENT_K_UNITS)[:, None] + to_k,
                old_k,
                mask=there & (d < D)[None, :],
            )
            tl.store(
                _rows(present_v, far, present_v_steps, PRESENT_V_UNITS)[:, None] + to_v,
                old_v,
                mask=there & (e < E)[None, :],
            )
            s_old = tl.where((column < limit)[None, :], _scores(x, _wide(old_k), BM) * scale, float("-inf"))
            acc, peak, total = _weighed(s_old, _wide(old_v), acc, peak, total, BM)

    first = tl.minimum(start + NEW, rows)
    share = tl.cdiv(tl.cdiv(rows - first, BN), SPLITS) * BN
    begin = tl.minimum(first + split * share, rows)
    stop = tl.minimum(begin + share, rows)
    for block in range(begin, stop, BN):
        far = (block + key).to(tl.int64)
        there = (block + key < stop)[:, None]
        empty_k = tl.zeros((BN, D_PADDED), present_k.dtype.element_ty)
        empty_v = tl.zeros((BN, E_PADDED), present_v.dtype.element_ty)
        tl.store(
            _rows(present_k, far, present_k_steps, PRESENT_K_UNITS)[:, None] + to_k,
            empty_k,
            mask=there & (d < D)[None, :],
        )
        tl.store(
            _rows(present_v, far, present_v_steps, PRESENT_V_UNITS)[:, None] + to_v,
            empty_v,
            mask=there & (e < E)[None, :],
        )

    held = inside[:, None] & (e < E)[None, :]
    if SPLITS > 1:
        at = (matrix * SPLITS + split) * (members * NEW) + row
        tl.store(peaks + at, peak, mask=inside)
        tl.store(totals + at, total, mask=inside)
        tl.store(out + at[:, None] * E + e[None, :], acc, mask=held)
    else:
        at = _members(
            _head(out, batch, group, out_steps, OUT_UNITS),
            (row // NEW).to(tl.int64),
            query.to(tl.int64),
            out_steps,
            OUT_UNITS,
        )
        y = tl.where(peak[:, None] == float("-inf"), 0.0, acc / total[:, None])
        tl.store(at[:, None] + _columns(far_e, out_steps, OUT_UNITS)[None, :], store_type(y, out), mask=held)
