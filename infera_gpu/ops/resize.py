"""Resize and Upsample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs, HostArray
from infera_gpu.op import REQUIRED, Buffers, Call, Kernel, Op, Site
from infera_gpu.ops._families import normalized
from infera_gpu.ops._later import Kinds, cases_in
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


_KERNELS = Kinds(
    {"cpu": Kernel(_bind, _supports)},
    "_triton_move",
    lambda gpu: gpu.mapping(_maps, lambda site, io: float(_options(site)["extrapolation_value"])),
)

_NAMED = (_ROI, _SCALES, _SIZES)

OPS: tuple[Op, ...] = (
    Op(
        "Upsample", 7, _infer, _compute, cases_in("_resize_cases", "Upsample", 7), {**_MODE, "scales": REQUIRED},
        kernels=_KERNELS,
    ),
    *(
        Op(op, since, _infer, _compute, cases_in("_resize_cases", op, since), attrs, kernels=_KERNELS, values=values)
        for op, since, attrs, values in (
            ("Upsample", 9, _MODE, (1,)),
            ("Resize", 10, _MODE, (1,)),
            ("Resize", 11, _RESIZE, _NAMED),
            ("Resize", 18, _KEPT, _NAMED),
            ("Resize", 19, _KEPT, _NAMED),
        )
    ),
)  # fmt: skip
