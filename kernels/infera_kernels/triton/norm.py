"""Layer normalisation and RMS normalisation over the trailing axes, of arrays or of sums, with float32 statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Call, Scratch
from infera_kernels.launch import Launcher, Typed
from infera_kernels.triton.layout import INT32_MAX, name_of
from infera_kernels.triton.normalize import normalize, supports_normalization
from infera_kernels.triton.rows import LONG_BLOCK


def _no_scratch(shape: Sequence[int], dtype: Any = np.float32) -> Any:
    raise ValueError(f"norm: rows that do not fit in a block need scratch, {list(shape)} of it")


def supports_rows(kind: str, x: Typed, out: Typed, *others: Typed | None, axes: Sequence[int]) -> bool:
    """float32, float16 or bfloat16 x with `out` of the same type and shape; the others, where given, of any of the
    three types and broadcasting to x; fewer than 2**31 elements normalised together."""
    shape = tuple(x.shape)
    if not supports_normalization(kind, x, out, *others):
        return False
    try:
        fitting = np.broadcast_shapes(shape, *(tuple(o.shape) for o in others if o is not None)) == shape
    except ValueError:
        return False
    return fitting and math.prod(shape[a] for a in axes) <= INT32_MAX - LONG_BLOCK


def supports_norm(x: Typed, out: Typed, *others: Typed | None, axis: int = -1) -> bool:
    """What `supports_rows` says of the axes from `axis` on."""
    rank = len(x.shape)
    return -rank <= axis < rank and supports_rows("layer", x, out, *others, axes=range(axis % rank, rank))


def norm(
    kind: str,
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    launcher: Launcher,
    scratch: Scratch = _no_scratch,
    *,
    eps: float,
    axis: int = -1,
    **arrays: Any,
) -> list[Call]:
    """out = (sum - mean) / sqrt(variance + eps) * weight + bias for the kind "layer", sum / sqrt(mean(sum^2) + eps) *
    weight + bias for "rms", over the axes from `axis` on. weight and bias may be None; `arrays` are those of
    `normalize`, which says what the sum is and what scratch is asked for."""
    others = (weight, bias, arrays.get("skip"), arrays.get("plus"))
    if not supports_norm(x, out, *others, axis=axis):
        given = ", ".join("none" if a is None else f"{name_of(a)}{list(a.shape)}" for a in (x, *others))
        raise ValueError(f"norm: no kernel for {given} -> {name_of(out)}{list(out.shape)} at axis {axis}")
    axes = range(axis % len(x.shape), len(x.shape))
    return normalize(kind, x, axes, out, launcher, scratch, eps=eps, weight=weight, bias=bias, **arrays)


def layer_norm(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    launcher: Launcher,
    scratch: Scratch = _no_scratch,
    *,
    eps: float = 1e-5,
    axis: int = -1,
    mean: Any = None,
    inv_std: Any = None,
) -> list[Call]:
    """`norm` of the kind "layer". `mean` and `inv_std`, where given, are contiguous float32 arrays that receive each
    row's statistics."""
    return norm("layer", x, weight, bias, out, launcher, scratch, eps=eps, axis=axis, center=mean, scale=inv_std)


def rms_norm(
    x: Any, weight: Any, out: Any, launcher: Launcher, scratch: Scratch = _no_scratch, *, eps: float = 1e-6,
    axis: int = -1,
) -> list[Call]:  # fmt: skip
    """`norm` of the kind "rms"."""
    return norm("rms", x, weight, None, out, launcher, scratch, eps=eps, axis=axis)
