"""The cases of Resize and Upsample."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Case, f32
from infera_gpu.spec import TensorSpec


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

_CASES: Mapping[tuple[str, int], tuple[Case, ...]] = MappingProxyType(
    {
        ("Upsample", 7): tuple(
            Case(name, (_X,), {"mode": mode, "scales": tuple(map(float, s))}) for name, mode, s in _OLD
        ),
        ("Upsample", 9): tuple(Case(name, (_X, s), {"mode": mode}) for name, mode, s in _OLD),
        ("Resize", 10): tuple(
            Case(name, (_X, s), {"mode": mode})
            for name, mode, s in (*_OLD, ("nearest-down", "nearest", _DOWN), ("linear-down", "linear", _DOWN))
        ),
        ("Resize", 11): _RESIZE_11,
        ("Resize", 18): _RESIZE_18,
        ("Resize", 19): _RESIZE_19,
    }
)
"""By operator and version."""


def cases(op: str, since: int) -> tuple[Case, ...]:
    """Those of a version."""
    return _CASES[op, since]
