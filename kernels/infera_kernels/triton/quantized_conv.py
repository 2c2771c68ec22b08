"""Convolutions and products of int8 on tensor cores, exact in int32, with what follows them: scales, bias, residual,
activation, and quantisation of the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from infera_kernels.calls import Call
from infera_kernels.launch import Const, Launcher, Target, Typed, target_of
from infera_kernels.triton import tiles
from infera_kernels.triton.elementwise import UNARY
from infera_kernels.triton.images import Image, constants, image_of, unit_of
from infera_kernels.triton.integer_sums import BYTES, step_of
from infera_kernels.triton.integer_weight import ALIGN
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    ceil_div,
    coalesce,
    fold,
    fold_one,
    name_of,
    next_power_of_two,
    span,
)
from infera_kernels.triton.products import GROUP
from infera_kernels.triton.quantise import bounds
from infera_kernels.triton.quantized_conv_kernel import quantized_conv_kernel
from infera_kernels.triton.tiles import INT8, LONG, SIZES, Tile, cycles, ending, fitting, least
from infera_kernels.tuning import Family, Problem, Tuned, choose
from infera_kernels.tuning.choice import REMEMBERED

HostArray = np.ndarray[Any, np.dtype[Any]]


def keeps(tile: Tile, layout: str, target: Target) -> bool:
    """Whether all values of the kernel are known to stay in registers.

    Up to 32 sums a thread always do. On sm_86 and sm_89 a tile of four warps has room for no more; from sm_100 on a
    thread has all columns of a row, and so a factor and a bias for each of its sums: with a residual that is too much.
    """
    if tile.m * tile.n <= 32 * 32 * tile.warps:
        return True
    narrow = 86 <= target.arch < 90 and tile.warps <= 4
    long = target.arch >= 100 and layout.endswith(LONG)
    return not narrow and not long and tiles.keeps(tile, layout, target)


@lru_cache(maxsize=REMEMBERED)
def _predicted(problem: Problem, target: Target) -> Tile:
    return least(problem, target, [t for t in fitting(problem, target) if keeps(t, problem.layout, target)])


QUANTIZED_CONV = Family(
    "quantized_conv", (*SIZES, "taps"), 2, Tile, fitting, _predicted, (quantized_conv_kernel,), cycles
)
"""`k` is the depth, all channels of all taps; `batch` counts groups; `layout` is "c" where channels are contiguous, or
"-", and the `ending`."""

SHALLOW = 32
"""Channels of a group below which blocks of the depth, of as many, hold several taps; the least that is multiplied."""

NARROW = 4
"""Channels that images have at least, zeros behind: one load of a thread."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a window of (height, width) is put; `pads` are (before, after)."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def padded(self) -> bool:
        return any(map(any, self.pads))

    @property
    def plain(self) -> bool:
        """Whether every output sees the pixel at its own place."""
        return self.taps == 1 and self.strides == (1, 1) and not self.padded


@dataclass(frozen=True, slots=True)
class Finish:
    """What follows the sums: times `factor`, one a channel, plus bias, plus residual, the activation, and quantisation.

    All are float32 but a residual, which is float too, or of 8-bit integers with a scale and a zero point; `scale` and
    `zero` are those of the result, which is floating-point without.
    """

    factor: Any
    bias: Any = None
    residual: Any = None
    residual_scale: Any = None
    residual_zero: Any = None
    activation: str | None = None
    alpha: float | None = None
    beta: float | None = None
    scale: Any = None
    zero: Any = None


@dataclass(frozen=True, slots=True)
class Corrections:
    """What a zero point other than 0 costs: the sums of the weights whose taps lie inside, by the classes of an
    output's row and column; None where all lie inside of every image."""

    sums: Any
    rows: Any = None
    columns: Any = None


def is_flat(channels: int, taps: int) -> bool:
    """Whether weights of so many channels a group are packed without a gap between taps."""
    return taps > 1 and channels < SHALLOW


