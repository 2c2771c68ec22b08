"""Products of quantised tensors: MatMulInteger, QLinearMatMul."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Buffers, Call, Case, Cases, Kernel, Op, Site
from infera_gpu.ops._families import INT32, plain, points, scales
from infera_gpu.ops._triton_quant_matmul import Form, scaled
from infera_gpu.ops._triton_quant_matmul import product as triton_product
from infera_gpu.ops.matmul import product_dims
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import quant as cpu
from infera_kernels.portable import quant as portable
from infera_kernels.portable.matmul import transposed
from infera_kernels.record import Record


def _row_zero(zero: Array | None) -> Array | None:
    """A zero point of `a` broadcasting to it: one value, or one a row."""
    return zero.reshape(-1, 1) if zero is not None and zero.ndim == 1 and zero.size > 1 else zero


def reach(site: Site, i: int, zero: int) -> int:
    """The largest |value - zero point| that 8-bit input i can hold."""
    point = site.value(zero)
    return cpu.largest(site.spec(i).dtype, point, known=not site.has(zero) or point is not None)


def left_operand(site: Site, io: Buffers, a: int, zero: int) -> tuple[Array, list[Call]]:
    """Input a, transposed with transA, as float32 less its zero point."""
    turned = transposed(io.ins[a], site.attrs.get("transA"))
    return cpu.centred(turned, _row_zero(io.ins[zero]) if site.has(zero) else None, io.scratch)


def product(site: Site, io: Buffers, left: Array, left_reach: int, b: int, b_zero: int, out: Array) -> list[Call]:
    """int32 or float32 out = left @ (input b - its zero point); `left` holds integers of at most `left_reach` as
    float32, any floats where that is 0."""
    turn, known, point = site.attrs.get("transB"), site.value(b), site.value(b_zero)
    k = left.shape[-1]
    ranges = cpu.exact_ranges(k, left_reach, reach(site, b, b_zero)) if left_reach else [(0, k)]
    if known is None or (site.has(b_zero) and point is None):
        zero = io.ins[b_zero] if site.has(b_zero) else None
        right, calls = cpu.centred(transposed(io.ins[b], turn), zero, io.scratch)
        return [*calls, *cpu.matmul_integer(left, right, out, ranges, io.scratch)]

    def centred(weights: HostArray) -> HostArray:
        made: HostArray = cpu.less_zero(transposed(weights, turn), point)
        return made

    def exact(weights: HostArray) -> HostArray:
        return np.array(cpu.exact_ranges(k, left_reach, reach(site, b, b_zero), centred(weights)))

    shift = "" if point is None or not point.any() else f" {point.tobytes().hex()}"
    tag = f"centred{' transposed' if turn else ''}{shift}"
    if len(ranges) > 1:
        ranges = [(int(i), int(j)) for i, j in io.pack(b, f"{tag} ranges of {left_reach}", exact)]
    if io.ins[b].ndim == 2 and left.flags.c_contiguous:
        panels = io.pack(b, f"{tag} in panels", lambda weights: cpu.packed_panels(centred(weights)))
        return io.parallel(cpu.matmul_panels(left, panels, out, ranges, io.scratch, threads=io.threads))
    right = io.pack(b, tag, lambda weights: centred(weights).astype(np.float32))
    return cpu.matmul_integer(left, right, out, ranges, io.scratch)


def of_inputs(site: Site, io: Buffers, operands: tuple[int, int, int, int], out: Array) -> list[Call]:
    """int32 out = (a - a's zero point) @ (b - b's): `operands` are the inputs a, its zero point, b, its zero point."""
    a, a_zero, b, b_zero = operands
    left, calls = left_operand(site, io, a, a_zero)
    return [*calls, *product(site, io, left, reach(site, a, a_zero), b, b_zero, out)]


class Arithmetic(Record):
    """What multiplies inputs as `of_inputs` does, and what makes 8-bit integers of the sums."""

    product: Callable[[Site, Buffers, tuple[int, int, int, int], Array], list[Call]]
    requantize: Callable[[Array, Array, Array, Array, Buffers], list[Call]]
    """(int32 sums, factor, zero point, out): out = saturate(round(sums factor) + zero point)."""


NUMPY = Arithmetic(of_inputs, lambda sums, factor, zero, out, io: cpu.requantize(sums, factor, zero, out, io.scratch))


def _compiled(site: Site, io: Buffers, operands: tuple[int, int, int, int], out: Array) -> list[Call]:
    from infera_gpu.ops import _jit_quant

    return _jit_quant.of_inputs(site, io, operands, out)


def _compiled_requantize(sums: Array, factor: Array, zero: Array, out: Array, io: Buffers) -> list[Call]:
    from infera_gpu.ops import _jit_quant

    return _jit_quant.requantize(sums, factor, zero, out, io)


COMPILED = Arithmetic(_compiled, _compiled_requantize)
"""For sites of which `compiles` says yes."""


def compiles(site: Site, a: int, a_zero: int, b: int, b_zero: int) -> bool:
    """Whether COMPILED multiplies these inputs: what `_jit_quant.takes` and `_jit_quant.packs`."""
    from infera_gpu.ops import _jit_quant

    return _jit_quant.takes(site, a, a_zero) and _jit_quant.packs(site, b, b_zero)


def check_parameters(site: Site, single: tuple[int, ...], many: tuple[int, ...], count: int) -> None:
    """Raises PlanError where a scale or zero point holds neither one value nor, if it is among `many`, `count`."""
    for i in (*single, *many):
        if site.has(i) and site.spec(i).size != 1 and (i in single or site.spec(i).dims != (count,)):
            raise site.fail(f"input {i} is {site.spec(i)}, expected one value{f' or {count}' if i in many else ''}")


def is_matrix(site: Site, i: int) -> bool:
    """Whether input i has two axes at least: what the kernels multiply by."""
    return site.spec(i).ndim >= 2


def _integer_spec(site: Site) -> tuple[TensorSpec]:
    return (TensorSpec(product_dims(site, site.spec(0).dims, site.spec(1).dims), INT32),)


def _integer(
    xp: Any, site: Site, a: Array, b: Array, a_zero: Array | None = None, b_zero: Array | None = None
) -> Array:
    return portable.matmul_integer(xp, a, b, a_zero, b_zero)


def _spec(dtype: Any, *shape: int) -> TensorSpec:
    return TensorSpec(shape, np.dtype(dtype))


def _u8(*shape: int) -> TensorSpec:
    return _spec(np.uint8, *shape)


def _s8(*shape: int) -> TensorSpec:
    return _spec(np.int8, *shape)


_WEIGHT = np.arange(-60, 60, dtype=np.int8).reshape(8, 15)
_LIMITS: dict[str, Any] = {"low": -128, "high": 255}

_MATMUL_INTEGER = Op(
    "MatMulInteger",
    10,
    infer=_integer_spec,
    compute=plain(_integer),
    kernels={
        "cpu": Kernel(
            bind=lambda site, io: of_inputs(site, io, (0, 2, 1, 3), io.outs[0]),
            supports=lambda site: is_matrix(site, 1),
            strided=True,
        ),
        "jit": Kernel(
            bind=lambda site, io: _compiled(site, io, (0, 2, 1, 3), io.outs[0]),
            supports=lambda site: compiles(site, 0, 2, 1, 3),
            strided=True,
        ),
        **triton_product(Form((0, 2, 1, 3))),
    },
    cases=Cases(
        lambda: (
            Case("no_zeros", (_u8(3, 8), _u8(8, 5)), **_LIMITS),
            Case("zeros", (_u8(3, 8), _u8(8, 5), points(128), points(7)), **_LIMITS),
            Case("weights", (_u8(2, 3, 8), _WEIGHT, _u8(), points(0, dtype=np.int8)), **_LIMITS),
            Case("columns", (_u8(3, 8), _WEIGHT, points(3), np.arange(15, dtype=np.int8)), **_LIMITS),
            Case("signed", (_s8(3, 8), _s8(8, 5), points(-3, dtype=np.int8), points(9, dtype=np.int8)), **_LIMITS),
            Case("long", (_u8(2, 3001), np.full((3001, 4), 255, np.uint8), points(0)), low=250, high=255),
            Case("past_block", (_u8(3, 40), _s8(40, 24001)), **_LIMITS),
            Case("batch", (_u8(2, 3, 8), _u8(2, 8, 5)), **_LIMITS),
        )
    ),
)


def require_parameters(site: Site) -> None:
    """Raises PlanError where one of the eight inputs that both QLinear operators need is left out."""
    for i in range(8):
        site.spec(i)


def _linear_spec(site: Site) -> tuple[TensorSpec]:
    require_parameters(site)
    return (TensorSpec(product_dims(site, site.spec(0).dims, site.spec(3).dims), site.spec(7).dtype),)


def row_scale(scale: Array) -> Array:
    """A scale of the left operand broadcasting to the product."""
    return scale.reshape(()) if scale.size == 1 else scale.reshape(-1, 1) if scale.ndim == 1 else scale


def column(parameter: Array) -> Array:
    """A parameter of the right operand's columns broadcasting to the product."""
    return parameter.reshape(()) if parameter.size == 1 else parameter


