"""Decision trees, all trees of a block of rows at once, level by level."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from infera_kernels.calls import Array

BLOCK = 1 << 16
"""Rows times trees that go down together: their state stays in the cache."""

COMPARE: dict[str, Callable[..., Array]] = {
    "BRANCH_LEQ": np.less_equal,
    "BRANCH_LT": np.less,
    "BRANCH_GTE": np.greater_equal,
    "BRANCH_GT": np.greater,
    "BRANCH_EQ": np.equal,
    "BRANCH_NEQ": np.not_equal,
}


class Forest(NamedTuple):
    """Trees as arrays over all nodes. A leaf leads to itself: going down `depth` levels ends every walk.

    `children` holds (false, true) of node i at 2i and 2i + 1. `modes` maps a comparison to a mask over nodes; `members`
    are the values of the nodes that ask for membership.
    """

    roots: Array
    feature: Array
    value: Array
    children: Array
    missing: Array
    modes: dict[str, Array]
    members: dict[int, Array]
    depth: int


def leaves(forest: Forest, x: Array) -> Array:
    """The leaf of each row in each tree: (rows, features) -> (rows, trees) of node numbers."""
    rows, trees = len(x), len(forest.roots)
    made = np.empty((rows, trees), np.int32)
    step = max(1, BLOCK // max(trees, 1))
    for start in range(0, rows, step):
        made[start : start + step] = _walk(forest, x[start : start + step])
    return made


def _walk(forest: Forest, x: Array) -> Array:
    n, width = x.shape
    flat = np.ascontiguousarray(x).reshape(-1)
    base = (np.arange(n, dtype=np.int32) * width)[:, None]
    at = np.broadcast_to(forest.roots, (n, len(forest.roots))).copy()
    single = next(iter(forest.modes)) if len(forest.modes) == 1 and not forest.members else None
    tracks = bool(forest.missing.any())
    for _ in range(forest.depth):
        v = flat.take(forest.feature.take(at) + base)
        yes = _decide(forest, at, v, single)
        if tracks:
            yes = yes | (np.isnan(v) & forest.missing.take(at))
        at = forest.children.take(2 * at + yes)
    return at


def _decide(forest: Forest, at: Array, v: Array, single: str | None) -> Array:
    bound = forest.value.take(at)
    if single is not None:
        return COMPARE[single](v, bound)
    yes = np.zeros(at.shape, np.bool_)
    for mode, mask in forest.modes.items():
        yes |= COMPARE[mode](v, bound) & mask.take(at)
    for node, values in forest.members.items():
        here = at == node
        yes[here] = np.isin(v[here], values)
    return yes


def aggregate(found: Array, weights: Array, hit: Array, how: str) -> Array:
    """What each row's leaves say together: (rows, trees) -> (rows, targets). `weights` and `hit` are (nodes, targets).

    A target that no leaf of a row names is 0, also for MIN and MAX.
    """
    rows = len(found)
    made = np.zeros((rows, weights.shape[1]), weights.dtype)
    step = max(1, BLOCK // max(found.shape[1] * weights.shape[1], 1))
    for start in range(0, rows, step):
        part = found[start : start + step]
        if how in ("SUM", "AVERAGE"):
            made[start : start + step] = weights.take(part, axis=0).sum(axis=1)
            continue
        picked, present = weights.take(part, axis=0), hit.take(part, axis=0)
        worst = np.inf if how == "MIN" else -np.inf
        best = np.where(present, picked, worst)
        best = best.min(axis=1) if how == "MIN" else best.max(axis=1)
        made[start : start + step] = np.where(present.any(axis=1), best, 0)
    return made / found.shape[1] if how == "AVERAGE" else made