def packed(weight: HostArray, channels: int) -> HostArray:
    """int8 (M, C, height, width) as (M, taps, C') or, where `is_flat`, (M, depth), of so many channels, with zeros
    behind, lines a multiple of ALIGN long."""
    m, c, *kernel = weight.shape
    taps = math.prod(kernel)
    made = np.zeros((m, taps, channels), np.int8)
    made[..., :c] = weight.reshape(m, c, taps).swapaxes(1, 2)
    lines = made.reshape(m, 1, -1) if is_flat(channels, taps) else made
    wide = np.zeros((*lines.shape[:-1], ceil_div(lines.shape[-1], ALIGN) * ALIGN), np.int8)
    wide[..., : lines.shape[-1]] = lines
    return wide


def seen_taps(size: int, out: int, axis: int, where: Places) -> HostArray:
    """(out, taps of an axis): which lie inside an image of `size`."""
    places = np.arange(out)[:, None] * where.strides[axis] - where.pads[axis][0]
    at = places + np.arange(where.kernel[axis])[None, :] * where.dilations[axis]
    return (at >= 0) & (at < size)


def border_classes(size: Sequence[int], out: Sequence[int], where: Places) -> tuple[HostArray, ...]:
    """Of rows and of columns: the class of each output, int32, and which taps each class sees."""
    found: list[HostArray] = []
    for axis in (0, 1):
        kinds, which = np.unique(seen_taps(size[axis], out[axis], axis, where), axis=0, return_inverse=True)
        found += [which.reshape(-1).astype(np.int32), kinds]
    return tuple(found)


def border_sums(weight: HostArray, rows: HostArray, columns: HostArray) -> HostArray:
    """int32 (row classes, column classes, M): the sums of the weights (M, C, height, width) at the taps of a class."""
    by_tap = weight.astype(np.int64).sum(axis=1)
    made: HostArray = np.einsum("ra,cb,mab->rcm", rows.astype(np.int64), columns.astype(np.int64), by_tap)
    return made.astype(np.int32)


def supports_quantized_conv(x: Typed, weight: Typed, out: Typed, groups: int, finish: Finish) -> bool:
    """x (N, H, W, C) and weights (M, C / groups, height, width) of int8, out and residual (N, H', W', M)."""
    shape = tuple(out.shape)
    if not name_of(x) == name_of(weight) == "int8" or not len(x.shape) == len(weight.shape) == len(shape) == 4:
        return False
    single = (finish.residual_scale, finish.residual_zero, finish.scale, finish.zero)
    channels = [v for v in (finish.factor, finish.bias) if v is not None]
    quantised = finish.scale is not None
    right = name_of(out) == name_of(finish.zero) and name_of(out) in BYTES if quantised else name_of(out) in FLOATS
    r = finish.residual
    if r is not None:
        typed = name_of(r) in FLOATS if finish.residual_scale is None else name_of(r) in BYTES
        right = right and typed and tuple(r.shape) == shape
    return (
        right
        and all(tuple(v.shape) == shape[-1:] for v in channels)
        and {name_of(finish.factor)} == {"float32"}
        and (finish.bias is None or name_of(finish.bias) in FLOATS)
        and all(v is None or math.prod(v.shape) == 1 for v in single)
        and weight.shape[1] * groups == x.shape[3]
        and 0 not in (*x.shape, *weight.shape, *shape)
        and max(math.prod(shape[:3]), math.prod(weight.shape)) <= INT32_MAX - 256
        and (finish.activation is None or finish.activation in UNARY)
    )


