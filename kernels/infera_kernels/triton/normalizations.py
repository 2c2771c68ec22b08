"""Normalisations by name, and their kernel: a centre and a scale for each row, and what they make of its elements.

A row here is all that shares statistics, wherever its elements lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import triton
import triton.language as tl

from infera_kernels.triton.indexing import store_type
from infera_kernels.triton.quantise import saturated
from infera_kernels.triton.reduce import offset_at, placed


@triton.jit
def itself(v, center, scale, index):
    return v


@triton.jit
def standardized(v, center, scale, index):
    return (v - center) * scale


@triton.jit
def scaled(v, center, scale, index):
    return v * scale


@triton.jit
def divided(v, center, scale, index):
    return tl.div_rn(v, scale)


@triton.jit
def centred_and_divided(v, center, scale, index):
    return tl.div_rn(v - center, scale)


@triton.jit
def softmax_of(v, center, scale, index):
    return tl.exp(v - center) / scale


@triton.jit
def log_softmax_of(v, center, scale, index):
    return v - center - tl.log(scale)


@triton.jit
def chosen(v, center, scale, index):
    return (index == center).to(tl.float32)


@dataclass(frozen=True, slots=True)
class Normalization:
    """apply(element, centre, scale, index): two reductions by name, of which the second takes the first's result."""

    center: str | None
    scale: str | None
    apply: Any

    @property
    def at_once(self) -> bool:
        """Whether one launch may do it where rows fit in a block."""
        return self.scale is not None

    def statistics(self) -> dict[str, str]:
        """ "center" and "scale" -> the reduction, those that there are, in order."""
        return {n: r for n, r in (("center", self.center), ("scale", self.scale)) if r is not None}


NORMALIZATIONS: Mapping[str, Normalization] = MappingProxyType(
    {
        "affine": Normalization(None, None, itself),
        "layer": Normalization("mean", "inverse_deviation", standardized),
        "rms": Normalization(None, "inverse_root_mean_square", scaled),
        "mean_variance": Normalization("mean", "deviation", centred_and_divided),
        "softmax": Normalization("max", "sum_exp", softmax_of),
        "hardmax": Normalization("largest_first", None, chosen),
        "log_softmax": Normalization("max", "sum_exp", log_softmax_of),
        **{
            name: Normalization(None, name, divided)
            for name in (
                *("length_1", "length_2", "length_at_least", "length_within", "length_and"),
                *("root_of_at_least", "root_of_within", "root_of_sum"),
            )
        },
    }
)


@triton.jit
def _factor(pointer, row, col, rows, row_strides, cols, col_strides, inside, along):
    """What a small array has for every element; no strides along a side where it has one value for all."""
    if row_strides is None and col_strides is None:
        return tl.load(pointer).to(tl.float32)
    elif row_strides is None:
        return tl.load(pointer + offset_at(col, col, cols, col_strides, False), mask=along, other=0).to(tl.float32)
    elif col_strides is None:
        return tl.load(pointer + offset_at(row, row, rows, row_strides, False), mask=inside, other=0).to(tl.float32)
    else:
        at = offset_at(row, row, rows, row_strides, False) + offset_at(col, col, cols, col_strides, False)
        return tl.load(pointer + at, mask=inside & along, other=0).to(tl.float32)


