"""Random forests for ai.onnx.ml: unbalanced trees, and the attributes of every version that say the same.

Splits, features and weights are multiples of 1/8: sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")


def eighths(rng: np.random.Generator, *shape: int, low: float = -2, high: float = 2) -> np.ndarray:
    return rng.integers(round(8 * low), round(8 * high), shape, endpoint=True) / 8


def features(rng: np.random.Generator, batch: int | None, width: int, dtype: Any, *, missing: bool) -> np.ndarray:
    """Multiples of 1/2 that often meet a split; with `missing` a tenth of them NaN, where the type has it."""
    x = (rng.integers(-6, 7, (1 if batch is None else batch, width)) / 2).astype(dtype)
    if missing and x.dtype.kind == "f":
        x[rng.random(x.shape) < 0.1] = np.nan
    return x[0] if batch is None else x


@dataclass
class Leaf:
    weights: dict[int, float]


@dataclass
class Branch:
    feature: int
    mode: str
    split: float
    tracks: bool
    true: Tree
    false: Tree
    members: tuple[float, ...]
    """Integers: onnxruntime knows no sets of others."""


Tree = Leaf | Branch


@dataclass
class Shape:
    """What a forest is made of. `ids(rng)` draws the targets that a leaf names."""

    trees: int
    depth: int
    width: int
    modes: tuple[str, ...]
    ids: Callable[[np.random.Generator], Sequence[int]]
    tracks: bool
    low: float = -2
    mirrored: bool = False


def grow(rng: np.random.Generator, s: Shape, depth: int) -> Tree:
    """Unbalanced: any node but those at the full depth may be a leaf, the root too."""
    if depth == s.depth or rng.random() < 0.25:
        ids = s.ids(rng)
        if s.mirrored:
            weight = float(eighths(rng))
            return Leaf({0: -weight, 1: weight})
        return Leaf({int(i): float(eighths(rng, low=s.low)) for i in ids})
    true, false = grow(rng, s, depth + 1), grow(rng, s, depth + 1)
    mode = str(rng.choice(s.modes))
    members = tuple(map(float, rng.choice((*range(-3, 4), 40), rng.integers(1, 5), replace=False)))
    tracks = s.tracks and bool(rng.random() < 0.5)
    return Branch(int(rng.integers(s.width)), mode, float(rng.integers(-6, 7) / 2), tracks, true, false, members)


def classic(forest: Sequence[Tree], kind: str, weight_type: Any, tensors: bool) -> dict[str, Any]:
    """As the lists of versions 1 to 3; numbers as tensors of `weight_type` where asked."""
    nodes: dict[str, list[Any]] = {}
    votes: dict[str, list[Any]] = {f"{kind}_{k}": [] for k in ("ids", "nodeids", "treeids", "weights")}

    def put(tree: int, node: Tree, number: int) -> int:
        """The next free number."""
        row: dict[str, Any] = {"treeids": tree, "nodeids": number, "modes": "LEAF", "featureids": 0, "values": 0.0}
        row |= {"truenodeids": 0, "falsenodeids": 0, "missing_value_tracks_true": 0}
        if isinstance(node, Branch):
            row |= {"modes": node.mode, "featureids": node.feature, "values": node.split}
            row |= {"missing_value_tracks_true": int(node.tracks)}
        at = len(nodes.setdefault("treeids", []))
        for k, v in row.items():
            nodes.setdefault(k, []).append(v)
        if isinstance(node, Leaf):
            for i, w in node.weights.items():
                for k, v in zip(("ids", "nodeids", "treeids", "weights"), (i, number, tree, w), strict=True):
                    votes[f"{kind}_{k}"].append(v)
            return number + 1
        nodes["truenodeids"][at] = number + 1
        nodes["falsenodeids"][at] = middle = put(tree, node.true, number + 1)
        return put(tree, node.false, middle)

    for i, tree in enumerate(forest):
        put(i, tree, 0)
    made: dict[str, Any] = {
        **{f"nodes_{k}": tuple(v) for k, v in nodes.items()},
        **{k: tuple(v) for k, v in votes.items()},
    }
    for name in ("nodes_values", f"{kind}_weights") if tensors else ():
        made[f"{name}_as_tensor"] = np.asarray(made.pop(name), weight_type)
    return made


@dataclass
class Flat:
    """As the lists of version 5, whose leaves stand apart and name one target each."""

    nodes: list[list[Any]] = field(default_factory=list)
    leaves: list[tuple[int, float]] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)
    members: list[float] = field(default_factory=list)

    def leaf(self, node: Leaf) -> int:
        self.leaves.append(next(iter(node.weights.items())))
        return len(self.leaves) - 1

    def branch(self, node: Branch) -> int:
        at = len(self.nodes)
        member = node.mode == "BRANCH_MEMBER"
        code = len(MODES) if member else MODES.index(node.mode)
        self.nodes.append([node.feature, code, node.split, int(node.tracks), 0, 0, 0, 0])
        if member:
            self.members += [*node.members, float("nan")]
        for place, child in ((4, node.true), (6, node.false)):
            is_leaf = isinstance(child, Leaf)
            self.nodes[at][place] = self.leaf(child) if isinstance(child, Leaf) else self.branch(child)
            self.nodes[at][place + 1] = int(is_leaf)
        return at

    def root(self, tree: Tree) -> None:
        """A tree that is a leaf is a node that leads to it either way."""
        if isinstance(tree, Branch):
            self.roots.append(self.branch(tree))
            return
        leaf = self.leaf(tree)
        self.roots.append(len(self.nodes))
        self.nodes.append([0, 0, 0.0, 0, leaf, 1, leaf, 1])

    def attrs(self, dtype: Any) -> dict[str, Any]:
        feature, code, split, tracks, true, trueleaf, false, falseleaf = zip(*self.nodes, strict=True)
        targets, weights = zip(*self.leaves, strict=True)
        sets = {"membership_values": np.asarray(self.members, dtype)} if self.members else {}
        return {
            "tree_roots": tuple(self.roots),
            "nodes_featureids": feature,
            "nodes_modes": np.asarray(code, np.uint8),
            "nodes_splits": np.asarray(split, dtype),
            "nodes_missing_value_tracks_true": tracks,
            "nodes_truenodeids": true,
            "nodes_trueleafs": trueleaf,
            "nodes_falsenodeids": false,
            "nodes_falseleafs": falseleaf,
            "leaf_targetids": targets,
            "leaf_weights": np.asarray(weights, dtype),
            **sets,
        }
