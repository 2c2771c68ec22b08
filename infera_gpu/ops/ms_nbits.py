"""com.microsoft: weights of few bits, quantised in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.op import REQUIRED, Case, Expansion, Op, Site, f32
from infera_gpu.ops._families import integers, uniform
from infera_gpu.ops._ms import ms_op, wide
from infera_gpu.ops._triton_nbits import gathered, nbits
from infera_gpu.ops.matmul import check_term, product_dims
from infera_gpu.ops.normalized import check_scale, normalized
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.quant import aligned, dequantize, is_integer, unpacked


def _nbits_sizes(site: Site) -> tuple[int, int, int, int, int]:
    n, k, bits, block = (int(site.attrs[x]) for x in ("N", "K", "bits", "block_size"))
    if bits not in (2, 4, 8) or block < 16 or block & (block - 1) or n < 1 or k < 1:
        raise site.fail(f"N {n}, K {k}, bits {bits}, block_size {block} are not valid")
    blocks = -(-k // block)
    if site.spec(1).size != n * blocks * block * bits // 8 or site.spec(2).size != n * blocks:
        raise site.fail(f"B {site.spec(1)} and scales {site.spec(2)} do not hold {n} x {blocks} blocks")
    if site.has(3):
        zeros = site.spec(3)
        if zeros.size != n * (-(-blocks * bits // 8) if zeros.dtype == np.uint8 else blocks):
            raise site.fail(f"zero_points {zeros} do not hold {n} x {blocks} values")
    if site.has(4) and (site.spec(4).ndim != 1 or site.spec(4).size < k):
        raise site.fail(f"g_idx is {site.spec(4)}, expected {k} values at least")
    if site.has(5) and site.spec(5).dims != (n,):
        raise site.fail(f"bias is {site.spec(5)}, expected {n} values")
    return n, k, bits, block, blocks


def _infer_nbits(site: Site) -> tuple[TensorSpec]:
    n, k, *_ = _nbits_sizes(site)
    if not site.spec(0).ndim or site.spec(0).dims[-1] != k:
        raise site.fail(f"A is {site.spec(0)}, expected {k} elements last")
    return (TensorSpec((*site.spec(0).dims[:-1], n), site.spec(0).dtype),)


def _nbits(
    xp: Any,
    site: Site,
    a: Array,
    b: Array,
    scales: Array,
    zeros: Array | None = None,
    group: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """`group` names the block whose scale and zero point each of the K inputs has; without it they follow in order."""
    n, k, bits, block, blocks = _nbits_sizes(site)
    q = unpacked(xp, b.reshape(n, blocks, -1), bits).reshape(n, -1)[:, :k].astype(np.float32)
    if zeros is None:
        zero = xp.full((n, blocks), 1 << (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        zero = unpacked(xp, zeros.reshape(n, -1), bits)[:, :blocks].astype(np.float32)
    else:
        zero = zeros.reshape(n, blocks).astype(np.float32)
    at = xp.arange(k) // block if group is None else group[:k]
    w = (q - zero[:, at]) * scales.reshape(n, blocks).astype(np.float32)[:, at]
    made = wide(a) @ w.T
    return (made if bias is None else made + wide(bias)).astype(a.dtype)


# ---- FusedMatMulNBits: Y = N(A) @ W' + bias + residual

_RESIDUAL, _SCALE = 6, 7


def _infer_fused(site: Site) -> Sequence[TensorSpec]:
    (made,) = _infer_nbits(site)
    if site.has(_RESIDUAL):
        check_term(site, "residual", site.spec(_RESIDUAL), made)
    if site.has(_SCALE):
        check_scale(site, _SCALE)
    return (made,)


def _apart(site: Site) -> Expansion | None:
    """The product and the addition apart, where the residual has another shape."""
    (made,) = _infer_nbits(site)
    if not site.has(_RESIDUAL) or site.spec(_RESIDUAL).dims == made.dims:
        return None
    node, product = site.node, made_name(site.node.outputs[0], "product")
    inputs = (*node.inputs[:_RESIDUAL], "", *node.inputs[_SCALE:])
    return Expansion(
        (
            replace(node, inputs=inputs, outputs=(product,)),
            Node("Add", (product, node.inputs[_RESIDUAL]), node.outputs, name=f"{node.name}/residual"),
        )
    )


def _fused(
    xp: Any,
    site: Site,
    a: Array,
    b: Array,
    scales: Array,
    zeros: Array | None = None,
    group: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    scale: Array | None = None,
) -> Array:
    """Two-byte floats are rounded once, at the end."""
    rows = normalized(xp, a, scale, site.attrs["epsilon"])
    made = _nbits(xp, site, rows, b, scales, zeros, group, None if bias is None else wide(bias))
    return (made if residual is None else made + wide(residual)).astype(a.dtype)


# ---- GatherBlockQuantized


def _gather_axes(site: Site) -> tuple[int, int]:
    data = site.spec(0)
    if not data.ndim:
        raise site.fail(f"data is {data}, expected one axis at least")
    along, blocked = site.axis("gather_axis"), site.axis("quantize_axis")
    if data.dtype == np.uint8 and (along, blocked) != (0, data.ndim - 1):
        raise site.fail(f"gather_axis {along} and quantize_axis {blocked}: expected 0 and {data.ndim - 1} for {data}")
    return along, blocked


def _gather_bits(site: Site) -> int:
    """Bits of a value in a byte of input 0, 8 where it holds one value an element."""
    bits = int(site.attrs["bits"])
    if bits not in (2, 4, 8):
        raise site.fail(f"bits is {bits}, expected 2, 4 or 8")
    return bits if site.spec(0).dtype == np.uint8 else 8


def _infer_gather(site: Site) -> tuple[TensorSpec]:
    data, scales, size = site.spec(0), site.spec(2), int(site.attrs["block_size"])
    along, blocked = _gather_axes(site)
    floats = not is_integer(data.dtype)
    if (size < 16 and not (floats and size == 0)) or size & (size - 1):
        raise site.fail(f"block_size is {size}, expected a power of two from 16 on{', or 0' if floats else ''}")
    dims = list(data.dims)
    dims[blocked] *= 8 // _gather_bits(site)
    wanted = [-(-d // (size or max(d, 1))) if i == blocked else d for i, d in enumerate(dims)]
    pairs = enumerate(zip(scales.dims, wanted, strict=False))
    fits = [s == w or (floats and i != blocked and s == 1) for i, (s, w) in pairs]
    if scales.ndim != data.ndim or not all(fits):
        raise site.fail(f"scales are {scales}, expected {wanted} for {data} in blocks of {size}")
    if site.has(3):
        wanted[blocked] = -(-wanted[blocked] // (8 // _gather_bits(site)))
        if floats or site.spec(3).dims != tuple(wanted):
            raise site.fail(f"zero_points are {site.spec(3)}, expected {'none' if floats else wanted} for {data}")
    return (TensorSpec((*dims[:along], *site.spec(1).dims, *dims[along + 1 :]), scales.dtype),)


def _gather(xp: Any, site: Site, data: Array, indices: Array, scales: Array, zeros: Array | None = None) -> Array:
    """Only what is gathered is dequantised, unless blocks run along the same axis. Outside, the output is 0."""
    along, blocked = _gather_axes(site)
    bits, size, rows = _gather_bits(site), int(site.attrs["block_size"]), data.shape[along]
    seen = (indices >= -rows) & (indices < rows)
    place = xp.where(seen, indices % max(rows, 1), 0).reshape(-1)
    if along != blocked:
        data, scales, zeros = (
            x if x is None or x.shape[along] != rows else xp.take(x, place, axis=along) for x in (data, scales, zeros)
        )
    if data.dtype == np.uint8:
        data = unpacked(xp, data, bits)
        zeros = xp.full(scales.shape, 1 << (bits - 1), xp.uint8) if zeros is None else unpacked(xp, zeros, bits)
        zeros = zeros[..., : scales.shape[-1]]
    factor, shift = (
        p if p is None else aligned(xp, p, data.shape, blocked, size or data.shape[blocked]) for p in (scales, zeros)
    )
    made = dequantize(xp, data, factor, shift, scales.dtype)
    made = xp.take(made, place, axis=along) if along == blocked else made
    made = xp.where(seen.reshape(-1, *(1,) * (made.ndim - along - 1)), made, xp.zeros((), made.dtype))
    return made.reshape(*made.shape[:along], *indices.shape, *made.shape[along + 1 :])


# ---- MatMulBnb4

_FLOAT4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
"""bitsandbytes' four-bit float without its sign, which is the highest bit."""
_NORMAL4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution: the NF4 of QLoRA (Dettmers et al. 2023, appendix E)."""
_TABLES = {0: (*_FLOAT4, *(-v for v in _FLOAT4)), 1: _NORMAL4}


def _infer_bnb4(site: Site) -> tuple[TensorSpec]:
    n, k, block = (int(site.attrs[x]) for x in ("N", "K", "block_size"))
    if block < 16 or block & (block - 1) or n < 1 or k < 1 or site.attrs["quant_type"] not in _TABLES:
        raise site.fail(f"N {n}, K {k}, block_size {block}, quant_type {site.attrs['quant_type']} are not valid")
    if not site.attrs["transB"]:
        raise site.fail("transB 0 is not supported")
    if site.spec(1).size != (n * k + 1) // 2 or site.spec(2).size != -(-n * k // block):
        raise site.fail(f"B {site.spec(1)} and absmax {site.spec(2)} do not hold {n} x {k} weights")
    return (TensorSpec(product_dims(site, site.spec(0).dims, (k, n)), site.spec(0).dtype),)


def _bnb4(xp: Any, site: Site, a: Array, b: Array, largest: Array) -> Array:
    n, k, block = (int(site.attrs[x]) for x in ("N", "K", "block_size"))
    codes = unpacked(xp, b.reshape(-1), 4).reshape(-1, 2)[:, ::-1].reshape(-1)[: n * k]
    values = xp.asarray(_TABLES[site.attrs["quant_type"]], np.float32)[codes]
    w = values * xp.repeat(largest.reshape(-1).astype(np.float32), block)[: n * k]
    return (wide(a) @ w.reshape(n, k).T).astype(a.dtype)


# ---- cases


def _scales(seed: int, *shape: int) -> Array:
    return uniform(seed, 0.01, 0.1, *shape)


_B4, _S4, _Z4 = integers(1, np.uint8, 5, 2, 16), _scales(2, 5, 2), integers(3, np.uint8, 5, 1)
_NB = {"N": 5, "K": 50, "bits": 4, "block_size": 32}
_EIGHT = np.array([0, 1, 1, 0, 0, 0, 1, 0], np.int32)
_GROUPS = np.concatenate((np.tile(_EIGHT, 4), np.tile(1 - _EIGHT, 4)))
"""The same in every eight of a block: onnxruntime reads a block's first eight for all of it (and no zero points)."""
_AT = np.array([[2, 0, 2], [-1, 5, 9]])
_LAST = {"block_size": 16, "quantize_axis": -1}
_FLOAT8 = np.linspace(-4, 4, 6 * 40, dtype=np.float32).reshape(6, 40).astype(ml_dtypes.float8_e4m3fn)

