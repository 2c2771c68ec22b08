"""The kernel of convolutions and products of int8 whose results are quantised before they are stored.

Rows are output pixels, columns output channels, the depth is every channel of every tap (implicit GEMM): a product with
a matrix is a convolution of one tap. What lies outside of an image is read as 0, so that loads pass registers by; where
the zero point is another number, it is taken away from the taps that lie inside: see `quantized_conv.border_sums`.
"""

import triton
import triton.language as tl

from infera_kernels.triton.images import UNHINTED
from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.products import tile_of
from infera_kernels.triton.quantise import saturated


@triton.jit
def _image_offset(at, row, column, strides, UNIT: tl.constexpr):
    """Where a pixel lies; `strides` of (image, depth, row, column) count UNIT elements. Within an image it is int32."""
    return at.to(tl.int64) * strides[0] * UNIT + (row * strides[2] + column * strides[3]) * UNIT


@triton.jit(do_not_specialize_on_alignment=UNHINTED)
def quantized_conv_kernel(
    x, w, out, factor, x_zero, sums, row_class, column_class, bias,
    residual, residual_scale, residual_zero, out_scale, out_zero,
    images, image, window, C, deep, F, groups, classes, steps, dilations, pads,
    x_strides, x_c, out_strides, out_c, residual_strides, residual_c, factor_f, bias_f, act_alpha, act_beta,
    ACT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    FLAT: tl.constexpr, WHOLE: tl.constexpr, PADDED: tl.constexpr,
    C_UNIT: tl.constexpr, F_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = ACT((sums of (x - x_zero) w) factor + bias + residual), quantised where there is `out_scale`.

    `images` is (batch, height, width) of the output, `image` and `window` (height, width) of what is read and of the
    kernel. F and C are the channels of a group, counted in units; w (groups, F, taps, deep), or FLAT (groups, F, deep),
    C compiled in. The classes of a pixel say which taps lie inside of the image: sums (row classes, `classes` of
    columns, groups * F) are those of the weights there. The residual has a scale where it is of integers.
    """
    F = F * F_UNIT
    C = C * C_UNIT
    pixels = images[0] * images[1] * images[2]
    group, m, n = tile_of(pixels, F, BM, BN, GROUP)
    at = m // (images[1] * images[2])
    row = m // images[2] % images[1]
    column = m % images[2]
    inside = m < pixels
    top = row * steps[0] - pads[0]
    left = column * steps[1] - pads[1]
    taps = window[0] * window[1]
    x += _image_offset(at, top, left, x_strides, X_UNIT)[:, None] + group * C * x_c
    # Channels past the end wrap around: their loads need no mask, and what they give is never stored.
    wide_n = (group * F + n % F).to(tl.int64)
    acc = tl.full((BM, BN), 0, tl.int32)
    if FLAT:
        blocks = tl.cdiv(taps * C, BK)
        w += wide_n[None, :] * deep
    else:
        blocks = taps * tl.cdiv(C, BK)
        w += wide_n[None, :] * (taps * deep)
    for block in range(blocks):
        if FLAT:
            k = block * BK + tl.arange(0, BK)
            tap = k // C
            c = k % C
            down = tap // window[1] * dilations[0]
            right = tap % window[1] * dilations[1]
            at_c = ((down * x_strides[2] + right * x_strides[3]) * X_UNIT + c * x_c)[None, :]
            y_in = top[:, None] + down[None, :]
            x_in = left[:, None] + right[None, :]
            seen = inside[:, None] & (tap < taps)[None, :]
            seen = seen & (y_in >= 0) & (y_in < image[0]) & (x_in >= 0) & (x_in < image[1])
            a = tl.load(x + at_c, mask=seen, other=0)
            b = tl.load(w + k[:, None], mask=(k < deep)[:, None], other=0)
        else:
            tap = block // tl.cdiv(C, BK)
            c = block % tl.cdiv(C, BK) * BK + tl.arange(0, BK)
            down = tap // window[1] * dilations[0]
            right = tap % window[1] * dilations[1]
            at_c = (down * x_strides[2] + right * x_strides[3]) * X_UNIT + c * x_c
            seen = inside
            if PADDED:
                y_in = top + down
                x_in = left + right
                seen = seen & (y_in >= 0) & (y_in < image[0]) & (x_in >= 0) & (x_in < image[1])
            w_at = w + (tap * deep + c)[:, None]
            if WHOLE:
                a = tl.load(x + at_c[None, :], mask=seen[:, None], other=0)
                b = tl.load(w_at)
            else:
                a = tl.load(x + at_c[None, :], mask=seen[:, None] & (c < C)[None, :], other=0)
                b = tl.load(w_at, mask=(c < deep)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)

    channel = group.to(tl.int32) * F + n
    kept = n < F
    stored = inside[:, None] & kept[None, :]
    if sums is not None:
        p = tl.load(x_zero).to(tl.int32)
        if row_class is None:
            acc -= p * tl.load(sums + channel, mask=kept, other=0)[None, :]
        else:
            kind = tl.load(row_class + row) * classes + tl.load(column_class + column)
            acc -= p * tl.load(sums + kind[:, None] * (groups * F) + channel[None, :], mask=stored, other=0)
    y = acc.to(tl.float32) * tl.load(factor + channel * factor_f, mask=kept, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + channel * bias_f, mask=kept, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        residual += _image_offset(at, row, column, residual_strides, RESIDUAL_UNIT)[:, None]
        r = tl.load(residual + (channel.to(tl.int64) * residual_c)[None, :], mask=stored, other=0).to(tl.float32)
        if residual_scale is not None:
            r = (r - tl.load(residual_zero).to(tl.float32)) * tl.load(residual_scale)
        y += r
    if ACT is not None:
        y = ACT(y, act_alpha, act_beta)
    if LOW is not None:
        inverse = tl.div_rn(1.0, tl.load(out_scale))
        y = saturated(y * inverse, tl.load(out_zero).to(tl.float32), LOW, HIGH).to(tl.int32)
    out += _image_offset(at, row, column, out_strides, OUT_UNIT)[:, None]
    tl.store(out + (channel.to(tl.int64) * out_c)[None, :], store_type(y, out), mask=stored)
