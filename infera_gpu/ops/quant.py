"""Linear quantisation: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from infera_gpu.op import Buffers, Call, Case, Cases, Kernel, Op, Site, f32
from infera_gpu.ops import _triton_quant
from infera_gpu.ops._families import FLOAT32, element_type, is_native, plain
from infera_gpu.ops._later import Kinds
from infera_gpu.spec import Array, DType, TensorSpec
from infera_kernels.cpu import quant as cpu
from infera_kernels.portable import quant as portable

UINT8 = np.dtype(np.uint8)

MICROSOFT = "com.microsoft"


def _block(site: Site) -> int:
    return int(site.attrs.get("block_size", 0))


def _axis(site: Site) -> int:
    """The axis that scales run along: without meaning, and so not checked, where there is but one scale."""
    return site.axis() if "axis" in site.attrs and site.spec(1).size > 1 else 0


def _place(site: Site) -> tuple[int, int]:
    return _axis(site), _block(site)


def _check_scale(site: Site) -> None:
    x, scale, axis, block = site.spec(0), site.spec(1), _axis(site), _block(site)
    if site.has(2) and site.spec(2).size != 1 and site.spec(2).dims != scale.dims:
        raise site.fail(f"zero point is {site.spec(2)}, expected one value or the shape of the scale, {scale}")
    if scale.size == 1 and not block:
        return
    if block:
        blocked = tuple(-(-d // block) if i == axis else d for i, d in enumerate(x.dims))
        if scale.dims != blocked:
            raise site.fail(
                f"scale is {scale}, expected {list(blocked)} for blocks of {block} along axis {axis} of {x}"
            )
    elif scale.dims != x.dims[axis : axis + 1]:
        raise site.fail(f"scale is {scale}, expected one value, or one for each element of axis {axis} of {x}")


def _target(site: Site) -> DType:
    if site.has(2):
        return site.spec(2).dtype
    return element_type(site, "output_dtype", UINT8)


def _parameters(xp: Any, site: Site, *parameters: Array | None) -> list[Array | None]:
    shape = site.spec(0).dims
    return [None if p is None else portable.aligned(xp, p, shape, _axis(site), _block(site)) for p in parameters]


def _quantize_spec(site: Site) -> tuple[TensorSpec]:
    _check_scale(site)
    if (x := site.spec(0)).dtype.kind in "iub" and x.dtype.itemsize < 4:
        raise site.fail(f"input 0 is {x}, expected floats or int32")
    return (TensorSpec(site.spec(0).shape, _target(site)),)


def _quantize(xp: Any, site: Site, x: Array, scale: Array, zero: Array | None = None) -> Array:
    factor, shift = _parameters(xp, site, scale, zero)
    saturate = bool(site.attrs.get("saturate", 1))
    return portable.quantize(xp, x, factor, shift, _target(site), saturate=saturate)


def _zero(site: Site, io: Buffers, i: int) -> tuple[Array | None, list[Call]]:
    """Input i, a zero point, as float32: None where it is left out or known to be 0."""
    known = site.value(i)
    if not site.has(i) or (known is not None and not known.any()):
        return None, []
    if known is not None:
        return io.pack(i, "float32", lambda v: v.astype(np.float32)), []
    return cpu.as_float(io.ins[i], io.scratch)


def _bind_quantize(site: Site, io: Buffers) -> list[Call]:
    zero, calls = _zero(site, io, 2)
    factor, shift = _parameters(np, site, io.ins[1], zero)
    return calls + cpu.quantize(io.ins[0], factor, shift, io.outs[0], io.scratch)


def _plain_types(wide: TensorSpec, scale: TensorSpec, narrow: TensorSpec) -> bool:
    """Whether it is float32 on the wide side and an integer of at most 32 bits that NumPy knows on the narrow one."""
    small = is_native(narrow.dtype) and narrow.dtype.kind in "iu" and narrow.dtype.itemsize <= 4
    return wide.dtype == scale.dtype == FLOAT32 and small


def _quantize_supported(site: Site) -> bool:
    return _plain_types(site.spec(0), site.spec(1), site.outs[0]) and not _block(site)


def _dequantize_supported(site: Site) -> bool:
    return _plain_types(site.outs[0], site.spec(1), site.spec(0)) and not _block(site)


def _cases(table: str, domain: str, since: int) -> Cases:
    """Those of a version, which a file of their own has: loading a model need not make them."""
    return Cases(lambda: getattr(import_module(f"{__package__}._quant_cases"), table)[domain, since])


def _quantize_op(since: int, attrs: dict[str, Any], domain: str = "") -> Op:
    return Op(
        "QuantizeLinear",
        since,
        domain=domain,
        infer=_quantize_spec,
        compute=plain(_quantize),
        kernels=Kinds(
            {"cpu": Kernel(bind=_bind_quantize, supports=_quantize_supported, strided=True)}
            | _triton_quant.quantize(_place),
            "_jit_quant",
            lambda jit: jit.quantize(_quantize_supported),
        ),
        attrs=attrs,
        cases=_cases("QUANTIZE", domain, since),
    )


def _dequantize_spec(site: Site) -> tuple[TensorSpec]:
    _check_scale(site)
    return (TensorSpec(site.spec(0).shape, element_type(site, "output_dtype", site.spec(1).dtype)),)


def _dequantize(xp: Any, site: Site, q: Array, scale: Array, zero: Array | None = None) -> Array:
    factor, shift = _parameters(xp, site, scale, zero)
    return portable.dequantize(xp, q, factor, shift, element_type(site, "output_dtype", scale.dtype))


def _bind_dequantize(site: Site, io: Buffers) -> list[Call]:
    zero, calls = _zero(site, io, 2)
    factor, shift = _parameters(np, site, io.ins[1], zero)
    return calls + cpu.dequantize(io.ins[0], factor, shift, io.outs[0])


def _dequantize_op(since: int, attrs: dict[str, Any], domain: str = "") -> Op:
    return Op(
        "DequantizeLinear",
        since,
        domain=domain,
        infer=_dequantize_spec,
        compute=plain(_dequantize),
        kernels={"cpu": Kernel(bind=_bind_dequantize, supports=_dequantize_supported, strided=True)}
        | _triton_quant.dequantize(_place),
        attrs=attrs,
        cases=_cases("DEQUANTIZE", domain, since),
    )


def _bind_dynamic(site: Site, io: Buffers) -> list[Call]:
    q, scale, zero = io.outs
    return cpu.dynamic_quantize(io.ins[0], q, scale, zero, io.scratch)


_DYNAMIC = Op(
    "DynamicQuantizeLinear",
    11,
    infer=lambda site: (
        TensorSpec(site.spec(0).shape, UINT8),
        TensorSpec((), site.spec(0).dtype),
        TensorSpec((), UINT8),
    ),
    compute=plain(lambda xp, site, x: portable.dynamic_quantize(xp, x)),
    kernels={"cpu": Kernel(bind=_bind_dynamic)} | _triton_quant.DYNAMIC,
    cases=Cases(
        lambda: (
            Case("both_signs", (f32(3, 5),), n_outs=3),
            Case("positive", (f32(3, 5),), n_outs=3, low=1, high=5),
            Case("negative", (f32(3, 5),), n_outs=3, low=-5, high=-1),
            Case("zeros", (np.zeros((2, 2), np.float32),), n_outs=3),
            Case("nan", (np.array([[1, np.nan, -2], [np.nan, 3, 0.5]], np.float32),), n_outs=3),
            Case("past_block", (f32(3, 24001),), n_outs=3),
        )
    ),
)

OPS: tuple[Op, ...] = (
    _quantize_op(10, {}),
    _quantize_op(13, {"axis": 1}),
    _quantize_op(19, {"axis": 1, "saturate": 1}),
    _quantize_op(21, {"axis": 1, "saturate": 1, "block_size": 0, "output_dtype": 0}),
    _quantize_op(23, {"axis": 1, "saturate": 1, "block_size": 0, "output_dtype": 0, "precision": 0}),
    _dequantize_op(10, {}),
    _dequantize_op(13, {"axis": 1}),
    _dequantize_op(21, {"axis": 1, "block_size": 0}),
    _dequantize_op(23, {"axis": 1, "block_size": 0, "output_dtype": 0}),
    _quantize_op(1, {"axis": 1}, MICROSOFT),
    _dequantize_op(1, {"axis": 1}, MICROSOFT),
    _DYNAMIC,
)
