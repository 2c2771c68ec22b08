"""Depthwise convolution of images with channels last: multiply-adds of pixels, as fast as memory gives them."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher
from infera_kernels.triton.conv import NOTHING, Finish, Geometry, supports_conv
from infera_kernels.triton.conv_kernel import store_finished
from infera_kernels.triton.images import (
    UNHINTED,
    constants,
    image_of,
    pixel_of,
    pixel_offset,
    tile_of,
    unit_of,
    unrolled,
    walked,
    within,
)
from infera_kernels.triton.layout import ceil_div, fold, fold_one, name_of


@triton.jit(do_not_specialize_on_alignment=UNHINTED)
def depthwise_kernel(
    x, w, out, bias, residual,
    M, F, size, out_size, kernel, strides, dilations, pads,
    x_strides, x_c, w_strides, w_f, out_strides, out_c, residual_strides, residual_c, bias_f,
    act_alpha, act_beta,
    ACT: tl.constexpr, MULTIPLE: tl.constexpr, TAPS: tl.constexpr, UNROLL: tl.constexpr, F_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = ACT(conv(x, w) + bias + residual), BM pixels x BN channels a program; output f sees channel f // MULTIPLE.

    M pixels in all images, F channels of the output, counted in F_UNIT; w (F, d, h, w, 1).
    """
    F = F * F_UNIT
    m, f, there = walked(M, F, BM, BN)
    n, d, h, v = pixel_of(m, out_size)
    in_d, in_h, in_v = d * strides[0] - pads[0], h * strides[1] - pads[1], v * strides[2] - pads[2]
    x += pixel_offset(n, in_d, in_h, in_v, x_strides, X_UNIT)[:, None] + ((f // MULTIPLE).to(tl.int64) * x_c)[None, :]
    w += f.to(tl.int64) * w_f
    acc = tl.zeros((BM, BN), tl.float32)
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        i_v = tap % kernel[2]
        i_h = tap // kernel[2] % kernel[1]
        i_d = tap // (kernel[2] * kernel[1])
        to_d, to_h, to_v = i_d * dilations[0], i_h * dilations[1], i_v * dilations[2]
        seen = within(in_d + to_d, in_h + to_h, in_v + to_v, size)[:, None] & there
        value = tl.load(x + pixel_offset(to_d * 0, to_d, to_h, to_v, x_strides, X_UNIT), mask=seen, other=0.0)
        w_off = (i_d * w_strides[0] + i_h * w_strides[1] + i_v * w_strides[2]) * W_UNIT
        weight = tl.load(w + w_off, mask=f < F, other=0.0)
        acc += value.to(tl.float32) * weight.to(tl.float32)[None, :]

    store_finished(
        acc, out, bias, residual, n, d, h, v, f, f < F, there,
        out_strides, out_c, residual_strides, residual_c, bias_f, act_alpha, act_beta, ACT, OUT_UNIT, RESIDUAL_UNIT,
    )  # fmt: skip


def depthwise(x: Any, w: Any, out: Any, launcher: Launcher, where: Geometry, *, finish: Finish = NOTHING) -> list[Call]:
    """out = activation(conv(x, w) + bias + residual), every channel by itself, summed in float32; see `conv`.

    w (O, kernel..., 1) with O a multiple of x's channels, fastest where neighbouring channels are neighbours.
    """
    if not supports_conv(x, w, out, finish.bias, finish.residual, finish.activation) or w.shape[-1] != 1:
        given = ", ".join(f"{name_of(v)}{list(v.shape)}" for v in (x, w, out))
        raise ValueError(f"depthwise: no kernel for {given} with activation {finish.activation}")
    if 0 in tuple(out.shape):
        return []
    source, target = image_of(x), image_of(out)
    w_f, *w_strides, _ = image_of(w).strides
    w_unit = unit_of(math.gcd(*w_strides), w) if w_f == 1 else 1
    f, unit = target.channels, unit_of(target.channels, out)
    bm, bn = tile_of(target)
    args = {
        "x": x,
        "w": w,
        "out": out,
        "M": target.pixels,
        "F": f // unit,
        "size": tuple(map(fold_one, source.size)),
        "out_size": tuple(map(fold_one, target.size)),
        "kernel": constants(where.kernel),
        "strides": constants(where.strides),
        "dilations": constants(where.dilations),
        "pads": constants(where.pads),
        **source.arguments("x"),
        "w_strides": fold(s // w_unit for s in w_strides),
        "w_f": fold_one(w_f),
        **target.arguments("out"),
        **finish.arguments(),
    }
    constexprs = {
        **finish.constexprs(),
        "MULTIPLE": f // source.channels,
        "TAPS": where.taps,
        "UNROLL": unrolled(where.kernel),
        "F_UNIT": unit,
        "X_UNIT": source.unit,
        "W_UNIT": w_unit,
        "OUT_UNIT": target.unit,
        "BM": bm,
        "BN": bn,
    }
    grid = (ceil_div(target.pixels, bm) * ceil_div(f, bn),)
    return [launcher.launch(depthwise_kernel, grid, args, constexprs, num_warps=4)]
