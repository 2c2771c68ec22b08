"""Resize and Upsample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs, HostArray
from infera_gpu.op import REQUIRED, Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops._families import normalized
from infera_gpu.ops._later import Kinds
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.resize import resize as fast_resize
from infera_kernels.portable.resize import COORDINATES, NEAREST, AxisTable, Filter, axis_table, resize
from infera_kernels.record import Record
from infera_kernels.triton.terms import AxisMap

_ROI, _SCALES, _SIZES = 1, 2, 3

_DEFAULTS: Attrs = {
    "mode": "nearest",
    "coordinate_transformation_mode": "half_pixel",
    "nearest_mode": "round_prefer_floor",
    "cubic_coeff_a": -0.75,
    "exclude_outside": 0,
    "extrapolation_value": 0.0,
    "antialias": 0,
}
_OLD_DEFAULTS: Attrs = {**_DEFAULTS, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "simple"}

_LARGEST = 1 << 26
"""Elements of an axis' table, of which planning makes one for each tap of an output element."""


class _Target(Record):
    """Output shape, and for each axis its scale before rounding and its region of interest."""

    shape: tuple[int, ...]
    scales: tuple[float, ...]
    roi: tuple[tuple[float, float], ...]


def _is_old(site: Site) -> bool:
    """Whether it is Upsample or the first Resize: its inputs are x and scales, `mode` its only option."""
    return site.node.op == "Upsample" or site.opset < 11


def _options(site: Site) -> Attrs:
    """The attributes, and what those mean that this version has not."""
    return {**(_OLD_DEFAULTS if _is_old(site) else _DEFAULTS), **site.attrs}


def _known(site: Site, i: int) -> HostArray | None:
    """Input i's value; None where it is left out or empty, which means the same here."""
    if not site.has(i):
        return None
    value = site.value(i)
    if value is None:
        raise site.fail(f"input {i} ('{site.node.inputs[i]}') must be known while planning")
    return value.reshape(-1) if value.size else None


def _target(site: Site) -> _Target:
    """What to resize to. Raises PlanError where neither scales nor sizes fit the input."""
    x = site.spec(0)
    n = x.ndim
    roi: HostArray | None = None
    scales: HostArray | None = None
    sizes: HostArray | None = None
    if "scales" in site.attrs:
        scales = np.array(site.attrs["scales"], np.float32)
    elif _is_old(site):
        scales = _known(site, 1)
    else:
        roi, scales, sizes = (_known(site, i) for i in (_ROI, _SCALES, _SIZES))
    given = site.attrs.get("axes")
    axes = list(range(n)) if given is None else list(normalized(site, given, n))
    if (scales is None) == (sizes is None):
        raise site.fail("expected either scales or sizes")
    wanted = scales if sizes is None else sizes
    if wanted is None or len(wanted) != len(axes) or (roi is not None and len(roi) != 2 * len(axes)):
        raise site.fail(f"scales {scales}, sizes {sizes} or roi {roi} do not match axes {axes} of {x}")
    fit = wanted >= 0 if scales is None else np.isfinite(wanted) & (wanted > 0)
    if not fit.all() or (roi is not None and not np.isfinite(roi).all()):
        raise site.fail(f"scales {scales}, sizes {sizes} or roi {roi} are not sizes of a tensor")
    shape, factors, regions = list(x.dims), [1.0] * n, [(0.0, 1.0)] * n
    for i, axis in enumerate(axes):
        if roi is not None:
            regions[axis] = (float(roi[i]), float(roi[i + len(axes)]))
        if scales is not None:
            factors[axis] = float(scales[i])
            shape[axis] = int(np.floor(np.float32(x.dims[axis]) * np.float32(scales[i])))
            if _options(site)["coordinate_transformation_mode"] == "tf_crop_and_resize":
                span = np.float32(regions[axis][1]) - np.float32(regions[axis][0])
                shape[axis] = int(np.floor(np.float32(x.dims[axis]) * span * np.float32(scales[i])))
    if sizes is not None:
        _fit(site, shape, factors, axes, [int(s) for s in sizes])
    if any(out and out * math.ceil(4 / min(1.0, f)) > _LARGEST for out, f in zip(shape, factors, strict=True)):
        raise site.fail(f"the output would be {shape}, scaled by {factors}: more than can be planned")
    return _Target(tuple(shape), tuple(factors), tuple(regions))


def _fit(site: Site, shape: list[int], factors: list[float], axes: list[int], sizes: list[int]) -> None:
    """Sets the axes' shape and factors from the wanted sizes and the aspect ratio policy."""
    if any(size and not shape[axis] for size, axis in zip(sizes, axes, strict=True)):
        raise site.fail(f"cannot resize {site.spec(0)}, which has no elements, to sizes {sizes}")
    ratios = [size / shape[axis] if size else 1.0 for size, axis in zip(sizes, axes, strict=True)]
    policy = site.attrs.get("keep_aspect_ratio_policy", "stretch")
    if policy not in ("stretch", "not_larger", "not_smaller"):
        raise site.fail(f"keep_aspect_ratio_policy '{policy}' is not one of stretch, not_larger, not_smaller")
    for ratio, size, axis in zip(ratios, sizes, axes, strict=True):
        if policy == "stretch":
            factors[axis], shape[axis] = ratio, size
        else:
            factors[axis] = min(ratios) if policy == "not_larger" else max(ratios)
            shape[axis] = math.floor(factors[axis] * shape[axis] + 0.5)


