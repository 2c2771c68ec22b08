"""Products of matrices of 8-bit integers on tensor cores, exact in int32, scaled or quantised again before they are
stored.

Tensor cores take signed integers: unsigned ones are read as u - 128. With a' and b' what is read, and p and q the zero
points less the same shifts, the sum over k of (a' - p)(b' - q) is that of a'b', less p times the sums of b's columns,
less q times (the sums of a's rows - K p). Weights bring the sums of their columns.
"""

from __future__ import annotations

import math

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Array, Call
from infera_kernels.launch import Launcher, Typed, target_of
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.integer_sums import BYTES, Scaling, scaled_sums, step_of
from infera_kernels.triton.integer_weight import Weight
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
    next_power_of_two,
)
from infera_kernels.triton.products import GROUP, in_batch, tile_of
from infera_kernels.triton.quantise import bounds
from infera_kernels.triton.tiles import INT8, SIZES, Tile, cycles, fitting, predicted
from infera_kernels.tuning import Family, Tuned, choose


@triton.jit
def integer_matmul_kernel(
    a,
    b,
    out,
    a_zero,
    b_zero,
    column_sums,
    a_scale,
    b_scale,
    bias,
    out_scale,
    out_zero,
    M,
    N,
    K,
    deep,
    batch,
    a_batch,
    b_batch,
    out_batch,
    a_m,
    a_k,
    b_k,
    b_n,
    out_m,
    out_n,
    a_zero_m,
    b_zero_n,
    a_scale_m,
    b_scale_n,
    bias_m,
    bias_n,
    alpha,
    A_SHIFT: tl.constexpr,
    B_SHIFT: tl.constexpr,
    B_FILL: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """out = (a - a_zero) @ (b - b_zero), with an integer bias; with scales times both, plus a floating-point bias, and
    with an output scale quantised again. b is `deep` deep, with zeros past K. One BM x BN tile a program."""
    matrix, m, n = tile_of(M, N, BM, BN, GROUP)
    matrix = matrix.to(tl.int64)
    k = tl.arange(0, BK)
    a = in_batch(a, matrix, batch, a_batch)
    b = in_batch(b, matrix, batch, b_batch)
    out = in_batch(out, matrix, batch, out_batch)
    # Rows and columns past the end wrap around: what they give is never stored.
    a_at = a + (m % M).to(tl.int64)[:, None] * a_m + k.to(tl.int64)[None, :] * a_k
    b_at = b + k.to(tl.int64)[:, None] * b_k + (n % N).to(tl.int64)[None, :] * b_n
    step = tl.full([], BK, tl.int64)
    acc = tl.full((BM, BN), 0, tl.int32)
    rows = tl.full((BM,), 0, tl.int32)
    columns = tl.full((BN,), 0, tl.int32)
    for start in range(0, K, BK):
        if WHOLE_K:
            x = tl.load(a_at)
            y = tl.load(b_at)
        else:
            x = tl.load(a_at, mask=(k < K - start)[None, :], other=A_SHIFT)
            y = tl.load(b_at, mask=(k < deep - start)[:, None], other=B_FILL)
        if x.dtype == tl.uint8:
            x = (x ^ 128).to(tl.int8, bitcast=True)
        if y.dtype == tl.uint8:
            y = (y ^ 128).to(tl.int8, bitcast=True)
        acc = tl.dot(x, y, acc, out_dtype=tl.int32)
        if ROW_SUMS:
            rows += tl.sum(x.to(tl.int32), axis=1)
        if COLUMN_SUMS:
            columns += tl.sum(y.to(tl.int32), axis=0)
        a_at += step * a_k
        b_at += step * b_k

    p = tl.full((BM,), -A_SHIFT, tl.int32)
    if a_zero is not None:
        p += tl.load(a_zero + m * a_zero_m, mask=m < M, other=0).to(tl.int32)
    if column_sums is not None:
        columns = tl.load(column_sums + n, mask=n < N, other=0)
    if COLUMN_SUMS or column_sums is not None:
        acc -= p[:, None] * columns[None, :]
    if ROW_SUMS:
        q = tl.full((BN,), -B_SHIFT, tl.int32)
        if b_zero is not None:
            q += tl.load(b_zero + n * b_zero_n, mask=n < N, other=0).to(tl.int32)
        acc -= (rows - p * K)[:, None] * q[None, :]

    inside = (m < M)[:, None] & (n < N)[None, :]
    wide_m = m.to(tl.int64)[:, None]
    wide_n = n.to(tl.int64)[None, :]
    if bias is not None:
        added = tl.load(bias + wide_m * bias_m + wide_n * bias_n, mask=inside, other=0)
        if bias.dtype.element_ty == tl.int32:
            acc += added
    at = out + wide_m * out_m + wide_n * out_n
    if a_scale is None:
        tl.store(at, acc, mask=inside)
    else:
        left = tl.load(a_scale + m * a_scale_m, mask=m < M, other=0.0).to(tl.float32)
        if alpha is not None:
            left = left * alpha
        right = tl.load(b_scale + n * b_scale_n, mask=n < N, other=0.0).to(tl.float32)
        if bias is not None and bias.dtype.element_ty != tl.int32:
            y = scaled_sums(acc, left[:, None] * right[None, :], added, out_scale, out_zero, LOW, HIGH)
        else:
            y = scaled_sums(acc, left[:, None] * right[None, :], None, out_scale, out_zero, LOW, HIGH)
        tl.store(at, store_type(y, out), mask=inside)


INTEGER_MATMUL = Family("integer_matmul", SIZES, 2, Tile, fitting, predicted, (integer_matmul_kernel,), cycles)
"""`layout` says whether the weight is packed."""


def _count(parameter: Typed | None) -> int:
    return 1 if parameter is None else math.prod(parameter.shape)


def supports_integer_matmul(
    a: Typed,
    b: Typed,
    out: Typed,
    a_zero: Typed | None = None,
    b_zero: Typed | None = None,
    scaling: Scaling | None = None,
    bias: Typed | None = None,
) -> bool:
    """a (..., M, K) @ b (..., K, N) of 8-bit integers, leading dimensions broadcasting to `out`'s; zero points of the
    factors' types and scales of floats, one, or one for each of the rows of an `a` without leading dimensions and for
    each of the columns. `out` is int32 without `scaling`, 8-bit where that quantises, else floating point."""
    if not {name_of(a), name_of(b)} <= BYTES or min(len(a.shape), len(b.shape), len(out.shape)) < 2:
        return False
    (m, k), (k2, n), shape = tuple(a.shape[-2:]), tuple(b.shape[-2:]), tuple(out.shape)
    try:
        leading = np.broadcast_shapes(tuple(a.shape[:-2]), tuple(b.shape[:-2]))
        biased = shape if bias is None else np.broadcast_shapes(shape[-2:] if len(shape) == 2 else (n,), bias.shape)
    except ValueError:
        return False
    rows = 1 if math.prod(leading) > 1 else m
    left, right = [a_zero], [b_zero]
    if scaling is not None:
        left.append(scaling.left)
        right.append(scaling.right)
    typed = all(z is None or name_of(z) == name_of(x) for z, x in ((a_zero, a), (b_zero, b)))
    if scaling is None:
        stored = name_of(out) == "int32"
    else:
        stored = name_of(out) in (FLOATS if scaling.zero is None else BYTES)
        stored = stored and (scaling.zero is None or name_of(scaling.zero) == name_of(out))
        stored = (
            stored and {name_of(s) for s in (scaling.left, scaling.right, scaling.scale) if s is not None} <= FLOATS
        )
    return (
        k == k2
        and shape == (*leading, m, n)
        and len(shape) <= MAX_DIMS
        and (bias is None or (biased in (shape, (n,)) and name_of(bias) in FLOATS | {"int32"}))
        and typed
        and stored
        and all(_count(p) in (1, rows) for p in left)
        and all(_count(p) in (1, n) for p in right)
        and (scaling is None or _count(scaling.scale) == _count(scaling.zero) == 1)
        and max(m, n, k) <= INT32_MAX - 256
    )


def integer_matmul(
    a: Array,
    b: Array | Weight,
    out: Array,
    launcher: Launcher,
    *,
    a_zero: Array | None = None,
    b_zero: Array | None = None,
    signed_zeros: bool = False,
    scaling: Scaling | None = None,
    bias: Array | None = None,
    tile: Tile | None = None,
    tuned: Tuned | None = None,
) -> list[Call]:
    """out = (a - a_zero) @ (b - b_zero), exact in int32 (modulo 2**32), then scaled, where `scaling` says how.

    Strides are arbitrary, parameters of more than one value have one dimension. `signed_zeros` says that b_zero is
    known to be what signed weights have no part of: 0 of int8, 128 of uint8.
    """
    shape = tuple(out.shape)
    if 0 in shape:
        return []
    (m, n), leading, k = shape[-2:], shape[:-2], a.shape[-1]
    if isinstance(b, Weight):
        y, deep, b_unsigned = b.packed, b.packed.shape[-1], b.unsigned
        b_strides = (*(0 for _ in leading), 1, deep)
    else:
        y, deep, b_unsigned = b, k, name_of(b) == "uint8"
        b_strides = broadcast_strides(b, (*leading, k, n))
    a_unsigned = name_of(a) == "uint8"
    a_strides = broadcast_strides(a, (*leading, m, k))
    out_strides = element_strides(out)
    left, right = (None, None) if scaling is None else (scaling.left, scaling.right)
    by_row = any(p is not None and p.size > 1 for p in (a_zero, left)) or (bias is not None and bias.ndim > 1)
    if not any(b_strides[:-2]) and not by_row:
        rows, down = coalesce(shape[:-1], [s[:-1] for s in (a_strides, out_strides)])
        if len(rows) == 1:  # one matrix b, and rows that follow each other: one taller product
            m, leading, b_strides = rows[0], (), b_strides[-2:]
            a_strides, out_strides = ((*step, s[-1]) for step, s in zip(down, (a_strides, out_strides), strict=True))
    batch, walked = coalesce(leading, [s[:-2] for s in (a_strides, b_strides, out_strides)])
    shifted = a_unsigned or a_zero is not None
    if tile is None:
        sizes = {"m": m, "batch": math.prod(leading), "n": n, "k": k}
        problem = INTEGER_MATMUL.problem(INT8, sizes, "packed" if isinstance(b, Weight) else "")
        tile = choose(INTEGER_MATMUL, problem, target_of(launcher), tuned)
    depth = min(tile.k, max(32, next_power_of_two(k)))
    bias_strides = (0, 0) if bias is None else broadcast_strides(bias, (m, n))
    low, high = (None, None) if scaling is None or scaling.zero is None else bounds(out.dtype)
    args = {
        "a": a,
        "b": y,
        "out": out,
        "a_zero": a_zero,
        "b_zero": None if signed_zeros else b_zero,
        "column_sums": b.sums if isinstance(b, Weight) and shifted else None,
        "a_scale": left,
        "b_scale": right,
        "bias": bias,
        "out_scale": scaling and scaling.scale,
        "out_zero": scaling and scaling.zero,
        "M": m,
        "N": n,
        "K": k,
        "deep": deep,
        "batch": batch if math.prod(leading) > 1 else None,
        **dict(zip(("a_batch", "b_batch", "out_batch"), map(fold, walked), strict=True)),
        **dict(zip(("a_m", "a_k"), fold(a_strides[-2:]), strict=True)),
        **dict(zip(("b_k", "b_n"), fold(b_strides[-2:]), strict=True)),
        **dict(zip(("out_m", "out_n"), fold(out_strides[-2:]), strict=True)),
        "a_zero_m": step_of(a_zero),
        "b_zero_n": step_of(b_zero),
        "a_scale_m": step_of(left),
        "b_scale_n": step_of(right),
        **dict(zip(("bias_m", "bias_n"), fold(bias_strides), strict=True)),
        "alpha": None if scaling is None or scaling.alpha == 1.0 else scaling.alpha,
    }
    constexprs = {
        "A_SHIFT": 128 if a_unsigned else 0,
        "B_SHIFT": 128 if b_unsigned else 0,
        "B_FILL": 128 if name_of(y) == "uint8" else 0,
        "ROW_SUMS": not signed_zeros and (b_unsigned or b_zero is not None),
        "COLUMN_SUMS": shifted and not isinstance(b, Weight),
        "LOW": low,
        "HIGH": high,
        "BM": tile.m,
        "BN": tile.n,
        "BK": depth,
        "GROUP": GROUP,
        "WHOLE_K": k % depth == 0,
    }
    grid = (math.prod(leading) * ceil_div(m, tile.m) * ceil_div(n, tile.n),)
    return [
        launcher.launch(
            integer_matmul_kernel,
            grid,
            args,
            constexprs,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
    ]
