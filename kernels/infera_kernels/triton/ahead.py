"""What a kernel that came early does before it waits: it has the L2 cache fetch the weights that it begins with.

Where one row, or a few, meet large matrices, memory is all that counts, and stands still from the last load of a kernel
to the first ones of the next. Weights are there already; to fetch what another kernel still writes changes nothing
either, since L2 holds what all of them see.
"""

from __future__ import annotations

from typing import TypeAlias

import triton
import triton.language as tl
from triton.language.extra import cuda

from infera_kernels.launch import Launcher, target_of
from infera_kernels.triton.indexing import INTERPRETED
from infera_kernels.triton.products import block_at

FETCHED = 1 << 23
"""Bytes that all programs of a kernel together fetch: what memory gives in the 2 µs between two kernels (assumed)."""

PIECE = 64
"""Bytes that L2 fetches from memory at once, unless it is told otherwise (cudaLimitMaxL2FetchGranularity)."""

LEAST, MOST = 64, 1024
"""Pieces that a program fetches."""

FEW_ROWS = 64
"""Up to so many rows of a product, each block of a matrix is read by one program alone."""

Ahead: TypeAlias = tuple[int, int, int, int]
"""Rows and columns of a grid of pieces, and the elements from one to the next along k and along n."""


def ahead(
    launcher: Launcher,
    programs: int,
    wide: int,
    itemsize: int,
    axis: str,
    *,
    rows: int = 1,
    invariant: bool = False,
) -> Ahead | None:
    """What each of so many programs fetches that begin with `wide` columns of a matrix whose `axis` "k" or "n" is
    contiguous; None where neither is, where that is multiplied by many rows, where kernels do not come early, and where
    all have to be the same binary."""
    if not target_of(launcher).pdl or axis not in ("k", "n") or rows > FEW_ROWS or invariant:
        return None
    wanted = FETCHED // PIECE // max(programs, 1)
    pieces = 1 << (max(LEAST, min(wanted, MOST)).bit_length() - 1)
    step = PIECE // itemsize
    if axis == "k":
        return max(pieces // wide, 1), wide, step, 1
    across = max(wide // step, 1)
    return max(pieces // across, 1), across, 1, step


@triton.jit
def fetch(b, K, N, n, b_k, b_n, AHEAD: tl.constexpr):
    """Has L2 fetch pieces of the matrix b (K, N) from column n on, none without AHEAD, or in the interpreter."""
    if AHEAD is not None and not INTERPRETED:
        k = tl.arange(0, AHEAD[0]) * AHEAD[2]
        n = n + tl.arange(0, AHEAD[1]) * AHEAD[3]
        at = block_at(b, k, n, b_k, b_n)
        there = (k < K)[:, None] & (n < N)[None, :]
        tl.inline_asm_elementwise(
            "{ .reg .pred there; setp.ne.s32 there, $2, 0; @there prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r",
            [at.to(tl.int64), there.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def begun(b, K, N, n, b_k, b_n, AHEAD: tl.constexpr):
    """Fetches, and waits for the kernel in front; neither without AHEAD, or in the interpreter."""
    fetch(b, K, N, n, b_k, b_n, AHEAD)
    if AHEAD is not None and not INTERPRETED:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
