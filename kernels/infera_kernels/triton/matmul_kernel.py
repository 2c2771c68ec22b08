"""The kernel of matrix products."""

import triton
import triton.language as tl

from infera_kernels.triton.ahead import begun
from infera_kernels.triton.indexing import INTERPRETED, store_type
from infera_kernels.triton.products import block_at, finished, in_batch, part_of, place_of


@triton.jit
def matmul_kernel(
    a,
    b,
    out,
    bias,
    residual,
    M,
    N,
    K,
    depth,
    batch,
    a_batch,
    b_batch,
    out_batch,
    residual_batch,
    a_m,
    a_k,
    b_k,
    b_n,
    out_m,
    out_n,
    residual_m,
    residual_n,
    out_split,
    alpha,
    beta,
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
    """out = ACT(alpha * a @ b + bias + beta * residual), one BM x BN tile a program; with `depth` the sums of part
    program_id(1). AHEAD: see `ahead`."""
    matrix, row, column = place_of(tl.program_id(0), M, N, BM, BN, GROUP)
    matrix, m, n = matrix.to(tl.int64), row + tl.arange(0, BM), column + tl.arange(0, BN)
    k = tl.arange(0, BK).to(tl.int64)
    a = in_batch(a, matrix, batch, a_batch)
    b = in_batch(b, matrix, batch, b_batch)
    out = in_batch(out, matrix, batch, out_batch)
    if residual is not None:
        residual = in_batch(residual, matrix, batch, residual_batch)
    a, b, out, K = part_of(a, b, out, K, depth, a_k, b_k, out_split)
    begun(b, K, N, column, b_k, b_n, AHEAD)

    # Rows and columns past the end wrap around: loads need no mask, and what they give is never stored.
    a_at = a + (m % M).to(tl.int64)[:, None] * a_m + k[None, :] * a_k
    b_at = b + k[:, None] * b_k + (n % N).to(tl.int64)[None, :] * b_n
    step = tl.full([], BK, tl.int64)
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for start in range(0, K, BK):
        if WHOLE_K:
            x = tl.load(a_at)
            y = tl.load(b_at)
        else:
            x = tl.load(a_at, mask=(k < K - start)[None, :], other=0.0)
            y = tl.load(b_at, mask=(k < K - start)[:, None], other=0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        a_at += step * a_k
        b_at += step * b_k

    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = finished(acc, bias, residual, m, n, inside, residual_m, residual_n, alpha, beta, act_alpha, act_beta, ACT)
    tl.store(block_at(out, m, n, out_m, out_n), store_type(acc, out), mask=inside)
