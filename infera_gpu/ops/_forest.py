"""Trees from the attributes of ai.onnx.ml's ensembles, of both forms, as one `Forest`. Declares no operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from infera_gpu.op import Op, Site
from infera_gpu.spec import Array
from infera_kernels.cpu import trees as cpu

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")


class Packed(NamedTuple):
    """The forest, each node's weights for every target, and which of them it names: (nodes, targets).

    `certain` says that every row's leaves name every target, whatever the row.
    """

    forest: cpu.Forest
    weights: Array
    hit: Array
    certain: bool


NODE_LISTS: dict[str, Any] = dict.fromkeys(
    f"nodes_{n}"
    for n in (
        "falsenodeids",
        "featureids",
        "hitrates",
        "missing_value_tracks_true",
        "modes",
        "nodeids",
        "treeids",
        "truenodeids",
        "values",
    )
)


def _depth(site: Site, children: Array, roots: Array) -> int:
    """Levels below the roots. Raises PlanError where nodes lead back to themselves."""
    level, depth = np.unique(roots), 0
    count = len(children) // 2
    seen = 0
    while True:
        nodes = level[children[2 * level] != level]
        if not len(nodes):
            return depth
        seen += len(nodes)
        if seen > count:
            raise site.fail("its trees have a cycle, or share nodes")
        level, depth = np.unique(np.concatenate((children[2 * nodes], children[2 * nodes + 1]))), depth + 1


def _checked(site: Site, name: str, values: Any, low: int, high: int) -> Array:
    array = np.asarray(values, np.int64)
    if array.size and not low <= array.min() <= array.max() < high:
        raise site.fail(f"{name} reaches from {array.min()} to {array.max()}, expected {low} to {high - 1}")
    return array


def tree_floats(site: Site, name: str) -> Array | None:
    """Floats from the attribute or its tensor form."""
    tensor = site.attrs.get(f"{name}_as_tensor")
    value = site.attrs.get(name) if tensor is None else tensor
    return None if value is None else np.asarray(value, None if tensor is not None else np.float32).reshape(-1)


def _forest(
    site: Site,
    dtype: Any,
    roots: Array,
    feature: Array,
    value: Array,
    false: Array,
    true: Array,
    modes: Sequence[str],
    missing: Any,
    members: Mapping[int, Array],
) -> cpu.Forest:
    n = len(feature)
    children = np.empty(2 * n, np.int32)
    children[0::2], children[1::2] = false, true
    named = np.asarray(modes)
    present = [m for m in MODES if (named == m).any()]
    wide = np.float64 if dtype == np.float64 else np.float32
    track = np.zeros(n, np.bool_) if missing is None or not len(missing) else np.asarray(missing, np.bool_)
    if len(track) != n:
        raise site.fail(f"nodes_missing_value_tracks_true has {len(track)} values for {n} nodes")
    return cpu.Forest(
        roots.astype(np.int32),
        feature.astype(np.int32),
        value.astype(wide),
        children,
        track,
        {m: named == m for m in present} or {"BRANCH_LEQ": named == named},
        dict(members),
        _depth(site, children, roots),
    )


def _packed(forest: cpu.Forest, rows: Array, ids: Array, weights: Array, targets: int) -> Packed:
    """With the weight that each of these nodes has for a target; a node may have several."""
    table, hit = (np.zeros((len(forest.feature), targets), t) for t in (np.float64, np.bool_))
    np.add.at(table, (rows, ids), weights)
    hit[rows, ids] = True
    named = hit
    for _ in range(forest.depth):
        below = named[forest.children[0::2]] & named[forest.children[1::2]]
        named = hit | below
    return Packed(forest, table, hit, bool(named[forest.roots].any(axis=0).all()))


def _classic(site: Site, kind: str, targets: int) -> Packed:
    """The form of versions 1 to 3: nodes named by tree and number."""
    a = site.attrs
    tree, number = (np.asarray(a[f"nodes_{k}"] or (), np.int64) for k in ("treeids", "nodeids"))
    n = len(tree)
    features = site.spec(0).dims[-1]
    place = {key: i for i, key in enumerate(zip(tree.tolist(), number.tolist(), strict=False))}
    modes = a["nodes_modes"] or ()
    value = tree_floats(site, "nodes_values")
    if value is None or not n or {n} != {len(number), len(place), len(modes), len(value)}:
        raise site.fail("the lists of nodes differ in length, or name a node twice")
    leaf = np.asarray([m == "LEAF" for m in modes])
    unknown = set(modes) - {*MODES, "LEAF"}
    if unknown:
        raise site.fail(f"nodes_modes has '{unknown.pop()}', expected LEAF or one of {', '.join(MODES)}")

    def find(name: str) -> Array:
        ids = a[name] or ()
        if len(ids) != n:
            raise site.fail(f"{name} has {len(ids)} values for {n} nodes")
        try:
            pairs = enumerate(zip(tree.tolist(), ids, strict=True))
            return np.asarray([i if leaf[i] else place[t, c] for i, (t, c) in pairs])
        except KeyError as error:
            raise site.fail(f"{name} names the node {error.args[0]}, which is not there") from None

    true, false = find("nodes_truenodeids"), find("nodes_falsenodeids")
    feature = _checked(site, "nodes_featureids", np.where(leaf, 0, a["nodes_featureids"]), 0, max(features, 1))
    below = np.zeros(n, np.bool_)
    below[true[~leaf]] = below[false[~leaf]] = True
    roots = np.flatnonzero(~below)
    forest = _forest(
        site,
        site.spec(0).dtype,
        roots,
        feature,
        value,
        false,
        true,
        [m if m != "LEAF" else "BRANCH_LEQ" for m in modes],
        a["nodes_missing_value_tracks_true"],
        {},
    )
    weights = tree_floats(site, f"{kind}_weights")
    ids = _checked(site, f"{kind}_ids", a[f"{kind}_ids"] or (), 0, targets)
    owners = list(zip(a[f"{kind}_treeids"] or (), a[f"{kind}_nodeids"] or (), strict=False))
    if weights is None or not len(weights) == len(ids) == len(owners) or any(o not in place for o in owners):
        raise site.fail(f"{kind}_ids, {kind}_nodeids, {kind}_treeids and {kind}_weights do not name leaves one by one")
    return _packed(forest, np.asarray([place[o] for o in owners], np.int64), ids, weights, targets)


def _version_5(site: Site) -> Packed:
    """The form of version 5: interior nodes and leaves numbered apart, modes as bytes."""
    a = site.attrs
    split = np.asarray(a["nodes_splits"]).reshape(-1)
    modes = np.asarray(a["nodes_modes"]).reshape(-1).astype(np.int64)
    weights = np.asarray(a["leaf_weights"]).reshape(-1)
    n, leafs, targets = len(split), len(weights), int(a["n_targets"] or 1)
    ids = _checked(site, "leaf_targetids", a["leaf_targetids"], 0, targets)
    if len(ids) != leafs or len(modes) != n or not 0 < targets <= 1 << 20:
        raise site.fail("leaf_targetids, nodes_modes or n_targets do not fit leaf_weights and nodes_splits")
    own = np.arange(n + leafs)

    def children(name: str, flags: str) -> Array:
        to, is_leaf = np.asarray(a[name], np.int64), np.asarray(a[flags], np.bool_)
        if len(to) != n or len(is_leaf) != n:
            raise site.fail(f"{name} or {flags} has not {n} values")
        _checked(site, name, to[is_leaf], 0, leafs)
        _checked(site, name, to[~is_leaf], 0, n)
        made = own.copy()
        made[:n] = np.where(is_leaf, to + n, to)
        return made

    true, false = children("nodes_truenodeids", "nodes_trueleafs"), children("nodes_falsenodeids", "nodes_falseleafs")
    roots = _checked(site, "tree_roots", a["tree_roots"], 0, max(n, 1))
    features = max(site.spec(0).dims[-1], 1)
    feature = _checked(site, "nodes_featureids", a["nodes_featureids"], 0, features)
    feature = np.concatenate((feature, np.zeros(leafs, np.int64)))
    _checked(site, "nodes_modes", modes, 0, len(MODES) + 1)
    if len(feature) != n + leafs:
        raise site.fail(f"nodes_featureids has not {n} values")
    # A root that is a leaf is an interior node whose both children are one leaf.
    named = [MODES[m] if m < len(MODES) else "BRANCH_MEMBER" for m in modes] + ["BRANCH_LEQ"] * leafs
    members: dict[int, Array] = {}
    sets = np.asarray(a["membership_values"]).reshape(-1) if a["membership_values"] is not None else np.zeros(0)
    groups = np.split(sets, np.flatnonzero(np.isnan(sets)) + 1) if sets.size else []
    asking = [i for i, m in enumerate(named) if m == "BRANCH_MEMBER"]
    if len(groups) < len(asking):
        raise site.fail(f"membership_values holds {len(groups)} sets for {len(asking)} nodes")
    for i, group in zip(asking, groups, strict=False):
        members[i] = group[~np.isnan(group)]
    track = a["nodes_missing_value_tracks_true"]
    missing = None if not track else [*track, *[0] * leafs]
    value = np.concatenate((split, np.zeros(leafs, split.dtype)))
    forest = _forest(site, site.spec(0).dtype, roots, feature, value, false, true, named, missing, members)
    return _packed(forest, n + np.arange(leafs), ids, weights, targets)


def packed_trees(site: Site, kind: str, targets: int) -> Packed:
    return _classic(site, kind, targets) if kind else _version_5(site)


def forest(
    trees: int,
    depth: int,
    features: int,
    targets: int,
    kind: str,
    seed: int = 0,
    modes: Sequence[str] = MODES[:1],
    low: float = -1,
    whole: bool = False,
) -> dict[str, Any]:
    """Attributes of full trees with random splits and weights: for cases and benchmarks.

    Nodes take the modes in turn. Weights lie from `low` to 1. Splits that are `whole` are integers from -2 to 2.
    """
    rng = np.random.default_rng(seed)
    inner, total = (1 << depth) - 1, (1 << (depth + 1)) - 1
    found: dict[str, list[Any]] = {k: [] for k in NODE_LISTS if "hitrates" not in k}
    leaf: dict[str, list[Any]] = {f"{kind}_{k}": [] for k in ("ids", "nodeids", "treeids", "weights")}

    def split() -> float:
        return float(rng.integers(-2, 3)) if whole else float(np.float32(rng.uniform(-1, 1)))

    for tree in range(trees):
        for node in range(total):
            is_leaf = node >= inner
            for key, value in {
                "treeids": tree,
                "nodeids": node,
                "modes": "LEAF" if is_leaf else modes[node % len(modes)],
                "featureids": 0 if is_leaf else int(rng.integers(features)),
                "values": 0.0 if is_leaf else split(),
                "truenodeids": 0 if is_leaf else 2 * node + 1,
                "falsenodeids": 0 if is_leaf else 2 * node + 2,
                "missing_value_tracks_true": int(rng.integers(2)) if not is_leaf else 0,
            }.items():
                found[f"nodes_{key}"].append(value)
            if is_leaf:
                row = (int(rng.integers(targets)), node, tree, float(np.float32(rng.uniform(low, 1))))
                for key, value in zip(("ids", "nodeids", "treeids", "weights"), row, strict=True):
                    leaf[f"{kind}_{key}"].append(value)
    return {k: tuple(v) for k, v in (found | leaf).items()}


OPS: tuple[Op, ...] = ()
