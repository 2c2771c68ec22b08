"""The "triton" kernels of onnxruntime's MultiHeadAttention and Attention. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._attention import heads_of
from infera_gpu.ops._triton import kernels
from infera_gpu.ops._triton_attention import Arranged, arranged, covers, joined, launches, room, stand_in
from infera_gpu.spec import Array, TensorSpec


def _masked(
    site: Site, operands: tuple[Array, Array, Array, Array], padding: Array | None, extra: Array | None
) -> Arranged | None:
    """Attention of heads. `padding` is 0 at keys that are none, `extra` is added; a mask of lengths has no kernel."""
    from infera_kernels.triton.attention import Options

    q, k, v, out = operands
    queries, keys = q.shape[2], k.shape[2]
    given = site.attrs["mask_filter_value"]
    fill = -10000.0 if given is None else float(given)
    if padding is not None:
        if padding.ndim not in (2, 3) or (padding.shape[0], padding.shape[-1]) != (q.shape[0], keys):
            return None
        padding = padding.reshape(q.shape[0], 1, -1, keys)
    options = Options(scale=site.attrs["scale"] or 1 / math.sqrt(q.shape[3]), fill=fill, added=True, zero="unseen")
    if site.attrs["unidirectional"]:
        options = replace(options, right=0, before=keys - queries, ahead=fill)
    return Arranged(q, k, v, out, options, [] if extra is None else [extra], padding)


def _inputs(site: Site, ins: Sequence[Any], count: int) -> list[Any]:
    return [ins[i] if site.has(i) else None for i in range(count)]


def _continued(
    made: Arranged | None, past: Sequence[Array], new: Sequence[Array], presents: Sequence[Array]
) -> Arranged | None:
    return None if made is None else replace(made, caches=joined(past, new, presents))


# ---- MultiHeadAttention


def _arrange_heads(site: Site, ins: Sequence[Any], outs: Sequence[Any]) -> Arranged | None:
    """Queries, keys and values apart or packed, in heads already or not; a past that comes out continued."""
    (q, k, v, _, padding, extra, *past), (out, *presents) = _inputs(site, ins, 8), outs
    past = [x for x in past if x is not None]
    if len(site.node.outputs) > 3 or (past and len(presents) < 2):
        return None
    heads = int(site.attrs["num_heads"])
    if q.ndim == 5:
        q, k, v = (q[:, :, :, i].swapaxes(1, 2) for i in range(3))
    else:
        if k.ndim == 5:
            k, v = (k[:, :, :, i].swapaxes(1, 2) for i in range(2))
        q, k, v = (x if x.ndim == 4 else heads_of(x, heads) for x in (heads_of(q, heads), k, v))
    new = k, v
    if past:
        k, v = presents
    made = _masked(site, (q, k, v, heads_of(out, heads)), padding, extra)
    return _continued(made, past, new, presents)


def _biased(site: Site) -> int:
    """How many of the first inputs a bias is added to."""
    return sum(site.has(i) and site.spec(i).ndim == 3 for i in range(3)) if site.has(3) else 0


def _supports_heads(site: Site) -> bool:
    from infera_kernels.triton.elementwise import supports_binary

    count, widths = _biased(site), [site.spec(i).dims[-1] for i in range(_biased(site))]
    if site.has(3) and not (count == 3 or (count == 1 and site.spec(1).ndim == 4)):
        return False
    if site.has(3) and (site.spec(3).ndim != 1 or site.spec(3).dims[0] < sum(widths)):
        return False
    sums = all(
        supports_binary("add", site.spec(i), TensorSpec((w,), site.spec(3).dtype), site.spec(i))
        for i, w in enumerate(widths)
    )
    return sums and covers(arranged(site, _arrange_heads))


def _bind_heads(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton import elementwise

    ins, calls, start = list(io.ins), list[Call](), 0
    for i in range(_biased(site)):
        x, width = ins[i], ins[i].shape[2]
        ins[i] = io.scratch(x.shape, x.dtype)
        calls += elementwise.binary("add", x, io.ins[3][start : start + width], ins[i], io.launcher)
        start += width
    given = _arrange_heads(site, ins, io.outs)
    assert given is not None
    return [*calls, *launches(given, io, site)]


def _room_heads(site: Site) -> int:
    sums = sum(aligned(site.spec(i).nbytes) for i in range(_biased(site)))
    return sums + room(arranged(site, _arrange_heads), site)


MULTI_HEAD = kernels(_bind_heads, _supports_heads, inplace=(), strided=True, workspace=_room_heads)


# ---- Attention: the projection, too


def _projection(site: Site) -> TensorSpec:
    """q, k and v side by side."""
    x, w = site.spec(0), site.spec(1)
    return TensorSpec((*x.dims[:2], w.dims[1]), x.dtype)


def _arrange_merged(site: Site, product: Array, ins: Sequence[Any], outs: Sequence[Any]) -> Arranged | None:
    """Attention of the projection's columns."""
    (_, _, _, padding, past, extra), (out, *presents) = _inputs(site, ins, 6), outs
    heads, wide = int(site.attrs["num_heads"]), out.shape[2]
    each = (product.shape[2] - wide) // 2
    q, k, v = (heads_of(product[..., a:b], heads) for a, b in pairwise((0, each, 2 * each, 2 * each + wide)))
    if (past is not None and not presents) or (presents and each != wide):
        return None
    new, before, after = (k, v), [] if past is None else [past[0], past[1]], [p[i] for p in presents for i in (0, 1)]
    if before:
        k, v = after
    made = _masked(site, (q, k, v, heads_of(out, heads)), padding, extra)
    return _continued(made, before, new, after)


def _stood_in(site: Site) -> Arranged | None:
    ins, outs = ([*map(stand_in, specs)] for specs in (site.ins, site.outs))
    return _arrange_merged(site, stand_in(_projection(site)), ins, outs)


def _supports_merged(site: Site) -> bool:
    from infera_kernels.triton.matmul import supports_matmul

    bias = site.spec(2) if site.has(2) else None
    return supports_matmul(site.spec(0), site.spec(1), _projection(site), bias) and covers(_stood_in(site))


def _bind_merged(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.matmul import matmul

    spec = _projection(site)
    product = io.scratch(spec.dims, spec.dtype)
    bias = io.ins[2] if site.has(2) else None
    how: dict[str, Any] = {"bias": bias, "invariant": site.batch_invariant, "tuned": site.tuned}
    calls = matmul(io.ins[0], io.ins[1], product, io.launcher, **how)
    given = _arrange_merged(site, product, io.ins, io.outs)
    assert given is not None
    return [*calls, *launches(given, io, site)]


MERGED = kernels(
    _bind_merged,
    _supports_merged,
    inplace=(),
    strided=False,
    workspace=lambda site: aligned(_projection(site).nbytes) + room(_stood_in(site), site),
)

OPS: tuple[Op, ...] = ()