def _coordinates(site: Site) -> str:
    """From opset 18 on, ONNX's test suite aligns the corners of the size that the scales give before rounding."""
    named = str(_options(site)["coordinate_transformation_mode"])
    unrounded = named == "align_corners" and site.opset >= 18 and site.has(2)
    return "align_unrounded_corners" if unrounded else named


def _filter(site: Site) -> Filter:
    """How to interpolate. Raises PlanError for an unknown name."""
    a = _options(site)
    chosen = {
        "mode": (a["mode"], ("nearest", "linear", "cubic")),
        "nearest_mode": (a["nearest_mode"], tuple(NEAREST)),
        "coordinate_transformation_mode": (a["coordinate_transformation_mode"], tuple(COORDINATES)),
    }
    for name, (value, allowed) in chosen.items():
        if value not in allowed:
            raise site.fail(f"{name} '{value}' is not one of {', '.join(allowed)}")
    return Filter(
        mode=a["mode"],
        coordinates=_coordinates(site),
        nearest=a["nearest_mode"],
        cubic_a=a["cubic_coeff_a"],
        exclude_outside=bool(a["exclude_outside"]),
        antialias=bool(a["antialias"]) and a["mode"] != "nearest",
        extrapolation=a["extrapolation_value"],
    )


def _tables(site: Site, how: Filter) -> list[AxisTable]:
    """Tables of the axes that change."""
    target = _target(site)
    cropped = how.coordinates == "tf_crop_and_resize"
    return [
        axis_table(i, size, out, scale, how, roi)
        for i, (size, out, scale, roi) in enumerate(
            zip(site.spec(0).dims, target.shape, target.scales, target.roi, strict=True)
        )
        if out and (size != out or scale != 1 or (cropped and roi != (0.0, 1.0)))
    ]


def _infer(site: Site) -> Sequence[TensorSpec]:
    mode = _filter(site).mode
    if site.spec(0).dtype == object and mode != "nearest":
        raise site.fail(f"{site.spec(0)} cannot be interpolated: expected mode 'nearest' for strings")
    return (TensorSpec(_target(site).shape, site.spec(0).dtype),)


def _compute(xp: Any, site: Site, x: Array, *_: Array | None) -> Array:
    how = _filter(site)
    if not math.prod(_target(site).shape):
        return xp.empty(_target(site).shape, x.dtype)
    return resize(xp, x, _tables(site, how), how)


def _supports(site: Site) -> bool:
    """Nearest of any dtype; the rest in floating point; nothing outside of a cropped region."""
    x, how = site.spec(0), _filter(site)
    whole = all(t.outside is None for t in _tables(site, how))
    movable = how.mode == "nearest" and x.dtype != object
    return x.size > 0 and site.outs[0].size > 0 and whole and (movable or x.dtype in (np.float32, np.float64))


def _bind(site: Site, io: Buffers) -> Sequence[Call]:
    how = _filter(site)
    return fast_resize(io.ins[0], io.outs[0], io.scratch, _tables(site, how), nearest=how.mode == "nearest")


def _maps(site: Site) -> list[AxisMap]:
    """The tables of the axes that change, without the taps that weigh nothing anywhere."""
    how, maps = _filter(site), list[AxisMap]()
    for table in _tables(site, how):
        index = table.index if table.outside is None else np.where(table.outside[:, None], -1, table.index)
        if how.mode == "nearest":
            maps.append(AxisMap(table.axis, index))
            continue
        used = table.weights.any(axis=0)
        maps.append(AxisMap(table.axis, index[:, used], table.weights[:, used]))
    return maps


_MODE: Attrs = {"mode": "nearest"}
_RESIZE = {k: v for k, v in _DEFAULTS.items() if k != "antialias"}
_KEPT: Attrs = {**_DEFAULTS, "axes": None, "keep_aspect_ratio_policy": "stretch"}


def _scales(*values: float) -> HostArray:
    return np.array(values, np.float32)


def _sizes(*values: int) -> HostArray:
    return np.array(values, np.int64)


def _scaled(name: str, x: TensorSpec, scales: HostArray, **attrs: Any) -> Case:
    return Case(name, (x, _EMPTY, scales), attrs)


def _sized(name: str, x: TensorSpec, sizes: HostArray, **attrs: Any) -> Case:
    return Case(name, (x, _EMPTY, _EMPTY, sizes), attrs)


_X = f32(1, 2, 7, 5)
_EMPTY = np.zeros(0, np.float32)
_UP, _DOWN, _MIXED = _scales(1, 1, 2, 3), _scales(1, 1, 0.6, 0.5), _scales(1, 1, 1.7, 0.7)
_OLD = tuple(
    (f"{mode}-{n}", mode, s)
    for mode in ("nearest", "linear")
    for n, s in (("up", _UP), ("larger", _scales(1, 1, 1.7, 2.3)))
)
_MODES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")

