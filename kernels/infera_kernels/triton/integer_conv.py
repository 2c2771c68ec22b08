"""Convolutions of 8-bit integers on tensor cores, as products that read their windows where the image lies.

Sums, zero points and scales are those of `integer_matmul`: its rows are output pixels, its columns the channels of one
group, its sums taps times channels. What lies outside of the image is the zero point, and so no part of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl

from infera_kernels.calls import Array, Call
from infera_kernels.launch import Launcher, Typed, target_of
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.integer_sums import BYTES, Scaling, scaled_sums, step_of
from infera_kernels.triton.integer_weight import ALIGN, signed
from infera_kernels.triton.layout import FLOATS, INT32_MAX, ceil_div, element_strides, fold, name_of
from infera_kernels.triton.products import GROUP, tile_of
from infera_kernels.triton.quantise import bounds
from infera_kernels.triton.tiles import INT8, SIZES, Tile, cycles, fitting, predicted
from infera_kernels.tuning import Family, Tuned, choose


@triton.jit
def integer_conv_kernel(
    x,
    w,
    out,
    x_zero,
    w_zero,
    column_sums,
    x_scale,
    w_scale,
    bias,
    out_scale,
    out_zero,
    images,
    image,
    window,
    C,
    deep,
    M,
    strides,
    dilations,
    pads,
    x_strides,
    out_strides,
    w_zero_n,
    w_scale_n,
    bias_n,
    UNSIGNED: tl.constexpr,
    W_SHIFT: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """BM output pixels and BN channels of one group a program. Sizes and strides: (images, channels, height, width).

    `image` is the (height, width) that is read, `window` (height, width) of the kernel, `images` (batch, height, width)
    of the output; C channels in a group, `deep` in packed weights (groups, M, taps, deep).
    """
    pixels = images[0] * images[1] * images[2]
    group, m, n = tile_of(pixels, M, BM, BN, GROUP)
    k = tl.arange(0, BK)
    at = m // (images[1] * images[2])
    row = m // images[2] % images[1]
    column = m % images[2]
    top = row * strides[0] - pads[0]
    left = column * strides[1] - pads[1]
    x += at.to(tl.int64)[:, None] * x_strides[0] + group * C * x_strides[1]
    w += group * M * window[0] * window[1] * deep
    w_at = w + (n % M).to(tl.int64)[None, :] * (window[0] * window[1] * deep) + k[:, None]
    p = tl.full([], 0, tl.int32)
    if x_zero is not None:
        p += tl.load(x_zero).to(tl.int32)
    acc = tl.full((BM, BN), 0, tl.int32)
    rows = tl.full((BM,), 0, tl.int32)
    blocks = (C + BK - 1) // BK
    for step in range(window[0] * window[1] * blocks):
        tap = step // blocks
        first = step % blocks * BK
        y_in = top + tap // window[1] * dilations[0]
        x_in = left + tap % window[1] * dilations[1]
        inside = (m < pixels) & (y_in >= 0) & (y_in < image[0]) & (x_in >= 0) & (x_in < image[1])
        offset = y_in.to(tl.int64) * x_strides[2] + x_in.to(tl.int64) * x_strides[3]
        within = first + k < C
        # Zero points stand where nothing is: taken away again, they are no part of any sum.
        a = tl.load(
            x + offset[:, None] + (first + k).to(tl.int64)[None, :] * x_strides[1],
            mask=inside[:, None] & within[None, :],
            other=p.to(x.dtype.element_ty),
        )
        b = tl.load(w_at + tap * deep + first, mask=(first + k < deep)[:, None], other=0)
        if UNSIGNED:
            a = (a ^ 128).to(tl.int8, bitcast=True)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        if ROW_SUMS:
            rows += tl.sum(a.to(tl.int32), axis=1)

    if UNSIGNED:
        p -= 128
    channel = group.to(tl.int32) * M + n
    if column_sums is not None:
        acc -= p * tl.load(column_sums + channel, mask=n < M, other=0)[None, :]
    if ROW_SUMS:
        q = tl.full((BN,), -W_SHIFT, tl.int32)
        if w_zero is not None:
            q += tl.load(w_zero + channel * w_zero_n, mask=n < M, other=0).to(tl.int32)
        acc -= (rows - p * (window[0] * window[1] * blocks * BK))[:, None] * q[None, :]
    if bias is not None:
        acc += tl.load(bias + channel * bias_n, mask=n < M, other=0)[None, :]
    out += at.to(tl.int64)[:, None] * out_strides[0] + channel.to(tl.int64)[None, :] * out_strides[1]
    out_at = out + row.to(tl.int64)[:, None] * out_strides[2] + column.to(tl.int64)[:, None] * out_strides[3]
    stored = (m < pixels)[:, None] & (n < M)[None, :]
    if x_scale is None:
        tl.store(out_at, acc, mask=stored)
    else:
        right = tl.load(w_scale + channel * w_scale_n, mask=n < M, other=0.0).to(tl.float32)
        factor = tl.load(x_scale).to(tl.float32) * right[None, :]
        y = scaled_sums(acc, factor, None, out_scale, out_zero, LOW, HIGH)
        tl.store(out_at, store_type(y, out), mask=stored)


INTEGER_CONV = Family("integer_conv", (*SIZES, "taps"), 2, Tile, fitting, predicted, (integer_conv_kernel,), cycles)
"""`k` is the depth, all channels of all taps; `batch` counts groups."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Constant weights (M, C, height, width) in groups: what `packed_filters` made of them, the int32 sums of each
    output channel's, and what they were before."""

    packed: Array
    sums: Array
    shape: tuple[int, int, int, int]
    unsigned: bool


