"""Sampling between pixels: grids, deformed convolutions; and windows put back or cropped."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from infera_gpu.graph import FOLD_LIMIT
from infera_gpu.op import REQUIRED, Buffers, Call, Case, Op, Site, f32
from infera_gpu.ops._families import i64, normalized, plain
from infera_gpu.ops._triton import kernels
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import sample as portable
from infera_kernels.portable.pad import blank

_MODES = {"bilinear": "linear", "bicubic": "cubic", "linear": "linear", "cubic": "cubic", "nearest": "nearest"}
_PADDINGS = ("zeros", "border", "reflection")


def _infer_grid(site: Site) -> tuple[TensorSpec]:
    x, grid = site.spec(0), site.spec(1)
    if x.ndim < 3 or grid.ndim != x.ndim or grid.dims[-1] != x.ndim - 2 or grid.dims[0] != x.dims[0]:
        raise site.fail(f"grid is {grid}, expected (batch, ..., {x.ndim - 2}) with {x.ndim} axes for {x}")
    if site.attrs["mode"] not in _MODES or site.attrs["padding_mode"] not in _PADDINGS:
        raise site.fail(f"mode '{site.attrs['mode']}' or padding_mode '{site.attrs['padding_mode']}' is unknown")
    if x.dtype == object and site.attrs["mode"] != "nearest":
        raise site.fail(f"{x} cannot be interpolated: expected mode 'nearest' for strings")
    if 0 in x.dims[2:]:
        raise site.fail(f"there is nothing to sample in {x}")
    return (TensorSpec((*x.dims[:2], *grid.dims[1:-1]), x.dtype),)


def _grid(xp: Any, site: Site, x: Array, grid: Array) -> Array:
    return portable.grid_sample(
        xp,
        x,
        grid,
        mode=_MODES[site.attrs["mode"]],
        padding=site.attrs["padding_mode"],
        aligned=bool(site.attrs["align_corners"]),
    )


def _supports_grid(site: Site) -> bool:
    from infera_kernels.triton.grid_sample import supports_grid_sample

    return supports_grid_sample(site.spec(0), site.spec(1), site.outs[0], mode=_MODES[site.attrs["mode"]])


def _bind_grid(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.grid_sample import grid_sample

    x, grid = io.ins
    mode, padding = _MODES[site.attrs["mode"]], str(site.attrs["padding_mode"])
    aligned = bool(site.attrs["align_corners"])
    return grid_sample(x, grid, io.outs[0], io.launcher, mode=mode, padding=padding, aligned=aligned)


def _grid_op(since: int, mode: str, cases: tuple[Case, ...]) -> Op:
    return Op(
        "GridSample",
        since,
        infer=_infer_grid,
        compute=plain(_grid),
        kernels=kernels(_bind_grid, _supports_grid, inplace=(), strided=True, strided_out=True),
        attrs={"align_corners": 0, "mode": mode, "padding_mode": "zeros"},
        cases=cases,
    )


def _grid_cases(*modes: str) -> tuple[Case, ...]:
    return tuple(
        Case(
            f"{mode}_{padding}_{aligned}",
            (f32(2, 3, 5, 4), f32(2, 3, 6, 2)),
            {"mode": mode, "padding_mode": padding, "align_corners": aligned},
            low=-1.4,
            high=1.4,
        )
        for mode in modes
        for padding in _PADDINGS
        for aligned in (0, 1)
    )


def _sizes(site: Site) -> tuple[int, ...]:
    theta, size = site.spec(0), site.ints(1) or ()
    axes = len(size) - 2
    if axes not in (2, 3) or theta.ndim != 3 or theta.dims[1:] != (axes, axes + 1) or theta.dims[0] != size[0]:
        raise site.fail(f"size {list(size)} does not fit {theta}, expected (batch, channels, ...) of 2 or 3 axes")
    if min(size) < 0 or math.prod((size[0], *size[2:], axes)) * theta.dtype.itemsize > FOLD_LIMIT:
        raise site.fail(f"size {list(size)} is negative or too large")
    return tuple(size)


_AFFINE = Op(
    "AffineGrid",
    20,
    infer=lambda site: (TensorSpec((_sizes(site)[0], *_sizes(site)[2:], len(_sizes(site)) - 2), site.spec(0).dtype),),
    compute=plain(
        lambda xp, site, theta, _: portable.affine_grid(
            xp, theta, _sizes(site)[2:], aligned=bool(site.attrs["align_corners"])
        )
    ),
    attrs={"align_corners": 0},
    values=(1,),
    cases=(
        Case("plane", (f32(2, 2, 3), i64(2, 3, 5, 6))),
        Case("aligned", (f32(2, 2, 3), i64(2, 3, 5, 6)), {"align_corners": 1}),
        Case("space", (f32(2, 3, 4), i64(2, 1, 3, 4, 5))),
    ),
)


def _windowing(site: Site, n: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Strides, pads and dilations over n axes, checked."""
    found = []
    for name, count, default in (("strides", n, 1), ("pads", 2 * n, 0), ("dilations", n, 1)):
        given = site.attrs[name]
        values = (default,) * count if given is None else tuple(int(v) for v in given)
        if len(values) != count or min(values, default=default) < default:
            raise site.fail(f"{name} is {list(values)}, expected {count} values of at least {default}")
        found.append(values)
    return found[0], found[1], found[2]


