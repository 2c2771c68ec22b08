"""ai.onnx.ml on random models: trees, hyperplanes and support vectors against onnxruntime; the domain is complete.

Splits, features and weights are multiples of 1/8: sums are exact, and what is compared with a threshold does not depend
on the order of additions. What onnxruntime gets wrong is left out, with the reason, or turned into what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from infera_gpu.op import REQUIRED
from infera_gpu.ops import registry
from infera_gpu.spec import onnx_of_dtype
from tests.cases import assert_close
from tests.forests import MODES, Flat, Shape, classic, eighths, features, grow
from tests.ml_support import both, same_labels, same_scores, same_targets

POSTS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
PHASES = (Phase.generate, Phase.shrink)
INTS = "classlabels_int64s"
WORDS = ("a", "bb", "", "é")


def bounded(examples: int) -> settings:
    return settings(max_examples=examples, phases=PHASES)


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
rows = st.sampled_from((9, 140, 2, 1, 0))
"""onnxruntime walks few trees, many trees, few rows and many rows in ways of their own."""
batches = rows | st.none()
"""None for a single row without the axis, which models other than trees take too."""


def labels(rng: np.random.Generator, count: int, words: bool, ints: str = "classlabels_ints") -> dict[str, Any]:
    """As an attribute; `ints` is what integers go by."""
    return {"classlabels_strings": WORDS[:count]} if words else {ints: tuple(map(int, rng.permutation(20)[:count] - 5))}


# ---- trees


@st.composite
def shapes(draw: st.DrawFn, modes: Sequence[str] = MODES) -> Shape:
    chosen = draw(st.sets(st.sampled_from(modes), min_size=1) | st.sampled_from(modes).map(lambda m: {m}))
    trees, depth = draw(st.sampled_from(((3, 3), (5, 4), (1, 4), (90, 2), (1, 0))))
    return Shape(trees, depth, draw(st.integers(1, 4)), tuple(sorted(chosen)), some_of(1), draw(st.booleans()))


def some_of(targets: int) -> Callable[[np.random.Generator], Sequence[int]]:
    return lambda rng: rng.permutation(targets)[: rng.integers(1, targets + 1)].tolist()


@bounded(200)
@given(
    seeds,
    shapes(),
    rows,
    st.sampled_from((1, 3)),
    st.sampled_from((np.float32, np.float64)),
    st.integers(1, 3),
    st.sampled_from(AGGREGATES),
    st.sampled_from(POSTS),
    st.booleans(),
)
def test_tree_regressors(
    rng: Any, shape: Shape, batch: int, since: int, dtype: Any, targets: int, how: str, post: str, based: bool
) -> None:
    shape.ids, shape.low = some_of(targets), 0 if post == "PROBIT" else -2
    forest = [grow(rng, shape, 0) for _ in range(shape.trees)]
    attrs = classic(forest, "target", dtype, since == 3 and dtype == np.float64)
    attrs |= {"n_targets": targets, "aggregate_function": how, "post_transform": post}
    if based:
        attrs["base_values"] = tuple(map(float, eighths(rng, targets)))
    x = features(rng, batch, shape.width, dtype, missing=True)
    ((got, want),) = both("TreeEnsembleRegressor", since, attrs, x, [TensorProto.FLOAT])
    same_targets(got, want, post)


@bounded(200)
@given(
    seeds,
    shapes((*MODES, "BRANCH_MEMBER")),
    rows,
    st.sampled_from((np.float32, np.float64)),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 4),
)
def test_tree_ensembles(rng: Any, shape: Shape, batch: int, dtype: Any, targets: int, how: int, post: int) -> None:
    shape.ids, shape.low = lambda r: [int(r.integers(targets))], 0 if POSTS[post] == "PROBIT" else -2
    flat = Flat()
    for _ in range(shape.trees):
        flat.root(grow(rng, shape, 0))
    attrs = {**flat.attrs(dtype), "n_targets": targets, "aggregate_function": how, "post_transform": post}
    x = features(rng, batch, shape.width, dtype, missing=True)
    if "BRANCH_MEMBER" in shape.modes:  # onnxruntime cuts 1.5 to 1 before it looks it up
        x = np.trunc(x)
    # ai.onnx.ml numbers SOFTMAX 1 and LOGISTIC 2; onnxruntime has them the other way round
    theirs = {1: 2, 2: 1}.get(post, post)
    outs = [onnx_of_dtype(np.dtype(dtype))]
    ((got, want),) = both("TreeEnsemble", 5, attrs, x, outs, post_transform=theirs)
    same_targets(got, want, POSTS[post])


DTYPES = st.sampled_from((np.float32, np.float64, np.int64, np.int32))
LABELS = {True: TensorProto.STRING, False: TensorProto.INT64}


def classifier(rng: Any, shape: Shape, batch: int, since: int, dtype: Any, attrs: dict[str, Any], names: Any) -> Any:
    forest = [grow(rng, shape, 0) for _ in range(shape.trees)]
    attrs = {**classic(forest, "class", dtype, since == 3 and dtype == np.float64), **attrs, **names}
    x = features(rng, batch, shape.width, dtype, missing=True)
    return both("TreeEnsembleClassifier", since, attrs, x, [LABELS["classlabels_strings" in names], TensorProto.FLOAT])


@bounded(200)
@given(
    seeds,
    shapes(),
    rows,
    st.sampled_from((1, 3)),
    DTYPES,
    st.integers(3, 4),
    st.sampled_from(POSTS),
    st.booleans(),
    st.booleans(),
)
def test_tree_classifiers(
    rng: Any, shape: Shape, batch: int, since: int, dtype: Any, n: int, post: str, based: bool, words: bool
) -> None:
    shape.ids, shape.low = some_of(n), 0 if post == "PROBIT" else -2
    base = {"base_values": tuple(map(float, eighths(rng, n)))} if based else {}
    pairs = classifier(rng, shape, batch, since, dtype, {**base, "post_transform": post}, labels(rng, n, words, INTS))
    (got, want), (scores, peer) = pairs
    same_labels(got, want)
    same_scores(scores, peer, post)


@bounded(200)
@given(
    seeds,
    shapes(),
    rows,
    st.sampled_from((1, 3)),
    DTYPES,
    st.sampled_from(("first", "first, one base value", "first, two base values", "second", "mirrored")),
    st.sampled_from(POSTS),
    st.booleans(),
    st.booleans(),
)
def test_tree_classifiers_of_two(
    rng: Any, shape: Shape, batch: int, since: int, dtype: Any, form: str, post: str, positive: bool, words: bool
) -> None:
    """Leaves score one class, or both, the second by what the first lacks."""
    shape.ids = lambda r: [int(form == "second")]
    shape.mirrored, shape.low = form == "mirrored", 0 if positive else -2
    count = {"first, one base value": 1, "first, two base values": 2}.get(form, 0)
    attrs: dict[str, Any] = {"post_transform": post}
    if count:
        attrs["base_values"] = tuple(map(float, eighths(rng, count)))
    names = labels(rng, 2, words, INTS)
    (got, want), (scores, peer) = classifier(rng, shape, batch, since, dtype, attrs, names)
    if form == "mirrored" and not words:  # onnxruntime answers 1 or 0, whatever the labels are
        want = np.asarray(names[INTS], np.int64)[want]
    same_labels(got, want)
    if form == "first, two base values":
        return  # onnxruntime loses the second score on the way to the output
    if post == "PROBIT" and form in ("first", "first, one base value"):  # onnxruntime leaves the second column unset
        assert_close(scores[:, 1], peer[:, 0], 1e-5, "scores")
        return
    same_scores(scores, peer, post)


def test_trees_that_score_both_of_two_classes_name_the_higher() -> None:
    """onnxruntime asks for the sign of the second score alone, and mixes the scores up where there are base values."""
    leaf = {"nodes_treeids": (0,), "nodes_nodeids": (0,), "nodes_modes": ("LEAF",), "nodes_values": (0.0,)}
    leaf |= {f"nodes_{k}": (0,) for k in ("featureids", "truenodeids", "falsenodeids")}
    votes = {"class_treeids": (0, 0), "class_nodeids": (0, 0), "class_ids": (0, 1), "class_weights": (0.75, 0.25)}
    for base, label, scores in (((0.0, 0.0), 5, (0.75, 0.25)), ((0.0, 1.0), 3, (0.75, 1.25))):
        attrs = {**leaf, **votes, "base_values": base, "classlabels_int64s": (5, 3)}
        x = np.zeros((2, 1), np.float32)
        pairs = both("TreeEnsembleClassifier", 3, attrs, x, [TensorProto.INT64, TensorProto.FLOAT])
        assert [got.tolist() for got, _ in pairs] == [[label] * 2, [list(scores)] * 2]


# ---- hyperplanes and support vectors


@bounded(60)
@given(seeds, batches, st.integers(1, 3), st.sampled_from(POSTS), st.booleans())
def test_linear_regressors(rng: Any, batch: Any, targets: int, post: str, shifted: bool) -> None:
    x = features(rng, batch, 3, np.float32, missing=False)  # onnxruntime has no other type here
    attrs: dict[str, Any] = {"coefficients": tuple(eighths(rng, 3 * targets)), "targets": targets}
    attrs |= {"post_transform": post}
    if shifted:
        attrs["intercepts"] = tuple(eighths(rng, targets))
    ((got, want),) = both("LinearRegressor", 1, attrs, x, [TensorProto.FLOAT])
    same_targets(got, want, post)


@bounded(100)
@given(seeds, batches, DTYPES, st.integers(2, 4), st.booleans(), st.sampled_from(POSTS), st.booleans())
def test_linear_classifiers(rng: Any, batch: Any, dtype: Any, n: int, one: bool, post: str, words: bool) -> None:
    planes = 1 if one and n == 2 else n
    x = features(rng, batch, 3, dtype, missing=False)
    attrs = {"coefficients": tuple(eighths(rng, 3 * planes)), "intercepts": tuple(eighths(rng, planes))}
    attrs |= labels(rng, n, words)
    outs = [LABELS[words], TensorProto.FLOAT]
    (got, want), (scores, peer) = both("LinearClassifier", 1, {**attrs, "post_transform": post}, x, outs)
    same_labels(got, want)
    if post != "PROBIT" or planes > 1:  # of one plane, onnxruntime writes one row's score into another's
        same_scores(scores, peer, post)


def machine(rng: np.random.Generator, kind: str, vectors: int, rows: int) -> dict[str, Any]:
    degree = float(rng.integers(1, 4))
    return {
        "kernel_type": kind,
        "kernel_params": (float(eighths(rng, low=0.125, high=1)), float(eighths(rng, low=-1, high=1)), degree),
        "coefficients": tuple(map(float, rng.uniform(-1, 1, rows * (vectors or 3)).astype(np.float32))),
        **(
            {"support_vectors": tuple(map(float, rng.uniform(-1, 1, 3 * vectors).astype(np.float32)))}
            if vectors
            else {}
        ),
    }


KERNELS = st.sampled_from(("LINEAR", "POLY", "RBF", "SIGMOID"))


@bounded(60)
@given(seeds, batches, KERNELS, st.integers(0, 5), st.booleans())
def test_svm_regressors(rng: Any, batch: Any, kind: str, vectors: int, one_class: bool) -> None:
    x = features(rng, batch, 3, np.float32, missing=False)
    attrs = {**machine(rng, kind, vectors, 1), "rho": (0.3,), "n_supports": vectors, "one_class": int(one_class)}
    ((got, want),) = both("SVMRegressor", 1, attrs, x, [TensorProto.FLOAT])
    assert_close(got, want, 1e-4, "targets")


@bounded(200)
@given(
    seeds,
    batches,
    DTYPES,
    KERNELS,
    st.integers(2, 4),
    st.sampled_from(("votes", "chances", "planes", "planes with chances")),
    st.booleans(),
    st.sampled_from(POSTS),
    st.booleans(),
)
def test_svm_classifiers(
    rng: Any, batch: Any, dtype: Any, kind: str, n: int, form: str, positive: bool, post: str, words: bool
) -> None:
    pairs = n * (n - 1) // 2
    planes = form.startswith("planes")
    counts = () if planes else tuple(map(int, rng.integers(0, 4, n) + np.eye(n, dtype=int)[0]))
    attrs = machine(rng, kind, sum(counts), n if planes else n - 1)
    attrs["rho"] = tuple(map(float, rng.uniform(-0.3, 0.3, pairs).astype(np.float32)))
    if planes:  # exact, as PROBIT close to 0 and 1 needs
        attrs |= {k: tuple(eighths(rng, len(attrs[k]))) for k in ("coefficients", "rho")}
    elif post == "PROBIT":
        post = "NONE"
    if positive:
        attrs["coefficients"] = tuple(map(abs, attrs["coefficients"]))
    if form.endswith("chances"):
        attrs["prob_a"] = tuple(map(float, rng.uniform(-3, 1, pairs).astype(np.float32)))
        attrs["prob_b"] = tuple(map(float, rng.uniform(-1, 1, pairs).astype(np.float32)))
    attrs |= {"vectors_per_class": counts} if counts else {}
    attrs |= labels(rng, n, words)
    x = features(rng, batch, 3, dtype, missing=False)
    outs = [LABELS[words], TensorProto.FLOAT]
    (got, want), (scores, peer) = both("SVMClassifier", 1, {**attrs, "post_transform": post}, x, outs)
    same_labels(got, want)
    same_scores(scores, peer, post)


# ---- the domain


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param(s, id=f"{s.name}-{s.since_version}")
        for s in onnx.defs.get_all_schemas_with_history()
        if s.domain == "ai.onnx.ml"
    ],
)
def test_every_operator_of_the_domain_is_declared(schema: Any) -> None:
    op = registry().find("ai.onnx.ml", schema.name, schema.since_version)
    assert op is not None
    assert set(schema.attributes) <= set(op.attrs)
    for name, attr in schema.attributes.items():
        if attr.required:
            assert op.attrs[name] is REQUIRED, name
        elif attr.default_value.type:
            default = helper.get_attribute_value(attr.default_value)
            assert op.attrs[name] == (default.decode() if isinstance(default, bytes) else default), name
    if op.since == schema.since_version:
        assert set(op.attrs) == set(schema.attributes)
