"""Operators of com.microsoft that onnxruntime has no CPU kernel for, in NumPy, straight from their documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import erf
from types import MappingProxyType
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray

Formula = Callable[..., list[HostArray]]
"""`f(attrs, *ins)`: the outputs in float64."""


def group_norm(attrs: Mapping[str, Any], x: HostArray, gamma: HostArray, beta: HostArray) -> list[HostArray]:
    """y = gamma (x - mean) / sqrt(variance + epsilon) + beta, group by group, then SiLU."""
    x = np.asarray(x, np.float64) if attrs["channels_last"] else np.asarray(np.moveaxis(x, 1, -1), np.float64)
    y = np.empty_like(x)
    size = x.shape[-1] // attrs["groups"]
    for image in range(len(x)):
        for c in range(0, x.shape[-1], size):
            group = x[image, ..., c : c + size]
            deviation = group - group.mean()
            y[image, ..., c : c + size] = deviation / np.sqrt(np.mean(deviation**2) + attrs["epsilon"])
    y = gamma * y + beta
    if attrs["activation"]:
        y = y / (1 + np.exp(-y))
    return [y if attrs["channels_last"] else np.moveaxis(y, -1, 1)]


def skip_group_norm(
    attrs: Mapping[str, Any],
    x: HostArray,
    gamma: HostArray,
    beta: HostArray,
    skip: HostArray,
    bias: HostArray | None = None,
) -> list[HostArray]:
    """s = x + skip + bias, channels last; then as GroupNorm."""
    total = np.asarray(x, np.float64) + (skip[:, None, None] if skip.ndim == 2 else skip)
    total = total if bias is None else total + bias
    return [*group_norm(attrs, total, gamma, beta), total]


def bias_add(attrs: Mapping[str, Any], x: HostArray, bias: HostArray, skip: HostArray) -> list[HostArray]:
    return [x.astype(np.float64) + bias + skip]


def bias_split_gelu(attrs: Mapping[str, Any], x: HostArray, bias: HostArray) -> list[HostArray]:
    """The left half times the Gelu of the right one."""
    total = x.astype(np.float64) + bias
    half = total.shape[-1] // 2
    left, right = total[..., :half], total[..., half:]
    return [left * 0.5 * right * (1 + np.vectorize(erf)(right / np.sqrt(2)))]


def nhwc_conv(attrs: Mapping[str, Any], x: HostArray, w: HostArray, b: HostArray | None = None) -> list[HostArray]:
    """Every output pixel by itself, channels last; weights (outputs, height, width, inputs a group)."""
    (top, left, bottom, right), (down, along) = attrs["pads"] or (0, 0, 0, 0), attrs["strides"] or (1, 1)
    x = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    outputs, height, width, inputs = w.shape
    rows, columns = (x.shape[1] - height) // down + 1, (x.shape[2] - width) // along + 1
    y = np.zeros((len(x), rows, columns, outputs))
    for o in range(outputs):
        first = o // (outputs // attrs["group"]) * inputs
        for i in range(rows):
            for j in range(columns):
                seen = x[:, i * down : i * down + height, j * along : j * along + width, first : first + inputs]
                y[:, i, j, o] = np.einsum("nhwc,hwc->n", seen, w[o].astype(np.float64)) + (0 if b is None else b[o])
    return [y]


FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "GroupNorm": group_norm,
        "SkipGroupNorm": skip_group_norm,
        "BiasAdd": bias_add,
        "BiasSplitGelu": bias_split_gelu,
        "NhwcConv": nhwc_conv,
    }
)
