"""The "triton" kernels of attention: the fused operator's and ONNX's. Declares no operators itself.

What a kernel covers, which scratch it takes and what it is bound to come from one function: it arranges a site's
operands, given arrays or stand-ins of the same shapes and types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._attention import heads_of
from infera_gpu.ops._families import ZERO
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.spec import Array, DType, TensorSpec
from infera_kernels.launch.cudnn import WORKSPACE

if TYPE_CHECKING:
    from infera_kernels.triton.attention import Options
    from infera_kernels.triton.decode_attention import Step


Cache = tuple[Array | None, Array, Array]
"""What is kept, what follows it, and what both become: (batch, heads, sequence, size)."""


@dataclass(frozen=True)
class Arranged:
    """Attention over (..., heads, queries, size); `caches` are made before."""

    q: Array
    k: Array
    v: Array
    out: Array
    options: Options
    masks: Sequence[Array] = ()
    condition: Array | None = None
    lengths: Array | None = None
    sink: Array | None = None
    caches: Sequence[Cache] = field(default_factory=tuple)

    @property
    def operands(self) -> dict[str, Any]:
        """What goes by name to the kernel and to what says whether it takes it."""
        return {"masks": self.masks, "condition": self.condition, "lengths": self.lengths, "sink": self.sink}


Arrange = Callable[[Site, Sequence[Any], Sequence[Any]], Arranged | None]
"""The operands of a site; None where there is no kernel for it."""


def stand_in(spec: TensorSpec | None) -> Array | None:
    """An array of the shape and type without elements of its own."""
    return None if spec is None else np.broadcast_to(np.zeros((), spec.dtype), spec.dims)


def arranged(site: Site, arrange: Arrange) -> Arranged | None:
    """The site's operands as stand-ins."""
    return arrange(site, [*map(stand_in, site.ins)], [*map(stand_in, site.outs)])


def covers(given: Arranged | None) -> bool:
    """Whether the kernels take these operands."""
    from infera_kernels.triton.attention import supports_attention
    from infera_kernels.triton.cache import supports_append

    if given is None or not supports_attention(given.q, given.k, given.v, given.out, **given.operands):
        return False
    return all(supports_append(*cache) for cache in given.caches)


def _step(given: Arranged) -> Step | None:
    """Few new tokens after a past, as one kernel takes them; None where it does not."""
    from infera_kernels.triton.decode_attention import Step, supports_decode

    options, caches = given.options, given.caches
    plain = not given.masks and given.condition is None and given.lengths is None and given.sink is None
    plain = plain and not options.cap and options.left is None and options.ahead is None and options.zero == "unseen"
    if not plain or len(caches) != 2:
        return None
    (past_k, k, present_k), (past_v, v, present_v) = caches
    if past_k is None or past_v is None:
        return None
    before = past_k.shape[2]
    if options.right is not None and (options.right, options.before) != (0, before):
        return None
    q, out = (x[:, :, None] if x.ndim == 4 else x for x in (given.q, given.out))
    step = Step(
        q,
        k,
        v,
        out,
        (past_k, past_v),
        (present_k, present_v),
        keys=present_k.shape[2],
        before=before,
        causal=options.right is not None,
        scale=options.scale,
    )
    return step if supports_decode(step) else None


def step_room(step: Step, site: Site) -> int:
    """Bytes of scratch for a step in one kernel."""
    from infera_kernels.triton.decode_attention import decode_scratch

    return _floats(decode_scratch(step, invariant=site.batch_invariant, tuned=site.tuned))


def _floats(shapes: Iterable[tuple[int, ...]]) -> int:
    """Bytes of scratch of these shapes."""
    return sum(aligned(4 * math.prod(shape)) for shape in shapes)


def room(given: Arranged | None, site: Site) -> int:
    """Bytes of scratch."""
    from infera_kernels.triton.attention import attention_scratch

    assert given is not None
    how: dict[str, Any] = {"invariant": site.batch_invariant, "tuned": site.tuned}
    if step := _step(given):
        return step_room(step, site)
    shapes = attention_scratch(given.q, given.k, given.v, given.out, **how)
    other = WORKSPACE if way_of(given, site) else 0
    return aligned(other) + _floats(shapes)


def way_of(given: Arranged, site: Site) -> int:
    """Which of cuDNN's plans computes it, from 1; 0 where kernels of ours do."""
    from infera_kernels.triton.dnn_attention import attention_way

    others = bool(given.masks) or not all(x is None for x in (given.condition, given.lengths, given.sink))
    tuned = None if site.batch_invariant else site.tuned
    return attention_way(given.q, given.k, given.v, given.out, given.options, others=others, tuned=tuned)


def launches(given: Arranged, io: Buffers, site: Site) -> list[Call]:
    from infera_kernels.triton import attention
    from infera_kernels.triton.cache import append
    from infera_kernels.triton.decode_attention import decode
    from infera_kernels.triton.dnn_attention import attention_by_cudnn

    how: dict[str, Any] = {"invariant": site.batch_invariant, "tuned": site.tuned}
    if step := _step(given):
        return decode(step, io.launcher, io.scratch, **how)
    calls: list[Call] = []
    for past, new, present in given.caches:
        calls += append(past, new, present, io.launcher, shift=0 if past is None else past.shape[2])
    q, k, v, out = given.q, given.k, given.v, given.out
    if way := way_of(given, site):
        workspace = io.scratch((WORKSPACE,), np.uint8)
        call = attention_by_cudnn(q, k, v, out, io.launcher, given.options, way, workspace, site.tuned)
        if call is not None:
            for shape in attention.attention_scratch(q, k, v, out, **how):
                io.scratch(shape)
            return [*calls, call]
    how |= given.operands
    return [*calls, *attention.attention(q, k, v, out, io.launcher, io.scratch, given.options, **how)]


