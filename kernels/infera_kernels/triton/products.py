"""What kernels of matrix products share: which tile a program computes, and what follows the sums."""

import triton
import triton.language as tl

from infera_kernels.triton.indexing import offset_of

GROUP = 8
"""Tile rows whose blocks run side by side, so that they share columns of b in the L2 cache."""


@triton.jit
def place_of(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(matrix, its first row, its first column) of a tile: BM x BN tiles of matrices M x N, GROUP rows of tiles at a
    time."""
    tiles_m = (M + BM - 1) // BM
    tiles_n = (N + BN - 1) // BN
    matrix = tile // (tiles_m * tiles_n)
    tile = tile % (tiles_m * tiles_n)
    first_m = tile // (GROUP * tiles_n) * GROUP
    group_m = tl.minimum(tiles_m - first_m, GROUP)
    tile = tile % (GROUP * tiles_n)
    return matrix, (first_m + tile % group_m) * BM, (tile // group_m) * BN


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(matrix, its rows, its columns) of this program: see `place_of`.

    The matrix is an int32, as wide as there may be programs. Rows and columns may lie past the end.
    """
    matrix, row, column = place_of(tl.program_id(0), M, N, BM, BN, GROUP)
    return matrix, row + tl.arange(0, BM), column + tl.arange(0, BN)


@triton.jit
def columns_of(N, BN: tl.constexpr):
    """(matrix, its first column) of this program: BN of N of one row."""
    tiles = (N + BN - 1) // BN
    return tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN


@triton.jit
def block_at(matrix, i, j, i_stride, j_stride):
    """Where the elements of rows i and columns j of a matrix are."""
    return matrix + i.to(tl.int64)[:, None] * i_stride + j.to(tl.int64)[None, :] * j_stride


@triton.jit
def in_batch(at, matrix, batch, strides):
    """Where matrix number `matrix` of a batch of these sizes begins, from where the first one does; there is one
    without `batch`."""
    if batch is not None:
        at += offset_of(matrix, batch, strides, 0, len(batch))
    return at


@triton.jit
def part_of(a, b, out, K, depth, a_k, b_k, out_split):
    """Where the factors of part program_id(1) begin and its sums are stored, and how deep it is: parts are `depth` deep
    but for the last one, and all there is without `depth`."""
    if depth is not None:
        part = tl.program_id(1).to(tl.int64)
        a += part * depth * a_k
        b += part * depth * b_k
        out += part * out_split
        K = tl.minimum(K - tl.program_id(1) * depth, depth)
    return a, b, out, K


@triton.jit
def finished(
    acc,
    bias,
    residual,
    m,
    n,
    inside,
    residual_m,
    residual_n,
    alpha,
    beta,
    act_alpha,
    act_beta,
    ACT: tl.constexpr,
):
    """ACT(alpha * acc + bias + beta * residual) for rows m and columns n, each part where there is one."""
    if alpha is not None:
        acc = acc * alpha
    if bias is not None:
        acc = acc + tl.load(bias + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        r = tl.load(block_at(residual, m, n, residual_m, residual_n), mask=inside, other=0.0).to(tl.float32)
        if beta is not None:
            r = r * beta
        acc = acc + r
    if ACT is not None:
        acc = ACT(acc, act_alpha, act_beta)
    return acc
