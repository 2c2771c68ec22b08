"""The kernels of LSTM, GRU and RNN: see `recurrent`."""

import triton
import triton.language as tl

from infera_kernels.triton.indexing import store_type


@triton.jit
def _product(h, r, b, n, B, H, BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """(BB, BH): the rows b of h (B, H) times the rows n of r (H, H)."""
    k = tl.arange(0, BK)
    if BB == 1:
        sums = tl.full((BH, BK), 0.0, tl.float32)
        for start in range(0, H, BK):
            x = tl.load(h + b * H + (start + k), mask=start + k < H, other=0.0)
            within = (n < H)[:, None] & (start + k < H)[None, :]
            y = tl.load(r + n[:, None] * H + (start + k)[None, :], mask=within, other=0.0)
            sums += y * x[None, :]
        return tl.sum(sums, axis=1)[None, :]
    else:
        acc = tl.full((BB, BH), 0.0, tl.float32)
        for start in range(0, H, BK):
            deep = start + k < H
            x = tl.load(h + b[:, None] * H + (start + k)[None, :], mask=(b < B)[:, None] & deep[None, :], other=0.0)
            y = tl.load(r + n[None, :] * H + (start + k)[:, None], mask=(n < H)[None, :] & deep[:, None], other=0.0)
            acc = tl.dot(x, y, acc, input_precision="ieee")
        return acc


@triton.jit
def _row(p, at, n, H):
    """Values n of a vector (H,) at `at`, as a row."""
    return tl.load(p + at + n, mask=n < H, other=0.0)[None, :]


@triton.jit
def _gate(x_at, h, r, bias, g, b, n, B, H, G: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """What enters gate g of the hidden units n: of the inputs, of the states h, and both biases."""
    v = tl.load(x_at + (g * H + n)[None, :], mask=(b < B)[:, None] & (n < H)[None, :], other=0.0)
    v += _product(h, r + g * H * H, b, n, B, H, BB, BH, BK)
    if bias is not None:
        v += _row(bias, g * H, n, H) + _row(bias, (G + g) * H, n, H)
    return v


@triton.jit
def _activated(v, clip, alpha, beta, ACT: tl.constexpr):
    if clip is not None:
        v = tl.minimum(tl.maximum(v, -clip), clip)
    return ACT(v, alpha, beta)


@triton.jit
def recurrent_kernel(
    gates,
    r,
    bias,
    lengths,
    peephole,
    h,
    c,
    saved,
    y,
    y_h,
    y_c,
    B,
    H,
    steps,
    first,
    count,
    swap,
    gates_t,
    gates_b,
    y_t,
    y_b,
    y_d,
    end_b,
    end_d,
    clip,
    alphas,
    betas,
    CELL: tl.constexpr,
    G: tl.constexpr,
    PHASE: tl.constexpr,
    LINEAR: tl.constexpr,
    COUPLED: tl.constexpr,
    REVERSE: tl.constexpr,
    ACT0: tl.constexpr,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    WHOLE: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
):
    """`count` steps from `first` on, of BB sequences in direction program_id(2), of BH hidden units or the WHOLE cell.

    gates hold what the inputs give, h two sets of states, one read and one written in turn, c the cells, and saved what
    a GRU that is not LINEAR needs for its second product: there PHASE 1 is what comes before, 2 the rest, 0 both.
    """
    d = tl.program_id(2)
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    real = b < B
    back = d + REVERSE > 0
    gates += d * G * H
    r += d * G * H * H
    h += d * B * H
    if bias is not None:
        bias += d * 2 * G * H
    if c is not None:
        c += d * B * H
    if saved is not None:
        saved += d * B * H
    if peephole is not None:
        peephole += d * 3 * H
    begin = tl.program_id(0) * BH
    end = begin + 1
    if WHOLE:
        end = H
    if lengths is None:
        length = tl.full((BB,), 0, tl.int32) + steps
    else:
        length = tl.load(lengths + b, mask=real, other=0)

    for s in range(first, first + count):
        alive = (s < length)[:, None]
        time = tl.where(back & (s < length), length - 1 - s, s).to(tl.int64)[:, None]
        wide_b = b.to(tl.int64)[:, None]
        x_at = gates + time * gates_t + wide_b * gates_b
        old = h + (s % 2) * swap
        new = h + ((s + 1) % 2) * swap
        y_at = y + time * y_t + wide_b * y_b + d * y_d
        end_at = wide_b * end_b + d * end_d
        if CELL == "GRU" and not LINEAR and PHASE != 2:
            for start in range(begin, end, BH):
                n = start + tl.arange(0, BH)
                inside = real[:, None] & (n < H)[None, :]
                at = b[:, None] * H + n[None, :]
                update = _gate(x_at, old, r, bias, 0, b, n, B, H, G, BB, BH, BK)
                reset = _gate(x_at, old, r, bias, 1, b, n, B, H, G, BB, BH, BK)
                reset = _activated(reset, clip, alphas[0], betas[0], ACT0)
                before = tl.load(old + at, mask=inside, other=0.0)
                tl.store(saved + at, _activated(update, clip, alphas[0], betas[0], ACT0), mask=inside)
                tl.store(saved + swap + at, reset * before, mask=inside)
            if PHASE == 0:
                tl.debug_barrier()
        if PHASE != 1:
            for start in range(begin, end, BH):
                n = start + tl.arange(0, BH)
                inside = real[:, None] & (n < H)[None, :]
                at = b[:, None] * H + n[None, :]
                before = tl.load(old + at, mask=inside, other=0.0)
                if CELL == "LSTM":
                    cell = tl.load(c + at, mask=inside, other=0.0)
                    i = _gate(x_at, old, r, bias, 0, b, n, B, H, G, BB, BH, BK)
                    o = _gate(x_at, old, r, bias, 1, b, n, B, H, G, BB, BH, BK)
                    f = _gate(x_at, old, r, bias, 2, b, n, B, H, G, BB, BH, BK)
                    z = _gate(x_at, old, r, bias, 3, b, n, B, H, G, BB, BH, BK)
                    if peephole is not None:
                        i += _row(peephole, 0, n, H) * cell
                        f += _row(peephole, 2 * H, n, H) * cell
                    i = _activated(i, clip, alphas[0], betas[0], ACT0)
                    if COUPLED:
                        f = 1.0 - i
                    else:
                        f = _activated(f, clip, alphas[0], betas[0], ACT0)
                    moved = f * cell + i * _activated(z, clip, alphas[1], betas[1], ACT1)
                    if peephole is not None:
                        o += _row(peephole, H, n, H) * moved
                    made = _activated(o, clip, alphas[0], betas[0], ACT0) * ACT2(moved, alphas[2], betas[2])
                    moved = tl.where(alive, moved, cell)
                    if y_c is not None:
                        tl.store(y_c + end_at + n[None, :], store_type(moved, y_c), mask=inside)
                elif CELL == "GRU":
                    if LINEAR:
                        update = _gate(x_at, old, r, bias, 0, b, n, B, H, G, BB, BH, BK)
                        update = _activated(update, clip, alphas[0], betas[0], ACT0)
                        reset = _gate(x_at, old, r, bias, 1, b, n, B, H, G, BB, BH, BK)
                        inner = _product(old, r + 2 * H * H, b, n, B, H, BB, BH, BK)
                        v = tl.load(x_at + (2 * H + n)[None, :], mask=inside, other=0.0)
                        if bias is not None:
                            inner += _row(bias, 5 * H, n, H)
                            v += _row(bias, 2 * H, n, H)
                        v += _activated(reset, clip, alphas[0], betas[0], ACT0) * inner
                    else:
                        update = tl.load(saved + at, mask=inside, other=0.0)
                        v = _gate(x_at, saved + swap, r, bias, 2, b, n, B, H, G, BB, BH, BK)
                    made = (1.0 - update) * _activated(v, clip, alphas[1], betas[1], ACT1) + update * before
                else:
                    v = _gate(x_at, old, r, bias, 0, b, n, B, H, G, BB, BH, BK)
                    made = _activated(v, clip, alphas[0], betas[0], ACT0)
                kept = tl.where(alive, made, before)
                tl.store(new + at, kept, mask=inside)
                tl.store(y_at + n[None, :], store_type(tl.where(alive, made, 0.0), y), mask=inside)
                if y_h is not None:
                    tl.store(y_h + end_at + n[None, :], store_type(kept, y_h), mask=inside)
                if CELL == "LSTM":  # last: until then other threads may read the cells that `made` is made of
                    tl.store(c + at, moved, mask=inside)
        if WHOLE:
            tl.debug_barrier()


@triton.jit
def start_kernel(h0, c0, h, c, size, B, H, start_b, start_d, BLOCK: tl.constexpr):
    """The states before the first step, contiguous (directions, B, H): those that are given, else 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = i // (H * B) * start_d + i // H % B * start_b + i % H
    inside = i < size
    value = tl.full((BLOCK,), 0.0, tl.float32)
    if h0 is None:
        tl.store(h + i, value, mask=inside)
    else:
        tl.store(h + i, tl.load(h0 + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
    if c is not None:
        if c0 is None:
            tl.store(c + i, value, mask=inside)
        else:
            tl.store(c + i, tl.load(c0 + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
