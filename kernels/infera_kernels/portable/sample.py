"""Values between pixels, and what undoes or crops windows, for NumPy and CuPy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array
from infera_kernels.portable.pad import blank

CUBIC = -0.75
"""The coefficient of Keys' cubic convolution (10.1109/TASSP.1981.1163711) that PyTorch and ONNX use."""


def _pixel(xp: Any, x: Array, size: int, *, aligned: bool) -> Array:
    """Positions in [-1, 1] as pixels of an axis of `size`."""
    return (x + 1) / 2 * (size - 1) if aligned else ((x + 1) * size - 1) / 2


def _reflected(xp: Any, x: Array, size: int, *, aligned: bool) -> Array:
    """Positions mirrored at the borders until they lie inside."""
    low, high = (0.0, size - 1.0) if aligned else (-0.5, size - 0.5)
    span = high - low
    if span <= 0:
        return xp.zeros_like(x)
    away = xp.abs(x - low) % (2 * span)
    return xp.where(away > span, 2 * span - away, away) + low


def _fetch(xp: Any, x: Array, at: Sequence[Array], padding: str, *, aligned: bool) -> Array:
    """x (batch, channels, *spatial) at whole positions, each (batch, *points): (batch, channels, *points)"""
    inside = xp.ones(at[0].shape, np.bool_)
    index = []
    for p, size in zip(at, x.shape[2:], strict=True):
        if padding == "reflection":
            p = xp.rint(_reflected(xp, p, size, aligned=aligned))
        elif padding == "zeros":
            inside = inside & (p >= 0) & (p < size)
        index.append(xp.clip(p, 0, size - 1).astype(np.int64))
    rows = xp.arange(x.shape[0]).reshape(-1, *(1,) * (at[0].ndim - 1))
    found = xp.moveaxis(x[(rows, slice(None), *index)], -1, 1)
    return xp.where(inside[:, None], found, blank(xp, x.dtype))


def _taps(xp: Any, p: Array, mode: str) -> list[tuple[Array, Array]]:
    """Whole positions around p and their weights."""
    if mode == "nearest":
        return [(xp.rint(p), xp.ones_like(p))]
    base = xp.floor(p)
    t = p - base
    if mode == "linear":
        return [(base, 1 - t), (base + 1, t)]
    a = CUBIC
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, 1 - t)]
    far = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (t + 1, 2 - t)]
    return [(base - 1, far[0]), (base, near[0]), (base + 1, near[1]), (base + 2, far[1])]


def grid_sample(xp: Any, x: Array, grid: Array, *, mode: str, padding: str, aligned: bool) -> Array:
    """x (batch, channels, *spatial) at the points of grid (batch, *points, axes), whose last axis counts backwards.

    `mode` is nearest, which copies elements of any type, linear or cubic, which cut integers off towards zero;
    `padding` zeros, border or reflection. ONNX's GridSample-20.
    """
    axes = x.ndim - 2
    wide = np.float32 if x.dtype in (np.float32, np.complex64) or x.dtype.itemsize < 4 else np.float64
    taps = []
    for i, size in enumerate(x.shape[2:]):
        p = _pixel(xp, grid[..., axes - 1 - i].astype(wide), size, aligned=aligned)
        if mode != "cubic" and padding == "border":
            p = xp.clip(p, 0, size - 1)
        elif mode != "cubic" and padding == "reflection":
            p = xp.clip(_reflected(xp, p, size, aligned=aligned), 0, size - 1)
        taps.append(_taps(xp, p, mode))
    if mode == "nearest":
        return _fetch(xp, x, [at for ((at, _),) in taps], padding, aligned=aligned)
    sums = np.result_type(wide, np.complex64) if x.dtype.kind == "c" else np.dtype(wide)
    made = xp.zeros((*x.shape[:2], *grid.shape[1:-1]), sums)
    for combination in itertools.product(*taps):
        weight = combination[0][1]
        for _, w in combination[1:]:
            weight = weight * w
        values = _fetch(xp, x, [at for at, _ in combination], padding, aligned=aligned)
        made = made + values.astype(sums) * weight[:, None]
    return made.astype(x.dtype)


