"""ai.onnx.ml: tree ensembles, of both forms, over one forest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops._families import movable
from infera_gpu.ops._forest import NODE_LISTS, Packed, forest, packed_trees, tree_floats
from infera_gpu.ops._ml import labels_of, post_transform, rows_of, winners
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import trees as cpu

AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


def _scores(site: Site, packed: Packed, x: Array, how: str) -> tuple[Array, Array]:
    """Each row's scores, and which targets its leaves have named."""
    forest, weights, hit = packed
    targets = weights.shape[1]
    wide = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    found = cpu.leaves(forest, wide.reshape(-1, x.shape[-1]))
    everywhere = targets == 1 or site.attrs.get("base_values") is None
    named = np.ones((1, targets), np.bool_) if everywhere else hit.take(found, axis=0).any(axis=1)
    return cpu.aggregate(found, weights, hit, how), named


def _base(site: Site, scores: Array, named: Array | None = None) -> Array:
    """With the base values, which onnxruntime leaves out, of several targets, for one that no leaf has named."""
    base = tree_floats(site, "base_values")
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
    base = tree_floats(site, "base_values")
    if base is not None and len(base):
        one = one + base[-1 if len(base) == 2 else 0]
    weights = tree_floats(site, "class_weights")
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
        packed = packed_trees(site, kind, _targets_of(site, kind))

        def call(x: Array, *outs: Array) -> None:
            made = run(site, packed, x)
            for out, array in zip(outs, made if isinstance(made, tuple) else (made,), strict=True):
                np.copyto(out, array)

        return [(call, (io.ins[0], *io.outs))]

    return {
        "compute": lambda xp, site, x: run(site, packed_trees(site, kind, _targets_of(site, kind)), x),
        "kernels": {"cpu": Kernel(bind, supports=movable, allocates=True)},
        "portable": False,
    }


_TENSORS: dict[str, Any] = dict.fromkeys(
    ("base_values_as_tensor", "nodes_hitrates_as_tensor", "nodes_values_as_tensor")
)


def _leaf_attrs(kind: str) -> dict[str, Any]:
    return dict.fromkeys(f"{kind}_{k}" for k in ("ids", "nodeids", "treeids", "weights"))


def _regressor(since: int, extra: dict[str, Any]) -> Op:
    base = {**forest(5, 3, 4, 3, "target"), "n_targets": 3, "base_values": (0.1, 0.2, 0.3)}
    return Op(
        "TreeEnsembleRegressor",
        since,
        domain="ai.onnx.ml",
        infer=lambda site: (TensorSpec((rows_of(site), _targets(site)), np.dtype(np.float32)),),
        **_ways(_regress, "target"),
        attrs={
            **NODE_LISTS,
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
        return TensorSpec((rows_of(site),), labels.dtype), TensorSpec(
            (rows_of(site), len(labels)), np.dtype(np.float32)
        )

    return Op(
        "TreeEnsembleClassifier",
        since,
        domain="ai.onnx.ml",
        infer=infer,
        **_ways(_classify, "class"),
        attrs={
            **NODE_LISTS,
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
    infer=lambda site: (TensorSpec((rows_of(site), int(site.attrs["n_targets"] or 1)), site.spec(0).dtype),),
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