def supports_images(*images: Any) -> bool:
    """Whether places within one image are 32-bit numbers, of arrays (N, H, W, C)."""
    return all(span(i.dims[1:], i.strides[1:]) <= INT32_MAX // 2 for i in map(image_of, images))


def _pixels(image: Image) -> Image:
    """The pixels of all images as images of one, where they are evenly spaced; else itself."""
    dims, (strides,) = coalesce(image.dims[:4], [image.strides[:4]])
    if len(dims) > 1:
        return image
    return Image((dims[0], 1, 1, 1, image.channels), (strides[0], 0, 0, 0, image.strides[4]), image.itemsize)


def quantized_conv(
    x: Any,
    weight: Any,
    out: Any,
    launcher: Launcher,
    where: Places,
    finish: Finish,
    *,
    groups: int = 1,
    x_zero: Any = None,
    corrections: Corrections | None = None,
    tile: Tile | None = None,
    tuned: Tuned | None = None,
) -> list[Call]:
    """out = the convolution of x less its zero point, and what `finish` says of it.

    x (N, H, W, C), out and residual (N, H', W', M) of any strides; `weight` is what `packed` made, of as many channels
    as x has in a group. `corrections` are needed where x_zero may be another number than 0.
    """
    images = [image_of(a) for a in (x, out, out if finish.residual is None else finish.residual)]
    if where.plain:
        lines = [_pixels(i) for i in images]
        images = lines if all(line.size == (1, 1, 1) for line in lines) else images
    source, target, other = images
    c, m = source.channels // groups, target.channels // groups
    flat = is_flat(c, where.taps)
    if tile is None:
        sizes = {"m": target.pixels, "batch": groups, "n": m, "k": c * where.taps, "taps": where.taps}
        layout = "c" if source.strides[4] == 1 else "-"
        problem = QUANTIZED_CONV.problem(INT8, sizes, layout + ending(finish.residual, finish.activation))
        tile = choose(QUANTIZED_CONV, problem, target_of(launcher), tuned)
    # Where a block of the depth holds several taps, a thread computes the place of each of its loads: it has few.
    depth = SHALLOW if flat else min(tile.k, max(SHALLOW, next_power_of_two(c)))
    entry = UNARY[finish.activation] if finish.activation else None
    low, high = (None, None) if finish.scale is None else bounds(out.dtype)
    args = {
        "x": x,
        "w": weight,
        "out": out,
        "factor": finish.factor,
        "x_zero": None if corrections is None else x_zero,
        "sums": corrections and corrections.sums,
        "row_class": corrections and corrections.rows,
        "column_class": corrections and corrections.columns,
        "bias": finish.bias,
        "residual": finish.residual,
        "residual_scale": finish.residual_scale,
        "residual_zero": finish.residual_zero,
        "out_scale": finish.scale,
        "out_zero": finish.zero,
        "images": fold((target.dims[0], *target.size[1:])),
        "image": source.size[1:],
        "window": constants(where.kernel),
        "C": Const(c) if flat else c // unit_of(c, x),
        "deep": weight.shape[-1],
        "F": m // unit_of(m, x),
        "groups": fold_one(groups),
        "classes": 1 if corrections is None else corrections.sums.shape[1],
        "steps": constants(where.strides),
        "dilations": constants(where.dilations),
        "pads": constants([before for before, _ in where.pads]),
        **source.arguments("x"),
        **target.arguments("out"),
        **other.arguments("residual"),
        "factor_f": step_of(finish.factor),
        "bias_f": step_of(finish.bias),
        "act_alpha": entry and (entry.alpha if finish.alpha is None else float(finish.alpha)),
        "act_beta": entry and (entry.beta if finish.beta is None else float(finish.beta)),
    }
    known = {
        "ACT": entry and entry.fn,
        "LOW": low,
        "HIGH": high,
        "FLAT": flat,
        "WHOLE": c % depth == 0,
        "PADDED": where.padded,
        "C_UNIT": 1 if flat else unit_of(c, x),
        "F_UNIT": unit_of(m, x),
        "X_UNIT": source.unit,
        "OUT_UNIT": target.unit,
        "RESIDUAL_UNIT": other.unit,
        "BM": tile.m,
        "BN": tile.n,
        "BK": depth,
        "GROUP": GROUP,
    }
    grid = (groups * ceil_div(target.pixels, tile.m) * ceil_div(m, tile.n),)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    return [launcher.launch(quantized_conv_kernel, grid, args, known, **options)]
