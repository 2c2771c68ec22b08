"""com.microsoft: activations and normalisations that optimisers fuse, and model builders write."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops import _triton_elementwise as _triton
from infera_gpu.ops._families import CHAIN_NS, elementwise, floating, split_of
from infera_gpu.ops._ms import F32, ms_op, wide
from infera_gpu.ops._triton_embed import EMBED
from infera_gpu.ops._triton_norm import SIMPLIFIED, skip_norm
from infera_gpu.ops.elementwise import single
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import norm as cpu
from infera_kernels.cpu.activation import activation as cpu_activation
from infera_kernels.portable.activation import activation
from infera_kernels.portable.norm import affine, standardized

# ---- activations


def _activation(name: str, cases: tuple[Case, ...], function: str, needs: tuple[int, ...] = (), **attrs: Any) -> Op:
    """`function` of portable.activation, of the input and a bias where there is one."""

    def compute(xp: Any, site: Site, x: Array, bias: Array | None = None) -> Array:
        return activation(xp, function, x if bias is None else x + bias, **site.attrs)

    def bind(site: Site, io: Buffers) -> list[Call]:
        (out,) = io.outs
        added = [(np.add, (*io.ins, out))] if site.has(1) else []
        return [*added, *cpu_activation(function, out if added else io.ins[0], out, io.scratch, **site.attrs)]

    kernels = elementwise(bind, supports=floating if attrs else single, ns=CHAIN_NS)
    kernels |= _triton.activation(function) if attrs else _triton.of_sum(function)
    return ms_op(name, _infer_activation, compute, cases, kernels=kernels, needs=needs, **attrs)


def _infer_activation(site: Site) -> tuple[TensorSpec]:
    x = site.spec(0)
    if site.has(1) and site.spec(1).dims != x.dims[-1:]:
        raise site.fail(f"bias is {site.spec(1)}, expected one value for each of the last axis of {x}")
    return (x,)


_PLAIN, _BIAS = Case("plain", (f32(3, 5),)), Case("bias", (f32(2, 3, 5), f32(5)))
_LONG = Case("past_block", (f32(2, 3, 12001),), low=-6, high=6)
_ACTIVATIONS = (
    _activation("Gelu", (_PLAIN, _LONG, Case("empty", (f32(0, 2),))), "gelu"),
    _activation("BiasGelu", (_BIAS, Case("past_block", (f32(3, 24001), f32(24001)))), "gelu", needs=(1,)),
    _activation("FastGelu", (_PLAIN, _BIAS, _LONG), "gelu_tanh"),
    _activation("QuickGelu", (_PLAIN, _LONG, Case("one", (f32(3, 5),), {"alpha": 1.0})), "swish", alpha=1.702),
)


# ---- normalisation


def _infer_skip(site: Site) -> tuple[TensorSpec, ...]:
    x, skip = site.spec(0), site.spec(1)
    if x.ndim not in (2, 3) or skip.dims[-2:] != x.dims[-2:] or site.spec(2).dims != x.dims[-1:]:
        raise site.fail(f"input {x}, skip {skip} and gamma {site.spec(2)} do not fit each other")
    for i in (3, 4):
        if site.has(i) and site.spec(i).dims != x.dims[-1:]:
            raise site.fail(f"input {i} is {site.spec(i)}, expected {x.dims[-1]} values")
    rows = TensorSpec((*x.dims[:-1], 1), F32)
    return (x, rows, rows, x)[: len(site.node.outputs)]


def _skip(simple: bool) -> Any:
    def compute(xp: Any, site: Site, x: Array, skip: Array, gamma: Array, *rest: Array | None) -> tuple[Array, ...]:
        beta, bias = (None, *rest, None)[:2] if simple else (*rest, None, None)[:2]
        total = wide(x) + wide(skip)
        total = total if bias is None else total + wide(bias)
        made, mean, inverse = standardized(xp, total, (-1,), site.attrs["epsilon"], center=not simple)
        mean = xp.broadcast_to(mean, inverse.shape)
        made = affine(made, gamma, beta, x.dtype)
        return (made, mean.astype(F32), inverse.astype(F32), total.astype(x.dtype))[: len(site.node.outputs)]

    return compute


def _single_precision(site: Site) -> bool:
    return site.spec(0).size > 0 and all(s is None or s.dtype == F32 for s in site.ins)


def _skip_kernels(simple: bool) -> dict[str, Kernel]:
    def bind(site: Site, io: Buffers) -> list[Call]:
        x, skip, gamma, *rest = io.ins
        beta, bias = (None, *rest, None)[:2] if simple else (*rest, None, None)[:2]
        made, mean, inverse, total = (*io.outs, None, None, None)[:4]
        total = made if total is None else total
        calls: list[Call] = [(np.add, (x, skip, total))]
        if bias is not None:
            calls.append((np.add, (total, bias, total)))
        if simple and mean is not None:
            calls.append((np.copyto, (mean, np.float32(0))))
        flat = made.reshape(-1, made.shape[-1])
        return calls + cpu.standardize(
            total.reshape(flat.shape),
            flat,
            io.scratch,
            split_of(io),
            epsilon=site.attrs["epsilon"],
            center=not simple,
            mean=None if simple or mean is None else mean.reshape(-1),
            inverse=None if inverse is None else inverse.reshape(-1),
            finish=lambda part: cpu.scaled(flat[part], gamma, beta),
        )

    return {"cpu": Kernel(bind, _single_precision, inplace=(0, 1))} | skip_norm(center=not simple)


def _infer_simplified(site: Site) -> tuple[TensorSpec, ...]:
    x = site.spec(0)
    if not x.ndim or not x.dims[-1] or site.spec(1).dims != x.dims[-1:]:
        raise site.fail(f"X {x} and scale {site.spec(1)} do not fit each other")
    if site.attrs["axis"] not in (-1, x.ndim - 1):
        raise site.fail(f"axis is {site.attrs['axis']}, only the last one is supported")
    return (x, TensorSpec((*x.dims[:-1], 1), F32))[: len(site.node.outputs)]


def _simplified(xp: Any, site: Site, x: Array, scale: Array) -> tuple[Array, ...]:
    made, _, inverse = standardized(xp, x, (-1,), site.attrs["epsilon"], center=False)
    return (affine(made, scale, None, x.dtype), inverse.astype(F32))[: len(site.node.outputs)]


def _bind_simplified(site: Site, io: Buffers) -> list[Call]:
    made, inverse = (*io.outs, None)[:2]
    flat = made.reshape(-1, made.shape[-1])
    return cpu.standardize(
        io.ins[0].reshape(flat.shape),
        flat,
        io.scratch,
        split_of(io),
        epsilon=site.attrs["epsilon"],
        center=False,
        inverse=None if inverse is None else inverse.reshape(-1),
        finish=lambda part: cpu.scaled(flat[part], io.ins[1], None),
    )


def _infer_embed(site: Site) -> tuple[TensorSpec, ...]:
    ids, words = site.spec(0), site.spec(2)
    if ids.ndim != 2 or words.ndim != 2 or {site.spec(i).dims for i in (5, 6)} != {words.dims[1:]}:
        raise site.fail(f"input_ids {ids} and word_embedding {words}: expected two axes each")
    for i in (3, 4):
        if site.has(i) and (site.spec(i).ndim != 2 or site.spec(i).dims[1] != words.dims[1]):
            raise site.fail(f"input {i} is {site.spec(i)}, expected rows of {words.dims[1]}")
    for i in (1, 7):
        if site.has(i) and site.spec(i).dims != ids.dims:
            raise site.fail(f"input {i} is {site.spec(i)}, expected the shape of input_ids, {ids}")
    if site.has(8) and site.spec(8).dims not in (ids.dims, (1, ids.dims[1])):
        raise site.fail(f"position_ids are {site.spec(8)}, expected the shape of input_ids, {ids}")
    if not site.has(8) and ids.dims[1] > site.spec(3).dims[0]:
        raise site.fail(f"input_ids {ids} are more than the positions of {site.spec(3)}")
    made = TensorSpec((*ids.dims, words.dims[1]), words.dtype)
    return made, TensorSpec((ids.dims[0],), np.dtype(np.int32)), made


def _embed(
    xp: Any, site: Site, ids: Array, segments: Array | None, words: Array, places: Array, *rest: Array | None
) -> tuple[Array, ...]:
    kinds, gamma, beta, mask, at = (*rest, None, None, None, None, None)[:5]
    position = xp.arange(ids.shape[1])[None] if at is None else at
    for index, table in ((ids, words), (position, places), (segments, kinds)):
        if index is None or table is None:
            continue
        if xp is np and index.size and not 0 <= index.min() <= index.max() < len(table):
            raise IndexError(f"an index is out of range for {len(table)} embeddings")
    total = words[ids] + places[position]
    if segments is not None and kinds is not None:
        total = total + kinds[segments]
    made, _, _ = standardized(xp, total, (-1,), site.attrs["epsilon"])
    counts = xp.zeros(ids.shape[0], np.int32) if mask is None else mask.sum(axis=1).astype(np.int32)
    return affine(made, gamma, beta, words.dtype), counts, total.astype(words.dtype)


_TOKENS = np.array([[1, 4, 2], [0, 3, 3]], np.int32)
_NORMS = (
    ms_op(
        "SkipLayerNormalization",
        _infer_skip,
        _skip(False),
        (
            Case("beta", (f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8))),
            Case("bias", (f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8), f32(8))),
            Case("shared", (f32(2, 3, 8), f32(3, 8), f32(8))),
            Case("sum", (f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8), f32(8)), n_outs=4),
            Case("past_block", (f32(61, 1101), f32(61, 1101), f32(1101), f32(1101))),
        ),
        kernels=_skip_kernels(simple=False),
        epsilon=1e-12,
        needs=(0, 1, 2),
    ),
    ms_op(
        "SkipSimplifiedLayerNormalization",
        _infer_skip,
        _skip(True),
        (
            Case("plain", (f32(2, 3, 8), f32(2, 3, 8), f32(8))),
            Case("bias", (f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8))),
            Case("sum", (f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8)), n_outs=4),
        ),
        kernels=_skip_kernels(simple=True),
        epsilon=1e-12,
        needs=(0, 1, 2),
    ),
    ms_op(
        "SimplifiedLayerNormalization",
        _infer_simplified,
        _simplified,
        (
            Case("plain", (f32(2, 3, 8), f32(8))),
            Case("statistics", (f32(130, 301), f32(301)), {"epsilon": 0.1}, n_outs=2),
        ),
        domain="",
        kernels={"cpu": Kernel(_bind_simplified, _single_precision, inplace=(0,))} | SIMPLIFIED,
        axis=-1,
        epsilon=1e-5,
        stash_type=1,
    ),
    ms_op(
        "EmbedLayerNormalization",
        _infer_embed,
        _embed,
        (
            Case("plain", (_TOKENS, None, f32(6, 8), f32(5, 8), None, f32(8), f32(8)), n_outs=2),
            Case("segments", (_TOKENS, _TOKENS % 2, f32(6, 8), f32(5, 8), f32(2, 8), f32(8), f32(8)), n_outs=2),
            Case(
                "mask",
                (
                    *(_TOKENS, None, f32(6, 300), f32(5, 300), None, f32(300), f32(300)),
                    *(np.array([[1, 1, 0], [1, 1, 1]], np.int32), np.array([[2, 0, 4]], np.int32)),
                ),
                n_outs=3,
            ),
        ),
        kernels=EMBED,
        epsilon=1e-12,
        mask_index_type=0,
        needs=(0, 2, 3, 5, 6),
    ),
)

OPS: tuple[Op, ...] = (*_ACTIVATIONS, *_NORMS)
