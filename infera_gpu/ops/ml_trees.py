"""ai.onnx.ml: tree ensembles, of both forms, over one forest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops._families import movable
from infera_gpu.ops._ml import labels_of, post_transform, winners
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import trees as cpu

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")

Packed = tuple[cpu.Forest, Array, Array]
"""The forest, each node's weights for every target, and which of them it names."""


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


def _floats(site: Site, name: str) -> Array | None:
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


def _classic(site: Site, kind: str, targets: int) -> Packed:
    """The form of versions 1 to 3: nodes named by tree and number."""
    a = site.attrs
    tree, number = (np.asarray(a[f"nodes_{k}"] or (), np.int64) for k in ("treeids", "nodeids"))
    n = len(tree)
    features = site.spec(0).dims[-1]
    place = {key: i for i, key in enumerate(zip(tree.tolist(), number.tolist(), strict=False))}
    modes = a["nodes_modes"] or ()
    value = _floats(site, "nodes_values")
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
    weights = _floats(site, f"{kind}_weights")
    ids = _checked(site, f"{kind}_ids", a[f"{kind}_ids"] or (), 0, targets)
    owners = list(zip(a[f"{kind}_treeids"] or (), a[f"{kind}_nodeids"] or (), strict=False))
    if weights is None or not len(weights) == len(ids) == len(owners) or any(o not in place for o in owners):
        raise site.fail(f"{kind}_ids, {kind}_nodeids, {kind}_treeids and {kind}_weights do not name leaves one by one")
    table, hit = np.zeros((n, targets), np.float64), np.zeros((n, targets), np.bool_)
    rows = [place[o] for o in owners]
    np.add.at(table, (rows, ids), weights)
    hit[rows, ids] = True
    return forest, table, hit


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
    table, hit = np.zeros((n + leafs, targets), np.float64), np.zeros((n + leafs, targets), np.bool_)
    table[n + np.arange(leafs), ids] = weights
    hit[n + np.arange(leafs), ids] = True
    return forest, table, hit


def _packed(site: Site, kind: str, targets: int) -> Packed:
    return _classic(site, kind, targets) if kind else _version_5(site)


def _scores(site: Site, packed: Packed, x: Array, how: str) -> tuple[Array, Array]:
    """Each row's scores, and which targets its leaves have named."""
    forest, weights, hit = packed
    targets = weights.shape[1]
    wide = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    found = cpu.leaves(forest, wide.reshape(-1, x.shape[-1]))
    everywhere = targets == 1 or site.attrs.get("base_values") is None
    named = np.ones((1, targets), np.bool_) if everywhere else hit.take(found, axis=0).any(axis=1)
    return cpu.aggregate(found, weights, hit, how), named


def _rows(site: Site) -> int:
    x = site.spec(0)
    if x.ndim not in (1, 2) or not x.dims[-1]:
        raise site.fail(f"its input is {x}, expected (rows, features)")
    return x.dims[0] if x.ndim == 2 else 1


def _base(site: Site, scores: Array, named: Array | None = None) -> Array:
    """With the base values, which onnxruntime leaves out, of several targets, for one that no leaf has named."""
    base = _floats(site, "base_values")
    if base is None or not len(base):
        return scores
    if len(base) not in (1, scores.shape[1]):
        raise site.fail(f"{len(base)} base_values for {scores.shape[1]} targets")
    return scores + (base if named is None or scores.shape[1] == 1 else np.where(named, base, 0))


def _regress(site: Site, packed: Packed, x: Array) -> Array:
    how = site.attrs["aggregate_function"]
    if how not in AGGREGATES:
        raise site.fail(f"aggregate_function is '{how}', expected one of {', '.join(AGGREGATES)}")
    scores = _base(site, *_scores(site, packed, x, how))
    return post_transform(site, scores.astype(np.float32))


def _targets(site: Site) -> int:
    targets = int(site.attrs["n_targets"] or 0)
    if not 0 < targets <= 1 << 20:
        raise site.fail(f"n_targets is {targets}, expected a positive number")
    return targets


def _ensemble(site: Site, packed: Packed, x: Array) -> Array:
    how, post = int(site.attrs["aggregate_function"]), int(site.attrs["post_transform"])
    if not 0 <= how < len(AGGREGATES) or not 0 <= post < len(TRANSFORMS):
        raise site.fail(f"aggregate_function {how} or post_transform {post} is unknown")
    scores, _ = _scores(site, packed, x, AGGREGATES[how])
    return post_transform(site, scores.astype(x.dtype), TRANSFORMS[post])


