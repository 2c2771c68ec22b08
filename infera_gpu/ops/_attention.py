"""The CPU kernels of ONNX's Attention and onnxruntime's MultiHeadAttention. Declares no operators itself."""

from __future__ import annotations

import math

import numpy as np

from infera_gpu.op import Buffers, Call, Kernel, Site
from infera_gpu.spec import Array
from infera_kernels.cpu import attention as cpu
from infera_kernels.cpu.elementwise import call, const, copy


def _plain(site: Site, masks: tuple[int, ...]) -> bool:
    """Whether everything but a boolean mask is float32 or float64 of one type, and nothing is empty."""
    dtype = site.spec(0).dtype
    specs = [*(s for i, s in enumerate(site.ins) if s is not None and i not in masks), *site.outs]
    return dtype in (np.float32, np.float64) and all(s.dtype == dtype and s.size for s in specs)


def _heads(x: Array, heads: int) -> Array:
    """(batch, sequence, heads x size) as (batch, heads, sequence, size), without a copy."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _grouped(x: Array, groups: int) -> Array:
    """(batch, heads, ...) as (batch, groups, heads in a group, ...), without a copy; one head goes for all."""
    heads = x.shape[1]
    return x[:, :, None] if heads == 1 else x.reshape(x.shape[0], groups, heads // groups, *x.shape[2:], copy=False)


def _continued(past: Array | None, new: Array, present: Array | None, io: Buffers) -> tuple[Array, list[Call]]:
    """Keys or values with those before them, in the output for them where there is one."""
    if past is None:
        return new, [] if present is None else [copy(present, new)]
    length = past.shape[2]
    if present is None:
        present = io.scratch((*new.shape[:2], length + new.shape[2], new.shape[3]), new.dtype)
    return present, [copy(present[:, :, :length], past), copy(present[:, :, length:], new)]


# ---- ONNX


def _bind_attention(site: Site, io: Buffers) -> list[Call]:
    attrs, (q, k, v) = site.attrs, io.ins[:3]
    out, presents = io.outs[0], [*io.outs[1:], None, None]
    if q.ndim == 3:
        heads, groups = int(attrs["q_num_heads"]), int(attrs["kv_num_heads"])
        q, k, v, out = _heads(q, heads), _heads(k, groups), _heads(v, groups), _heads(out, heads)
    groups = k.shape[1]
    past = [io.ins[i] if site.has(i) else None for i in (4, 5)]
    (k, calls), (v, more) = (_continued(*x, io) for x in zip(past, (k, v), presents, strict=False))
    mask = io.ins[3] if site.has(3) else None
    if mask is not None and mask.ndim == 4:
        mask = _grouped(mask, groups)
    scale = attrs["scale"]
    options = cpu.Options(
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        fill=-np.inf,
        zero="" if mask is None and not attrs["is_causal"] else "unseen",
    )
    operands = _grouped(q, groups), k[:, :, None].swapaxes(-1, -2), v[:, :, None], _grouped(out, groups)
    if attrs["is_causal"]:
        before = 0 if past[0] is None else past[0].shape[2]
        first, parts = cpu.causal(*operands, io.scratch, options, before=before, mask=mask, parts=io.threads)
    else:
        seen = mask is not None and mask.dtype == np.bool_
        first, parts = cpu.attention(
            *operands,
            io.scratch,
            options,
            mask=None if seen else mask,
            condition=mask if seen else None,
            parts=io.threads,
        )
    return [*calls, *more, *first, *io.parallel(parts)]


def _takes(site: Site) -> bool:
    """No caps, no windows, no scores wanted, a mask for all keys; with is_causal no boolean one."""
    attrs = site.attrs
    if attrs["softcap"] or attrs["softmax_precision"] or site.has(6) or len(site.node.outputs) > 3:
        return False
    if max(attrs.get("left_window_size", -1), attrs.get("right_window_size", -1)) >= 0 or not _plain(site, (3,)):
        return False
    if not site.has(3):
        return True
    mask, dtype = site.spec(3), site.spec(0).dtype
    keys = site.spec(1).dims[-2] + (site.spec(4).dims[2] if site.has(4) else 0)
    whole = mask.ndim in (2, 4) and mask.dims[-1] == keys
    return whole and (mask.dtype == dtype or (mask.dtype == np.bool_ and not attrs["is_causal"]))


ATTENTION = {"cpu": Kernel(_bind_attention, _takes, strided=True)}


# ---- com.microsoft


def _bind_mha(site: Site, io: Buffers) -> list[Call]:
    heads, calls = int(site.attrs["num_heads"]), list[Call]()
    given = list(io.ins[:3])
    if site.has(3):
        widths = np.cumsum([x.shape[2] for x in given])[:-1]
        for i, bias in enumerate(np.split(io.ins[3], widths)):
            sum_ = io.scratch(given[i].shape, given[i].dtype)
            calls.append(call(np.add, given[i], bias, sum_))
            given[i] = sum_
    q, k, v = (_heads(x, heads) for x in given)
    calls += [copy(present, x) for present, x in zip(io.outs[1:], (k, v), strict=False)]
    mask = io.ins[5] if site.has(5) else None
    if site.has(4):
        padding = io.ins[4]
        mask = io.scratch((padding.shape[0], 1, 1, padding.shape[1]), q.dtype)
        hidden = io.scratch(padding.shape, np.bool_)
        fill = site.attrs["mask_filter_value"]
        calls += [
            call(np.equal, padding, const(0, padding), hidden),
            copy(mask[:, 0, 0], hidden),
            call(np.multiply, mask, const(-10000.0 if fill is None else fill, mask), mask),
        ]
    scale = site.attrs["scale"] or 1 / math.sqrt(q.shape[-1])
    options = cpu.Options(scale=scale, zero="" if mask is None else "unseen")
    first, parts = cpu.attention(
        q, k.swapaxes(-1, -2), v, _heads(io.outs[0], heads), io.scratch, options, mask=mask, parts=io.threads
    )
    return [*calls, *first, *io.parallel(parts)]


def _takes_mha(site: Site) -> bool:
    """Three inputs apart, no past, one mask at most: of keys, or to be added."""
    if site.attrs["unidirectional"] or any(site.has(i) for i in (6, 7)) or (site.has(4) and site.has(5)):
        return False
    apart = all(site.has(i) and site.spec(i).ndim == 3 for i in range(3))
    if not apart or len(site.node.outputs) > 3 or not _plain(site, (4,)):
        return False
    return not site.has(4) or (site.spec(4).dims == site.spec(1).dims[:2] and site.spec(4).dtype == np.int32)


MULTI_HEAD = {"cpu": Kernel(_bind_mha, _takes_mha, strided=True)}
