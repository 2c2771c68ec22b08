"""Quantisation to uint8 over a tensor's own range: partial ranges first, then every program reads them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Array, Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.layout import ceil_div, name_of, next_power_of_two
from infera_kernels.triton.quantise import saturated

_ALONE = 8192
"""Up to so many elements one program does it all."""
_BLOCK = 4096
_TILE = 2048
_MOST_PARTS = 128


@triton.jit
def range_kernel(x, ranges, n, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """ranges (2, PARTS): the least and the greatest of 0 and every PARTS-th block of x."""
    part = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    step = tl.full([], PARTS * BLOCK, tl.int64)
    at = part.to(tl.int64) * BLOCK
    while at < n:
        v = tl.load(x + at + lane, mask=at + lane < n, other=0.0)
        low = tl.minimum(low, v)
        high = tl.maximum(high, v)
        at += step
    tl.store(ranges + part, tl.min(low, axis=0))
    tl.store(ranges + PARTS + part, tl.max(high, axis=0))


@triton.jit
def dynamic_kernel(
    x, ranges, out, scale_out, zero_out, n, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """uint8 out = x over the range that holds it and 0: of `ranges`, or of the one block that there is."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n, other=0.0)
    if ranges is None:
        low = tl.minimum(tl.min(v, axis=0), 0.0)
        high = tl.maximum(tl.max(v, axis=0), 0.0)
    else:
        lane = tl.arange(0, WIDTH)
        low = tl.min(tl.load(ranges + lane, mask=lane < PARTS, other=0.0), axis=0)
        high = tl.max(tl.load(ranges + PARTS + lane, mask=lane < PARTS, other=0.0), axis=0)
    scale = tl.div_rn(high - low, 255.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    zero = saturated(tl.div_rn(-low, scale), 0.0, 0.0, 255.0)
    q = saturated(tl.div_rn(v, scale), zero, 0.0, 255.0)
    tl.store(out + at, q.to(tl.int32).to(tl.uint8), mask=at < n)
    if tl.program_id(0) == 0:
        tl.store(scale_out, scale)
        tl.store(zero_out, zero.to(tl.int32).to(tl.uint8))


def supports_dynamic(x: Typed) -> bool:
    """float32."""
    return name_of(x) == "float32"


def range_parts(size: int) -> int:
    """How many partial ranges `dynamic_quantise` finds of so many elements; 0 where one program does it all."""
    return 0 if size <= _ALONE else min(_MOST_PARTS, ceil_div(size, _ALONE))


def dynamic_quantise(
    x: Array, out: Array, scale: Array, zero: Array, ranges: Array | None, launcher: Launcher
) -> list[Call]:
    """uint8 out = x over the range that holds it and 0, with its float32 scale and uint8 zero point.

    All contiguous; `ranges` is scratch of float32 (2, range_parts(x.size)), None for no parts. The parts are always
    the same, so every run finds the same range.
    """
    if not supports_dynamic(x):
        raise ValueError(f"dynamic_quantise: no kernel for {name_of(x)}")
    parts = range_parts(x.size)
    args = {"x": x, "ranges": ranges, "out": out, "scale_out": scale, "zero_out": zero, "n": x.size}
    if not parts:
        block = max(128, next_power_of_two(x.size))
        known = {"PARTS": 0, "WIDTH": 1, "BLOCK": block}
        return [_launch(launcher, dynamic_kernel, 1, args, known, warps=4 if block <= 2048 else 8)]
    given = {"x": x, "ranges": ranges, "n": x.size}
    found = _launch(launcher, range_kernel, parts, given, {"PARTS": parts, "BLOCK": _BLOCK}, warps=8)
    known = {"PARTS": parts, "WIDTH": next_power_of_two(parts), "BLOCK": _TILE}
    return [found, _launch(launcher, dynamic_kernel, ceil_div(x.size, _TILE), args, known, warps=4)]


def _launch(
    launcher: Launcher,
    kernel: Any,
    programs: int,
    args: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    *,
    warps: int,
) -> Call:
    return launcher.launch(kernel, (programs,), args, constexprs, num_warps=warps, enable_fp_fusion=False)
