"""ai.onnx.ml: tree ensembles, of both forms, over one forest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops._families import movable
from infera_gpu.ops._forest import MODES, NODE_LISTS, Packed, forest, packed_trees, tree_floats
from infera_gpu.ops._ml import both_columns, labels_of, post_transform, rows_of, winners
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import trees as cpu

AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


def _scores(packed: Packed, x: Array, how: str) -> tuple[Array, Array | None]:
    """Each row's scores, and which targets its leaves have named; None where that is all of them."""
    wide = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    found = cpu.leaves(packed.forest, wide.reshape(-1, x.shape[-1]))
    named = None if packed.certain else packed.hit.take(found, axis=0).any(axis=1)
    return cpu.aggregate(found, packed.weights, packed.hit, how), named


def _checked_base(site: Site, base: Array, targets: int) -> Array:
    if len(base) != targets:
        raise site.fail(f"base_values has {len(base)} values for {targets} targets or classes")
    return base


def _base(site: Site, targets: int) -> Array | None:
    base = tree_floats(site, "base_values")
    return None if base is None or not len(base) else _checked_base(site, base, targets)


def _regress(site: Site, packed: Packed, x: Array) -> Array:
    how = site.attrs["aggregate_function"]
    if how not in AGGREGATES:
        raise site.fail(f"aggregate_function is '{how}', expected one of {', '.join(AGGREGATES)}")
    scores, named = _scores(packed, x, how)
    base = _base(site, scores.shape[1])
    if base is not None:  # as in onnxruntime, one of several targets that no leaf of a row names stays 0
        scores = scores + (base if named is None or len(base) == 1 else np.where(named, base, 0))
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
    scores, _ = _scores(packed, x, AGGREGATES[how])
    return post_transform(site, scores.astype(x.dtype), TRANSFORMS[post])


def _classify(site: Site, packed: Packed, x: Array) -> tuple[Array, Array]:
    """The class with the highest score wins; without base values, of the classes that the row's leaves name."""
    labels = labels_of(site, "classlabels_int64s")
    scores, named = _scores(packed, x, "SUM")
    ids = set(site.attrs["class_ids"] or ())
    wide = np.float64 if x.dtype == np.float64 else np.float32
    if len(labels) == 2 and len(ids) == 1:
        return _classify_two(site, labels, scores.astype(wide), int(ids.pop()))
    base = _base(site, len(labels))
    scores = (scores if base is None else scores + base).astype(wide)
    open_to = scores if named is None or base is not None else np.where(named, scores, -np.inf)
    return labels[winners(open_to)], post_transform(site, scores.astype(np.float32))


def _classify_two(site: Site, labels: Array, scores: Array, scored: int) -> tuple[Array, Array]:
    """Two classes of which the leaves score one, as onnxruntime reads them.

    The second label wins with a score above 0, or above 1/2 where no weight is negative. Weights of class 0 are in fact
    the second's, and the first gets what is left; weights of class 1 leave the first 0.
    """
    base, weights = tree_floats(site, "base_values"), tree_floats(site, "class_weights")
    if base is None or not len(base):
        base = np.zeros(2)
    elif len(base) == 1:
        base = np.where(np.arange(2) == scored, base, 0)
    score = scores[:, scored] + _checked_base(site, base, 2)[scored].astype(scores.dtype)
    positive = weights is None or bool((weights >= 0).all())
    picked = labels[(score > (0.5 if positive else 0)).astype(int)]
    if scored == 0:
        return picked, both_columns(site, score.astype(np.float32), complement=positive)
    made = np.stack((np.full_like(score, base[0]), score), axis=1)
    return picked, post_transform(site, made.astype(np.float32))


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


_WHOLE = np.random.default_rng(0).integers(-3, 4, (30, 4)).astype(np.float32)
_WHOLE[::3, 1] = np.nan


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
            *(
                Case(m.lower(), (_WHOLE,), {**forest(4, 3, 4, 2, "target", 1, (m,), whole=True), "n_targets": 2})
                for m in MODES[1:]
            ),
            Case("mixed", (_WHOLE,), {**forest(4, 4, 4, 1, "target", 2, MODES, whole=True), "n_targets": 1}),
            Case("double", (TensorSpec((7, 4), np.dtype(np.float64)),), base),
            Case("one_row", (f32(1, 4),), {**forest(2, 1, 4, 1, "target"), "n_targets": 1}),
        ),
    )


def _classifier(since: int, extra: dict[str, Any]) -> Op:
    three = {**forest(5, 3, 4, 3, "class"), "classlabels_int64s": (4, 7, 9)}
    binary = {**forest(5, 3, 4, 1, "class"), "classlabels_int64s": (3, 8)}
    positive = {**forest(5, 3, 4, 1, "class", low=0), "classlabels_int64s": (3, 8)}

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
                Case(f"{name}_{p.lower()}", (f32(7, 4),), {**attrs, "post_transform": p}, n_outs=2)
                for name, attrs in (("binary", binary), ("positive", positive))
                for p in ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO")
            ),
            Case("binary_base", (f32(40, 4),), {**binary, "base_values": (0.7,)}, n_outs=2),
            Case("second_class", (f32(40, 4),), {**binary, "class_ids": (1,) * len(binary["class_ids"])}, n_outs=2),
            Case("integers", (TensorSpec((9, 4), np.dtype(np.int64)),), three, n_outs=2),
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