_RESIZE_11 = (
    *(
        _scaled(f"{mode}-{coordinates}-{name}", _X, scales, mode=mode, coordinate_transformation_mode=coordinates)
        for mode in ("nearest", "linear", "cubic")
        for coordinates in _MODES
        for name, scales in (("up", _UP), ("down", _DOWN), ("mixed", _MIXED))
    ),
    *(
        _sized(f"nearest-{nearest}", _X, _sizes(1, 2, 11, 3), nearest_mode=nearest, coordinate_transformation_mode=c)
        for nearest, c in (
            ("round_prefer_ceil", "half_pixel"), ("floor", "asymmetric"), ("ceil", "align_corners"),
        )
    ),
    _sized("sizes-to-one", _X, _sizes(1, 2, 1, 1), mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    _sized("same", _X, _sizes(1, 2, 7, 5), mode="linear"),
    _sized("volume", f32(1, 2, 3, 4, 5), _sizes(1, 2, 6, 7, 3), mode="linear"),
    _sized("large", f32(1, 2, 65, 70), _sizes(1, 2, 150, 33), mode="linear"),
    _sized("large-nearest", f32(1, 2, 65, 70), _sizes(1, 2, 150, 33), mode="nearest"),
    _scaled("exclude-outside", _X, _MIXED, mode="cubic", exclude_outside=1),
    _scaled("cubic-a", _X, _UP, mode="cubic", cubic_coeff_a=-0.5),
    Case(
        "crop", (_X, _scales(0, 0, 0.1, 0.2, 1, 1, 0.9, 0.7), _EMPTY, _sizes(1, 2, 4, 6)),
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
    ),
    Case(
        "crop-past-the-edge", (_X, _scales(0, 0, -0.2, 0.5, 1, 1, 1.1, 1.3), _EMPTY, _sizes(1, 2, 4, 6)),
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 9.0},
    ),
    Case("bytes", (TensorSpec((1, 2, 4, 5), np.dtype(np.uint8)), _EMPTY, _UP), low=0, high=255),
)  # fmt: skip

_RESIZE_18 = (
    _sized("axes", _X, _sizes(9, 3), axes=(2, 3), mode="linear"),
    _sized("axes-reordered", _X, _sizes(3, 9), axes=(3, 2), mode="nearest"),
    *(
        _sized(f"{policy}-{mode}", _X, _sizes(9, 9), axes=(2, 3), mode=mode, keep_aspect_ratio_policy=policy)
        for policy in ("not_larger", "not_smaller")
        for mode in ("nearest", "linear")
    ),
    *(
        _scaled(f"antialias-{mode}-{name}", f32(1, 1, 11, 9), scales, mode=mode, antialias=1)
        for mode in ("linear", "cubic")
        for name, scales in (("down", _scales(1, 1, 0.4, 0.6)), ("up", _UP), ("mixed", _MIXED))
    ),
)
_RESIZE_19 = (
    Case("left-out", (_X, None, None, _sizes(1, 2, 9, 3)), {"mode": "linear"}),
    _scaled("symmetric", _X, _MIXED, mode="linear", coordinate_transformation_mode="half_pixel_symmetric"),
    _scaled("linear", _X, _MIXED, mode="linear"),
)  # fmt: skip

_KERNELS = Kinds(
    {"cpu": Kernel(_bind, _supports)},
    "_triton_move",
    lambda gpu: gpu.mapping(_maps, lambda site, io: float(_options(site)["extrapolation_value"])),
)

OPS: tuple[Op, ...] = (
    Op(
        "Upsample", 7, _infer, _compute,
        tuple(Case(name, (_X,), {"mode": mode, "scales": tuple(map(float, s))}) for name, mode, s in _OLD),
        {**_MODE, "scales": REQUIRED}, kernels=_KERNELS,
    ),
    Op(
        "Upsample", 9, _infer, _compute, tuple(Case(name, (_X, s), {"mode": mode}) for name, mode, s in _OLD),
        _MODE, kernels=_KERNELS, values=(1,),
    ),
    Op(
        "Resize", 10, _infer, _compute,
        tuple(
            Case(name, (_X, s), {"mode": mode})
            for name, mode, s in (*_OLD, ("nearest-down", "nearest", _DOWN), ("linear-down", "linear", _DOWN))
        ),
        _MODE, kernels=_KERNELS, values=(1,),
    ),
    Op("Resize", 11, _infer, _compute, _RESIZE_11, _RESIZE, kernels=_KERNELS, values=(_ROI, _SCALES, _SIZES)),
    Op("Resize", 18, _infer, _compute, _RESIZE_18, _KEPT, kernels=_KERNELS, values=(_ROI, _SCALES, _SIZES)),
    Op("Resize", 19, _infer, _compute, _RESIZE_19, _KEPT, kernels=_KERNELS, values=(_ROI, _SCALES, _SIZES)),
)  # fmt: skip