def _infer_col2im(site: Site) -> tuple[TensorSpec]:
    x, image, block = site.spec(0), site.ints(1) or (), site.ints(2) or ()
    if x.dtype == object:
        raise site.fail(f"{x} cannot be added up: expected numbers")
    n = len(image)
    strides, pads, dilations = _windowing(site, n)
    size = math.prod(block)
    if x.ndim != 3 or len(block) != n or min((*image, *block), default=0) < 1 or x.dims[1] % size:
        raise site.fail(f"{x} does not hold blocks {list(block)} of an image {list(image)}")
    places = [
        (image[i] + pads[i] + pads[n + i] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1 for i in range(n)
    ]
    if min(places) < 1 or math.prod(places) != x.dims[2]:
        raise site.fail(f"{x} has {x.dims[2]} places, expected {places}")
    return (TensorSpec((x.dims[0], x.dims[1] // size, *image), x.dtype),)


def _col2im(xp: Any, site: Site, x: Array, *_: Array) -> Array:
    image, block = site.ints(1) or (), site.ints(2) or ()
    return portable.col2im(xp, x, image, block, *_windowing(site, len(image)))


_COL2IM = Op(
    "Col2Im",
    18,
    infer=_infer_col2im,
    compute=plain(_col2im),
    attrs={"dilations": None, "pads": None, "strides": None},
    values=(1, 2),
    cases=(
        Case("plain", (f32(1, 5, 5), i64(5, 5), i64(1, 5))),
        Case("strided", (f32(1, 9, 4), i64(5, 5), i64(3, 3)), {"strides": (2, 2)}),
        Case(
            "padded",
            (f32(2, 10, 12), i64(5, 5), i64(1, 5)),
            {"pads": (0, 1, 0, 1), "dilations": (1, 1), "strides": (2, 1)},
        ),
    )[:2],
)


def _crop_shape(site: Site) -> tuple[int, ...]:
    x, shape = site.spec(0), site.ints(1) or ()
    axes = site.attrs["axes"]
    at = tuple(range(x.ndim)) if axes is None else normalized(site, axes, x.ndim)
    if len(shape) != len(at) or min(shape, default=0) < 0:
        raise site.fail(f"shape {list(shape)} does not name a size for each of the axes {list(at)}")
    dims = list(x.dims)
    for i, n in zip(at, shape, strict=True):
        dims[i] = n
    if math.prod(dims) * x.dtype.itemsize > FOLD_LIMIT:
        raise site.fail(f"shape {list(shape)} asks for more than {FOLD_LIMIT:,} bytes")
    return tuple(dims)


def _center_crop_pad(xp: Any, site: Site, x: Array, _: Array) -> Array:
    """The middle of what is too large, in the middle of blanks where it is too small."""
    dims = _crop_shape(site)
    take, put = [], []
    for have, want in zip(x.shape, dims, strict=True):
        n, cut, gap = min(have, want), max(have - want, 0) // 2, max(want - have, 0) // 2
        take.append(slice(cut, cut + n))
        put.append(slice(gap, gap + n))
    made = xp.full(dims, blank(xp, x.dtype), x.dtype)
    made[tuple(put)] = x[tuple(take)]
    return made


_CROP = Op(
    "CenterCropPad",
    18,
    infer=lambda site: (TensorSpec(_crop_shape(site), site.spec(0).dtype),),
    compute=plain(_center_crop_pad),
    attrs={"axes": None},
    values=(1,),
    cases=(
        Case("crop", (f32(5, 7), i64(2, 4))),
        Case("pad", (f32(2, 3), i64(5, 6))),
        Case("axes", (f32(4, 3, 8), i64(7, 2)), {"axes": (-1, 0)}),
    ),
)


def _unpooled(site: Site) -> tuple[int, ...]:
    x = site.spec(0)
    kernel, n = site.attrs["kernel_shape"], x.ndim - 2
    if site.spec(1).dims != x.dims or len(kernel) != n:
        raise site.fail(f"indices are {site.spec(1)} and kernel_shape {list(kernel)}, expected them to fit {x}")
    given = site.ints(2)
    strides = site.attrs["strides"] or (1,) * n
    pads = site.attrs["pads"] or (0,) * (2 * n)
    dims = (
        tuple(given)
        if given
        else (
            *x.dims[:2],
            *(
                s * (d - 1) + k - p - q
                for d, s, k, p, q in zip(x.dims[2:], strides, kernel, pads[:n], pads[n:], strict=True)
            ),
        )
    )
    if len(dims) != x.ndim or min(dims) < 0 or math.prod(dims) * x.dtype.itemsize > FOLD_LIMIT:
        raise site.fail(f"its output would be {list(dims)}, which does not fit {x} or is too large")
    return dims


def _inferred_dims(site: Site) -> tuple[int, ...]:
    """The shape that the indices count in: the one inferred, also where another is asked for."""
    return _unpooled(Site(site.node, site.attrs, site.ins[:2], site.values[:2], site.outs, site.opset))


def _max_unpool(xp: Any, site: Site, x: Array, index: Array, *_: Array) -> Array:
    dims, counted = _unpooled(site), _inferred_dims(site)
    if xp is np and index.size and not 0 <= index.min() <= index.max() < math.prod(counted):
        raise IndexError(f"an index is out of range for {list(counted)}")
    made = portable.max_unpool(xp, x, index, counted)
    if dims == counted:
        return made
    whole = xp.zeros(dims, x.dtype)
    whole[tuple(slice(0, min(a, b)) for a, b in zip(dims, counted, strict=True))] = made[
        tuple(slice(0, min(a, b)) for a, b in zip(dims, counted, strict=True))
    ]
    return whole


_UNPOOL = Op(
    "MaxUnpool",
    9,
    infer=lambda site: (TensorSpec(_unpooled(site), site.spec(0).dtype),),
    compute=plain(_max_unpool),
    attrs={"kernel_shape": REQUIRED, "pads": None, "strides": None},
    values=(2,),
    cases=(
        Case(
            "twice",
            (f32(1, 1, 2, 2), np.array([[[[5, 7], [13, 15]]]])),
            {"kernel_shape": (2, 2), "strides": (2, 2)},
        ),
    ),
)


def _deform_out(site: Site) -> tuple[int, ...]:
    x, w = site.spec(0), site.spec(1)
    if x.ndim != 4 or w.ndim != 4:
        raise site.fail(f"X is {x}, W is {w}; expected 4 axes each")
    strides, pads, dilations = _windowing(site, 2)
    return tuple(
        (x.dims[2 + i] + pads[i] + pads[2 + i] - dilations[i] * (w.dims[2 + i] - 1) - 1) // strides[i] + 1
        for i in range(2)
    )


def _infer_deform(site: Site) -> tuple[TensorSpec]:
    x, w, out = site.spec(0), site.spec(1), _deform_out(site)
    group, groups, taps = int(site.attrs["group"]), int(site.attrs["offset_group"]), math.prod(site.spec(1).dims[2:])
    if min(group, groups) < 1 or x.dims[1] != w.dims[1] * group or w.dims[0] % group or x.dims[1] % groups:
        raise site.fail(f"X {x} and W {w} do not fit {group} groups, or {groups} offset groups")
    if min(out) < 1 or site.spec(2).dims != (x.dims[0], groups * taps * 2, *out):
        raise site.fail(f"offset is {site.spec(2)}, expected {[x.dims[0], groups * taps * 2, *out]}")
    if site.has(4) and site.spec(4).dims != (x.dims[0], groups * taps, *out):
        raise site.fail(f"mask is {site.spec(4)}, expected {[x.dims[0], groups * taps, *out]}")
    if site.has(3) and site.spec(3).dims != w.dims[:1]:
        raise site.fail(f"B is {site.spec(3)}, expected {w.dims[0]} elements")
    return (TensorSpec((x.dims[0], w.dims[0], *out), x.dtype),)


def _deform(
    xp: Any, site: Site, x: Array, w: Array, offset: Array, bias: Array | None = None, mask: Array | None = None
) -> Array:
    strides, pads, dilations = _windowing(site, 2)
    return portable.deform_conv(
        xp,
        x,
        w,
        offset,
        bias,
        mask,
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=int(site.attrs["group"]),
        offset_group=int(site.attrs["offset_group"]),
    )


_DEFORM = Op(
    "DeformConv",
    19,
    infer=_infer_deform,
    compute=plain(_deform),
    attrs={"dilations": None, "group": 1, "kernel_shape": None, "offset_group": 1, "pads": None, "strides": None},
    cases=(
        Case("plain", (f32(1, 2, 5, 5), f32(3, 2, 2, 2), f32(1, 8, 4, 4))),
        Case(
            "all",
            (f32(2, 4, 6, 5), f32(6, 2, 3, 3), f32(2, 36, 3, 3), f32(6), f32(2, 18, 3, 3)),
            {"group": 2, "offset_group": 2, "pads": (1, 1, 1, 1), "strides": (2, 2)},
        ),
    ),
)

OPS = (
    _grid_op(16, "bilinear", _grid_cases("bilinear", "bicubic", "nearest")),
    _grid_op(
        20,
        "linear",
        (
            *_grid_cases("linear"),
            Case("complex", (TensorSpec((1, 2, 3, 4), np.dtype(np.complex64)), f32(1, 2, 3, 2))),
            Case("volume", (f32(1, 2, 3, 4, 5), f32(1, 2, 3, 2, 3)), low=-1.2, high=1.2),
        ),
    ),
    _AFFINE,
    _COL2IM,
    _CROP,
    _UNPOOL,
    _DEFORM,
)
