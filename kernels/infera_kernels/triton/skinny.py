"""Products of one row, which read a matrix once: what counts is how many bytes are on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import triton
import triton.language as tl

from infera_kernels.launch import Target
from infera_kernels.triton.ahead import begun
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.layout import next_power_of_two
from infera_kernels.triton.products import block_at, columns_of, finished, in_batch, part_of
from infera_kernels.triton.reductions import inverse_deviation
from infera_kernels.tuning import Family, Problem
from infera_kernels.tuning.choice import REMEMBERED
from infera_kernels.tuning.cost import ITEMSIZE, Strip, row_cycles


@triton.jit
def matvec_kernel(
    a,
    b,
    out,
    bias,
    residual,
    gain,
    N,
    K,
    depth,
    batch,
    a_batch,
    b_batch,
    out_batch,
    residual_batch,
    a_k,
    b_k,
    b_n,
    out_n,
    residual_n,
    gain_k,
    out_split,
    alpha,
    beta,
    act_alpha,
    act_beta,
    epsilon,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """out = ACT(alpha * a @ b + bias + beta * residual) of one row a, BN columns a program; with `depth` the sums of
    part program_id(1). Every thread adds up its own elements, and they are added once. The next STAGES - 1 blocks are
    on their way to shared memory meanwhile; with one stage, elements are loaded into registers when they are due.
    With `gain`, of K elements, a is multiplied by it and divided by its root mean square: one number for all columns,
    known when all of a has been read, which is when the sums are. AHEAD: see `ahead`."""
    matrix, column = columns_of(N, BN)
    matrix, n = matrix.to(tl.int64), column + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a = in_batch(a, matrix, batch, a_batch)
    b = in_batch(b, matrix, batch, b_batch)
    out = in_batch(out, matrix, batch, out_batch)
    if residual is not None:
        residual = in_batch(residual, matrix, batch, residual_batch)
    a, b, out, K = part_of(a, b, out, K, depth, a_k, b_k, out_split)
    begun(b, K, N, column, b_k, b_n, AHEAD)
    a_at = a + k.to(tl.int64) * a_k
    b_at = block_at(b, k, n, b_k, b_n)
    step = tl.full([], BK, tl.int64)
    sums = tl.full((BK, BN), 0.0, tl.float32)
    if gain is not None:
        gain_at = gain + k.to(tl.int64) * gain_k
        squares = tl.full((BK,), 0.0, tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        within = k < K - start
        x = tl.load(a_at, mask=within, other=0.0).to(tl.float32)
        y = tl.load(b_at, mask=within[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if gain is not None:
            squares += x * x
            x *= tl.load(gain_at, mask=within, other=0.0).to(tl.float32)
            gain_at += step * gain_k
        sums += x[:, None] * y
        a_at += step * a_k
        b_at += step * b_k
    acc = tl.sum(sums, axis=0)[None, :]
    if gain is not None:
        acc *= inverse_deviation(tl.sum(squares, axis=0), None, K, epsilon)
    m = tl.arange(0, 1)
    inside = (n < N)[None, :]
    acc = finished(acc, bias, residual, m, n, inside, 0, residual_n, alpha, beta, act_alpha, act_beta, ACT)
    tl.store(out + n.to(tl.int64)[None, :] * out_n, store_type(acc, out), mask=inside)


ALONG_K, ALONG_N = "k", "n"
"""Layouts: which axis of the matrix is contiguous. A matrix without any counts as along n."""

SHAPES = {
    ALONG_N: ((16, 64), (32, 32), (16, 128), (32, 64), (64, 32), (16, 256), (32, 128), (64, 64)),
    ALONG_K: ((4, 256), (8, 128), (4, 512), (8, 256), (4, 1024), (8, 512), (16, 256)),
}
"""Columns, and how deep, by layout: 8 to 32 elements a thread, at least 32 bytes in one piece."""

STAGES = (1, 3, 5)


def strips(problem: Problem, shapes: Sequence[tuple[int, int]]) -> tuple[Strip, ...]:
    """Strips of these shapes that do not reach far past the end; the least where all do."""
    _, n, k = problem.sizes
    wide, deep = (next_power_of_two(size) for size in (n, k))
    least = shapes[0]
    near = [(w, d) for w, d in shapes if w <= max(wide, least[0]) and d <= max(deep, least[1])]
    return tuple(Strip(w, d, stages) for stages in STAGES for w, d in near)


def strip_candidates(problem: Problem, target: Target) -> tuple[Strip, ...]:
    """Those of the layout's shapes."""
    return strips(problem, SHAPES[problem.layout or ALONG_N])


def strip_cycles(problem: Problem, strip: Strip, target: Target) -> float:
    """Of all of a problem; see `tuning.cost`."""
    programs, n, k = problem.sizes
    along_k, bits = problem.layout == ALONG_K, 8 * ITEMSIZE[problem.kind]
    return row_cycles(n, k, bits, strip, along_k=along_k, target=target, batch=programs)


def least_strip(
    problem: Problem, target: Target, among: Iterable[Strip], estimate: Callable[[Problem, Strip, Target], float]
) -> Strip:
    """The strip with the least estimated time; of equals one that loads ahead where there are several steps, with the
    fewest stages, then the smallest."""

    def cost(strip: Strip) -> tuple[float, bool, int, int]:
        alone = strip.stages == 1 and strip.k < problem.sizes[2]
        return estimate(problem, strip, target), alone, strip.stages, strip.k * strip.n

    return min(among, key=cost)


@lru_cache(maxsize=REMEMBERED)
def pick_strip(problem: Problem, target: Target) -> Strip:
    """The predicted one."""
    return least_strip(problem, target, strip_candidates(problem, target), strip_cycles)


MATVEC = Family(
    "matvec", ("programs", "n", "k"), 1, Strip, strip_candidates, pick_strip, (matvec_kernel,), strip_cycles
)
"""Products of one row; `layout` says which axis of the matrix is contiguous."""