def _classify(site: Site, packed: Packed, x: Array) -> tuple[Array, Array]:
    labels = labels_of(site, "classlabels_int64s")
    classes = len(labels)
    ids = set(site.attrs["class_ids"] or ())
    binary = classes == 2 and len(ids) == 1
    scores, _ = _scores(site, packed, x, "SUM")
    forest_ids = next(iter(ids)) if binary else 0
    if not binary:
        scores = _base(site, scores)
        return labels[winners(scores)], post_transform(site, scores.astype(np.float32))
    one = scores[:, forest_ids]
    base = _floats(site, "base_values")
    if base is not None and len(base):
        one = one + base[-1 if len(base) == 2 else 0]
    weights = _floats(site, "class_weights")
    positive = weights is None or bool((weights >= 0).all())
    pick = one > (0.5 if positive else 0)
    made = _two(site, one.astype(np.float32), positive=positive)
    return labels[pick.astype(int)], made


def _two(site: Site, score: Array, *, positive: bool) -> Array:
    """Both columns of a binary classifier that scores one class, as onnxruntime fills them in."""
    post = site.attrs["post_transform"]
    if post == "LOGISTIC":
        p = 1 / (1 + np.exp(-score))
        return np.stack((1 - p, p), axis=1)
    if post == "PROBIT":
        return post_transform(site, np.stack((1 - score, score), axis=1))
    columns = np.stack((1 - score if positive and post == "NONE" else -score, score), axis=1)
    return post_transform(site, columns)


Run = Callable[[Site, Packed, Array], Array | tuple[Array, Array]]


def _targets_of(site: Site, kind: str) -> int:
    if kind == "class":
        return len(labels_of(site, "classlabels_int64s"))
    return _targets(site) if kind else int(site.attrs["n_targets"] or 1)


