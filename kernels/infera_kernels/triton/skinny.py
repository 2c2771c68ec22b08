"""Products of few rows, and sums that are cut into parts: what fills a GPU where there are few tiles of output."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from infera_kernels.launch import Target
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.layout import ceil_div, next_power_of_two
from infera_kernels.triton.products import finished, in_batch, part_of, tile_of
from infera_kernels.tuning import Family, Problem

_PROGRAMS = 132
"""As many programs at least keep a large GPU busy; what scratch a product takes must not depend on the device."""
_DEPTH, _STEP = 256, 128
"""The least depth of a part, and what it is a multiple of: blocks of tiles divide it."""
_ELEMENTS = 4096
"""Elements of the matrix that a program of `matvec_kernel` reads at a time: 32 for each of its threads."""


@triton.jit
def matvec_kernel(
    a,
    b,
    out,
    bias,
    residual,
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
    out_split,
    alpha,
    beta,
    act_alpha,
    act_beta,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = ACT(alpha * a @ b + bias + beta * residual) of one row a, BN columns a program; with `depth` the sums of
    part program_id(1). Every thread adds up its own elements, and they are added once."""
    tiles = (N + BN - 1) // BN
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a = in_batch(a, matrix, batch, a_batch)
    b = in_batch(b, matrix, batch, b_batch)
    out = in_batch(out, matrix, batch, out_batch)
    if residual is not None:
        residual = in_batch(residual, matrix, batch, residual_batch)
    a, b, out, K = part_of(a, b, out, K, depth, a_k, b_k, out_split)
    a_at = a + k.to(tl.int64) * a_k
    b_at = b + k.to(tl.int64)[:, None] * b_k + n.to(tl.int64)[None, :] * b_n
    step = tl.full([], BK, tl.int64)
    sums = tl.full((BK, BN), 0.0, tl.float32)
    for start in range(0, K, BK):
        within = k < K - start
        x = tl.load(a_at, mask=within, other=0.0).to(tl.float32)
        y = tl.load(b_at, mask=within[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        sums += x[:, None] * y
        a_at += step * a_k
        b_at += step * b_k
    acc = tl.sum(sums, axis=0)[None, :]
    m = tl.arange(0, 1)
    inside = (n < N)[None, :]
    acc = finished(acc, bias, residual, m, n, inside, 0, residual_n, alpha, beta, act_alpha, act_beta, ACT)
    tl.store(out + n.to(tl.int64)[None, :] * out_n, store_type(acc, out), mask=inside)


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
    at = out + m.to(tl.int64)[:, None] * out_m + n.to(tl.int64)[None, :] * out_n
    tl.store(at, store_type(acc, out), mask=inside)


def part_count(m: int, n: int, k: int, batch: int) -> int:
    """Into how many parts the sums of `batch` products (m, k) @ (k, n) are cut; 1 where there is enough to do.

    It depends on nothing else, so that every run and every device adds up in the same order.
    """
    programs = batch * ceil_div(m, 32) * ceil_div(n, 64)
    if 2 * programs > _PROGRAMS or k < 4 * _DEPTH:
        return 1
    parts = min(ceil_div(_PROGRAMS, max(programs, 1)), k // _DEPTH, MOST_PARTS)
    return ceil_div(k, part_depth(k, parts))


def part_depth(k: int, parts: int) -> int:
    """The depth of all parts but the last, which may be less."""
    return ceil_div(ceil_div(k, parts), _STEP) * _STEP


@dataclass(frozen=True, slots=True)
class Parts:
    """Into how many parts sums are cut."""

    count: int


MOST_PARTS = 16
_ROOM = 4
"""Programs beyond so many times those that fill a large GPU leave nothing to gain by cutting sums."""


def part_candidates(problem: Problem, target: Target) -> tuple[Parts, ...]:
    """What may pay: no part of less than the least depth, and none where there are programs enough without."""
    m, batch, n, k = problem.sizes
    programs = batch * ceil_div(m, 32) * ceil_div(n, 64)
    most = min(MOST_PARTS, k // _DEPTH) if programs <= _ROOM * _PROGRAMS else 1
    whole = {ceil_div(k, part_depth(k, count)) for count in range(1, max(most, 1) + 1)}
    return tuple(Parts(count) for count in sorted({1, part_count(m, n, k, batch), *whole}))


def parts_predicted(problem: Problem, target: Target) -> Parts:
    """As many as `part_count` says, on every device."""
    m, batch, n, k = problem.sizes
    return Parts(part_count(m, n, k, batch))


@dataclass(frozen=True, slots=True)
class Strip:
    """What a program of `matvec_kernel` reads at a time: n columns, k deep."""

    n: int
    k: int


def pick_strip(n: int, k: int, programs: int, *, along_k: bool) -> Strip:
    """Columns for a program where `programs` would compute them side by side; `along_k` says that what is contiguous
    are the columns, else the rows, of which at least 32 bytes are read then."""
    deep = min(next_power_of_two(k), 512)
    if along_k:
        return Strip(max(4, min(_ELEMENTS // deep, 64)), deep)
    wide = next((w for w in (64, 32) if ceil_div(n, w) * programs >= _PROGRAMS), 16)
    return Strip(wide, min(deep, _ELEMENTS // wide))


def _strips(problem: Problem, target: Target) -> tuple[Strip, ...]:
    """What a program may read at a time: 8 to 64 elements for each of its threads, and not much past the end."""
    _, n, k = problem.sizes
    wide, deep = next_power_of_two(n), next_power_of_two(k)
    made = {pick_strip(n, k, problem.sizes[0], along_k=problem.layout == "k")}
    made |= {
        Strip(w, d)
        for w in (4, 8, 16, 32, 64, 128)
        for d in (32, 64, 128, 256, 512, 1024)
        if w <= max(wide, 4) and d <= max(deep, 32) and 1024 <= w * d <= 2 * _ELEMENTS
    }
    return tuple(sorted(made, key=lambda s: (s.n, s.k)))


def _strip(problem: Problem, target: Target) -> Strip:
    programs, n, k = problem.sizes
    return pick_strip(n, k, programs, along_k=problem.layout == "k")


MATVEC = Family("matvec", ("programs", "n", "k"), 1, Strip, _strips, _strip, (matvec_kernel,))
"""Products of one row; `layout` says which axis of the matrix is contiguous."""
