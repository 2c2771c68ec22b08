"""The kernel of matrix products whose factors TMA reads: as many programs as run at a time, each makes tile after
tile."""

import triton
import triton.language as tl

from infera_kernels.triton.indexing import INTERPRETED, store_type
from infera_kernels.triton.products import finished, in_batch, place_of


@triton.jit
def _block(x, matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    """ROWS x COLUMNS of a matrix, by a descriptor that has columns for rows where it is TURNED, and three dimensions
    where matrices follow each other."""
    if TURNED:
        if len(x.shape) == 3:
            block = x.load([matrix, column, row]).reshape(COLUMNS, ROWS)
        else:
            block = x.load([column, row])
        return block.T
    else:
        if len(x.shape) == 3:
            return x.load([matrix, row, column]).reshape(ROWS, COLUMNS)
        else:
            return x.load([row, column])


@triton.jit
def _store(
    acc,
    matrix,
    row,
    column,
    out,
    bias,
    residual,
    M,
    N,
    batch,
    out_batch,
    residual_batch,
    out_m,
    out_n,
    residual_m,
    residual_n,
    alpha,
    beta,
    act_alpha,
    act_beta,
    ACT: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Finishes sums and stores them, STRIP columns at a time, which takes fewer registers than all at once."""
    if acc.shape[1] > STRIP:
        half: tl.constexpr = acc.shape[1] // 2
        left, right = acc.reshape(acc.shape[0], 2, half).permute(0, 2, 1).split()
        to = (out, bias, residual, M, N, batch, out_batch, residual_batch, out_m, out_n, residual_m, residual_n)
        how = (alpha, beta, act_alpha, act_beta)
        _store(left, matrix, row, column, *to, *how, ACT, STRIP)
        _store(right, matrix, row, column + half, *to, *how, ACT, STRIP)
    else:
        matrix = matrix.to(tl.int64)
        out = in_batch(out, matrix, batch, out_batch)
        if residual is not None:
            residual = in_batch(residual, matrix, batch, residual_batch)
        m = row + tl.arange(0, acc.shape[0])
        n = column + tl.arange(0, acc.shape[1])
        inside = (m < M)[:, None] & (n < N)[None, :]
        acc = finished(acc, bias, residual, m, n, inside, residual_m, residual_n, alpha, beta, act_alpha, act_beta, ACT)
        at = out + m.to(tl.int64)[:, None] * out_m + n.to(tl.int64)[None, :] * out_n
        tl.store(at, store_type(acc, out), mask=inside)


@triton.jit
def tma_kernel(
    a,
    b,
    out,
    bias,
    residual,
    M,
    N,
    K,
    batch,
    out_batch,
    residual_batch,
    out_m,
    out_n,
    residual_m,
    residual_n,
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
    STRIP: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    JOINED: tl.constexpr,
    SPECIALISED: tl.constexpr,
):
    """out = ACT(alpha * a @ b + bias + beta * residual), of descriptors a and b.

    Where tiles are JOINED, the loads of one begin while the one before is finished; where warps are SPECIALISED, some
    do nothing but load. What blocks have past the end of a factor is read as 0.
    """
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    if batch is not None:
        tiles *= batch[0]
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=JOINED, warp_specialize=SPECIALISED):
        matrix, row, column = place_of(tile, M, N, BM, BN, GROUP)
        acc = tl.full((BM, BN), 0.0, tl.float32)
        for start in range(0, K, BK):
            x = _block(a, matrix, row, start, BM, BK, A_TURNED)
            y = _block(b, matrix, start, column, BK, BN, B_TURNED)
            if INTERPRETED:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
        to = (out, bias, residual, M, N, batch, out_batch, residual_batch, out_m, out_n, residual_m, residual_n)
        how = (alpha, beta, act_alpha, act_beta)
        _store(acc, matrix, row, column, *to, *how, ACT, STRIP)
