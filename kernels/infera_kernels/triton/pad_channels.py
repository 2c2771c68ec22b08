"""Images with a few zero channels more, so that a thread can load several elements."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher
from infera_kernels.triton.images import UNHINTED, image_of, pixel_of, pixel_offset
from infera_kernels.triton.layout import ceil_div, fold_one

_PIXELS = 256


@triton.jit(do_not_specialize_on_alignment=UNHINTED)
def pad_channels_kernel(x, out, M, C, size, x_strides, x_c, X_UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """out (M, BN) = the C channels of every pixel of x, and zeros, BM pixels a program."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BN)
    n, d, h, v = pixel_of(m, size)
    x += pixel_offset(n, d, h, v, x_strides, X_UNIT)[:, None] + (c.to(tl.int64) * x_c)[None, :]
    value = tl.load(x, mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
    tl.store(out + m.to(tl.int64)[:, None] * BN + c[None, :], value, mask=(m < M)[:, None])


def pad_channels(x: Any, out: Any, launcher: Launcher) -> list[Call]:
    """out (N, spatial..., P) = x (N, spatial..., C), of any strides, then zeros; out contiguous, P a power of two."""
    source = image_of(x)
    args = {
        "x": x,
        "out": out,
        "M": source.pixels,
        "C": source.channels,
        "size": tuple(map(fold_one, source.size)),
        **source.arguments("x"),
    }
    constexprs = {"X_UNIT": source.unit, "BM": _PIXELS, "BN": int(out.shape[-1])}
    return [launcher.launch(pad_channels_kernel, (ceil_div(source.pixels, _PIXELS),), args, constexprs, num_warps=4)]
