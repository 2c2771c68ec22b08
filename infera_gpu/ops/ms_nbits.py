"""com.microsoft: weights of few bits, quantised in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._ms import ms_op, wide
from infera_gpu.spec import Array, TensorSpec


def _nbits_sizes(site: Site) -> tuple[int, int, int, int, int]:
    n, k, bits, block = (int(site.attrs[x]) for x in ("N", "K", "bits", "block_size"))
    if bits not in (2, 4, 8) or block < 16 or block & (block - 1) or n < 1 or k < 1:
        raise site.fail(f"N {n}, K {k}, bits {bits}, block_size {block} are not valid")
    blocks = -(-k // block)
    if site.spec(1).size != n * blocks * block * bits // 8 or site.spec(2).size != n * blocks:
        raise site.fail(f"B {site.spec(1)} and scales {site.spec(2)} do not hold {n} x {blocks} blocks")
    return n, k, bits, block, blocks


def _infer_nbits(site: Site) -> tuple[TensorSpec]:
    n, k, *_ = _nbits_sizes(site)
    if not site.spec(0).ndim or site.spec(0).dims[-1] != k:
        raise site.fail(f"A is {site.spec(0)}, expected {k} elements last")
    return (TensorSpec((*site.spec(0).dims[:-1], n), site.spec(0).dtype),)


def _unpacked(xp: Any, packed: Array, bits: int) -> Array:
    """(..., bytes) -> (..., values): the lowest bits of a byte come first."""
    per = 8 // bits
    shifts = xp.arange(per, dtype=np.uint8) * np.uint8(bits)
    made = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return made.reshape(*packed.shape[:-1], -1)


def _nbits(
    xp: Any, site: Site, a: Array, b: Array, scales: Array, zeros: Array | None = None, *rest: Array | None
) -> Array:
    n, k, bits, _, blocks = _nbits_sizes(site)
    group, bias = (*rest, None, None)[:2]
    if group is not None:
        raise site.fail("g_idx is not supported")
    q = _unpacked(xp, b.reshape(n, blocks, -1), bits).astype(np.float32)
    scale = scales.reshape(n, blocks, 1).astype(np.float32)
    if zeros is None:
        zero: Any = np.float32(1 << (bits - 1))
    elif zeros.dtype == np.uint8:
        zero = _unpacked(xp, zeros.reshape(n, -1), bits)[:, :blocks, None].astype(np.float32)
    else:
        zero = zeros.reshape(n, blocks, 1).astype(np.float32)
    w = ((q - zero) * scale).reshape(n, -1)[:, :k]
    made = wide(a) @ w.T
    return (made if bias is None else made + wide(bias)).astype(a.dtype)


_B4 = np.random.default_rng(1).integers(0, 256, (5, 2, 16)).astype(np.uint8)
_S4 = np.random.default_rng(2).uniform(0.01, 0.1, (5, 2)).astype(np.float32)
_Z4 = np.random.default_rng(3).integers(0, 256, (5, 1)).astype(np.uint8)
_NB = {"N": 5, "K": 50, "bits": 4, "block_size": 32}
OPS: tuple[Op, ...] = (
    ms_op(
        "MatMulNBits",
        _infer_nbits,
        _nbits,
        (Case("symmetric", (f32(3, 50), _B4, _S4), _NB), Case("zeros", (f32(2, 1, 50), _B4, _S4, _Z4), _NB)),
        K=REQUIRED,
        N=REQUIRED,
        accuracy_level=0,
        bits=4,
        block_size=REQUIRED,
        weight_prepacked=0,
        needs=(0, 1, 2),
    ),
)
