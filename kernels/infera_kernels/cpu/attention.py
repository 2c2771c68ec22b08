"""Scaled dot-product attention on NumPy, a block of scores in cache at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Literal, TypeAlias

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import call, const, copy, copy_where
from infera_kernels.cpu.matmul import readable
from infera_kernels.record import Record

BLOCK = 65536
"""Scores of a block: in float32 half of a 512 KB L2 cache; they go through it six times."""

SHARE = 32768
"""Scores that are worth a thread of their own."""

ROWS = 64
"""Queries of a block where those before see fewer keys."""

FEWEST_QUERIES, MOST_KEYS = 16, 4
"""Queries from which a block's scores lie key by key, and keys for each of them up to which. The largest score of each
query is then found for several of them at a time, instead of by a loop for each."""

Piece: TypeAlias = tuple[int | slice, ...]
"""An index into the leading axes and the rows of the scores."""


class Options(Record):
    """How scores become weights.

    Scores s are multiplied by `scale`, and become `cap` tanh(s / cap) where there is one. With a condition those where
    it equals `fill_where` are `fill` instead. Rows of the result are 0 where the weights are no numbers (`zero` is
    "nan") or no key is seen, all scores being -inf ("unseen"); else they are NaN.
    """

    scale: float = 1.0
    cap: float = 0.0
    fill: float = 0.0
    fill_where: bool = False
    zero: Literal["", "nan", "unseen"] = ""


def attention(
    q: Array,
    kt: Array,
    v: Array,
    out: Array,
    scratch: Scratch,
    options: Options,
    *,
    masks: Sequence[Array] = (),
    condition: Array | None = None,
    parts: int = 1,
) -> tuple[list[Call], list[list[Call]]]:
    """out = softmax(scale q kt + masks) v: calls to make first, then up to `parts` lists that may run side by side.

    The queries are scaled in place of the scores, and weights are divided by their sum after the last product.

    q (..., M, D), kt (..., D, N), v (..., N, E) and out (..., M, E) have any strides and no empty axis; leading axes
    broadcast to out's. Masks and the condition broadcast to the scores (..., M, N).
    """
    first: list[Call] = []
    q, kt, v = (_readable(x, scratch, first) for x in (q, kt, v))
    if condition is not None and not options.fill_where:
        inverse = scratch(condition.shape, np.bool_)
        first.append(call(np.logical_not, condition, inverse))
        condition = inverse
    lead, m, n = out.shape[:-2], q.shape[-2], kt.shape[-1]
    q, kt, v = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (q, kt, v))
    added = [np.broadcast_to(x, (*lead, m, n)) for x in masks]
    filled = None if condition is None else np.broadcast_to(condition, (*lead, m, n))
    operands = _Operands(q, kt, v, out, added, filled)
    parts = max(1, min(parts, prod(lead) * m * n // SHARE))
    pieces = list(_pieces(lead, m, n, parts))
    edges = [len(pieces) * i // parts for i in range(parts + 1)]
    spread = [operands.bind(pieces[a:b], scratch, options) for a, b in pairwise(edges) if a < b]
    return first, spread


def causal(
    q: Array,
    kt: Array,
    v: Array,
    out: Array,
    scratch: Scratch,
    options: Options,
    *,
    before: int,
    masks: Sequence[Array] = (),
    parts: int = 1,
) -> tuple[list[Call], list[list[Call]]]:
    """`attention` where query i sees the keys up to `before` + i; what a block of queries does not see is left out."""
    m, n = q.shape[-2], kt.shape[-1]
    first: list[Call] = []
    spread: list[list[Call]] = [[] for _ in range(parts)]
    q, kt, v = (_readable(x, scratch, first) for x in (q, kt, v))
    places = np.arange(max(n, before + m))
    for i in range(0, m, ROWS):
        rows = slice(i, min(i + ROWS, m))
        seen = max(1, min(n, before + rows.stop))
        ahead = None
        if before + i + 1 < n:
            ahead = scratch((rows.stop - i, seen), np.bool_)
            first.append(call(np.greater, places[:seen], places[before + i : before + rows.stop, None], ahead))
        more, made = attention(
            q[..., rows, :],
            kt[..., :seen],
            v[..., :seen, :],
            out[..., rows, :],
            scratch,
            Options(options.scale, options.cap, -np.inf, True, options.zero),
            masks=[_cut(mask, rows, slice(seen)) for mask in masks],
            condition=ahead,
            parts=parts,
        )
        first += more
        for part, calls in zip(spread, made, strict=False):
            part += calls
    return first, [part for part in spread if part]


def _cut(mask: Array, rows: slice, keys: slice) -> Array:
    """A part of a mask that broadcasts to the scores."""
    if mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask if mask.ndim == 0 or mask.shape[-1] == 1 else mask[..., keys]


def _readable(x: Array, scratch: Scratch, first: list[Call]) -> Array:
    x, calls = readable(x, scratch)
    first += calls
    return x


def _pieces(lead: tuple[int, ...], m: int, n: int, parts: int) -> Iterator[Piece]:
    """Blocks that cover all rows of scores: whole trailing axes, and a range of the axis before them. Parts get as many
    each, where there are enough rows."""
    axes, axis, inner = (*lead, m), len(lead), n
    most = min(BLOCK, max(n, -(-prod(axes) * n // parts)))
    while axis > 0 and inner * axes[axis] <= most:
        inner *= axes[axis]
        axis -= 1
    step = max(1, most // inner)
    if prod(axes[:axis]) % parts:
        count = -(-axes[axis] // step)
        step = -(-axes[axis] // (-(-count // parts) * parts))
    for outer in np.ndindex(axes[:axis]):
        for i in range(0, axes[axis], step):
            yield (*outer, slice(i, min(i + step, axes[axis])))


class _Operands(Record):
    """Everything over the leading axes of `out`."""

    q: Array
    kt: Array
    v: Array
    out: Array
    masks: Sequence[Array]
    condition: Array | None

    def bind(self, pieces: Sequence[Piece], scratch: Scratch, options: Options) -> list[Call]:
        """The calls of these pieces, which share scratch."""
        like, depth, keys = self.out, self.q.shape[-1], self.kt.shape[-1]
        rows = max(prod(self.out[p].shape[:-1]) for p in pieces)
        queries, scores, top, total = (scratch((rows * k,), like.dtype) for k in (depth, keys, 1, 1))
        lost, ones = scratch((rows,), np.bool_), scratch((keys,), like.dtype)
        scale = options.scale / (options.cap or 1.0)
        factor, cap, one, zero, fill, lowest = (
            const(x, like) for x in (scale, options.cap, 1, 0, options.fill, -np.inf)
        )
        calls = [copy(ones, one)]
        for piece in pieces:
            q, out = self.q[piece], self.out[piece]
            heads = piece[: self.out.ndim - 2]
            count, shape = prod(out.shape[:-1]), out.shape[:-1]
            s = scores[: count * keys].reshape(*shape, keys)
            if by_keys := self._lie_by_keys(shape[-1]):
                s = s.reshape(*shape[:-1], keys, shape[-1]).swapaxes(-1, -2)
            high, low = top[:count].reshape(*shape, 1), total[:count].reshape(shape)
            gone = lost[:count].reshape(*shape, 1)
            if scale != 1:
                t = queries[: count * depth].reshape(*shape, depth)
                calls.append(call(np.multiply, q, factor, t))
                q = t
            calls.append((np.matmul, _transposed(self.kt[heads], q, s) if by_keys else (q, self.kt[heads], s)))
            if options.cap:
                calls += [(np.tanh, (s, s)), (np.multiply, (s, cap, s))]
            if self.condition is not None:
                calls.append(copy_where(s, fill, self.condition[piece]))
            calls += [
                *(call(np.add, s, mask[piece], s) for mask in self.masks),
                (np.maximum.reduce, (s, -1, None, high, True)),
                *([call(np.equal, high, lowest, gone)] if options.zero == "unseen" else []),
                (np.subtract, (s, high, s)),
                (np.exp, (s, s)),
                (np.matmul, (s, ones, low)),
                *([(np.isnan, (low[..., None], gone))] if options.zero == "nan" else []),
                (np.true_divide, (one, low, low)),
                (np.matmul, (s, self.v[heads], out)),
                call(np.multiply, out, low[..., None], out),
            ]
            if options.zero:
                calls.append(copy_where(out, zero, gone))
        return calls

    def _lie_by_keys(self, queries: int) -> bool:
        """Whether the scores of a block of so many queries do, rather than query by query as masks may."""
        keys = self.kt.shape[-1]
        few = queries < FEWEST_QUERIES or keys > MOST_KEYS * queries
        return not few and self.condition is None and all(mask.strides[-2] == 0 for mask in self.masks)


def _transposed(*operands: Array) -> tuple[Array, ...]:
    return tuple([x.swapaxes(-1, -2) for x in operands])
