"""Sums that are cut into parts, which a second launch adds: where that costs less than whole ones, as is estimated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from infera_kernels.launch import Target, Typed, nominal_target
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.invariance import rows_seen
from infera_kernels.triton.layout import ceil_div
from infera_kernels.triton.matmul_kernel import matmul_kernel
from infera_kernels.triton.products import block_at, finished, in_batch, tile_of
from infera_kernels.triton.skinny import ALONG_N, MATVEC, matvec_kernel, pick_strip, strip_cycles
from infera_kernels.triton.tiles import EITHER, SIZES, kind_of, least_cycles
from infera_kernels.tuning import Family, Problem, Tuned, choose
from infera_kernels.tuning.choice import REMEMBERED
from infera_kernels.tuning.cost import joining_cycles

LEAST_DEPTH, _STEP = 256, 128
"""The least depth of a part, and what that of a product is a multiple of: blocks of tiles divide it."""
MOST_PARTS = 16
"""Of the sums of a product; each number is another kernel."""
_ROOM = 4
"""Programs beyond so many a multiprocessor leave nothing to gain by cutting sums."""


@triton.jit
def parts_kernel(
    parts,
    out,
    bias,
    residual,
    M,
    N,
    size,
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
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = ACT(alpha * sum of parts + bias + beta * residual): float32 parts (PARTS, matrices, M, N) of `size`
    elements each, always added in the same order."""
    matrix, m, n = tile_of(M, N, BM, BN, GROUP)
    matrix = matrix.to(tl.int64)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = parts + (matrix * M + m.to(tl.int64)[:, None]) * N + n[None, :]
    step = tl.full([], 1, tl.int64) * size
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for _ in tl.static_range(PARTS):
        acc += tl.load(at, mask=inside, other=0.0)
        at += step
    out = in_batch(out, matrix, batch, out_batch)
    if residual is not None:
        residual = in_batch(residual, matrix, batch, residual_batch)
    acc = finished(acc, bias, residual, m, n, inside, residual_m, residual_n, alpha, beta, act_alpha, act_beta, ACT)
    tl.store(block_at(out, m, n, out_m, out_n), store_type(acc, out), mask=inside)


@dataclass(frozen=True, slots=True)
class Parts:
    """Into how many parts sums are cut."""

    count: int


def room_for_parts(m: int, n: int, batch: int, k: int, target: Target) -> int:
    """The most parts of `batch` products (m, k) @ (k, n) that may pay: none of less than the least depth, and no more
    programs than a GPU has room for."""
    programs = batch * ceil_div(m, 64) * ceil_div(n, 64)
    return max(1, min(_ROOM * target.multiprocessors // max(programs, 1), k // LEAST_DEPTH))


def cheapest(
    problem: Problem,
    target: Target,
    candidates: Callable[[Problem, Target], tuple[Parts, ...]],
    cycles: Callable[[Problem, Parts, Target], float],
) -> Parts:
    """The number of parts with the least estimated time, of equals the least. One, where that takes less than a second
    launch, and where the library may compute whole sums: it cuts them itself where that pays, and is taken to be as
    fast as the best of ours."""
    if problem.layout == EITHER or cycles(problem, Parts(1), target) <= joining_cycles(2, 0, target):
        return Parts(1)
    return min(candidates(problem, target), key=lambda parts: (cycles(problem, parts, target), parts.count))


def part_depth(k: int, parts: int) -> int:
    """The depth of all parts of a product's sums but the last, which may be less."""
    return ceil_div(ceil_div(k, parts), _STEP) * _STEP


def part_candidates(problem: Problem, target: Target) -> tuple[Parts, ...]:
    """Whole sums, and what may pay."""
    m, batch, n, k = problem.sizes
    most = min(MOST_PARTS, room_for_parts(m, n, batch, k, target))
    return tuple(Parts(c) for c in sorted({1, *(ceil_div(k, part_depth(k, c)) for c in range(2, most + 1))}))


def part_cycles(problem: Problem, parts: Parts, target: Target) -> float:
    """Of all launches; of one row with a matrix whose rows are contiguous."""
    m, batch, n, k = problem.sizes
    deep, products = part_depth(k, parts.count) if parts.count > 1 else k, batch * parts.count
    if m == 1:
        row = MATVEC.problem(problem.kind, {"programs": products, "n": n, "k": deep}, ALONG_N)
        sums = strip_cycles(row, pick_strip(row, target), target)
    else:
        sums = least_cycles(Problem("matmul", problem.kind, (m, products, n, deep)), target)
    return sums + joining_cycles(parts.count, batch * m * n, target)


@lru_cache(maxsize=REMEMBERED)
def parts_predicted(problem: Problem, target: Target) -> Parts:
    """The number of parts with the least estimated time."""
    return cheapest(problem, target, part_candidates, part_cycles)


PARTS = Family(
    *("matmul_parts", SIZES, 2, Parts, part_candidates, parts_predicted),
    (matmul_kernel, matvec_kernel, parts_kernel),
    part_cycles,
)
"""Into how many parts sums are cut. What scratch that takes is asked before strides are known: `layout` says no more
than whether whole sums may be EITHER's."""


def parts_of(
    a: Typed,
    b: Typed,
    out: Typed,
    *,
    invariant: bool = False,
    library: bool = False,
    tf32: bool = False,
    tuned: Tuned | None = None,
) -> int:
    """Into how many parts the sums of a product are best cut: see `matmul`. The `library` may compute whole sums."""
    shape = tuple(out.shape)
    if not math.prod(shape):
        return 1
    leading = math.prod(shape[:-2])
    m, batch = (leading * shape[-2], 1) if math.prod(b.shape[:-2]) == 1 else (shape[-2], leading)
    if invariant:
        m, batch = rows_seen(m, invariant=True), 1
    problem = PARTS.problem(
        kind_of(a, tf32=tf32), {"m": m, "batch": batch, "n": shape[-1], "k": a.shape[-1]}, EITHER * library
    )
    target = nominal_target(90) if tuned is None else tuned.target
    return choose(PARTS, problem, target, None if invariant else tuned).count
