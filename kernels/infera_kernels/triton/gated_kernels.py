"""The kernels of gated products: of one row, and of several."""

import triton
import triton.language as tl

from infera_kernels.triton.ahead import begun, fetch
from infera_kernels.triton.indexing import INTERPRETED, store_type
from infera_kernels.triton.products import block_at, columns_of, in_batch, place_of
from infera_kernels.triton.reductions import inverse_deviation


@triton.jit
def gate_of(gates, ups, act_alpha, act_beta, ACT: tl.constexpr):
    """ACT(gates) * ups, of sums in float32."""
    if ACT is not None:
        gates = ACT(gates, act_alpha, act_beta)
    return gates * ups


@triton.jit
def loaded(at, inside, WHOLE: tl.constexpr):
    """A block of a factor, 0 where it is not `inside`: nowhere, if it is WHOLE."""
    if WHOLE:
        block = tl.load(at)
    else:
        block = tl.load(at, mask=inside, other=0.0)
    return block.to(tl.float32) if INTERPRETED else block


@triton.jit
def gated_row_kernel(
    a,
    gate,
    up,
    gain,
    out,
    N,
    K,
    batch,
    a_batch,
    out_batch,
    a_k,
    gate_k,
    gate_n,
    up_k,
    up_n,
    out_n,
    gain_k,
    act_alpha,
    act_beta,
    epsilon,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """out = ACT(a @ gate) * (a @ up) of one row a, normalised with `gain`, BN columns of both matrices a program: see
    `skinny.matvec_kernel`."""
    row, column = columns_of(N, BN)
    row, n = row.to(tl.int64), column + tl.arange(0, BN)
    fetch(gate, K, N, column, gate_k, gate_n, AHEAD)
    begun(up, K, N, column, up_k, up_n, AHEAD)
    k = tl.arange(0, BK)
    a = in_batch(a, row, batch, a_batch)
    out = in_batch(out, row, batch, out_batch)
    a_at = a + k.to(tl.int64) * a_k
    gate_at = block_at(gate, k, n, gate_k, gate_n)
    up_at = block_at(up, k, n, up_k, up_n)
    step = tl.full([], BK, tl.int64)
    gates = tl.full((BK, BN), 0.0, tl.float32)
    ups = tl.full((BK, BN), 0.0, tl.float32)
    if gain is not None:
        gain_at = gain + k.to(tl.int64) * gain_k
        squares = tl.full((BK,), 0.0, tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        within = k < K - start
        inside = within[:, None] & (n < N)[None, :]
        x = tl.load(a_at, mask=within, other=0.0).to(tl.float32)
        if gain is not None:
            squares += x * x
            x *= tl.load(gain_at, mask=within, other=0.0).to(tl.float32)
            gain_at += step * gain_k
        x = x[:, None]
        gates += x * tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
        ups += x * tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
        a_at += step * a_k
        gate_at += step * gate_k
        up_at += step * up_k
    gates, ups = tl.sum(gates, axis=0), tl.sum(ups, axis=0)
    if gain is not None:
        factor = inverse_deviation(tl.sum(squares, axis=0), None, K, epsilon)
        gates *= factor
        ups *= factor
    made = gate_of(gates, ups, act_alpha, act_beta, ACT)
    tl.store(out + n.to(tl.int64) * out_n, store_type(made, out), mask=n < N)


@triton.jit
def gated_kernel(
    a,
    gate,
    up,
    out,
    M,
    N,
    K,
    batch,
    a_batch,
    out_batch,
    a_m,
    a_k,
    gate_k,
    gate_n,
    up_k,
    up_n,
    out_m,
    out_n,
    act_alpha,
    act_beta,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """out = ACT(a @ gate) * (a @ up), one BM x BN tile of both products a program: blocks of a are read once for
    both. AHEAD: see `ahead`."""
    rows, row, column = place_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rows, m, n = rows.to(tl.int64), row + tl.arange(0, BM), column + tl.arange(0, BN)
    fetch(gate, K, N, column, gate_k, gate_n, AHEAD)
    begun(up, K, N, column, up_k, up_n, AHEAD)
    k = tl.arange(0, BK)
    a = in_batch(a, rows, batch, a_batch)
    out = in_batch(out, rows, batch, out_batch)

    # Rows and columns past the end wrap around, as in matmul_kernel.
    a_at = block_at(a, m % M, k, a_m, a_k)
    gate_at = block_at(gate, k, n % N, gate_k, gate_n)
    up_at = block_at(up, k, n % N, up_k, up_n)
    step = tl.full([], BK, tl.int64)
    gates = tl.full((BM, BN), 0.0, tl.float32)
    ups = tl.full((BM, BN), 0.0, tl.float32)
    for start in range(0, K, BK):
        within = k < K - start
        x = loaded(a_at, within[None, :], WHOLE_K)
        y = loaded(gate_at, within[:, None], WHOLE_K)
        z = loaded(up_at, within[:, None], WHOLE_K)
        gates = tl.dot(x, y, gates, input_precision=PRECISION)
        ups = tl.dot(x, z, ups, input_precision=PRECISION)
        a_at += step * a_k
        gate_at += step * gate_k
        up_at += step * up_k

    made = gate_of(gates, ups, act_alpha, act_beta, ACT)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(block_at(out, m, n, out_m, out_n), store_type(made, out), mask=inside)
