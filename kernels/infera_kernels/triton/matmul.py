"""Matrix products, batched and with any strides, with what usually follows one computed before it is stored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed, target_of
from infera_kernels.triton.elementwise import UNARY
from infera_kernels.triton.indexing import INTERPRETED, offset_of, store_type
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    MAX_DIMS,
    broadcast_strides,
    ceil_div,
    coalesce,
    element_strides,
    fold,
    name_of,
)
from infera_kernels.triton.tiles import HALF, IEEE, TF32, TF32X3, Tile, pick_tile

GROUP = 8
"""Tile rows whose blocks run side by side, so that they share columns of b in the L2 cache."""


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(matrix, its rows, its columns) of this program: BM x BN tiles of matrices M x N, GROUP rows of tiles at a time.

    Rows and columns may lie past the end.
    """
    tiles_m = (M + BM - 1) // BM
    tiles_n = (N + BN - 1) // BN
    tile = tl.program_id(0)
    matrix = (tile // (tiles_m * tiles_n)).to(tl.int64)
    tile = tile % (tiles_m * tiles_n)
    first_m = tile // (GROUP * tiles_n) * GROUP
    group_m = tl.minimum(tiles_m - first_m, GROUP)
    tile = tile % (GROUP * tiles_n)
    m = (first_m + tile % group_m) * BM + tl.arange(0, BM)
    n = (tile // group_m) * BN + tl.arange(0, BN)
    return matrix, m, n


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
):
    """out = ACT(alpha * a @ b + bias + beta * residual), one BM x BN tile a program."""
    matrix, m, n = tile_of(M, N, BM, BN, GROUP)
    k = tl.arange(0, BK).to(tl.int64)
    DIMS: tl.constexpr = len(batch)

    # Rows and columns past the end wrap around: loads need no mask, and what they give is never stored.
    a += offset_of(matrix, batch, a_batch, 0, DIMS)
    b += offset_of(matrix, batch, b_batch, 0, DIMS)
    a_at = a + (m % M).to(tl.int64)[:, None] * a_m + k[None, :] * a_k
    b_at = b + k[:, None] * b_k + (n % N).to(tl.int64)[None, :] * b_n
    step = tl.full([], BK, tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
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

    if alpha is not None:
        acc = acc * alpha
    if bias is not None:
        acc = acc + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    wide_m = m.to(tl.int64)[:, None]
    wide_n = n.to(tl.int64)[None, :]
    if residual is not None:
        residual += offset_of(matrix, batch, residual_batch, 0, DIMS)
        r = tl.load(residual + wide_m * residual_m + wide_n * residual_n, mask=inside, other=0.0).to(tl.float32)
        if beta is not None:
            r = r * beta
        acc = acc + r
    if ACT is not None:
        acc = ACT(acc, act_alpha, act_beta)
    out += offset_of(matrix, batch, out_batch, 0, DIMS)
    tl.store(out + wide_m * out_m + wide_n * out_n, store_type(acc, out), mask=inside)


def supports_matmul(
    a: Typed,
    b: Typed,
    out: Typed,
    bias: Typed | None = None,
    residual: Typed | None = None,
    activation: str | None = None,
) -> bool:
    """a (..., M, K) @ b (..., K, N) -> out (..., M, N), all of one type out of float32, float16 and bfloat16.

    At least two dimensions each, leading ones broadcasting to `out`'s, of which there are at most four; bias of shape
    (N,), residual of a shape that broadcasts to `out`, both of the same type; an activation of UNARY on that type.
    """
    given = [x for x in (a, b, out, bias, residual) if x is not None]
    if len({name_of(x) for x in given}) != 1 or name_of(a) not in FLOATS:
        return False
    if min(len(a.shape), len(b.shape), len(out.shape)) < 2 or len(out.shape) > MAX_DIMS:
        return False
    (m, k), (k2, n), shape = tuple(a.shape[-2:]), tuple(b.shape[-2:]), tuple(out.shape)
    try:
        leading = np.broadcast_shapes(tuple(a.shape[:-2]), tuple(b.shape[:-2]))
        stretched = shape if residual is None else np.broadcast_shapes(shape, tuple(residual.shape))
    except ValueError:
        return False
    return (
        k == k2
        and shape == (*leading, m, n)
        and tuple(stretched) == shape
        and (bias is None or tuple(bias.shape) == (n,))
        and max(m, n, k) <= INT32_MAX - 256
        and (activation is None or (activation in UNARY and name_of(a) in UNARY[activation].dtypes))
        and (activation is None or UNARY[activation].result is None)
    )


def matmul(
    a: Any,
    b: Any,
    out: Any,
    launcher: Launcher,
    *,
    bias: Any = None,
    residual: Any = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    activation: str | None = None,
    act_alpha: float | None = None,
    act_beta: float | None = None,
    precision: str = IEEE,
    tile: Tile | None = None,
) -> list[Call]:
    """out = activation(alpha * a @ b + bias + beta * residual), summed in float32.

    Strides are arbitrary; `bias` must be contiguous; residual may stretch. `precision` is for float32 inputs: "ieee"
    (exact products), "tf32" (about 3 digits, tensor cores) or "tf32x3" (nearly exact, tensor cores). `tile` overrides
    `pick_tile`. K of 0 gives the epilogue of zeros.
    """
    if not supports_matmul(a, b, out, bias, residual, activation):
        given = ", ".join(f"{name_of(x)}{list(x.shape)}" for x in (a, b, out, bias, residual) if x is not None)
        raise ValueError(f"matmul: no kernel for {given} with activation {activation}")
    if precision not in (IEEE, TF32, TF32X3):
        raise ValueError(f"matmul: precision '{precision}' is none of {IEEE}, {TF32}, {TF32X3}")
    if bias is not None:
        (bias_stride,) = element_strides(bias)
        if bias_stride != 1 and bias.shape[0] > 1:
            raise ValueError(f"matmul: bias must be contiguous, its stride is {bias_stride}")
    shape = tuple(out.shape)
    if 0 in shape:
        return []
    (m, n), k = shape[-2:], a.shape[-1]
    leading = shape[:-2]
    # Stretched leading dimensions are walked with stride 0; the matrices' own two are as they are.
    a_strides = broadcast_strides(a, (*leading, m, k))
    b_strides = broadcast_strides(b, (*leading, k, n))
    out_strides = element_strides(out)
    residual_strides = (0,) * len(shape) if residual is None else broadcast_strides(residual, shape)
    if not any(b_strides[:-2]):
        rows, down = coalesce(shape[:-1], [s[:-1] for s in (a_strides, out_strides, residual_strides)])
        if len(rows) == 1:  # one matrix b, and rows that follow each other: one taller product
            m, leading, b_strides = rows[0], (), b_strides[-2:]
            a_strides, out_strides, residual_strides = (
                (*step, s[-1]) for step, s in zip(down, (a_strides, out_strides, residual_strides), strict=True)
            )
    batch, walked = coalesce(leading, [s[:-2] for s in (a_strides, b_strides, out_strides, residual_strides)])

    kind = precision if name_of(a) == "float32" else HALF
    tile = tile or pick_tile(m, n, math.prod(leading), kind, target_of(launcher))
    entry = UNARY[activation] if activation else None
    args = {
        "a": a,
        "b": b,
        "out": out,
        "bias": bias,
        "residual": residual,
        "M": m,
        "N": n,
        "K": k,
        "batch": batch,
        **dict(zip(("a_batch", "b_batch", "out_batch", "residual_batch"), map(fold, walked), strict=True)),
        **dict(zip(("a_m", "a_k"), fold(a_strides[-2:]), strict=True)),
        **dict(zip(("b_k", "b_n"), fold(b_strides[-2:]), strict=True)),
        **dict(zip(("out_m", "out_n"), fold(out_strides[-2:]), strict=True)),
        **dict(zip(("residual_m", "residual_n"), fold(residual_strides[-2:]), strict=True)),
        "alpha": None if alpha == 1.0 else float(alpha),
        "beta": None if beta == 1.0 else float(beta),
        "act_alpha": entry and (entry.alpha if act_alpha is None else float(act_alpha)),
        "act_beta": entry and (entry.beta if act_beta is None else float(act_beta)),
    }
    constexprs = {
        "ACT": entry.fn if entry else None,
        "PRECISION": precision,
        "GROUP": GROUP,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "WHOLE_K": k % tile.k == 0,
    }
    grid = (math.prod(leading) * ceil_div(m, tile.m) * ceil_div(n, tile.n),)
    return [launcher.launch(matmul_kernel, grid, args, constexprs, num_warps=tile.warps, num_stages=tile.stages)]
