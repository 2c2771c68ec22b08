"""com.microsoft: products of quantised matrices, the result in floating point or quantised again."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from infera_gpu.op import Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops import _jit_quant
from infera_gpu.ops._families import points, scales, u8
from infera_gpu.ops._ms import F32, ms_op
from infera_gpu.ops._triton_quant_matmul import Form, dynamic_product, scaled
from infera_gpu.ops._triton_quant_matmul import product as triton_product
from infera_gpu.ops.matmul import check_term, given, product_dims, swapped
from infera_gpu.ops.quant_matmul import (
    COMPILED,
    NUMPY,
    Arithmetic,
    check_parameters,
    column,
    is_matrix,
    of_inputs,
    product,
)
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import quant as cpu
from infera_kernels.portable import quant as portable
from infera_kernels.portable.matmul import transposed


def _infer_product(site: Site, single: tuple[int, ...], many: tuple[int, ...], bias: int) -> tuple[TensorSpec]:
    """The product of inputs 0 and 1, with parameters for all or for each column, and a bias for each column."""
    b = site.spec(1)
    columns = b.dims[-1] if b.ndim > 1 else 1
    check_parameters(site, single, many, columns)
    if site.has(bias) and site.spec(bias).dims != (columns,):
        raise site.fail(f"bias is {site.spec(bias)}, expected {columns} elements")
    return (TensorSpec(product_dims(site, site.spec(0).dims, b.dims), F32),)


def _scaled(sums: Array, scale: Array, bias: Array | None) -> Array:
    made = sums.astype(np.float32) * scale
    return (made if bias is None else made + bias).astype(np.float32)


def bind_scaled(sums: Array, scales: tuple[Array, Array], bias: Array | None, out: Array, io: Buffers) -> list[Call]:
    """out = sums times both scales + bias: float32 from int32."""
    left, right = scales[0].reshape(()), column(scales[1])
    factor = io.scratch(right.shape, np.float32)
    calls: list[Call] = [(np.multiply, (left, right, factor)), *cpu.dequantize(sums, factor, None, out)]
    return calls if bias is None else [*calls, (np.add, (out, bias, out))]


# ---- MatMulIntegerToFloat


def integer_to_float(
    xp: Any,
    site: Site,
    a: Array,
    b: Array,
    a_scale: Array,
    b_scale: Array,
    a_zero: Array | None = None,
    b_zero: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """MatMulIntegerToFloat: (a - a_zero) @ (b - b_zero), times both scales, plus a bias."""
    sums = portable.matmul_integer(xp, a, b, a_zero, b_zero)
    return _scaled(sums, a_scale.reshape(()) * column(b_scale), bias)


def _bind_to_float(site: Site, io: Buffers) -> list[Call]:
    out = io.outs[0]
    sums = io.scratch(out.shape, np.int32)
    return [
        *of_inputs(site, io, (0, 4, 1, 5), sums),
        *bind_scaled(sums, (io.ins[2], io.ins[3]), given(io, 6), out, io),
    ]


def _compiled_to_float(site: Site) -> bool:
    return site.spec(2).size == 1 and _jit_quant.takes(site, 0, 4) and _jit_quant.packs(site, 1, 5, 3, 6)


def _bind_compiled(site: Site, io: Buffers) -> list[Call]:
    return _jit_quant.of_inputs(site, io, (0, 4, 1, 5), io.outs[0], scale=io.ins[2], scales=3, bias=6)


# ---- DynamicQuantizeMatMul


def _infer_dynamic(site: Site) -> tuple[TensorSpec]:
    if site.spec(0).dtype != F32:
        raise site.fail(f"A is {site.spec(0)}, expected float32")
    return _infer_product(site, (), (2, 3), 4)


def _dynamic(
    xp: Any, site: Site, a: Array, b: Array, scale: Array, zero: Array | None = None, bias: Array | None = None
) -> Array:
    made = portable.dynamic_matmul(xp, a, b, column(scale), zero)
    return made if bias is None else made + bias


def _bind_dynamic(site: Site, io: Buffers) -> list[Call]:
    a, out = io.ins[0], io.outs[0]
    q, scale, zero = io.scratch(a.shape, np.uint8), io.scratch((), np.float32), io.scratch((), np.uint8)
    sums = io.scratch(out.shape, np.int32)
    left, calls = cpu.centred(q, zero, io.scratch)
    return [
        *cpu.dynamic_quantize(a, q, scale, zero, io.scratch),
        *calls,
        *product(site, io, left, 255, 1, 3, sums),
        *bind_scaled(sums, (scale, io.ins[2]), given(io, 4), out, io),
    ]


def _supported(site: Site) -> bool:
    """Whether the second matrix is one, and what is not it is not empty: reductions need a value."""
    return is_matrix(site, 1) and site.spec(0).size > 0


# ---- QGemm

_B, _C, _Y_SCALE, _Y_ZERO = 3, 6, 7, 8


def _infer_gemm(site: Site) -> tuple[TensorSpec]:
    a, b = site.spec(0), site.spec(_B)
    if a.ndim != 2 or b.ndim != 2:
        raise site.fail(f"expected two matrices, got {a} and {b}")
    if site.has(_Y_SCALE) != site.has(_Y_ZERO):
        raise site.fail("y_scale and y_zero_point come together or not at all")
    dims = product_dims(site, swapped(a.dims, site.attrs["transA"]), swapped(b.dims, site.attrs["transB"]))
    check_parameters(site, (1, 2, _Y_SCALE, _Y_ZERO), (4, 5), dims[1])
    if site.has(_C):
        check_term(site, "C", site.spec(_C), TensorSpec(dims, site.spec(_C).dtype))
    return (TensorSpec(dims, site.spec(_Y_ZERO).dtype if site.has(_Y_ZERO) else F32),)


def _gemm(
    xp: Any,
    site: Site,
    a: Array,
    a_scale: Array,
    a_zero: Array,
    b: Array,
    b_scale: Array,
    b_zero: Array,
    c: Array | None = None,
    y_scale: Array | None = None,
    y_zero: Array | None = None,
) -> Array:
    a, b = transposed(a, site.attrs["transA"]), transposed(b, site.attrs["transB"])
    sums = portable.matmul_integer(xp, a, b, a_zero, b_zero)
    sums = sums if c is None else sums + c
    factor = np.float32(site.attrs["alpha"]) * a_scale.reshape(()) * column(b_scale)
    if y_scale is None or y_zero is None:
        return _scaled(sums, factor, None)
    return portable.requantize(xp, sums, factor / y_scale.reshape(()), y_zero.reshape(()))


def _bind_gemm(site: Site, io: Buffers, arithmetic: Arithmetic) -> list[Call]:
    out, c, scale = io.outs[0], given(io, _C), column(io.ins[4])
    sums, factor = io.scratch(out.shape, np.int32), io.scratch(scale.shape, np.float32)
    calls = arithmetic.product(site, io, (0, 2, _B, 5), sums)
    if c is not None:
        calls.append((np.add, (sums, c, sums)))
    calls += [
        (np.multiply, (np.float32(site.attrs["alpha"]), io.ins[1].reshape(()), factor)),
        (np.multiply, (factor, scale, factor)),
    ]
    if not site.has(_Y_SCALE):
        return [*calls, *cpu.dequantize(sums, factor, None, out)]
    zero, more = cpu.as_float(io.ins[_Y_ZERO].reshape(()), io.scratch)
    calls.append((np.true_divide, (factor, io.ins[_Y_SCALE].reshape(()), factor)))
    return [*calls, *more, *arithmetic.requantize(sums, factor, zero, out, io)]


def _gemm_compiled(site: Site) -> bool:
    return _jit_quant.takes(site, 0, 2) and _jit_quant.packs(site, _B, 5)


# ---- cases


def _s8(*shape: int) -> TensorSpec:
    return TensorSpec(shape, np.dtype(np.int8))


_BYTES: dict[str, Any] = {"low": -128, "high": 255}
_COLUMNS = scales(0.0217, 0.0513, 0.0109)
_A, _TENSOR = (u8(5, 4), scales(0.0531), points(120)), (scales(0.0217), points(3, dtype=np.int8))
_WEIGHT = np.arange(-60, 60, 10, dtype=np.int8).reshape(4, 3)

OPS: tuple[Op, ...] = (
    ms_op(
        "MatMulIntegerToFloat",
        lambda site: _infer_product(site, (2, 4), (3, 5), 6),
        integer_to_float,
        (
            Case(
                "columns",
                (u8(2, 4), _s8(4, 3), scales(0.1), _COLUMNS, points(7), points(1, 0, -2, dtype=np.int8), f32(3)),
                low=-50,
                high=50,
            ),
            Case("batch", (u8(2, 5, 4), _WEIGHT, scales(0.1), scales(0.2), points(7)), **_BYTES),
            Case("past_block", (u8(3, 40), _s8(40, 24001), scales(0.1), scales(0.2)), **_BYTES),
        ),
        kernels={
            "cpu": Kernel(_bind_to_float, _supported, strided=True),
            "jit": Kernel(_bind_compiled, _compiled_to_float, strided=True),
            **triton_product(Form((0, 4, 1, 5), scaled(2, 3), 6)),
        },
        needs=(0, 1, 2, 3),
    ),
    ms_op(
        "DynamicQuantizeMatMul",
        _infer_dynamic,
        _dynamic,
        (
            Case("tensor", (f32(2, 4), _s8(4, 3), scales(0.1), points(3, dtype=np.int8)), low=-3),
            Case("columns", (f32(2, 4), u8(4, 3), _COLUMNS, None, f32(3)), low=0, high=3),
            Case("batch", (f32(2, 5, 4), _WEIGHT, _COLUMNS, None, f32(3))),
            Case("past_block", (f32(3, 40), _s8(40, 24001), scales(0.1)), low=-100, high=100),
        ),
        kernels={
            "cpu": Kernel(_bind_dynamic, _supported),
            "jit": Kernel(
                lambda site, io: _jit_quant.dynamic_product(site, io, (1, 3), 2, 4),
                lambda site: site.spec(0).ndim > 1 and _jit_quant.packs(site, 1, 3, 2, 4),
            ),
            **dynamic_product(1, 3, 2, 4),
        },
        needs=(0, 1, 2),
    ),
    ms_op(
        "QGemm",
        _infer_gemm,
        _gemm,
        (
            Case("float", (*_A, _s8(4, 3), *_TENSOR), **_BYTES),
            Case(
                "columns",
                (
                    *_A,
                    _s8(4, 3),
                    _COLUMNS,
                    points(0, 4, -7, dtype=np.int8),
                    np.array([500, -90, 7], np.int32),
                    scales(0.419),
                    points(100),
                ),
                {"alpha": 0.7},
                **_BYTES,
            ),
            Case(
                "transposed",
                (u8(4, 5), *_A[1:], np.ascontiguousarray(_WEIGHT.T), *_TENSOR, None, scales(0.419), points(100)),
                {"transA": 1, "transB": 1},
                **_BYTES,
            ),
            Case(
                "signed",
                (
                    _s8(34, 40),
                    scales(0.0531),
                    points(-9, dtype=np.int8),
                    _s8(40, 130),
                    *_TENSOR,
                    np.arange(34, dtype=np.int32).reshape(34, 1),
                    scales(3.19),
                    points(-3, dtype=np.int8),
                ),
                **_BYTES,
            ),
        ),
        kernels={
            "cpu": Kernel(partial(_bind_gemm, arithmetic=NUMPY), lambda site: site.spec(0).size > 0, strided=True),
            "jit": Kernel(partial(_bind_gemm, arithmetic=COMPILED), _gemm_compiled, strided=True),
            **triton_product(Form((0, 2, _B, 5), scaled(1, 4, _Y_SCALE, _Y_ZERO), _C)),
        },
        alpha=1.0,
        transA=0,
        transB=0,
        needs=(0, 1, 2, 3, 4, 5),
    ),
)
