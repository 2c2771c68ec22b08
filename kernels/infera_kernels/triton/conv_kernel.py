"""The kernel of convolutions and transposed convolutions as matrix products, and that which adds its parts.

Rows are output pixels, columns output channels, and the depth is every channel of every tap of the kernel (implicit
GEMM). A transposed convolution is a convolution a phase: the outputs that leave the same remainder by the stride see
the same taps, `step` apart, on neighbouring inputs. So every output gathers what it is the sum of.
"""

import triton
import triton.language as tl

from infera_kernels.triton.ahead import begun
from infera_kernels.triton.images import UNHINTED, pixel_of, pixel_offset, walked, within
from infera_kernels.triton.indexing import INTERPRETED, store_type
from infera_kernels.triton.products import place_of


@triton.jit
def _phase(a, kernel, dilation, pad, turn, AXIS: tl.constexpr):
    """What outputs a, a + stride, ... of a transposed convolution see along an axis.

    Returns the first tap, how many there are, and the input of output a at that tap. `turn` is (stride, its greatest
    common divisor with the dilation, taps from one to the next, the inverse of the dilation modulo those) of each axis.
    """
    stride = turn[4 * AXIS]
    common = turn[4 * AXIS + 1]
    step = turn[4 * AXIS + 2]
    at = a + pad
    first = at // common * turn[4 * AXIS + 3] % step
    count = tl.where(at % common == 0, (kernel - first + step - 1) // step, 0)
    return first, count, tl.where(count > 0, (at - first * dilation) // stride, 0)


@triton.jit
def _finished(acc, bias, residual, act_alpha, act_beta, ACT: tl.constexpr):
    """ACT(acc + bias + residual); bias (BN,) and residual (BM, BN), each where there is one."""
    if bias is not None:
        acc = acc + bias.to(tl.float32)[None, :]
    if residual is not None:
        acc = acc + residual.to(tl.float32)
    if ACT is not None:
        acc = ACT(acc, act_alpha, act_beta)
    return acc


@triton.jit
def store_finished(
    acc, out, bias, residual,
    n, d, h, v, f, known, there,
    out_strides, out_c, residual_strides, residual_c, bias_f,
    act_alpha, act_beta,
    ACT: tl.constexpr, OUT_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr,
):  # fmt: skip
    """Stores ACT(acc + bias + residual) for pixels (n, d, h, v) and output channels f: those that are `known`, and
    `there` with the pixel."""
    if bias is not None:
        bias = tl.load(bias + f.to(tl.int64) * bias_f, mask=known, other=0.0)
    if residual is not None:
        residual += pixel_offset(n, d, h, v, residual_strides, RESIDUAL_UNIT)[:, None]
        residual = tl.load(residual + (f.to(tl.int64) * residual_c)[None, :], mask=there, other=0.0)
    acc = _finished(acc, bias, residual, act_alpha, act_beta, ACT)
    out += pixel_offset(n, d, h, v, out_strides, OUT_UNIT)[:, None]
    tl.store(out + (f.to(tl.int64) * out_c)[None, :], store_type(acc, out), mask=there)


@triton.jit(do_not_specialize_on_alignment=UNHINTED)
def conv_kernel(
    x, w, out, bias, residual, parts,
    M, F, C, groups, splits,
    size, out_size, rows, kernel, strides, dilations, pads, turn,
    x_strides, x_c, w_strides, w_c, out_strides, out_c, residual_strides, residual_c, bias_f,
    act_alpha, act_beta,
    ACT: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    F_UNIT: tl.constexpr, C_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """out = ACT(conv(x, w) + bias + residual), one BM x BN tile of one group (and phase, and split) a program.

    `size` and `out_size` are those of images, `rows` that of the outputs of a phase, M their number in all images. F
    and C are the channels of a group, counted in F_UNIT and C_UNIT; w (groups * F, d, h, w, C). With `parts` (splits,
    M, groups * F), each split stores its part of the sums there, in float32, and nothing else. `turn` is None but for
    transposed convolutions. The depth is walked tap by tap, or FLAT: then C is compiled in, and a block may hold
    several taps. WHOLE: it is full blocks. AHEAD: see `ahead`; then the depth lies in one piece.
    """
    F = F * F_UNIT
    C = C * C_UNIT
    rest, row, column = place_of(tl.program_id(0), M, F, BM, BN, GROUP)
    m, f = row + tl.arange(0, BM), column + tl.arange(0, BN)
    group = rest % groups
    rest = rest // groups
    split = rest % splits
    phase = rest // splits
    if AHEAD is not None:
        share = kernel[0] * kernel[1] * kernel[2] * C // splits
        own = w + (group * F).to(tl.int64) * w_strides[0] * W_UNIT + split * share
        begun(own, share, F, column, 1, w_strides[0] * W_UNIT, AHEAD)

    n, d, h, v = pixel_of(m, rows)
    if turn is None:
        in_d, in_h, in_v = d * strides[0] - pads[0], h * strides[1] - pads[1], v * strides[2] - pads[2]
        first_d, first_h, first_v = 0, 0, 0
        taps_d, taps_h, taps_v = kernel[0], kernel[1], kernel[2]
        step_d, step_h, step_v = 1, 1, 1
        down_d, down_h, down_v = dilations[0], dilations[1], dilations[2]
    else:
        a_v = phase % turn[8]
        a_h = phase // turn[8] % turn[4]
        a_d = phase // (turn[8] * turn[4])
        first_d, taps_d, at_d = _phase(a_d, kernel[0], dilations[0], pads[0], turn, 0)
        first_h, taps_h, at_h = _phase(a_h, kernel[1], dilations[1], pads[1], turn, 1)
        first_v, taps_v, at_v = _phase(a_v, kernel[2], dilations[2], pads[2], turn, 2)
        step_d, step_h, step_v = turn[2], turn[6], turn[10]
        down_d, down_h, down_v = -(dilations[0] // turn[1]), -(dilations[1] // turn[5]), -(dilations[2] // turn[9])
        in_d, in_h, in_v = d + at_d, h + at_h, v + at_v
        d, h, v = a_d + d * turn[0], a_h + h * turn[4], a_v + v * turn[8]
    inside = (m < M) & (d < out_size[0]) & (h < out_size[1]) & (v < out_size[2])
    x += pixel_offset(n, in_d, in_h, in_v, x_strides, X_UNIT)[:, None]
    x += (group * C).to(tl.int64) * x_c
    # Channels past the end wrap around: loads need no mask, and what they give is never stored.
    w += ((group * F + f % F).to(tl.int64) * w_strides[0] * W_UNIT)[None, :]
    taps = taps_d * taps_h * taps_v
    if FLAT:
        blocks = tl.cdiv(taps * C, BK)
    else:
        blocks = taps * tl.cdiv(C, BK)
    share = tl.cdiv(blocks, splits)
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(split * share, tl.minimum((split + 1) * share, blocks)):
        if FLAT:
            k = block * BK + tl.arange(0, BK)
            c = k % C
            tap = k // C
            known = k < taps * C
        else:
            k = block % tl.cdiv(C, BK) * BK + tl.arange(0, BK)
            c = k
            tap = block // tl.cdiv(C, BK)
            known = k < C
        i_v = tap % tl.maximum(taps_v, 1)
        tap = tap // tl.maximum(taps_v, 1)
        i_h = tap % tl.maximum(taps_h, 1)
        i_d = tap // tl.maximum(taps_h, 1)
        to_d, to_h, to_v = i_d * down_d, i_h * down_h, i_v * down_v
        x_off = pixel_offset(to_d * 0, to_d, to_h, to_v, x_strides, X_UNIT)
        of_d, of_h, of_v = first_d + i_d * step_d, first_h + i_h * step_h, first_v + i_v * step_v
        w_off = (of_d * w_strides[1] + of_h * w_strides[2] + of_v * w_strides[3]).to(tl.int64) * W_UNIT
        x_at = x_off + c.to(tl.int64) * x_c
        w_at = w_off + c.to(tl.int64) * w_c
        if FLAT:
            seen = inside[:, None] & within(
                in_d[:, None] + to_d[None, :], in_h[:, None] + to_h[None, :], in_v[:, None] + to_v[None, :], size
            )
        else:
            seen = (inside & within(in_d + to_d, in_h + to_h, in_v + to_v, size))[:, None]
        if WHOLE:
            left = tl.load(x + x_at[None, :], mask=seen, other=0.0)
            right = tl.load(w + w_at[:, None])
        else:
            left = tl.load(x + x_at[None, :], mask=seen & known[None, :], other=0.0)
            right = tl.load(w + w_at[:, None], mask=known[:, None], other=0.0)
        if INTERPRETED:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    at = group * F + f
    if parts is not None:
        parts += (split * M + m).to(tl.int64)[:, None] * (groups * F) + at[None, :]
        tl.store(parts, acc, mask=(m < M)[:, None] & (f < F)[None, :])
    else:
        there = inside[:, None] & (f < F)[None, :]
        store_finished(
            acc, out, bias, residual, n, d, h, v, at, f < F, there,
            out_strides, out_c, residual_strides, residual_c, bias_f, act_alpha, act_beta, ACT, OUT_UNIT, RESIDUAL_UNIT,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=UNHINTED)
def join_kernel(
    parts, out, bias, residual,
    M, F, splits, size,
    out_strides, out_c, residual_strides, residual_c, bias_f,
    act_alpha, act_beta,
    ACT: tl.constexpr, F_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = ACT(sum of parts (splits, M, F), in order, + bias + residual), a BM x BN tile a program.

    F is counted in F_UNIT.
    """
    F = F * F_UNIT
    m, f, there = walked(M, F, BM, BN)
    at = parts + m.to(tl.int64)[:, None] * F + f[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for split in range(splits):
        acc += tl.load(at + (split * M).to(tl.int64) * F, mask=there, other=0.0)
    n, d, h, v = pixel_of(m, size)
    store_finished(
        acc, out, bias, residual, n, d, h, v, f, f < F, there,
        out_strides, out_c, residual_strides, residual_c, bias_f, act_alpha, act_beta, ACT, OUT_UNIT, RESIDUAL_UNIT,
    )  # fmt: skip
