"""Products with weights of two, four or eight bits, quantised in blocks along the sums.

Few rows read the weights as they are, one program for some columns, and widen them in registers. For many rows the
weights are widened to scratch first, as many columns at a time as fit, and multiplied there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Array, Call
from infera_kernels.launch import Launcher, Target, Typed, target_of
from infera_kernels.triton.ahead import ahead, begun
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.layout import FLOATS, INT32_MAX, ceil_div, name_of, next_power_of_two
from infera_kernels.triton.matmul import matmul
from infera_kernels.triton.reductions import inverse_deviation
from infera_kernels.tuning import Tuned
from infera_kernels.tuning.choice import REMEMBERED
from infera_kernels.tuning.cost import ROW_WARPS, Strip, row_cycles

FEW_ROWS = 8
"""Up to so many rows, reading packed weights for each of them takes less time than widening them once."""
_WIDE_BYTES = 64 * 2**20
"""The most scratch for widened weights."""
_BYTES, _STAGES = 512, 3
"""Bytes of a column's weights that a program reads at a time, and how many such steps are under way or due."""
_COLUMNS = (8, 4, 2, 1)


@triton.jit
def nbits_kernel(
    a,
    b,
    scale,
    zero,
    bias,
    residual,
    gain,
    out,
    N,
    K,
    blocks,
    epsilon,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Row program_id(1) of out = a @ dequantised b + bias + residual, BN columns a program. Byte j of a block's BYTES
    holds its values j, j + BYTES and so on, the first in the lowest bits. Without `zero` it is the middle of the range.
    The next STAGES - 1 blocks of weights are on their way to shared memory meanwhile. With `gain` rows are multiplied
    by it and divided by their root mean square first: see `skinny.matvec_kernel`. AHEAD: see `ahead`."""
    begun(b, blocks * BYTES, N, tl.program_id(0) * BN, 1, blocks * BYTES, AHEAD)
    VALUES: tl.constexpr = 8 // BITS
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    g = tl.arange(0, BLOCKS)
    j = tl.arange(0, BYTES)
    a += row * K
    first_of = n.to(tl.int64)[:, None] * blocks + g[None, :]
    sums = tl.full((BN, BLOCKS, BYTES), 0.0, tl.float32)
    if gain is not None:
        squares = tl.full((BLOCKS, BYTES), 0.0, tl.float32)
    for start in tl.range(0, blocks, BLOCKS, num_stages=STAGES):
        block = first_of + start
        inside = (n < N)[:, None] & (start + g < blocks)[None, :]
        held = tl.load(b + (block * BYTES)[:, :, None] + j[None, None, :], mask=inside[:, :, None], other=0)
        s = tl.load(scale + block, mask=inside, other=0.0).to(tl.float32)
        if zero is None:
            z = tl.full((BN, BLOCKS), 1 << (BITS - 1), tl.float32)
        else:
            z = tl.load(zero + block, mask=inside, other=0.0).to(tl.float32)
        part = tl.full((BN, BLOCKS, BYTES), 0.0, tl.float32)
        for t in tl.static_range(VALUES):
            k = (start + g)[:, None] * (BYTES * VALUES) + (t * BYTES + j)[None, :]
            x = tl.load(a + k, mask=k < K, other=0.0).to(tl.float32)
            if gain is not None:
                squares += x * x
                x *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            q = ((held >> (t * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
            part += (q - z[:, :, None]) * x[None, :, :]
        sums += part * s[:, :, None]
    total = tl.sum(tl.sum(sums, axis=2), axis=1)
    if gain is not None:
        total *= inverse_deviation(tl.sum(tl.sum(squares, axis=1), axis=0), None, K, epsilon)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, store_type(total, out), mask=n < N)


@triton.jit
def widen_kernel(
    b,
    scale,
    zero,
    out,
    N,
    K,
    blocks,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BN: tl.constexpr,
):
    """out (N, K) = dequantised b, laid out as `nbits_kernel` says; BLOCKS blocks of BN columns a program."""
    VALUES: tl.constexpr = 8 // BITS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    g = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    j = tl.arange(0, BYTES)
    block = n.to(tl.int64)[:, None] * blocks + g[None, :]
    inside = (n < N)[:, None] & (g < blocks)[None, :]
    held = tl.load(b + (block * BYTES)[:, :, None] + j[None, None, :], mask=inside[:, :, None], other=0)
    s = tl.load(scale + block, mask=inside, other=0.0).to(tl.float32)
    if zero is None:
        z = tl.full((BN, BLOCKS), 1 << (BITS - 1), tl.float32)
    else:
        z = tl.load(zero + block, mask=inside, other=0.0).to(tl.float32)
    for t in tl.static_range(VALUES):
        k = g[:, None] * (BYTES * VALUES) + (t * BYTES + j)[None, :]
        q = ((held >> (t * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        at = out + n.to(tl.int64)[:, None, None] * K + k[None, :, :]
        made = store_type((q - z[:, :, None]) * s[:, :, None], out)
        tl.store(at, made, mask=inside[:, :, None] & (k < K)[None, :, :])


def repacked(weight: np.ndarray[Any, Any], blocks: int, bits: int) -> np.ndarray[Any, Any]:
    """ONNX's bytes (N, blocks, bytes), whose neighbours share a byte, as the kernels take them."""
    values = 8 // bits
    held = weight.reshape(-1, blocks, weight.size // (len(weight) * blocks))
    shifts = np.arange(values, dtype=np.uint8) * np.uint8(bits)
    each = ((held[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(*held.shape[:2], values, -1)
    made: np.ndarray[Any, Any] = np.bitwise_or.reduce(each << shifts[:, None], axis=2).astype(np.uint8)
    return made


@dataclass(frozen=True, slots=True)
class Weight:
    """What `repacked` made of a weight (N, blocks, bytes), and contiguous scales and zero points (N, blocks)."""

    packed: Array
    scale: Array
    zero: Array | None
    bits: int


def supports_nbits(a: Typed, scale: Typed, out: Typed, bias: Typed | None = None) -> bool:
    """a (..., K) and out (..., N) of float32, float16 or bfloat16, the bias of their type, scales of any of them."""
    given = [x for x in (a, out, bias) if x is not None]
    widths = max(a.shape[-1], out.shape[-1]) if a.shape else 0
    return (
        len({name_of(x) for x in given}) == 1
        and name_of(a) in FLOATS
        and name_of(scale) in FLOATS
        and 0 < widths <= INT32_MAX // 2
    )


def wide_columns(n: int, k: int, itemsize: int) -> int:
    """How many columns of weights are widened at a time: a whole number of 16, or all."""
    fitting = _WIDE_BYTES // max(k * itemsize, 1) // 16 * 16
    return min(n, max(fitting, 16))


@lru_cache(maxsize=REMEMBERED)
def _columns(n: int, k: int, bits: int, width: int, rows: int, most: int, target: Target) -> int:
    """How many a program computes, which reads so many values of each at a time: what is estimated to take least."""

    def cost(columns: int) -> float:
        strip = Strip(columns, width, _STAGES)
        return row_cycles(n, k, bits, strip, along_k=True, target=target, batch=rows)

    return min((c for c in _COLUMNS if c <= most), key=cost)


def nbits_matmul(
    a: Array,
    weight: Weight,
    bias: Array | None,
    out: Array,
    wide: Array | None,
    launcher: Launcher,
    *,
    residual: Array | None = None,
    gain: Array | None = None,
    epsilon: float = 0.0,
    invariant: bool = False,
    tuned: Tuned | None = None,
) -> list[Call]:
    """out (M, N) = a (M, K) @ dequantised weights + bias + residual (M, N), all contiguous; `wide`, scratch of a's type
    of shape (wide_columns(N, K), K), for more than FEW_ROWS rows, and for `invariant` ones always: see `matmul`.
    Without it rows of a are multiplied by `gain` (K,), where there is one, and divided by sqrt(mean(a^2) + epsilon)
    first. Raises ValueError for a gain with it."""
    if wide is not None and gain is not None:
        raise ValueError(f"nbits_matmul: normalises up to {FEW_ROWS} rows, not {a.shape[0]} that meet wide weights")
    (m, k), n = a.shape, out.shape[1]
    _, blocks, held = weight.packed.shape
    many = min(next_power_of_two(blocks), max(_BYTES // held, 1))
    most = max(1, _COLUMNS[0] * _BYTES // (many * held))
    known = {"BITS": weight.bits, "BYTES": held, "BLOCKS": many, "BN": min(most, _COLUMNS[0])}
    if not m * n:
        return []
    if wide is None:
        args = {
            "a": a,
            "b": weight.packed,
            "scale": weight.scale,
            "zero": weight.zero,
            "bias": bias,
            "residual": residual,
            "gain": gain,
            "out": out,
            "N": n,
            "K": k,
            "blocks": blocks,
            "epsilon": None if gain is None else float(epsilon),
        }
        width = many * held * 8 // weight.bits
        columns = _columns(n, k, weight.bits, width, m, known["BN"], target_of(launcher))
        grid = ceil_div(n, columns), m
        fetched = ahead(launcher, math.prod(grid), columns, 1, "k")
        known |= {"BN": columns, "STAGES": _STAGES, "AHEAD": fetched}
        return [launcher.launch(nbits_kernel, grid, args, known, num_warps=ROW_WARPS)]
    calls = []
    for start in range(0, n, len(wide)):
        part = slice(start, min(start + len(wide), n))
        count = part.stop - part.start
        args = {
            "b": weight.packed[part],
            "scale": weight.scale[part],
            "zero": None if weight.zero is None else weight.zero[part],
            "out": wide,
            "N": count,
            "K": k,
            "blocks": blocks,
        }
        grid = (ceil_div(count, known["BN"]), ceil_div(blocks, many))
        calls.append(launcher.launch(widen_kernel, grid, args, known, num_warps=4))
        calls += matmul(
            a,
            wide[:count].swapaxes(0, 1),
            out[:, part],
            launcher,
            bias=None if bias is None else bias[part],
            residual=None if residual is None else residual[:, part],
            invariant=invariant,
            tuned=tuned,
        )
    return calls