def affine_grid(xp: Any, theta: Array, size: Sequence[int], *, aligned: bool) -> Array:
    """The points of a grid over [-1, 1] that `theta` (batch, axes, axes + 1) maps: (batch, *size, axes), x first."""
    lines = []
    for n in size:
        step = xp.arange(n, dtype=np.float64)
        line = step * (2 / max(n - 1, 1)) - 1 if aligned else (2 * step + 1) / n - 1
        lines.append(xp.zeros_like(line) if aligned and n == 1 else line)
    points = xp.stack([*xp.meshgrid(*lines, indexing="ij")[::-1], xp.ones(tuple(size))], axis=-1)
    made = points.reshape(1, -1, len(size) + 1) @ theta.astype(np.float64).swapaxes(1, 2)
    return made.reshape(theta.shape[0], *size, len(size)).astype(theta.dtype)


def col2im(
    xp: Any,
    x: Array,
    image: Sequence[int],
    block: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> Array:
    """Blocks (batch, channels x block, places) added up where they lie in the image: what undoes im2col, as a sum."""
    n = len(image)
    padded = [image[i] + pads[i] + pads[n + i] for i in range(n)]
    places = [(padded[i] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1 for i in range(n)]
    columns = x.reshape(x.shape[0], -1, *block, *places)
    made = xp.zeros((*columns.shape[:2], *padded), x.dtype)
    for at in np.ndindex(*block):
        window = tuple(
            slice(k * d, k * d + s * (p - 1) + 1, s) for k, d, s, p in zip(at, dilations, strides, places, strict=True)
        )
        made[(slice(None), slice(None), *window)] += columns[(slice(None), slice(None), *at)]
    return made[(slice(None), slice(None), *(slice(pads[i], pads[i] + image[i]) for i in range(n)))]


def roi_align(
    xp: Any,
    x: Array,
    rois: Array,
    rows: Array,
    size: tuple[int, int],
    *,
    scale: float,
    ratio: int,
    mode: str,
    half_pixel: bool,
) -> Array:
    """Each region of interest in `size` bins, each bin the mean or maximum of points sampled between the pixels.

    rois: (regions, x1 y1 x2 y2). Mask R-CNN, arXiv 1703.06870; "max" takes the largest weighted corner of each point.
    """
    wide = np.float64 if x.dtype == np.float64 else np.float32
    made = xp.zeros((len(rois), x.shape[1], *size), wide)
    offset = 0.5 if half_pixel else 0.0
    for r in range(len(rois)):
        left, top, right, bottom = (float(v) * scale - offset for v in rois[r])
        extent = [bottom - top, right - left]
        if not half_pixel:
            extent = [max(e, 1.0) for e in extent]
        taps = []
        for start, length, bins, limit in zip((top, left), extent, size, x.shape[2:], strict=True):
            each = ratio if ratio > 0 else max(int(np.ceil(length / bins)), 1)
            step = length / bins
            p = start + (xp.arange(bins)[:, None] + (xp.arange(each) + 0.5) / each) * step
            outside = (p < -1) | (p > limit)
            p = xp.clip(p, 0, None)
            low = xp.minimum(xp.floor(p), limit - 1).astype(np.int64)
            high = xp.minimum(low + 1, limit - 1)
            t = xp.where(low >= limit - 1, 0.0, p - low)
            keep = (~outside).astype(wide)
            taps.append(((low, (1 - t) * keep), (high, t * keep)))
        image = x[int(rows[r])].astype(wide)
        corners = []
        for (yi, yw), (xi, xw) in itertools.product(taps[0], taps[1]):
            values = image[:, yi[:, None, :, None], xi[None, :, None, :]]
            corners.append(values * (yw[:, None, :, None] * xw[None, :, None, :]).astype(wide))
        if mode == "avg":
            made[r] = sum(corners[1:], corners[0]).mean(axis=(-2, -1))
        else:
            made[r] = xp.stack(corners).max(axis=0).max(axis=(-2, -1))
    return made.astype(x.dtype)


def max_roi_pool(xp: Any, x: Array, rois: Array, size: tuple[int, int], *, scale: float) -> Array:
    """Each region (batch index, x1, y1, x2, y2) in `size` bins of whole pixels, each bin its maximum; Fast R-CNN,
    arXiv 1504.08083. Empty bins are 0.
    """
    made = xp.zeros((len(rois), x.shape[1], *size), x.dtype)
    for r in range(len(rois)):
        row = int(rois[r][0])
        left, top, right, bottom = (int(np.floor(float(v) * scale + 0.5)) for v in rois[r][1:])
        bins = []
        for start, end, n, limit in ((top, bottom, size[0], x.shape[2]), (left, right, size[1], x.shape[3])):
            step = max(end - start + 1, 1) / n
            low = np.clip(np.floor(np.arange(n) * step).astype(int) + start, 0, limit)
            bins.append((low, np.clip(np.ceil((np.arange(n) + 1) * step).astype(int) + start, 0, limit)))
        for i, j in np.ndindex(*size):
            cut = x[row, :, bins[0][0][i] : bins[0][1][i], bins[1][0][j] : bins[1][1][j]]
            if cut.size:
                made[r, :, i, j] = cut.max(axis=(1, 2))
    return made


def max_unpool(xp: Any, x: Array, index: Array, made: Sequence[int]) -> Array:
    """Each element at its flat place in zeros of the shape `made`."""
    flat = xp.zeros(int(np.prod(made)), x.dtype)
    flat[index.reshape(-1)] = x.reshape(-1)
    return flat.reshape(tuple(made))


def deform_conv(
    xp: Any,
    x: Array,
    w: Array,
    offset: Array,
    bias: Array | None,
    mask: Array | None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    offset_group: int,
) -> Array:
    """Convolution whose taps are moved by `offset` and weighted by `mask`; arXiv 1703.06211 and 1811.11168."""
    batch, channels = x.shape[:2]
    kernel, out = w.shape[2:], offset.shape[2:]
    taps = int(np.prod(kernel))
    wide = np.float64 if x.dtype == np.float64 else np.float32
    moved = offset.reshape(batch, offset_group, taps, 2, *out).astype(wide)
    weight = None if mask is None else mask.reshape(batch, offset_group, taps, *out).astype(wide)
    per = channels // offset_group
    columns = xp.zeros((batch, channels, taps, *out), wide)
    for g in range(offset_group):
        part = x[:, g * per : (g + 1) * per]
        for k, at in enumerate(np.ndindex(*kernel)):
            position = []
            for axis in range(2):
                shape = [1, 1]
                shape[axis] = out[axis]
                base = xp.arange(out[axis]).reshape(shape) * strides[axis] - pads[axis] + at[axis] * dilations[axis]
                position.append(base + moved[:, g, k, axis])
            value = xp.zeros((batch, per, *out), wide)
            for (y, yw), (z, zw) in itertools.product(*(_taps(xp, p, "linear") for p in position)):
                value = value + _fetch(xp, part, [y, z], "zeros", aligned=True).astype(wide) * (yw * zw)[:, None]
            columns[:, g * per : (g + 1) * per, k] = value if weight is None else value * weight[:, g, k][:, None]
    columns = columns.reshape(batch, group, -1, int(np.prod(out)))
    matrix = w.astype(wide).reshape(group, w.shape[0] // group, -1)
    made = (matrix @ columns).reshape(batch, w.shape[0], *out)
    if bias is not None:
        made = made + bias.astype(wide)[:, None, None]
    return made.astype(x.dtype)