def packed_filters(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """8-bit weights (M, C, height, width) as signed (M, height * width, C'), zeros past C, C' a multiple of ALIGN."""
    m, c, *taps = weight.shape
    made = np.zeros((m, int(np.prod(taps)), ceil_div(c, ALIGN) * ALIGN), np.int8)
    made[..., :c] = signed(weight).reshape(m, c, -1).swapaxes(1, 2)
    return made


def filter_sums(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The sums of the signed weights of each output channel."""
    sums: np.ndarray[Any, Any] = signed(weight).reshape(len(weight), -1).sum(axis=1, dtype=np.int32)
    return sums


def supports_integer_conv(
    x: Typed,
    weight: Typed,
    out: Typed,
    x_zero: Typed | None,
    w_zero: Typed | None,
    scaling: Scaling | None,
    bias: Typed | None,
) -> bool:
    """x (n, c, h, w) and weights (m, c / groups, kh, kw) of 8 bits, not empty, zero points of their types, one, or for
    weights one a channel; scales likewise. `out` is int32 without `scaling`, 8-bit where that quantises."""
    if not {name_of(x), name_of(weight)} <= BYTES or not len(x.shape) == len(weight.shape) == len(out.shape) == 4:
        return False
    many = (1, weight.shape[0])
    counts = [(x_zero, (1,)), (w_zero, many)]
    if scaling is None:
        stored = name_of(out) == "int32"
    else:
        counts += [(scaling.left, (1,)), (scaling.right, many), (scaling.scale, (1,)), (scaling.zero, (1,))]
        quantised = scaling.zero is not None and name_of(scaling.zero) == name_of(out) and name_of(out) in BYTES
        stored = quantised and all(name_of(s) in FLOATS for s in (scaling.left, scaling.right, scaling.scale))
    return (
        stored
        and all(p is None or int(np.prod(p.shape)) in allowed for p, allowed in counts)
        and all(z is None or name_of(z) == name_of(t) for z, t in ((x_zero, x), (w_zero, weight)))
        and (bias is None or (name_of(bias) == "int32" and tuple(bias.shape) == (weight.shape[0],)))
        and 0 not in (*x.shape, *weight.shape, *out.shape)
        and out.shape[0] * out.shape[2] * out.shape[3] <= INT32_MAX - 256
    )


def integer_conv(
    x: Array,
    filters: Filters,
    out: Array,
    launcher: Launcher,
    *,
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    group: int,
    x_zero: Array | None = None,
    w_zero: Array | None = None,
    signed_zeros: bool = False,
    scaling: Scaling | None = None,
    bias: Array | None = None,
    tile: Tile | None = None,
    tuned: Tuned | None = None,
) -> list[Call]:
    """out = the convolution of x less its zero point, exact in int32, plus `bias`, then scaled.

    Axes of x and out are (image, channel, height, width), whatever their strides.
    `signed_zeros` says that w_zero is known to be what signed weights have no part of: 0 of int8, 128 of uint8.
    """
    m, c, *kernel = filters.shape
    pixels, columns = out.shape[0] * out.shape[2] * out.shape[3], m // group
    if tile is None:
        taps = int(np.prod(kernel))
        problem = INTEGER_CONV.problem(INT8, {"m": pixels, "batch": group, "n": columns, "k": c * taps, "taps": taps})
        tile = choose(INTEGER_CONV, problem, target_of(launcher), tuned)
    deep = next((d for d in (32, 64) if c <= d), tile.k)
    low, high = (None, None) if scaling is None else bounds(out.dtype)
    unsigned = name_of(x) == "uint8"
    args = {
        "x": x,
        "w": filters.packed,
        "out": out,
        "x_zero": x_zero,
        "w_zero": None if signed_zeros else w_zero,
        "column_sums": filters.sums if unsigned or x_zero is not None else None,
        "x_scale": scaling and scaling.left,
        "w_scale": scaling and scaling.right,
        "bias": bias,
        "out_scale": scaling and scaling.scale,
        "out_zero": scaling and scaling.zero,
        "images": (out.shape[0], *out.shape[2:]),
        "image": tuple(x.shape[2:]),
        "window": tuple(kernel),
        "C": c,
        "deep": filters.packed.shape[-1],
        "M": columns,
        "strides": tuple(strides),
        "dilations": tuple(dilations),
        "pads": tuple(before for before, _ in pads),
        "x_strides": fold(element_strides(x)),
        "out_strides": fold(element_strides(out)),
        "w_zero_n": step_of(w_zero),
        "w_scale_n": step_of(None if scaling is None else scaling.right),
        "bias_n": step_of(bias),
    }
    known = {
        "UNSIGNED": unsigned,
        "W_SHIFT": 128 if filters.unsigned else 0,
        "ROW_SUMS": not signed_zeros and (filters.unsigned or w_zero is not None),
        "LOW": low,
        "HIGH": high,
        "BM": tile.m,
        "BN": tile.n,
        "BK": min(tile.k, deep),
        "GROUP": GROUP,
    }
    grid = (group * ceil_div(pixels, tile.m) * ceil_div(columns, tile.n),)
    # Left alone, the assembler saves registers for more blocks of small tiles than there are, and spills a few (sm_90).
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False, "maxnreg": 255}
    return [launcher.launch(integer_conv_kernel, grid, args, known, **options)]