_NBITS = nbits(_nbits_sizes)

OPS: tuple[Op, ...] = (
    ms_op(
        "MatMulNBits",
        _infer_nbits,
        _nbits,
        (
            Case("symmetric", (f32(3, 50), _B4, _S4), _NB),
            Case("zeros", (f32(2, 1, 50), _B4, _S4, _Z4), _NB),
            Case("float_zeros", (f32(3, 50), _B4, _S4, _scales(4, 5, 2) * 100), _NB),
            Case("groups", (f32(3, 50), _B4, _S4, None, _GROUPS), _NB),
            Case("bias", (f32(3, 50), _B4, _S4, None, None, f32(5)), _NB),
            Case("bytes", (f32(3, 50), integers(5, np.uint8, 5, 2, 32), _S4), {**_NB, "bits": 8}),
            Case("many_rows", (f32(9, 50), _B4, _S4, _Z4, None, f32(5)), _NB),
        ),
        kernels=_NBITS,
        K=REQUIRED,
        N=REQUIRED,
        accuracy_level=0,
        bits=4,
        block_size=REQUIRED,
        weight_prepacked=0,
        needs=(0, 1, 2),
    ),
    # Inputs 6 and 7, where there are any, are a residual and the scale with which A is normalised first, as
    # infera.NormalizedMatMul says; the others are MatMulNBits'.
    ms_op(
        "FusedMatMulNBits",
        _infer_fused,
        _fused,
        (
            Case("plain", (f32(3, 50), _B4, _S4), _NB),
            Case("residual", (f32(2, 1, 50), _B4, _S4, _Z4, None, None, f32(2, 1, 5)), _NB),
            Case("row_residual", (f32(3, 50), _B4, _S4, None, None, f32(5), f32(1, 5)), _NB),
            Case("normalized", (f32(1, 50), _B4, _S4, _Z4, None, None, None, uniform(6, 0.5, 2, 50)), _NB),
            Case(
                "normalized_rows",
                (f32(2, 3, 50), _B4, _S4, None, None, f32(5), f32(2, 3, 5), uniform(6, 0.5, 2, 50)),
                {**_NB, "epsilon": 0.25},
            ),
            Case(
                "many_rows",
                (f32(9, 50), _B4, _S4, _Z4, None, f32(5), f32(9, 5), uniform(6, 0.5, 2, 50)),
                {**_NB, "epsilon": 0.25},
            ),
            Case("groups", (f32(3, 50), _B4, _S4, None, _GROUPS, None, f32(3, 5)), _NB),
        ),
        domain="infera",
        kernels=_NBITS,
        expand=_apart,
        K=REQUIRED,
        N=REQUIRED,
        accuracy_level=0,
        bits=4,
        block_size=REQUIRED,
        weight_prepacked=0,
        epsilon=1e-5,
        needs=(0, 1, 2),
    ),
    ms_op(
        "MatMulBnb4",
        _infer_bnb4,
        _bnb4,
        (
            *(
                Case(
                    name,
                    (f32(2, 3, 24), integers(6, np.uint8, 60), _scales(7, 8)),
                    {"N": 5, "K": 24, "block_size": 16, "quant_type": kind},
                )
                for name, kind in (("float", 0), ("normal", 1))
            ),
        ),
        K=REQUIRED,
        N=REQUIRED,
        block_size=REQUIRED,
        quant_type=REQUIRED,
        training_mode=0,
        transB=1,
        needs=(0, 1, 2),
    ),
    ms_op(
        "GatherBlockQuantized",
        _infer_gather,
        _gather,
        (
            *(
                Case(
                    f"{bits}_bits",
                    (integers(8, np.uint8, 6, 40 * bits // 8), _AT, _scales(9, 6, 3)),
                    {**_LAST, "bits": bits},
                )
                for bits in (2, 4, 8)
            ),
            Case(
                "zeros",
                (integers(8, np.uint8, 6, 20), _AT, _scales(9, 6, 3), integers(10, np.uint8, 6, 2)),
                _LAST,
            ),
            Case("int4", (integers(8, ml_dtypes.int4, 6, 40), _AT, _scales(9, 6, 3)), _LAST),
            Case(
                "uint4_zeros",
                (
                    integers(8, ml_dtypes.uint4, 6, 40),
                    _AT,
                    _scales(9, 6, 3),
                    integers(10, ml_dtypes.uint4, 6, 3),
                ),
                _LAST,
            ),
            Case(
                "columns",
                (integers(8, ml_dtypes.int4, 40, 6), _AT.astype(np.int32), _scales(9, 3, 6)),
                {"block_size": 16, "quantize_axis": 0, "gather_axis": 1},
            ),
            Case(
                "one_axis",
                (integers(8, ml_dtypes.int4, 40, 6), _AT, _scales(9, 3, 6)),
                {"block_size": 16, "quantize_axis": 0},
            ),
            Case("float8", (_FLOAT8, _AT, _scales(9, 6, 3)), _LAST),
            Case("float8_rows", (_FLOAT8, _AT, _scales(9, 1, 1)), {"block_size": 0, "quantize_axis": 1}),
            Case("lines", (integers(8, np.uint8, 6, 3, 20), _AT[0], _scales(9, 6, 3, 3)), _LAST),
        ),
        kernels=gathered(_gather_axes, _gather_bits),
        bits=4,
        block_size=128,
        gather_axis=0,
        quantize_axis=1,
        needs=(0, 1, 2),
    ),
)
