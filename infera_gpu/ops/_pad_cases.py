"""The cases of Pad."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Case, f32
from infera_gpu.ops._families import NARROW, narrow, narrow_cases
from infera_gpu.spec import TensorSpec


def _i64(*values: int) -> HostArray:
    return np.array(values, np.int64)


_PATTERNS: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("images", (2, 3, 5, 4), (0, 0, 1, 2, 0, 0, 3, 1)),
    ("vector", (6,), (2, 3)),
    ("nothing", (2, 3), (0, 0, 0, 0)),
    ("every-axis", (3, 4, 5), (1, 2, 0, 2, 1, 3)),
    ("negative", (4, 5), (-1, 2, 1, -2)),
)


def _cases(*modes: str, attributes: bool = False) -> tuple[Case, ...]:
    """Every pattern in every mode, with the pads as attribute or as input."""
    return tuple(
        Case(f"{mode}-{name}", (f32(*shape),), {"mode": mode, "pads": pads})
        if attributes
        else Case(f"{mode}-{name}", (f32(*shape), _i64(*pads)), {"mode": mode})
        for mode in modes
        for name, shape, pads in _PATTERNS
    )


_VALUES = (
    Case("value", (f32(2, 3), _i64(1, 0, 2, 1), np.array(1.5, np.float32))),
    Case("large", (f32(2, 33, 65), _i64(0, 1, 1, 0, 1, 1), f32())),
    Case("integers", (TensorSpec((2, 3), np.dtype(np.int64)), _i64(1, 0, 2, 1), np.array(-7))),
    Case("empty", (f32(0, 3), _i64(1, 0, 2, 1))),
)
_BOOLEANS = (Case("booleans", (TensorSpec((2, 3), np.dtype(np.bool_)), _i64(1, 0, 2, 1)), opset=13),)
_AXES_CASES = (
    Case("axes", (f32(2, 3, 4), _i64(1, 2, 3, 0), None, _i64(2, 0))),
    Case("negative-axes", (f32(2, 3, 4), _i64(1, 2, 3, 0), f32(), _i64(-1, -2))),
)
_NARROW = (
    *(c for c in narrow_cases((2, 3), _i64(1, 0, 2, 1), since=21) if c.id != "float8_e8m0fnu"),  # which has no 0
    *(
        Case(f"{dtype.name}-value", (narrow(dtype, 2, 3), _i64(1, 0, 2, 1), np.ones((), dtype)), opset=max(21, since))
        for dtype, since in NARROW.items()
    ),
)
_WRAP = (
    *_cases("wrap"),
    Case("wrap-more-than-once", (f32(3, 4), _i64(4, 0, 5, 9)), {"mode": "wrap"}),
)
_INPUTS = _cases("constant", "edge", "reflect") + _VALUES
_CASES: Mapping[int, tuple[Case, ...]] = MappingProxyType(
    {
        2: (
            *_cases("constant", "edge", "reflect", attributes=True),
            Case("value", (f32(2, 33, 35),), {"pads": (0, 1, 1, 0, 2, 1), "value": 1.5}),
        ),
        11: _INPUTS + _BOOLEANS,
        18: _INPUTS + _AXES_CASES + _WRAP,
        19: _WRAP + _VALUES + _NARROW,
    }
)
"""By version."""


def cases(since: int) -> tuple[Case, ...]:
    """Those of a version."""
    return _CASES[since]