def _ways(run: Run, kind: str) -> dict[str, Any]:
    """`compute`, which packs the trees each time, and a kernel that packs them once a plan."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        packed = _packed(site, kind, _targets_of(site, kind))

        def call(x: Array, *outs: Array) -> None:
            made = run(site, packed, x)
            for out, array in zip(outs, made if isinstance(made, tuple) else (made,), strict=True):
                np.copyto(out, array)

        return [(call, (io.ins[0], *io.outs))]

    return {
        "compute": lambda xp, site, x: run(site, _packed(site, kind, _targets_of(site, kind)), x),
        "kernels": {"cpu": Kernel(bind, supports=movable, allocates=True)},
        "portable": False,
    }


_NODES: dict[str, Any] = dict.fromkeys(
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
_TENSORS: dict[str, Any] = dict.fromkeys(
    ("base_values_as_tensor", "nodes_hitrates_as_tensor", "nodes_values_as_tensor")
)


def forest(trees: int, depth: int, features: int, targets: int, kind: str, seed: int = 0) -> dict[str, Any]:
    """Attributes of full trees with random splits and weights: for cases and benchmarks."""
    rng = np.random.default_rng(seed)
    inner, total = (1 << depth) - 1, (1 << (depth + 1)) - 1
    found: dict[str, list[Any]] = {k: [] for k in _NODES if "hitrates" not in k}
    leaf: dict[str, list[Any]] = {f"{kind}_{k}": [] for k in ("ids", "nodeids", "treeids", "weights")}
    for tree in range(trees):
        for node in range(total):
            is_leaf = node >= inner
            for key, value in {
                "treeids": tree,
                "nodeids": node,
                "modes": "LEAF" if is_leaf else "BRANCH_LEQ",
                "featureids": 0 if is_leaf else int(rng.integers(features)),
                "values": 0.0 if is_leaf else float(np.float32(rng.uniform(-1, 1))),
                "truenodeids": 0 if is_leaf else 2 * node + 1,
                "falsenodeids": 0 if is_leaf else 2 * node + 2,
                "missing_value_tracks_true": int(rng.integers(2)) if not is_leaf else 0,
            }.items():
                found[f"nodes_{key}"].append(value)
            if is_leaf:
                row = (int(rng.integers(targets)), node, tree, float(np.float32(rng.uniform(-1, 1))))
                for key, value in zip(("ids", "nodeids", "treeids", "weights"), row, strict=True):
                    leaf[f"{kind}_{key}"].append(value)
    return {k: tuple(v) for k, v in (found | leaf).items()}


def _leaf_attrs(kind: str) -> dict[str, Any]:
    return dict.fromkeys(f"{kind}_{k}" for k in ("ids", "nodeids", "treeids", "weights"))


def _regressor(since: int, extra: dict[str, Any]) -> Op:
    base = {**forest(5, 3, 4, 3, "target"), "n_targets": 3, "base_values": (0.1, 0.2, 0.3)}
    return Op(
        "TreeEnsembleRegressor",
        since,
        domain="ai.onnx.ml",
        infer=lambda site: (TensorSpec((_rows(site), _targets(site)), np.dtype(np.float32)),),
        **_ways(_regress, "target"),
        attrs={
            **_NODES,
            **_leaf_attrs("target"),
            "aggregate_function": "SUM",
            "base_values": None,
            "n_targets": None,
            "post_transform": "NONE",
            **extra,
        },
        cases=(
            *(Case(how.lower(), (f32(7, 4),), {**base, "aggregate_function": how}) for how in AGGREGATES),
            Case("one_row", (f32(1, 4),), {**forest(2, 1, 4, 1, "target"), "n_targets": 1}),
        ),
    )


def _classifier(since: int, extra: dict[str, Any]) -> Op:
    three = {**forest(5, 3, 4, 3, "class"), "classlabels_int64s": (4, 7, 9)}
    binary = {**forest(5, 3, 4, 1, "class"), "classlabels_int64s": (0, 1)}

    def infer(site: Site) -> tuple[TensorSpec, TensorSpec]:
        labels = labels_of(site, "classlabels_int64s")
        return TensorSpec((_rows(site),), labels.dtype), TensorSpec((_rows(site), len(labels)), np.dtype(np.float32))

    return Op(
        "TreeEnsembleClassifier",
        since,
        domain="ai.onnx.ml",
        infer=infer,
        **_ways(_classify, "class"),
        attrs={
            **_NODES,
            **_leaf_attrs("class"),
            "base_values": None,
            "classlabels_int64s": None,
            "classlabels_strings": None,
            "post_transform": "NONE",
            **extra,
        },
        cases=(
            *(
                Case(p.lower(), (f32(7, 4),), {**three, "post_transform": p}, n_outs=2)
                for p in ("NONE", "SOFTMAX", "LOGISTIC")
            ),
            *(
                Case(f"binary_{p.lower()}", (f32(7, 4),), {**binary, "post_transform": p}, n_outs=2)
                for p in ("NONE", "LOGISTIC")
            ),
            Case("base_values", (f32(40, 4),), {**three, "base_values": (0.3, -0.2, 0.1)}, n_outs=2),
        ),
    )


_SPLITS = np.array([3.14, 1.2, 4.2], np.float32)
_ENSEMBLE = Op(
    "TreeEnsemble",
    5,
    domain="ai.onnx.ml",
    infer=lambda site: (TensorSpec((_rows(site), int(site.attrs["n_targets"] or 1)), site.spec(0).dtype),),
    **_ways(_ensemble, ""),
    attrs={
        "aggregate_function": 1,
        "leaf_targetids": REQUIRED,
        "leaf_weights": REQUIRED,
        "membership_values": None,
        "n_targets": None,
        "nodes_falseleafs": REQUIRED,
        "nodes_falsenodeids": REQUIRED,
        "nodes_featureids": REQUIRED,
        "nodes_hitrates": None,
        "nodes_missing_value_tracks_true": None,
        "nodes_modes": REQUIRED,
        "nodes_splits": REQUIRED,
        "nodes_trueleafs": REQUIRED,
        "nodes_truenodeids": REQUIRED,
        "post_transform": 0,
        "tree_roots": REQUIRED,
    },
    cases=(
        Case(
            "tree",
            (f32(5, 2),),
            {
                "n_targets": 2,
                "tree_roots": (0,),
                "nodes_featureids": (0, 0, 0),
                "nodes_splits": _SPLITS,
                "nodes_modes": np.zeros(3, np.uint8),
                "nodes_truenodeids": (1, 0, 1),
                "nodes_trueleafs": (0, 1, 1),
                "nodes_falsenodeids": (2, 2, 3),
                "nodes_falseleafs": (0, 1, 1),
                "leaf_targetids": (0, 1, 0, 1),
                "leaf_weights": np.array([5.23, 12.12, -12.23, 7.21], np.float32),
            },
            low=0,
            high=6,
        ),
    ),
)

OPS = (
    *(_regressor(since, extra) for since, extra in ((1, {}), (3, {**_TENSORS, "target_weights_as_tensor": None}))),
    *(_classifier(since, extra) for since, extra in ((1, {}), (3, {**_TENSORS, "class_weights_as_tensor": None}))),
    _ENSEMBLE,
)