def _linear(
    xp: Any,
    site: Site,
    a: Array,
    a_scale: Array,
    a_zero: Array,
    b: Array,
    b_scale: Array,
    b_zero: Array,
    y_scale: Array,
    y_zero: Array,
) -> Array:
    sums = portable.matmul_integer(xp, a, b, a_zero, b_zero)
    a_scale, b_scale, y_scale = (s.astype(np.float32) for s in (a_scale, b_scale, y_scale))
    factor = row_scale(a_scale) * column(b_scale) / y_scale.reshape(())
    return portable.requantize(xp, sums, factor, y_zero.reshape(()))


def _bind_linear(site: Site, io: Buffers, arithmetic: Arithmetic) -> list[Call]:
    a_scale, b_scale = row_scale(io.ins[1]), column(io.ins[4])
    sums = io.scratch(io.outs[0].shape, np.int32)
    factor = io.scratch(np.broadcast_shapes(a_scale.shape, b_scale.shape), np.float32)
    zero, calls = cpu.as_float(io.ins[7].reshape(()), io.scratch)
    return [
        *arithmetic.product(site, io, (0, 2, 3, 5), sums),
        (np.multiply, (a_scale, b_scale, factor)),
        (np.true_divide, (factor, io.ins[6].reshape(()), factor)),
        *calls,
        *arithmetic.requantize(sums, factor, zero, io.outs[0], io),
    ]