@triton.jit
def normalize_kernel(
    x,
    skip,
    plus,
    weight,
    bias,
    out,
    sums,
    codes,
    codes_scale,
    codes_zero,
    center,
    scale,
    kept,
    x_kept,
    skip_kept,
    out_kept,
    sums_kept,
    codes_kept,
    center_kept,
    scale_kept,
    kept_count,
    reduced,
    x_reduced,
    skip_reduced,
    out_reduced,
    sums_reduced,
    codes_reduced,
    length,
    rows,
    plus_rows,
    weight_rows,
    bias_rows,
    cols,
    plus_cols,
    weight_cols,
    bias_cols,
    tiles_a_row,
    eps,
    CENTER_FOLD: tl.constexpr,
    CENTER_FINISH: tl.constexpr,
    CENTER_START: tl.constexpr,
    SCALE_MAP: tl.constexpr,
    SCALE_FOLD: tl.constexpr,
    SCALE_FINISH: tl.constexpr,
    APPLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GIVEN: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_SPLIT: tl.constexpr,
    REDUCED: tl.constexpr,
    REDUCED_SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """sums = x + skip + plus; out = ACTIVATION(APPLY(sums, center, scale) * weight + bias); codes = out quantised.

    CENTER_FOLD is None where there is no centre. Where statistics are not GIVEN a tile holds whole rows, and `center`
    and `scale` are written, if there are such arrays. x, skip, out, sums and codes have strides along `kept` and
    `reduced`; plus, weight and bias along `rows` and `cols`, the same dimensions merged for them.
    """
    tile = tl.program_id(0)
    lane = tl.arange(0, REDUCED)[None, :]
    if WIDE:
        tile = tile.to(tl.int64)
        lane = lane.to(tl.int64)
    outer, at, inside = placed(tile // tiles_a_row, tl.arange(0, KEPT)[:, None], kept, kept_count, KEPT, KEPT_SPLIT)
    block, place, along = placed(tile % tiles_a_row, lane, reduced, length, REDUCED, REDUCED_SPLIT)
    there = inside & along
    row, col = at, place
    if KEPT_SPLIT:
        row = outer * kept[0] + at
    if REDUCED_SPLIT:
        col = block * reduced[0] + place

    here = offset_at(outer, at, kept, x_kept, KEPT_SPLIT) + offset_at(block, place, reduced, x_reduced, REDUCED_SPLIT)
    v = tl.load(x + here, mask=there, other=0).to(tl.float32)
    if skip is not None:
        here = offset_at(outer, at, kept, skip_kept, KEPT_SPLIT) + offset_at(
            block, place, reduced, skip_reduced, REDUCED_SPLIT
        )
        v += tl.load(skip + here, mask=there, other=0).to(tl.float32)
    if plus is not None:
        v += _factor(plus, row, col, rows, plus_rows, cols, plus_cols, inside, along)
    if sums is not None:
        here = offset_at(outer, at, kept, sums_kept, KEPT_SPLIT) + offset_at(
            block, place, reduced, sums_reduced, REDUCED_SPLIT
        )
        tl.store(sums + here, store_type(v, sums), mask=there)

    middle, spread = None, None
    if GIVEN:
        if center is not None:
            here = offset_at(outer, at, kept, center_kept, KEPT_SPLIT)
            middle = tl.load(center + here, mask=inside, other=0)
        if scale is not None:
            here = offset_at(outer, at, kept, scale_kept, KEPT_SPLIT)
            spread = tl.load(scale + here, mask=inside, other=0)
    else:
        if CENTER_FOLD is not None:
            middle = CENTER_FINISH(CENTER_FOLD(tl.where(there, v, CENTER_START))[:, None], None, length, eps)
        if center is not None:
            here = offset_at(outer, at, kept, center_kept, KEPT_SPLIT)
            tl.store(center + here, tl.zeros([KEPT, 1], tl.float32) if middle is None else middle, mask=inside)
        mapped = tl.where(there, SCALE_MAP(v, middle, col), 0.0)
        spread = SCALE_FINISH(SCALE_FOLD(mapped)[:, None], middle, length, eps)
        if scale is not None:
            here = offset_at(outer, at, kept, scale_kept, KEPT_SPLIT)
            tl.store(scale + here, spread, mask=inside)
    y = APPLY(v, middle, spread, col)
    if weight is not None:
        y *= _factor(weight, row, col, rows, weight_rows, cols, weight_cols, inside, along)
    if bias is not None:
        y += _factor(bias, row, col, rows, bias_rows, cols, bias_cols, inside, along)
    if ACTIVATION is not None:
        y = ACTIVATION(y, 0.0, 0.0)
    here = offset_at(outer, at, kept, out_kept, KEPT_SPLIT) + offset_at(
        block, place, reduced, out_reduced, REDUCED_SPLIT
    )
    tl.store(out + here, store_type(y, out), mask=there)
    if codes is not None:
        here = offset_at(outer, at, kept, codes_kept, KEPT_SPLIT) + offset_at(
            block, place, reduced, codes_reduced, REDUCED_SPLIT
        )
        inverse = tl.div_rn(1.0, tl.load(codes_scale))
        q = saturated(y * inverse, tl.load(codes_zero).to(tl.float32), LOW, HIGH)
        tl.store(codes + here, q.to(tl.int32).to(codes.dtype.element_ty), mask=there)
