"""The cases of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from infera_gpu.op import Case, f32
from infera_gpu.ops._families import NARROW, narrow, u8
from infera_gpu.spec import Array, DType, TensorSpec, onnx_of_dtype
from infera_kernels.portable.quant import is_integer


def _scalar(value: float, dtype: Any = np.float32) -> np.ndarray[Any, np.dtype[Any]]:
    return np.array(value, dtype)


_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_TARGETS = {d: since for d, since in NARROW.items() if d != _E8M0} | {
    np.dtype(t): 28 for t in (ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn)
}
"""The narrow types to quantise to, and the opset from which ONNX has them; float8_e8m0 is one for scales."""

_POWER_SCALE = (
    Case("power_scale", (f32(3, 5), np.array(0.25).astype(_E8M0)), {"output_dtype": 3}, opset=24),
)  # fmt: skip
_POWER_SCALE_BACK = (
    Case("power_scale", (np.arange(-3, 3, dtype=np.int8), np.array(0.25).astype(_E8M0)), {"output_dtype": 1}, opset=24),
)  # fmt: skip
_SCALES = np.array([0.02, 0.1, 0.5], np.float32)
_ZEROS = np.array([128, 0, 255], np.uint8)
_SIGNED = np.array([3, 0, -7], np.int8)
_TIES = np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 1e9, -1e9], np.float32)

_TENSOR_CASES = (
    Case("no_zero", (f32(3, 5), _scalar(0.02))),
    Case("uint8", (f32(3, 5), _scalar(0.02), _scalar(128, np.uint8))),
    Case("int8", (f32(3, 5), _scalar(0.02), _scalar(-5, np.int8))),
    Case("ties", (_TIES, _scalar(1), _scalar(3, np.uint8))),
    Case("past_block", (f32(3, 24001), _scalar(0.02), _scalar(7, np.uint8))),
    Case("empty", (f32(0, 5), _scalar(0.02), _scalar(7, np.uint8))),
)
_AXIS_CASES = (
    Case("rows", (f32(3, 5), _SCALES, _ZEROS), {"axis": 0}),
    Case("channels", (f32(2, 3, 4, 5), _SCALES, _SIGNED)),
    Case("last", (f32(4, 3), _SCALES, _SIGNED), {"axis": -1}),
    Case("channels_past_block", (f32(2, 3, 3, 4001), _SCALES, _ZEROS)),
)
_BLOCK_SCALES = np.array([[0.02, 0.1], [0.5, 0.05], [0.3, 0.01]], np.float32)
_QUANTIZE_21 = (
    Case("blocks", (f32(3, 8), _BLOCK_SCALES), {"axis": 1, "block_size": 4, "output_dtype": 2}),
    Case("uint16", (f32(3, 5), _scalar(0.001), _scalar(30000, np.uint16))),
    Case("int16", (f32(3, 5), _scalar(0.001), _scalar(-100, np.int16))),
    Case("output_dtype", (f32(3, 5), _scalar(0.02)), {"output_dtype": 3}),
    Case("blocks_and_a_rest", (f32(3, 7), _BLOCK_SCALES), {"axis": 1, "block_size": 4, "output_dtype": 3}),
)

_BACK_CASES = (
    Case("no_zero", (u8(3, 5), _scalar(0.02)), low=0, high=255),
    Case("uint8", (u8(3, 5), _scalar(0.02), _scalar(128, np.uint8)), low=0, high=255),
    Case("int32", (TensorSpec((7,), np.dtype(np.int32)), _scalar(0.02)), low=-9999, high=9999),
    Case("past_block", (u8(3, 24001), _scalar(0.02), _scalar(128, np.uint8)), low=0, high=255),
)
_BACK_AXIS_CASES = (
    Case("rows", (u8(3, 5), _SCALES, _ZEROS), {"axis": 0}, low=0, high=255),
    Case("channels", (u8(2, 3, 4, 5), _SCALES, _ZEROS), low=0, high=255),
    Case("last", (u8(4, 3), _SCALES, _ZEROS), {"axis": -1}, low=0, high=255),
)
_BACK_21 = (
    Case("blocks", (u8(3, 8), _BLOCK_SCALES), {"axis": 1, "block_size": 4}, low=0, high=255),
    Case("uint16", (TensorSpec((3, 5), np.dtype(np.uint16)), _scalar(0.001), _scalar(99, np.uint16)), high=60000),
    Case("blocks_and_a_rest", (u8(3, 7), _BLOCK_SCALES), {"axis": 1, "block_size": 4}, low=0, high=255),
)

_INT4 = np.arange(-7, 8).reshape(3, 5).astype(ml_dtypes.int4)
_MS_BACK = (
    Case("int16", (TensorSpec((3, 5), np.dtype(np.int16)), _scalar(0.001)), low=-30000, high=30000),
    Case("int4", (_INT4, _scalar(0.1), _scalar(-2, ml_dtypes.int4))),
    Case("uint4_rows", ((_INT4.astype(np.int8) & 7).astype(ml_dtypes.uint4), _SCALES), {"axis": 0}),
)
_INT4_CASES = tuple(
    Case(np.dtype(t).name, (f32(3, 5), _scalar(0.3), _scalar(zero, t)))
    for t, zero in ((ml_dtypes.int4, -2), (ml_dtypes.uint4, 7))
)


def _zero_of(dtype: DType) -> Array:
    return np.zeros((), dtype)


def _rounded(*since: int) -> tuple[Case, ...]:
    """float32 to narrow types, those that came with these opsets; from 21 on also in blocks, told by an attribute."""
    found = [(d, s) for d, s in _TARGETS.items() if s in since]
    x = np.array([[-1.5, 0.3, 0.5, 1.5, 2.4, 100], [-100, 0, 0.25, -0.25, 3, 6]], np.float32)
    return (
        *(Case(f"{d.name}_zero", (x, _scalar(0.5), _zero_of(d)), opset=s) for d, s in found),
        *(
            Case(
                f"{d.name}_blocks",
                (x, np.array([[0.5, 2], [1, 0.25]], np.float32)),
                {"axis": 1, "block_size": 3, "output_dtype": onnx_of_dtype(d)},
                opset=max(21, s),
            )
            for d, s in found
            if min(since) >= 21
        ),
    )


def _widened(*since: int) -> tuple[Case, ...]:
    """Narrow types to float32: with a zero point, which is 0 for floats, and along an axis."""
    found = [(d, s) for d, s in _TARGETS.items() if s in since]
    return (
        *(
            Case(d.name, (narrow(d, 2, 6), _scalar(0.5), np.full((), is_integer(d), np.int8).astype(d)), opset=s)
            for d, s in found
        ),
        *(
            Case(f"{d.name}_axis", (narrow(d, 2, 6), np.array([0.5, 0.2], np.float32)), {"axis": 0}, opset=s)
            for d, s in found
        ),
    )


QUANTIZE: Mapping[tuple[str, int], tuple[Case, ...]] = MappingProxyType(
    {
        ("", 10): _TENSOR_CASES,
        ("", 13): _TENSOR_CASES[:2] + _AXIS_CASES,
        ("", 19): _TENSOR_CASES[1:3] + _AXIS_CASES[:1] + _rounded(19),
        ("", 21): _AXIS_CASES[:1] + _QUANTIZE_21 + _rounded(21),
        ("", 23): (_QUANTIZE_21[3], *_rounded(23, 25, 28), *_POWER_SCALE),
        ("com.microsoft", 1): _INT4_CASES + _TENSOR_CASES[:2] + _AXIS_CASES[:2] + _QUANTIZE_21[1:3],
    }
)
DEQUANTIZE: Mapping[tuple[str, int], tuple[Case, ...]] = MappingProxyType(
    {
        ("", 10): _BACK_CASES,
        ("", 13): _BACK_CASES[:2] + _BACK_AXIS_CASES + _widened(19),
        ("", 21): _BACK_AXIS_CASES[:1] + _BACK_21 + _widened(21),
        ("", 23): (*_BACK_CASES[1:2], *_widened(23, 25, 28), *_POWER_SCALE_BACK),
        ("com.microsoft", 1): _BACK_CASES[1:3] + _BACK_AXIS_CASES[:2] + _BACK_21[1:2] + _MS_BACK,
    }
)
"""By domain and version."""
