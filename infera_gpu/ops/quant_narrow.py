"""What passes make of quantised models on the CPU: integers that lie in float32, their products with narrow weights.

A tensor is *centred* where it holds quantised values less their zero point, as float32: what products take. It never
exists as 8-bit integers then, and is made once for all its readers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Buffers, Call, Kernel, Op, Site
from infera_gpu.ops import _triton_quant
from infera_gpu.ops._families import FLOAT32, plain
from infera_gpu.ops._later import Kinds, cases_in
from infera_gpu.ops.matmul import product_dims
from infera_gpu.ops.quant_matmul import check_parameters, column, product
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import quant as cpu
from infera_kernels.cpu.matmul import epilogue
from infera_kernels.portable import quant as portable

# ---- DynamicCentre: (x) -> centred, scale. DynamicQuantizeLinear whose integers are centred.


def _infer_dynamic(site: Site) -> tuple[TensorSpec, TensorSpec]:
    _require_float32(site, 0)
    return site.spec(0), TensorSpec((), FLOAT32)


def _require_float32(site: Site, *inputs: int) -> None:
    for i in inputs:
        if site.has(i) and site.spec(i).dtype != FLOAT32:
            raise site.fail(f"input {i} is {site.spec(i)}, expected float32")


def _dynamic(xp: Any, site: Site, x: Array) -> tuple[Array, Array]:
    q, scale, zero = portable.dynamic_quantize(xp, x)
    return q.astype(xp.float32) - zero.astype(xp.float32), scale


def _bind_dynamic(site: Site, io: Buffers) -> list[Call]:
    return cpu.dynamic_centre(io.ins[0], io.outs[0], io.outs[1], io.scratch)


def _not_empty(site: Site) -> bool:
    """Reductions need a value."""
    return site.spec(0).size > 0


# ---- Centre: (x, scale, zero point) -> centred. QuantizeLinear whose integers are centred; with
# `dequantize` they are multiplied by the scale again, with `relu` what is negative becomes 0 in between. Scale and zero
# point are single; the kernel wants to know the zero point.


def _infer_centre(site: Site) -> tuple[TensorSpec]:
    for i in range(3):
        site.spec(i)
    if site.spec(0).dtype not in (FLOAT32, np.int32):
        raise site.fail(f"input 0 is {site.spec(0)}, expected float32 or int32")
    _require_float32(site, 1)
    check_parameters(site, (1, 2), (), 1)
    return (TensorSpec(site.spec(0).dims, FLOAT32),)


def _bounds(site: Site) -> tuple[int, int]:
    """The smallest and the largest centred value."""
    zero = site.value(2)
    assert zero is not None
    low, high = portable.bounds(zero.dtype)
    point = int(zero.reshape(())[()])
    return 0 if site.attrs["relu"] else low - point, max(0 if site.attrs["relu"] else low - point, high - point)


def _centre(xp: Any, site: Site, x: Array, scale: Array, zero: Array) -> Array:
    q = portable.quantize(xp, x, scale.reshape(()), zero.reshape(()), zero.dtype)
    wide = q.astype(xp.float32) - zero.reshape(()).astype(xp.float32)
    wide = xp.maximum(wide, xp.float32(0)) if site.attrs["relu"] else wide
    return wide * scale.reshape(()) if site.attrs["dequantize"] else wide


def _bind_centre(site: Site, io: Buffers) -> list[Call]:
    again = bool(site.attrs["dequantize"])
    return cpu.centre(io.ins[0], io.ins[1].reshape(()), _bounds(site), io.outs[0], io.scratch, dequantize=again)


def _supports_centre(site: Site) -> bool:
    return site.value(2) is not None and site.spec(0).dtype == FLOAT32


# ---- NarrowMatMul: (a, b, scale, b's zero point, a's scale, bias) -> float32.
# a @ (b - zero point) * (a's scale * scale) + bias. b (K, N) has 8 bits and is constant, as its zero point is; both
# parameters of b have one value or N, a's scale has one, bias N. With `reach` a is centred, from 8 bits and one zero
# point, and none of its integers larger than that: sums are exact, and scaled once.

_SCALE, _ZERO, _A_SCALE, _BIAS = range(2, 6)


def _infer_product(site: Site) -> tuple[TensorSpec]:
    _require_float32(site, 0, _SCALE, _A_SCALE, _BIAS)
    b = site.spec(1)
    if b.ndim != 2 or b.dtype.name not in ("int8", "uint8"):
        raise site.fail(f"b is {b}, expected a matrix of 8-bit integers")
    site.spec(_SCALE)
    check_parameters(site, (_A_SCALE,), (_SCALE, _ZERO, _BIAS), b.dims[1])
    return (TensorSpec(product_dims(site, site.spec(0).dims, b.dims), FLOAT32),)


def _product(
    xp: Any,
    site: Site,
    a: Array,
    b: Array,
    scale: Array,
    zero: Array | None = None,
    a_scale: Array | None = None,
    bias: Array | None = None,
) -> Array:
    summed = xp.float64 if site.attrs["reach"] else xp.float32
    sums = xp.matmul(a.astype(summed), portable.centred(xp, b, zero, 1).astype(summed)).astype(xp.float32)
    made = sums * (column(scale) if a_scale is None else a_scale.reshape(()) * column(scale))
    return made if bias is None else made + column(bias)


def _bind_product(site: Site, io: Buffers) -> list[Call]:
    a, out, factor = io.ins[0], io.outs[0], column(io.ins[_SCALE])
    calls = product(site, io, a, int(site.attrs["reach"]), 1, _ZERO, out)
    if site.has(_A_SCALE):
        scale, factor = factor, io.scratch(factor.shape, np.float32)
        calls.append((np.multiply, (io.ins[_A_SCALE].reshape(()), scale, factor)))
    bias = column(io.ins[_BIAS]) if site.has(_BIAS) else None
    return [*calls, (np.multiply, (out, factor, out)), *epilogue(out, io.scratch, bias=bias)]


def _bind_compiled(site: Site, io: Buffers) -> list[Call]:
    from infera_gpu.ops import _jit_quant

    if not site.attrs["reach"]:
        return _jit_quant.scaled_product(site, io, _SCALE, _BIAS)
    a, scale = io.ins[0], io.ins[_A_SCALE] if site.has(_A_SCALE) else None
    return _jit_quant.product(site, io, a, None, (1, _ZERO), io.outs[0], scale=scale, scales=_SCALE, bias=_BIAS)


def _compiled(site: Site) -> bool:
    from infera_gpu.ops import _jit_quant

    signed = site.spec(1).dtype == np.int8 and not site.has(_ZERO) and not site.has(_A_SCALE)
    return (bool(site.attrs["reach"]) or signed) and _jit_quant.packs(site, 1, _ZERO, _SCALE, _BIAS)


def _narrow_constant(site: Site) -> bool:
    return site.value(1) is not None and (not site.has(_ZERO) or site.value(_ZERO) is not None)


OPS: tuple[Op, ...] = (
    Op(
        "DynamicCentre",
        1,
        domain="infera",
        infer=_infer_dynamic,
        compute=plain(_dynamic),
        kernels=Kinds({"cpu": Kernel(_bind_dynamic, _not_empty)}, "_jit_quant", lambda jit: jit.dynamic_centre()),
        cases=cases_in("_narrow_cases", "DynamicCentre"),
    ),
    Op(
        "Centre",
        1,
        domain="infera",
        infer=_infer_centre,
        compute=plain(_centre),
        kernels=Kinds(
            {"cpu": Kernel(_bind_centre, _supports_centre, inplace=(0,), strided=True)} | _triton_quant.centre(_bounds),
            "_jit_quant",
            lambda jit: jit.centre(_bounds, _supports_centre),
        ),
        attrs={"dequantize": 0, "relu": 0},
        cases=cases_in("_narrow_cases", "Centre"),
    ),
    Op(
        "NarrowMatMul",
        1,
        domain="infera",
        infer=_infer_product,
        compute=plain(_product),
        kernels={"cpu": Kernel(_bind_product, _narrow_constant), "jit": Kernel(_bind_compiled, _compiled)},
        attrs={"reach": 0},
        cases=cases_in("_narrow_cases", "NarrowMatMul"),
    ),
)
