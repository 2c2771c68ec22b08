"""Cases of the operators of `quant_narrow`. Declares no operators itself."""

from __future__ import annotations

import numpy as np

from infera_gpu.op import Case, f32
from infera_gpu.ops._families import points, scales

_CENTRED = np.linspace(-128, 127, 30, dtype=np.float32).round().reshape(2, 3, 5)
_WEIGHT = np.arange(-60, 60, 8, dtype=np.int8).reshape(5, 3)
_COLUMNS, _ROW = scales(0.0217, 0.0513, 0.0109), scales(0.5, -0.25, 3)
_NAN = np.array([np.nan, 1, -np.inf, np.inf, np.nan], np.float32)
_NUMBERS_AND_NAN = np.where(np.arange(40) % 7 == 3, -np.nan, np.linspace(-2, 3, 40)).astype(np.float32)
_ENDS = np.linspace(-9, 9, 40, dtype=np.float32)


def _dynamic() -> tuple[Case, ...]:
    return (
        Case("both_signs", (f32(3, 5),), n_outs=2),
        Case("positive", (f32(3, 5),), n_outs=2, low=1, high=5),
        Case("negative", (f32(3, 5),), n_outs=2, low=-5, high=-1),
        Case("zeros", (np.zeros((2, 2), np.float32),), n_outs=2),
        Case("nan", (_NUMBERS_AND_NAN,), n_outs=2),
        Case("nothing_but_nan", (np.full(5, np.nan, np.float32),), n_outs=2),
        Case("past_block", (f32(3, 6001),), n_outs=2),
    )


def _centre() -> tuple[Case, ...]:
    return (
        Case("uint8", (_ENDS, scales(0.05), points(100))),
        Case("int8", (_ENDS, scales(0.05), points(-3, dtype=np.int8))),
        Case("dequantized", (f32(3, 6001), scales(0.02), points(7)), {"dequantize": 1}),
        Case("relu", (_ENDS, scales(0.05), points(-3, dtype=np.int8)), {"dequantize": 1, "relu": 1}),
        Case("only_negative", (_ENDS, scales(0.05), points(255)), {"relu": 1}),
        Case("integers", (np.arange(-700, 700, 100, dtype=np.int32), scales(3), points(100))),
        Case("nan", (_NAN, scales(0.05), points(100)), {"dequantize": 1}),
        Case("ties", (np.array([-1.5, -0.5, 0.5, 1.5, 2.5], np.float32), scales(1), points(3))),
    )


def _product() -> tuple[Case, ...]:
    return (
        Case("floats", (f32(2, 4, 5), _WEIGHT, _COLUMNS, None, None, _ROW)),
        Case("integers", (_CENTRED, _WEIGHT, _COLUMNS, points(3, dtype=np.int8), scales(0.1)), {"reach": 128}),
        Case(
            "columns",
            (_CENTRED, _WEIGHT, scales(0.1), points(3, 0, -128, dtype=np.int8), scales(0.3), _ROW),
            {"reach": 255},
        ),
        Case(
            "past_panel",
            (
                np.resize(_CENTRED, (7, 1100)),
                np.resize(_WEIGHT.view(np.uint8), (1100, 150)),
                scales(0.1),
                points(3),
                scales(0.3),
            ),
            {"reach": 128},
        ),
        Case("vector", (f32(5), _WEIGHT, _COLUMNS)),
        Case("empty", (f32(0, 5), _WEIGHT, _COLUMNS)),
        Case("no_terms", (f32(2, 0), _WEIGHT[:0], _COLUMNS)),
    )


_CASES = {"DynamicCentre": _dynamic, "Centre": _centre, "NarrowMatMul": _product}


def cases(name: str) -> tuple[Case, ...]:
    """Those of an operator."""
    return _CASES[name]()
