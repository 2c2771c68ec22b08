"""Scaled dot-product attention: what the kernels cover, how operands are laid out for them, and the launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from infera_kernels.calls import Call, Scratch
from infera_kernels.launch import Const, Launcher, Typed, nominal_target, target_of
from infera_kernels.triton.attention_kernels import attention_kernel, combine_kernel
from infera_kernels.triton.attention_tiles import (
    SIZES,
    WIDEST,
    Cut,
    Tile,
    candidates,
    cycles,
    padded,
    predicted,
    registers,
)
from infera_kernels.triton.invariance import entries_seen, of_batch
from infera_kernels.triton.layout import (
    FLOATS,
    INDICES,
    INT32_MAX,
    MAX_DIMS,
    Dims,
    broadcast_strides,
    coalesce,
    fold,
    name_of,
    next_power_of_two,
    span,
)
from infera_kernels.triton.units import each_in_units, in_units
from infera_kernels.tuning import Family, Tuned, choose

ATTENTION = Family(
    *("attention", SIZES, 3, Cut, candidates, predicted, (attention_kernel, combine_kernel)), estimate=cycles
)
"""What scratch the splits take is asked before strides are known: no layout."""

PACKED_ROWS = 64
"""Heads that share keys become rows of one tile while there are no more rows than these."""


@dataclass(frozen=True, slots=True)
class Options:
    """How scores become weights.

    Scores s are multiplied by `scale`, and become `cap` tanh(s / cap) where there is one. Where the condition does not
    hold (where it does, if `hidden`) they are `fill`, or become s + fill if `added`. Then masks are added. Query i sees
    the keys from `before` + i - `left` to `before` + i + `right`, bounds that are None apart; where `ahead` is given
    later keys are seen, with that added to their scores. Rows of the result are 0 where the weights are no numbers
    (`zero` is "nan") or all scores are -inf ("unseen"); else they are NaN.

    With lengths matrix b has `lengths[b]` + `more` keys. If `from_end` its queries are the last of these, with no fewer
    than `before` keys before them.
    """

    scale: float = 1.0
    cap: float = 0.0
    fill: float = -math.inf
    hidden: bool = False
    added: bool = False
    zero: Literal["", "nan", "unseen"] = ""
    left: int | None = None
    right: int | None = None
    ahead: float | None = None
    before: int = 0
    more: int = 0
    from_end: bool = False


@dataclass(frozen=True, slots=True)
class _Work:
    """How shapes are cut up: `lead` matrices of `members` x `queries` rows, by `tile`, the keys in `splits` parts."""

    lead: Dims
    members: int
    queries: int
    keys: int
    tile: Tile
    splits: int

    @property
    def rows(self) -> int:
        return self.members * self.queries

    @property
    def matrices(self) -> int:
        return math.prod(self.lead)

    @property
    def packed(self) -> bool:
        return self.members > 1


def _lead_of(x: Typed, rank: int) -> Dims:
    """The leading axes, as seen from a result of `rank` axes."""
    return (*(1,) * (rank - len(x.shape)), *x.shape[:-2])


def _work(q: Typed, k: Typed, v: Typed, out: Typed, *, invariant: bool, tuned: Tuned | None) -> _Work:
    rank, (queries, size) = len(out.shape), out.shape[-2:]
    lead, keys = tuple(out.shape[:-2]), k.shape[-2]
    shared = all(_lead_of(x, rank)[-1:] == (1,) for x in (k, v))
    alike = lead[1:] if invariant else lead  # a batch is not packed: a tile would have as many rows as it has entries
    members = lead[-1] if alike and shared and lead[-1] * queries <= PACKED_ROWS else 1
    lead = lead[:-1] if members > 1 else lead
    kind = "ieee" if name_of(q) == "float32" else "half"
    rows = members * queries
    matrices = entries_seen(lead[0], invariant=invariant) * math.prod(lead[1:]) if lead else 1
    sizes = {"rows": rows, "matrices": matrices, "keys": keys, "size": max(q.shape[-1], size)}
    target = nominal_target(90) if tuned is None else tuned.target
    cut = choose(ATTENTION, ATTENTION.problem(kind, sizes), target, None if invariant else tuned)
    return _Work(lead, members, queries, keys, cut.tile, cut.splits)


def _any_empty(*given: Typed | None) -> bool:
    return any(x is not None and 0 in x.shape for x in given)


def supports_attention(
    q: Typed,
    k: Typed,
    v: Typed,
    out: Typed,
    masks: Sequence[Typed] = (),
    condition: Typed | None = None,
    lengths: Typed | None = None,
    sink: Typed | None = None,
) -> bool:
    """q (..., M, D), k (..., N, D), v (..., N, E) and out (..., M, E), of one type out of float32, float16 and
    bfloat16; D and E up to 512, leading axes broadcasting to out's, nothing empty but out.

    At most two masks of any of these types and a condition of bool, int32 or int64 broadcast to the scores (..., M, N),
    lengths (int32 or int64) and sinks (of the floats' type) to (..., 1, 1) and (..., M, 1); along the last leading axis
    lengths are alike.
    """
    floats = (q, k, v, out, *([] if sink is None else [sink]))
    if len({name_of(x) for x in floats}) != 1 or len(masks) > 2 or not {name_of(x) for x in (q, *masks)} <= FLOATS:
        return False
    if min(len(x.shape) for x in (q, k, v, out)) < 2 or len(out.shape) > MAX_DIMS:
        return False
    (m, d), (n, e), rank = q.shape[-2:], v.shape[-2:], len(out.shape)
    if tuple(k.shape[-2:]) != (n, d) or tuple(out.shape[-2:]) != (m, e) or min(n, d, e) < 1:
        return False
    walked = m * n if masks or condition is not None else max(m, n)
    if max(d, e) > WIDEST or walked > INT32_MAX - 1024 or _any_empty(*masks, condition, lengths, sink):
        return False
    if condition is not None and name_of(condition) not in {"bool", *INDICES}:
        return False
    if lengths is not None and name_of(lengths) not in INDICES:
        return False
    lead = tuple(out.shape[:-2])
    wanted = [*((x, (m, n)) for x in (*masks, condition)), (sink, (m, 1)), (lengths, (1, 1))]
    if lengths is not None and rank > 2 and _lead_of(lengths, rank)[-1:] != (1,):
        return False
    stretched = [(tuple(x.shape), (*lead, *last)) for x, last in wanted if x is not None]
    try:
        return all(
            np.broadcast_shapes(shape, to) == to
            for shape, to in [*((_lead_of(x, rank), lead) for x in (q, k, v)), *stretched]
        )
    except ValueError:
        return False


def attention_scratch(
    q: Typed, k: Typed, v: Typed, out: Typed, *, invariant: bool = False, tuned: Tuned | None = None
) -> tuple[Dims, ...]:
    """The shapes of the float32 scratch that `attention` asks for."""
    if 0 in out.shape:
        return ()
    work = _work(q, k, v, out, invariant=invariant, tuned=tuned)
    rows = work.matrices, work.splits, work.rows
    return ((*rows, out.shape[-1]), rows, rows) if work.splits > 1 else ()


def _walk(lead: Dims, steps: Sequence[int]) -> tuple[tuple[int | Const, ...], tuple[int | Const, ...], Dims]:
    """Strides of leading axes and of (members, rows, columns) in units, and the units: of all leading axes, then of
    each of the others."""
    (outer, common), (inner, units) = in_units(lead), each_in_units(steps)
    return outer, inner, (common, *units)


def attention(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    launcher: Launcher,
    scratch: Scratch,
    options: Options,
    *,
    masks: Sequence[Any] = (),
    condition: Any = None,
    lengths: Any = None,
    sink: Any = None,
    invariant: bool = False,
    tuned: Tuned | None = None,
) -> list[Call]:
    """out = softmax(scale q kᵀ + masks) v with sums and weights in float32, whatever the strides.

    A `sink` is a score more for every row, of a key whose value is zero. Shapes and types as `supports_attention` says.
    `invariant` entries of the first leading axis are the same bits however many there are; nothing is tuned for them.
    """
    if not supports_attention(q, k, v, out, masks, condition, lengths, sink):
        given = ", ".join(f"{name_of(x)}{list(x.shape)}" for x in (q, k, v, *masks, condition, out) if x is not None)
        raise ValueError(f"attention: no kernel for {given}")
    if 0 in out.shape:
        return []
    work = _work(q, k, v, out, invariant=invariant, tuned=tuned)
    tile = work.tile
    lead, m, n = tuple(out.shape[:-2]), work.queries, work.keys
    first, second = (*masks, None, None)[:2]
    shapes = {
        "q": (q, (m, q.shape[-1])),
        "k": (k, (n, k.shape[-1])),
        "v": (v, (n, v.shape[-1])),
        "out": (out, (m, out.shape[-1])),
        "mask": (first, (m, n)),
        "further": (second, (m, n)),
        "condition": (condition, (m, n)),
        "lengths": (lengths, (1, 1)),
        "sink": (sink, (m, 1)),
    }
    strides = {
        name: (0,) * len(out.shape) if x is None else broadcast_strides(x, (*lead, *last))
        for name, (x, last) in shapes.items()
    }
    for name in ("mask", "further", "condition"):
        if span((work.members, m, n), strides[name][-3:] if work.packed else (0, *strides[name][-2:])) > INT32_MAX:
            raise ValueError(f"attention: a matrix of {name} is too large to be walked in 32 bits")
    dims, walked = coalesce(work.lead, [s[: len(work.lead)] for s in strides.values()], ones=invariant)
    args: dict[str, Any] = {name: x for name, (x, _) in shapes.items()}
    units: dict[str, Dims] = {}
    for (name, s), along in zip(strides.items(), walked, strict=True):
        member = s[-3] if work.packed else 0
        args[f"{name}_lead"], args[f"{name}_steps"], units[f"{name.upper()}_UNITS"] = _walk(along, (member, *s[-2:]))
    del args["lengths_steps"], units["LENGTHS_UNITS"]
    args["lengths_lead"] = fold(walked[list(strides).index("lengths")])

    free = options.left is None and options.ahead is None
    bounded = not free or options.right is not None or lengths is not None
    exp2 = not masks and condition is None and options.ahead is None
    base = math.log2(math.e) if exp2 else 1.0
    cap = options.cap
    size, wide = q.shape[-1], padded(v.shape[-1])
    depth = tile.depth or padded(size)
    shared = {"E": v.shape[-1], "E_PADDED": wide, "SPLITS": work.splits, "PACKED": work.packed, "EXP2": exp2}
    args |= {
        "peaks": None,
        "totals": None,
        "M": m,
        "N": n,
        "rows": work.rows,
        "lead": dims,
        "scale": float(options.scale / cap if cap else options.scale * base),
        "cap": cap * base if cap else None,
        "fill": None if condition is None else float(options.fill),
        "left": options.left,
        "right": options.right,
        "ahead": options.ahead,
        "before": options.before,
        "more": options.more,
    }
    constexprs = {
        **shared,
        **units,
        "D": size,
        "DEPTH": depth,
        "D_PADDED": tile.padded(size),
        "BM": tile.rows,
        "BN": tile.keys,
        "HIDDEN": options.hidden,
        "ADDED": options.added,
        "FROM_END": options.from_end,
        "FREE": free and n >= tile.keys,
        "CHECKED": bounded or n % tile.keys != 0,
        "ZERO": options.zero,
    }
    args = of_batch(args, "lead", invariant=invariant)
    grid = (work.matrices * work.splits * -(-work.rows // tile.rows),)
    how = {"num_warps": tile.warps, "num_stages": tile.stages, **registers(tile, target_of(launcher))}
    if work.splits == 1:
        return [launcher.launch(attention_kernel, grid, args, constexprs, **how)]
    parts, peaks, totals = (
        scratch(shape, np.float32) for shape in attention_scratch(q, k, v, out, invariant=invariant, tuned=tuned)
    )
    joined = {name: args[name] for name in ("out", "M", "rows", "lead", "out_lead", "out_steps")}
    joined |= {"parts": parts, "peaks": peaks, "totals": totals}
    joining = {
        **shared,
        "SPLITS_PADDED": next_power_of_two(work.splits),
        "OUT_UNITS": units["OUT_UNITS"],
        "ZERO": options.zero,
    }
    args |= {"out": parts, "peaks": peaks, "totals": totals}
    return [
        launcher.launch(attention_kernel, grid, args, constexprs, **how),
        launcher.launch(combine_kernel, (work.matrices * work.rows,), joined, joining, num_warps=4),
    ]
