"""The "triton" kernels of products with weights of few bits. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.ops._triton_normalized import first, normalizes_first, scratch_first
from infera_gpu.spec import Array
from infera_kernels.portable.quant import unpacked

_RESIDUAL, _GAIN = 6, 7
"""Inputs of FusedMatMulNBits alone: what is added, and what normalised rows are multiplied by."""

Sizes = Callable[[Site], tuple[int, int, int, int, int]]
"""N, K, bits, the length of a block, and how many there are along K."""


def _rows(site: Site) -> int:
    return math.prod(site.spec(0).dims[:-1])


def nbits(sizes: Sizes) -> Kernels:
    """The kernels of MatMulNBits and FusedMatMulNBits: constant weights whose blocks follow each other in order. Few
    rows are normalised by the product, others before it."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.nbits import supports_nbits

        known = all(site.value(i) is not None for i in (1, 3) if site.has(i))
        bias = site.spec(5) if site.has(5) else None
        *_, block, _ = sizes(site)
        fits = block <= 4096 and site.spec(1).dtype == np.uint8
        product = known and fits and not site.has(4)
        product = product and supports_nbits(site.spec(0), site.spec(2), site.outs[0], bias)
        whole = not site.has(_RESIDUAL) or site.spec(_RESIDUAL) == site.outs[0]
        return product and whole and (not site.has(_GAIN) or normalizes_first(site, _GAIN))

    def wide_shape(site: Site) -> tuple[int, int] | None:
        """The shape of widened weights, None for few rows."""
        from infera_kernels.triton.nbits import FEW_ROWS, wide_columns

        n, k, *_ = sizes(site)
        if _rows(site) <= FEW_ROWS and not site.batch_invariant:
            return None
        return wide_columns(n, k, site.spec(0).dtype.itemsize), k

    def workspace(site: Site) -> int:
        shape = wide_shape(site)
        widened = 0 if shape is None else aligned(math.prod(shape) * site.spec(0).dtype.itemsize)
        return widened + (scratch_first(site, within=shape is None) if site.has(_GAIN) else 0)

    def zeros(site: Site, io: Buffers) -> Array | None:
        """Zero points (N, blocks), those of integers as float32."""
        n, _, bits, _, blocks = sizes(site)
        if not site.has(3):
            return None
        if site.spec(3).dtype != np.uint8:
            return io.ins[3].reshape(n, blocks)

        def build(packed: HostArray) -> HostArray:
            each: HostArray = unpacked(np, packed.reshape(n, -1), bits)[:, :blocks].astype(np.float32)
            return np.ascontiguousarray(each)

        return io.pack(3, f"{bits} bits of {n}", build)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.nbits import Weight, nbits_matmul, repacked

        n, k, bits, _, blocks = sizes(site)
        packed = io.pack(1, f"{bits} bits in {blocks}", lambda w: repacked(w.reshape(n, -1), blocks, bits))
        weight = Weight(packed, io.ins[2].reshape(n, blocks), zeros(site, io), bits)
        shape = wide_shape(site)
        wide = None if shape is None else io.scratch(shape, site.spec(0).dtype)
        bias = io.ins[5] if site.has(5) else None
        residual = io.ins[_RESIDUAL].reshape(-1, n) if site.has(_RESIDUAL) else None
        within = wide is None
        x, how, calls = first(site, io, _GAIN, within=within) if site.has(_GAIN) else (io.ins[0], {}, [])
        product = nbits_matmul(
            x.reshape(-1, k),
            weight,
            bias,
            io.outs[0].reshape(-1, n),
            wide,
            io.launcher,
            residual=residual,
            invariant=site.batch_invariant,
            tuned=site.tuned,
            **how,
        )
        return [*calls, *product]

    return kernels(bind, supports, inplace=(), strided=False, workspace=workspace)


def gathered(axes: Callable[[Site], tuple[int, int]], bits: Callable[[Site], int]) -> Kernels:
    """The kernels of GatherBlockQuantized: rows of a table whose blocks run along its last axis."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.gather_blocks import supports_gather_blocks

        zero = site.spec(3) if site.has(3) else None
        rows = axes(site) == (0, site.spec(0).ndim - 1) and site.spec(0).ndim > 1
        return rows and supports_gather_blocks(site.spec(0), site.spec(1), site.spec(2), zero, site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.gather_blocks import gather_blocks

        table, indices, scale, zero = (*io.ins, None)[:4]
        options = {"bits": bits(site), "block": int(site.attrs["block_size"])}
        return gather_blocks(table, indices, scale, zero, io.outs[0], io.launcher, **options)

    return kernels(bind, supports, inplace=(), strided=False)


OPS: tuple[Op, ...] = ()