def attending(arrange: Arrange, *, strided_out: bool = False) -> Kernels:
    """The kernels of an operator whose operands need no arithmetic before."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        given = arrange(site, io.ins, io.outs)
        assert given is not None
        return launches(given, io, site)

    return kernels(
        bind,
        lambda site: covers(arranged(site, arrange)),
        inplace=(),
        strided=True,
        strided_out=strided_out,
        workspace=lambda site: room(arranged(site, arrange), site),
    )


def apart(x: Array, heads: int, repeats: int) -> Array:
    """(..., heads, rows, size) as (..., keys' heads, repeats, rows, size): a view. One head goes for all."""
    if x.ndim < 3:
        return x
    split = (heads // repeats, repeats) if x.shape[-3] == heads else (1, 1)
    return x.reshape(*x.shape[:-3], *split, *x.shape[-2:])


# ---- infera.Attention


def fused(repeats_of: Callable[[Site], int | None]) -> Kernels:
    """The kernels of the fused operator; `repeats_of` says how often heads of keys and values are repeated."""

    def arrange(site: Site, ins: Sequence[Any], outs: Sequence[Any]) -> Arranged | None:
        from infera_kernels.triton.attention import Options

        attrs, (q, k, v), (out,) = site.attrs, ins[:3], outs
        if not attrs["swap_keys"]:
            k = k.swapaxes(-1, -2)
        if attrs["heads_last"]:
            out = out.swapaxes(1, 2)
        masks, condition = [ins[i] for i in (3, 5) if site.has(i)], ins[4] if site.has(4) else None
        repeats = repeats_of(site)
        if attrs["repeated"] and repeats is not None:
            heads = q.shape[1]
            q, out, *masks = (apart(x, heads, repeats) for x in (q, out, *masks))
            condition = None if condition is None else apart(condition, heads, repeats)
            k, v = k[:, :, None], v[:, :, None]
        options = Options(
            scale=float(attrs["scale"]),
            cap=float(attrs["cap"]),
            fill=_as_stored(attrs["fill"], q.dtype),
            hidden=bool(attrs["fill_where"]),
            zero=ZERO[attrs["guarded"]],
        )
        return Arranged(q, k, v, out, options, masks, condition)

    return attending(arrange, strided_out=True)


def _as_stored(value: float, dtype: DType) -> float:
    """The value in that type: one beyond it is infinite."""
    with np.errstate(over="ignore"):
        return float(dtype.type(value))


# ---- ONNX


def _arrange_onnx(site: Site, ins: Sequence[Any], outs: Sequence[Any]) -> Arranged | None:
    """No scores wanted, weights in float32 or less, a mask for all keys, a past that comes out continued."""
    from infera_kernels.triton.attention import Options

    attrs, (q, k, v), (out, *presents) = site.attrs, ins[:3], outs
    if len(site.node.outputs) > 3 or attrs["softmax_precision"] not in (None, 0, 1, 10, 16):
        return None
    if q.ndim == 3:
        heads, groups = int(attrs["q_num_heads"]), int(attrs["kv_num_heads"])
        q, k, v, out = heads_of(q, heads), heads_of(k, groups), heads_of(v, groups), heads_of(out, heads)
    past = [ins[i] for i in (4, 5) if site.has(i)]
    if past and len(presents) < 2:
        return None
    caches = joined(past, (k, v), presents)
    before = past[0].shape[2] if past else 0
    if past:
        k, v = presents
    mask = ins[3] if site.has(3) else None
    if mask is not None and (mask.ndim < 2 or mask.shape[-1] != k.shape[2]):
        return None
    heads, queries, size = q.shape[1:]
    repeats = heads // k.shape[1]
    left, right = (int(attrs.get(f"{side}_window_size", -1)) for side in ("left", "right"))
    lengths = ins[6].reshape(-1, 1, 1, 1, 1) if site.has(6) else None
    options = Options(
        scale=1 / math.sqrt(size) if attrs["scale"] is None else float(attrs["scale"]),
        cap=float(attrs["softcap"]),
        zero="unseen",
        left=left if left >= 0 else None,
        right=0 if attrs["is_causal"] else right if right >= 0 else None,
        before=before if lengths is None else -queries,
        from_end=lengths is not None,
    )
    q, out = apart(q, heads, repeats), apart(out, heads, repeats)
    mask = None if mask is None else apart(mask, heads, repeats)
    seen = mask is not None and mask.dtype == np.bool_
    masks, condition = ([], mask) if seen or mask is None else ([mask], None)
    return Arranged(q, k[:, :, None], v[:, :, None], out, options, masks, condition, lengths, caches=caches)


def joined(past: Sequence[Array], new: Sequence[Array], presents: Sequence[Array]) -> list[Cache]:
    """Keys and values that come out: the past where there is one, and what is new."""
    return [(p, n, out) for p, n, out in zip(past or (None, None), new, presents, strict=False)]


ATTENTION = attending(_arrange_onnx)

OPS: tuple[Op, ...] = ()