def _linear_supported(site: Site) -> bool:
    eight_bit = all(site.spec(i).dtype.name in ("uint8", "int8") for i in (0, 3, 7))
    return eight_bit and site.spec(1).dtype == np.float32 and is_matrix(site, 3)


def _linear_compiled(site: Site) -> bool:
    return _linear_supported(site) and compiles(site, 0, 2, 3, 5) and site.spec(1).size == 1


_QLINEAR_MATMUL = Op(
    "QLinearMatMul",
    10,
    infer=_linear_spec,
    compute=plain(_linear),
    kernels={
        "cpu": Kernel(partial(_bind_linear, arithmetic=NUMPY), _linear_supported, strided=True),
        "jit": Kernel(partial(_bind_linear, arithmetic=COMPILED), _linear_compiled, strided=True),
        **triton_product(Form((0, 2, 3, 5), scaled(1, 4, 6, 7))),
    },
    cases=Cases(
        lambda: (
            Case(
                "uint8",
                (_u8(3, 8), scales(0.02), points(128), _u8(8, 5), scales(0.01), points(7), scales(0.2), points(100)),
                **_LIMITS,
            ),
            Case(
                "weights",
                (
                    _u8(2, 3, 8),
                    scales(0.02),
                    points(128),
                    _WEIGHT,
                    scales(0.01),
                    points(0, dtype=np.int8),
                    scales(0.1),
                    points(100),
                ),
                **_LIMITS,
            ),
            Case(
                "past_block",
                (
                    _u8(3, 8),
                    scales(0.02),
                    points(128),
                    _s8(8, 24001),
                    scales(0.01),
                    points(0, dtype=np.int8),
                    scales(0.1),
                    points(100),
                ),
                **_LIMITS,
            ),
            Case(
                "signed",
                (
                    _s8(130, 8),
                    scales(0.02),
                    points(1, dtype=np.int8),
                    _s8(8, 40),
                    scales(0.01),
                    points(0, dtype=np.int8),
                    scales(0.1),
                    points(-3, dtype=np.int8),
                ),
                **_LIMITS,
            ),
        )
    ),
)

OPS: tuple[Op, ...] = (_MATMUL_INTEGER, _QLINEAR_MATMUL)
