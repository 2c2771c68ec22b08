"""Attention that never holds a matrix of scores: FlashAttention-2 (arXiv 2307.08691), and its split over the keys.

Axes before the last two are the `lead`: they are walked with strides of 0 where an operand broadcasts. Strides come in
units, powers of two up to 16 that are compiled in, so that a head of 40 elements, too, is known to be aligned.
"""

import triton
import triton.language as tl

from infera_kernels.triton.functions import tanh
from infera_kernels.triton.indexing import offset_of, store_type, wide


@triton.jit
def _lead(matrix, lead, strides, UNITS: tl.constexpr):
    """The offset of a matrix over all leading axes."""
    return offset_of(matrix, lead, strides, 0, len(lead)) * UNITS[0]


@triton.jit
def _rows(row, M, steps, UNITS: tl.constexpr, PACKED: tl.constexpr):
    """Offsets of rows; packed rows are the M queries of one head after those of another."""
    if PACKED:
        return row // M * steps[0] * UNITS[1] + row % M * steps[1] * UNITS[2]
    else:
        return row * steps[1] * UNITS[2]


@triton.jit
def _columns(column, steps, UNITS: tl.constexpr):
    """Offsets of elements along the last axis."""
    return column * steps[2] * UNITS[3]


@triton.jit
def _load(at, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile, zero outside of the rows and columns where those are bounded."""
    if ROWS and COLUMNS:
        return tl.load(at, mask=rows & columns, other=0.0)
    elif ROWS:
        return tl.load(at, mask=rows, other=0.0)
    elif COLUMNS:
        return tl.load(at, mask=columns, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _weighted(acc, peak, total, ZERO: tl.constexpr):
    """The sums over their weights; rows without weights are 0 or NaN as ZERO says."""
    y = acc / total
    if ZERO == "unseen":
        y = tl.where(peak == float("-inf"), 0.0, y)
    if ZERO == "nan":
        y = tl.where(total > 0.0, y, 0.0)
    return y


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    out,
    peaks,
    totals,
    mask,
    further,
    condition,
    lengths,
    sink,
    M,
    N,
    rows,
    lead,
    q_lead,
    k_lead,
    v_lead,
    out_lead,
    mask_lead,
    further_lead,
    condition_lead,
    lengths_lead,
    sink_lead,
    q_steps,
    k_steps,
    v_steps,
    out_steps,
    mask_steps,
    further_steps,
    condition_steps,
    sink_steps,
    scale,
    cap,
    fill,
    left,
    right,
    ahead,
    before,
    more,
    D: tl.constexpr,
    E: tl.constexpr,
    DEPTH: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    Q_UNITS: tl.constexpr,
    K_UNITS: tl.constexpr,
    V_UNITS: tl.constexpr,
    OUT_UNITS: tl.constexpr,
    MASK_UNITS: tl.constexpr,
    FURTHER_UNITS: tl.constexpr,
    CONDITION_UNITS: tl.constexpr,
    SINK_UNITS: tl.constexpr,
    PACKED: tl.constexpr,
    HIDDEN: tl.constexpr,
    ADDED: tl.constexpr,
    FROM_END: tl.constexpr,
    FREE: tl.constexpr,
    CHECKED: tl.constexpr,
    EXP2: tl.constexpr,
    ZERO: tl.constexpr,
):
    """BM rows of queries against the keys, or against a part of them whose sums `combine_kernel` joins.

    Blocks of keys that every row sees go first (FREE), those that bounds cut through follow (CHECKED).
    """
    tiles = tl.cdiv(rows, BM)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # of causal attention the longest first
    split = program // tiles % SPLITS
    matrix = (program // tiles // SPLITS).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    inside = row < rows
    query = row % M if PACKED else row
    key = tl.arange(0, BN)
    d = tl.arange(0, DEPTH)
    e = tl.arange(0, E_PADDED)
    # Offsets into q, k, v and out may pass 2**31; those into one matrix of a mask do not.
    far_row, far_key, far_d, far_e = row.to(tl.int64), key.to(tl.int64), d.to(tl.int64), e.to(tl.int64)
    one = tl.full([], 1, tl.int64)

    end = N
    offset = before
    if lengths is not None:
        count = tl.load(lengths + offset_of(matrix, lead, lengths_lead, 0, len(lead))).to(tl.int32) + more
        end = tl.minimum(tl.maximum(count, 0), N)
        if FROM_END:
            offset = tl.maximum(count - M, before)
    first_query = 0 if PACKED else tile * BM
    last_query = tl.minimum(M, first_query + BM) - 1 if not PACKED else M - 1
    begin = 0
    free = end
    if right is not None:
        free = tl.maximum(tl.minimum(free, first_query + offset + right + 1), 0)
        if ahead is None:
            end = tl.maximum(tl.minimum(end, last_query + offset + right + 1), 0)
    if left is not None:
        begin = tl.minimum(tl.maximum(first_query + offset - left, 0), end) // BN * BN
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, BN), SPLITS) * BN
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)
    middle = begin
    if FREE:
        middle = begin + tl.maximum(tl.minimum(free, end) - begin, 0) // BN * BN

    q += _lead(matrix, lead, q_lead, Q_UNITS)
    k += _lead(matrix, lead, k_lead, K_UNITS)
    v += _lead(matrix, lead, v_lead, V_UNITS)
    q_at = q + (_rows(far_row, M, q_steps, Q_UNITS, PACKED)[:, None] + _columns(far_d, q_steps, Q_UNITS)[None, :])
    k_at = _rows(far_key, M, k_steps, K_UNITS, False)[None, :] + _columns(far_d, k_steps, K_UNITS)[:, None]
    v_at = _rows(far_key, M, v_steps, V_UNITS, False)[:, None] + _columns(far_e, v_steps, V_UNITS)[None, :]
    if mask is not None:
        mask += _lead(matrix, lead, mask_lead, MASK_UNITS)
        mask_at = _rows(row, M, mask_steps, MASK_UNITS, PACKED)[:, None]
    if further is not None:
        further += _lead(matrix, lead, further_lead, FURTHER_UNITS)
        further_at = _rows(row, M, further_steps, FURTHER_UNITS, PACKED)[:, None]
    if condition is not None:
        condition += _lead(matrix, lead, condition_lead, CONDITION_UNITS)
        condition_at = _rows(row, M, condition_steps, CONDITION_UNITS, PACKED)[:, None]

    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if sink is not None:
        sink += _lead(matrix, lead, sink_lead, SINK_UNITS)
        sunk = tl.load(sink + _rows(row, M, sink_steps, SINK_UNITS, PACKED), mask=inside, other=0.0).to(tl.float32)
        if EXP2:
            sunk *= 1.4426950408889634
        peak = tl.where(split == 0, sunk, peak)
        total = tl.where(split == 0, total + 1.0, total)
    acc = tl.zeros((BM, E_PADDED), tl.float32)
    if DEPTH == D_PADDED:
        x = wide(_load(q_at, inside[:, None], (d < D)[None, :], True, D < DEPTH))
    for phase in tl.static_range(0 if FREE else 1, 2 if CHECKED else 1):
        for start in range(begin if phase == 0 else middle, middle if phase == 0 else end, BN):
            column = start + key
            there = column < end
            from_k = k + _rows(one * start, M, k_steps, K_UNITS, False)
            from_v = v + _rows(one * start, M, v_steps, V_UNITS, False)
            if DEPTH == D_PADDED:
                y = wide(_load(from_k + k_at, there[None, :], (d < D)[:, None], phase == 1, D < DEPTH))
                if BM == 1:
                    s = tl.sum(tl.trans(x) * y, axis=0)[None, :]
                else:
                    s = tl.dot(x, y, input_precision="ieee")
            else:
                s = tl.zeros((BM, BN), tl.float32)
                for i in tl.static_range(0, D_PADDED, DEPTH):
                    deep = d + i < D
                    from_q = q_at + _columns(one * i, q_steps, Q_UNITS)
                    x = _load(from_q, inside[:, None], deep[None, :], True, D < D_PADDED)
                    from_i = from_k + _columns(one * i, k_steps, K_UNITS)
                    y = _load(from_i + k_at, there[None, :], deep[:, None], phase == 1, D < D_PADDED)
                    s = tl.dot(x, y, s, input_precision="ieee")
            s = s * scale
            if cap is not None:
                s = cap * tanh(s, 0.0, 0.0)
            if condition is not None:
                at = condition + (condition_at + _columns(column, condition_steps, CONDITION_UNITS)[None, :])
                given = tl.load(at, mask=inside[:, None] & there[None, :], other=0)
                seen = (given == 0) if HIDDEN else (given != 0)
                s = tl.where(seen, s, (s + fill) if ADDED else fill)
            if mask is not None:
                at = mask + (mask_at + _columns(column, mask_steps, MASK_UNITS)[None, :])
                s += tl.load(at, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
            if further is not None:
                at = further + (further_at + _columns(column, further_steps, FURTHER_UNITS)[None, :])
                s += tl.load(at, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
            if phase == 1:
                seen = there[None, :]
                if left is not None:
                    seen = seen & (column[None, :] >= query[:, None] + offset - left)
                if right is not None:
                    early = column[None, :] <= query[:, None] + offset + right
                    if ahead is None:
                        seen = seen & early
                    else:
                        s = tl.where(early, s, s + ahead)
                s = tl.where(seen, s, float("-inf"))
            risen = tl.maximum(peak, tl.max(s, axis=1))
            # A row that has seen nothing but -inf has no peak yet: -inf - -inf would be NaN.
            shift = tl.where(risen == float("-inf"), 0.0, risen)
            if EXP2:
                p = tl.exp2(s - shift[:, None])
                fade = tl.exp2(peak - shift)
            else:
                p = tl.exp(s - shift[:, None])
                fade = tl.exp(peak - shift)
            total = total * fade + tl.sum(p, axis=1)
            peak = risen
            z = wide(_load(from_v + v_at, there[:, None], (e < E)[None, :], phase == 1, E < E_PADDED))
            if BM == 1:
                acc = acc * fade[:, None] + tl.sum(tl.trans(p) * z, axis=0)[None, :]
            else:
                acc = tl.dot(p.to(z.dtype), z, acc * fade[:, None], input_precision="ieee")

    held = inside[:, None] & (e < E)[None, :]
    if SPLITS > 1:
        at = (matrix * SPLITS + split) * rows + far_row
        tl.store(peaks + at, peak, mask=inside)
        tl.store(totals + at, total, mask=inside)
        tl.store(out + at[:, None] * E + e[None, :], acc, mask=held)
    else:
        out += _lead(matrix, lead, out_lead, OUT_UNITS)
        at = _rows(far_row, M, out_steps, OUT_UNITS, PACKED)[:, None] + _columns(far_e, out_steps, OUT_UNITS)[None, :]
        tl.store(out + at, store_type(_weighted(acc, peak[:, None], total[:, None], ZERO), out), mask=held)


@triton.jit
def combine_kernel(
    parts,
    peaks,
    totals,
    out,
    M,
    rows,
    lead,
    out_lead,
    out_steps,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    OUT_UNITS: tl.constexpr,
    PACKED: tl.constexpr,
    EXP2: tl.constexpr,
    ZERO: tl.constexpr,
):
    """One row of a result from its parts over the keys, always in the same order."""
    program = tl.program_id(0).to(tl.int64)
    matrix = program // rows
    row = program % rows
    e = tl.arange(0, E_PADDED)
    split = tl.arange(0, SPLITS_PADDED)
    at = (matrix * SPLITS + split) * rows + row
    high = tl.load(peaks + at, mask=split < SPLITS, other=float("-inf"))
    peak = tl.max(high, axis=0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    share = tl.exp2(high - shift) if EXP2 else tl.exp(high - shift)
    total = tl.sum(tl.load(totals + at, mask=split < SPLITS, other=0.0) * share, axis=0)
    part = tl.load(parts + at[:, None] * E + e[None, :], mask=(split < SPLITS)[:, None] & (e < E)[None, :], other=0.0)
    acc = tl.sum(part * share[:, None], axis=0)
    out += _lead(matrix, lead, out_lead, OUT_UNITS)
    at = _rows(row, M, out_steps, OUT_UNITS, PACKED) + _columns(e, out_steps, OUT_UNITS)
    tl.store(out + at, store_type(_weighted(acc, peak, total, ZERO), out), mask=e < E)
