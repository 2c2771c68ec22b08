"""The CPU kernels of ONNX's Attention and onnxruntime's MultiHeadAttention. Declares no operators itself."""

from __future__ import annotations

import math

import numpy as np

from infera_gpu.op import Buffers, Call, Kernel, Site
from infera_gpu.spec import Array
from infera_kernels.cpu import attention as cpu
from infera_kernels.cpu.elementwise import call, const, copy
from infera_kernels.cpu.matmul import epilogue, matmul


def _plain(site: Site, masks: tuple[int, ...]) -> bool:
    """Whether everything but a boolean mask is float32 or float64 of one type, and nothing is empty."""
    dtype = site.spec(0).dtype
    specs = [*(s for i, s in enumerate(site.ins) if s is not None and i not in masks), *site.outs]
    return dtype in (np.float32, np.float64) and all(s.dtype == dtype and s.size for s in specs)


def heads_of(x: Array, heads: int) -> Array:
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
        q, k, v, out = heads_of(q, heads), heads_of(k, groups), heads_of(v, groups), heads_of(out, heads)
    groups = k.shape[1]
    past = [io.ins[i] if site.has(i) else None for i in (4, 5)]
    (k, calls), (v, more) = (_continued(*x, io) for x in zip(past, (k, v), presents, strict=False))
    mask = io.ins[3] if site.has(3) else None
    if mask is not None and mask.ndim == 4:
        mask = _grouped(mask, groups)
    scale = attrs["scale"]
    options = cpu.Options(
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        cap=float(attrs["softcap"]),
        fill=-np.inf,
        zero="" if mask is None and not attrs["is_causal"] else "unseen",
    )
    masks = [] if mask is None else [mask]
    operands = _grouped(q, groups), k[:, :, None].swapaxes(-1, -2), v[:, :, None], _grouped(out, groups)
    if attrs["is_causal"]:
        before = 0 if past[0] is None else past[0].shape[2]
        first, parts = cpu.causal(*operands, io.scratch, options, before=before, masks=masks, parts=io.threads)
    else:
        seen = mask is not None and mask.dtype == np.bool_
        first, parts = cpu.attention(
            *operands,
            io.scratch,
            options,
            masks=[] if seen else masks,
            condition=mask if seen else None,
            parts=io.threads,
        )
    return [*calls, *more, *first, *io.parallel(parts)]


def _takes(site: Site) -> bool:
    """No windows, no scores wanted, a mask for all keys; with is_causal no boolean one."""
    attrs = site.attrs
    if attrs["softmax_precision"] or site.has(6) or len(site.node.outputs) > 3:
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


def _attend(site: Site, io: Buffers, q: Array, k: Array, v: Array, *, padding: int, extra: int) -> list[Call]:
    """Attention of heads, into output 0. Input `padding` is 0 at keys that are none, input `extra` is added."""
    calls: list[Call] = []
    masks = [io.ins[extra]] if site.has(extra) else []
    if site.has(padding):
        given, fill = io.ins[padding], site.attrs["mask_filter_value"]
        mask = io.scratch((given.shape[0], 1, 1, given.shape[1]), q.dtype)
        hidden = io.scratch(given.shape, np.bool_)
        calls += [
            call(np.equal, given, const(0, given), hidden),
            copy(mask[:, 0, 0], hidden),
            call(np.multiply, mask, const(-10000.0 if fill is None else fill, mask), mask),
        ]
        masks.append(mask)
    options = cpu.Options(
        scale=site.attrs["scale"] or 1 / math.sqrt(q.shape[-1]), zero="unseen" if site.has(extra) else ""
    )
    out = heads_of(io.outs[0], q.shape[1])
    first, parts = cpu.attention(q, k.swapaxes(-1, -2), v, out, io.scratch, options, masks=masks, parts=io.threads)
    return [*calls, *first, *io.parallel(parts)]


def _masks_fit(site: Site, keys: tuple[int, ...], padding: int, extra: int) -> bool:
    """No order among tokens; padding given for every key, a number for it, and no mask to be added beside it."""
    fill = site.attrs["mask_filter_value"]
    if site.attrs["unidirectional"] or (site.has(padding) and site.has(extra)):
        return False
    if fill is not None and not math.isfinite(fill):
        return False
    return not site.has(padding) or (site.spec(padding).dims == keys and site.spec(padding).dtype == np.int32)


def _bind_mha(site: Site, io: Buffers) -> list[Call]:
    heads, calls = int(site.attrs["num_heads"]), list[Call]()
    given = list(io.ins[:3])
    if site.has(3):
        widths = np.cumsum([x.shape[2] for x in given])[:-1]
        for i, bias in enumerate(np.split(io.ins[3], widths)):
            biased = io.scratch(given[i].shape, given[i].dtype)
            calls.append(call(np.add, given[i], bias, biased))
            given[i] = biased
    q, k, v = (heads_of(x, heads) for x in given)
    calls += [copy(present, x) for present, x in zip(io.outs[1:], (k, v), strict=False)]
    return calls + _attend(site, io, q, k, v, padding=4, extra=5)


def _takes_mha(site: Site) -> bool:
    """Three inputs apart and no past."""
    apart = all(site.has(i) and site.spec(i).ndim == 3 for i in range(3))
    if not apart or site.has(6) or site.has(7) or len(site.node.outputs) > 3:
        return False
    return _plain(site, (4,)) and _masks_fit(site, site.spec(1).dims[:2], 4, 5)


MULTI_HEAD = {"cpu": Kernel(_bind_mha, _takes_mha, strided=True)}


def _bind_merged(site: Site, io: Buffers) -> list[Call]:
    (x, w), heads = io.ins[:2], int(site.attrs["num_heads"])
    product = io.scratch((*x.shape[:2], w.shape[1]), x.dtype)
    calls = matmul(x, w, product, io.scratch)
    calls += epilogue(product, io.scratch, bias=io.ins[2] if site.has(2) else None)
    size = site.outs[0].dims[2]
    each = (w.shape[1] - size) // 2
    q, k, v = (heads_of(p, heads) for p in np.split(product, (each, 2 * each), axis=2))
    calls += [copy(present[i], x) for present in io.outs[1:] for i, x in enumerate((k, v))]
    return calls + _attend(site, io, q, k, v, padding=3, extra=5)


def _takes_merged(site: Site) -> bool:
    """No past; where keys and values come out, they are of one width."""
    return not site.has(4) and _plain(site, (3,)) and _masks_fit(site, site.spec(0).dims[:2], 3, 5)


MERGED = {"cpu": Kernel(_bind_merged, _takes_merged, strided=True)}
