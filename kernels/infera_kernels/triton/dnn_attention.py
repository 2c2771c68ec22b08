"""Which attention cuDNN may compute, and by which of its plans: one that was measured to be faster than kernels of
ours."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, Typed
from infera_kernels.launch.cudnn import TYPES, Tensor
from infera_kernels.launch.cudnn_graphs import Attention
from infera_kernels.triton.attention import Options
from infera_kernels.triton.attention_kernels import attention_kernel, combine_kernel
from infera_kernels.triton.dnn import Way, asked, ours, ways
from infera_kernels.triton.layout import coalesce, element_strides, name_of
from infera_kernels.triton.tiles import HALF
from infera_kernels.tuning import Family, Tuned, choose

WIDEST = 256
"""Elements of a head: cuDNN's forward kernels have no more."""

SINCE = (9, 10, 2)
"""The release from which on attention is asked for: in the two before it is wrong, as NVIDIA's frontend knows, and
those before that have restrictions which it is for the frontend to keep (`sdpa_support_surface.h`)."""

WAY = Family(
    *("attention_way", ("queries", "matrices", "keys", "size", "repeats"), 0, Way, ways, ours),
    (attention_kernel, combine_kernel),
    zeros="ours",
    last=True,
)
"""`repeats` heads of queries stand against the same keys; `layout` begins with the release of cuDNN, whose plans
another may number otherwise, and may end in "causal". What is measured goes for those sizes alone: for all others the
library compiles a plan anew, which takes longer than thousands of runs, of a cache that grows one for every token."""


def attention_way(
    q: Typed, k: Typed, v: Typed, out: Typed, options: Options, *, others: bool, tuned: Tuned | None
) -> int:
    """Which of cuDNN's plans computes attention, from 1; 0 where kernels of ours do, as where there are `others` among
    the operands: masks, whose rows of nothing but -inf it may take otherwise, conditions, lengths or sinks."""
    if tuned is None or not tuned.target.cudnn or others or name_of(q) not in TYPES or 0 in out.shape:
        return 0
    if tuple(map(int, tuned.target.cudnn.split("."))) < SINCE:
        return 0
    causal, sizes = _causal(options, q.shape[-2], k.shape[-2]), (q.shape[-1], v.shape[-1])
    if causal is None or max(sizes) > WIDEST or any(n % 8 for n in sizes) or len(out.shape) not in (4, 5):
        return 0
    heads = out.shape[1:-2]
    repeats = math.prod(heads) // math.prod(k.shape[1:-2])
    known = {
        "queries": q.shape[-2],
        "matrices": math.prod(out.shape[:-2]),
        "keys": k.shape[-2],
        "size": max(sizes),
        "repeats": repeats,
    }
    layout = f"{tuned.target.cudnn} causal" if causal else tuned.target.cudnn
    return choose(WAY, WAY.problem(HALF, known, layout), tuned.target, tuned).plan


def _causal(options: Options, queries: int, keys: int) -> bool | None:
    """Whether the last queries see no later keys; None for what the library is not asked for."""
    plain = Options(options.scale, right=options.right, before=options.before, zero=options.zero, fill=options.fill)
    if options != plain or options.right not in (None, 0):
        return None
    if options.right is None:
        return False
    return True if options.before == keys - queries >= 0 else None


def attention_by_cudnn(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    launcher: Launcher,
    options: Options,
    way: int,
    workspace: Any,
    tuned: Tuned | None = None,
) -> Call | None:
    """Attention by one of cuDNN's plans: see `dnn.asked`."""
    return asked(attention_of(q, k, v, out, options), way, launcher, workspace, WAY, tuned)


def attention_of(q: Any, k: Any, v: Any, out: Any, options: Options) -> Attention | None:
    """Attention over (batch, heads or keys' heads and repeats, rows, size) as the library takes it; None where an array
    lies otherwise."""
    first, keys, values, results = (_tensor(x, out.shape[0]) for x in (q, k, v, out))
    if first is None or keys is None or values is None or results is None:
        return None
    if first.sizes[:3] != results.sizes[:3] or keys.sizes[:3] != values.sizes[:3] or first.sizes[1] % keys.sizes[1]:
        return None
    causal = bool(_causal(options, q.shape[-2], k.shape[-2]))
    return Attention(name_of(q), first, keys, values, results, options.scale, causal)


def _tensor(array: Any, batch: int) -> Tensor | None:
    """The array as (batch, heads, rows, size); None where it is none, or elements of a head are no neighbours, or some
    lie in the same place or backwards."""
    shape, strides = tuple(array.shape), element_strides(array)
    if len(shape) < 4 or shape[0] != batch:
        return None
    heads, (apart,) = coalesce(shape[1:-2], [strides[1:-2]])
    if len(heads) > 1:
        return None
    sizes, steps = (shape[0], *heads, *shape[-2:]), (strides[0], *apart, *strides[-2:])
    inner = sorted((s, n) for n, s in zip(sizes, steps, strict=True) if n > 1)
    if any(s < 1 for s, _ in inner) or any(far < s * n for (s, n), (far, _) in pairwise(inner)):
        return None
    if steps[3] != 1 and sizes[3] > 1:
        return None
    filled = [s if n > 1 else math.prod(sizes[i + 1 :]) for i, (n, s) in enumerate(zip(sizes, steps, strict=True))]
    return Tensor(array, sizes, tuple(filled))
