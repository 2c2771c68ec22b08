"""Regions of interest: RoiAlign, MaxRoiPool."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._families import plain
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import sample as portable


def _infer_roi(site: Site) -> tuple[TensorSpec]:
    x, rois, rows = site.spec(0), site.spec(1), site.spec(2)
    if x.ndim != 4 or rois.ndim != 2 or rois.dims[1] != 4 or rows.dims != rois.dims[:1]:
        raise site.fail(f"X {x}, rois {rois}, batch_indices {rows}: expected 4 axes, (regions, 4) and (regions,)")
    size = site.attrs["output_height"], site.attrs["output_width"]
    if site.attrs["mode"] not in ("avg", "max") or min(size) < 1 or site.attrs["sampling_ratio"] > 1 << 10:
        raise site.fail(f"mode '{site.attrs['mode']}', output {list(size)} or sampling_ratio is not valid")
    return (TensorSpec((rois.dims[0], x.dims[1], *size), x.dtype),)


def _roi(xp: Any, site: Site, x: Array, rois: Array, rows: Array) -> Array:
    if xp is np and rows.size and not 0 <= rows.min() <= rows.max() < x.shape[0]:
        raise IndexError(f"a batch index is out of range for {x.shape[0]} images")
    limit = 1 << 16
    if xp is np and (not np.isfinite(rois).all() or np.abs(rois * site.attrs["spatial_scale"]).max(initial=0) > limit):
        raise IndexError(f"a region reaches past {limit} pixels")
    return portable.roi_align(
        xp,
        x,
        rois,
        rows,
        (int(site.attrs["output_height"]), int(site.attrs["output_width"])),
        scale=float(site.attrs["spatial_scale"]),
        ratio=int(site.attrs["sampling_ratio"]),
        mode=site.attrs["mode"],
        half_pixel=site.attrs.get("coordinate_transformation_mode") == "half_pixel",
    )


_REGIONS = np.array([[0.5, 0.7, 5.1, 6.2], [1, 2, 3, 3.5], [-0.5, 0, 9, 12]], np.float32)
_ROI_ATTRS = {"mode": "avg", "output_height": 1, "output_width": 1, "sampling_ratio": 0, "spatial_scale": 1.0}


def _roi_op(since: int, attrs: dict[str, Any]) -> Op:
    size = {"output_height": 3, "output_width": 2}
    cases = tuple(
        Case(
            f"{mode}_{ratio}",
            (f32(2, 3, 8, 7), _REGIONS, np.array([0, 1, 1])),
            {**size, "mode": mode, "sampling_ratio": ratio},
        )
        for mode in ("avg", "max")
        for ratio in (0, 2)
    )
    return Op("RoiAlign", since, infer=_infer_roi, compute=plain(_roi), attrs={**_ROI_ATTRS, **attrs}, cases=cases)


def _infer_roi_pool(site: Site) -> tuple[TensorSpec]:
    x, rois, size = site.spec(0), site.spec(1), site.attrs["pooled_shape"]
    if x.ndim != 4 or rois.ndim != 2 or rois.dims[1] != 5 or len(size) != 2 or min(size) < 1:
        raise site.fail(f"X {x}, rois {rois}, pooled_shape {list(size)}: expected 4 axes, (regions, 5) and two sizes")
    return (TensorSpec((rois.dims[0], x.dims[1], *size), x.dtype),)


def _roi_pool(xp: Any, site: Site, x: Array, rois: Array) -> Array:
    if (
        xp is np
        and len(rois)
        and not (np.isfinite(rois).all() and 0 <= rois[:, 0].min() <= rois[:, 0].max() < x.shape[0])
    ):
        raise IndexError(f"a region's batch index is out of range for {x.shape[0]} images")
    return portable.max_roi_pool(
        xp, x, rois, tuple(site.attrs["pooled_shape"]), scale=float(site.attrs["spatial_scale"])
    )


_ROI_POOL = Op(
    "MaxRoiPool",
    1,
    infer=_infer_roi_pool,
    compute=plain(_roi_pool),
    attrs={"pooled_shape": REQUIRED, "spatial_scale": 1.0},
    cases=(
        Case(
            "regions",
            (f32(2, 3, 8, 7), np.array([[0, 0, 0, 6, 7], [1, 2, 1, 4, 3]], np.float32)),
            {"pooled_shape": (2, 3)},
        ),
    ),
)

OPS: tuple[Op, ...] = (
    _roi_op(10, {}),
    _roi_op(16, {"coordinate_transformation_mode": "half_pixel"}),
    _ROI_POOL,
)
