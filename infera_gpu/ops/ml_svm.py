"""ai.onnx.ml: support vector machines."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops._families import uniform
from infera_gpu.ops._ml import both_columns, floats, labels_of, ml_op, post_transform, rows_of, table
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import svm

F32 = np.dtype(np.float32)


def _kernel(site: Site, x: Array, vectors: Array, kind: str | None = None) -> Array:
    kind = site.attrs["kernel_type"] if kind is None else kind
    if kind not in svm.KERNELS:
        raise site.fail(f"kernel_type is '{kind}', expected one of {', '.join(svm.KERNELS)}")
    params = site.attrs["kernel_params"] or (0.0, 0.0, 0.0)
    if len(params) != 3:
        raise site.fail(f"kernel_params has {len(params)} values, expected gamma, coef0 and degree")
    return svm.kernel(np, kind, x, vectors, *params)


def _numbers(site: Site, name: str, *shape: int) -> Array:
    made = np.asarray(site.attrs[name] or (), np.float64)
    if made.size != np.prod(shape):
        raise site.fail(f"{name} has {made.size} values, expected {' x '.join(map(str, shape))}")
    return made.reshape(shape)


def _rho(site: Site, count: int = 1) -> Array:
    rho = np.asarray(site.attrs["rho"] or (), np.float64)
    if len(rho) < count:
        raise site.fail(f"rho has {len(rho)} values, expected {count}")
    return rho


def _regress(xp: Any, site: Site, x: Array) -> Array:
    rows, n = table(x).astype(np.float64), int(site.attrs["n_supports"])
    if n > 0:
        similar = _kernel(site, rows, _numbers(site, "support_vectors", n, rows.shape[1]))
        made = similar @ _numbers(site, "coefficients", n)
    else:
        made = _kernel(site, rows, _numbers(site, "coefficients", 1, rows.shape[1]), "LINEAR")[:, 0]
    made = (made + _rho(site)[0]).astype(np.float32)[:, None]
    return np.where(made > 0, 1, -1).astype(np.float32) if site.attrs["one_class"] else post_transform(site, made)


def _counts(site: Site) -> tuple[int, ...] | None:
    """How many support vectors each class has; None for the linear form, which has none."""
    counts = tuple(map(int, site.attrs["vectors_per_class"] or ()))
    if not any(counts):
        return None
    classes = len(labels_of(site, "classlabels_ints"))
    if len(counts) != classes or classes < 2 or min(counts) < 0:
        raise site.fail(
            f"vectors_per_class is {list(counts)} for {classes} labels, expected one number for each of two"
        )
    return counts


def _infer(site: Site) -> tuple[TensorSpec, TensorSpec]:
    """One score a class, or, of more than two classes without probabilities, one a pair."""
    labels, rows = labels_of(site, "classlabels_ints"), rows_of(site)
    by_pair = _counts(site) is not None and not site.attrs["prob_a"] and len(labels) > 2
    columns = len(labels) * (len(labels) - 1) // 2 if by_pair else len(labels)
    return TensorSpec((rows,), labels.dtype), TensorSpec((rows, columns), F32)


def _classify(xp: Any, site: Site, x: Array) -> tuple[Array, Array]:
    rows, labels, counts = table(x).astype(np.float64), labels_of(site, "classlabels_ints"), _counts(site)
    if counts is None:
        return _linear(site, rows, labels)
    n, total = len(labels), sum(counts)
    pairs = n * (n - 1) // 2
    similar = _kernel(site, rows, _numbers(site, "support_vectors", total, rows.shape[1])).astype(np.float32)
    weights = _numbers(site, "coefficients", n - 1, total)
    scores, votes = svm.duels(np, similar, weights, _rho(site, pairs), counts)
    picked, scores = labels[votes.argmax(axis=1)], scores.astype(np.float32)
    a, b = floats(site, "prob_a"), floats(site, "prob_b")
    if len(a) != len(b) or 0 < len(a) < pairs:
        raise site.fail(f"prob_a has {len(a)} values, prob_b {len(b)}, expected {pairs} of each, or none")
    if len(a):
        return picked, post_transform(site, svm.coupled(np, scores, a[:pairs], b[:pairs], n))
    if n == 2:
        return picked, both_columns(site, scores[:, 0], complement=site.attrs["post_transform"] != "NONE")
    return picked, post_transform(site, scores)


def _linear(site: Site, rows: Array, labels: Array) -> tuple[Array, Array]:
    """A hyperplane a class. Of two, the second wins with any score above 0, or 1/2 where no coefficient is negative."""
    weights = _numbers(site, "coefficients", len(labels), rows.shape[1])
    scores = (_kernel(site, rows, weights, "LINEAR") + _rho(site)[0]).astype(np.float32)
    pick = scores.argmax(axis=1)
    if len(labels) == 2 and not site.attrs["prob_a"]:
        best = scores.max(axis=1)
        pick = np.where(best >= 0.5 if (weights >= 0).all() else best > 0, 1, pick)
    return labels[pick], post_transform(site, scores)


_KINDS = ("LINEAR", "POLY", "RBF", "SIGMOID")
_MACHINE: dict[str, Any] = {
    **dict.fromkeys(("coefficients", "kernel_params", "rho", "support_vectors")),
    "kernel_type": "LINEAR",
    "post_transform": "NONE",
}


def _random(seed: int, count: int, low: float = -1, high: float = 1) -> tuple[float, ...]:
    return tuple(map(float, uniform(seed, low, high, count)))


def _machine(vectors: int, features: int, rows: int = 1, rho: int = 1) -> dict[str, Any]:
    return {
        "support_vectors": _random(1, vectors * features),
        "coefficients": _random(2, rows * vectors),
        "rho": _random(3, rho),
        "kernel_params": (0.5, 0.3, 3.0),
    }


def _classes(*counts: int, odds: bool = False) -> dict[str, Any]:
    n = len(counts)
    pairs = n * (n - 1) // 2
    chances = {"prob_a": _random(4, pairs, -3, -1), "prob_b": _random(5, pairs)} if odds else {}
    return {
        **_machine(sum(counts), 3, n - 1, pairs),
        "vectors_per_class": counts,
        "classlabels_ints": (4, 7, 9, 12)[:n],
        "kernel_type": "RBF",
        **chances,
    }


def _cases() -> tuple[Case, ...]:
    flat = {"coefficients": _random(6, 12), "rho": (0.2,), "kernel_params": (0.0, 0.0, 0.0)}
    two = {**flat, "coefficients": flat["coefficients"][:8], "classlabels_ints": (3, 8)}
    rows, made = f32(30, 3), [(k.lower(), {**_classes(3, 2, 4), "kernel_type": k}) for k in _KINDS]
    made += [(f"three_{p.lower()}", {**_classes(3, 2, 4), "post_transform": p}) for p in ("SOFTMAX", "LOGISTIC")]
    made += [(f"chances_{len(n)}", _classes(*n, odds=True)) for n in ((2, 3), (2, 0, 3), (4, 2, 3, 1))]
    made += [
        (f"two_{p.lower()}", {**_classes(3, 2), "post_transform": p})
        for p in ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO")
    ]
    return (
        *(Case(name, (rows,), attrs, n_outs=2) for name, attrs in made),
        Case("planes", (f32(30, 4),), {**flat, "classlabels_ints": (0, 4, 7)}, n_outs=2),
        Case("two_planes", (f32(30, 4),), two, n_outs=2),
        Case("positive", (f32(30, 4),), {**two, "coefficients": tuple(map(abs, two["coefficients"]))}, n_outs=2),
        Case("integers", (TensorSpec((9, 3), np.dtype(np.int64)),), _classes(3, 2, 4), n_outs=2),
    )


OPS: tuple[Op, ...] = (
    ml_op(
        "SVMRegressor",
        1,
        lambda site: (TensorSpec((rows_of(site), 1), F32),),
        _regress,
        {**_MACHINE, "n_supports": 0, "one_class": 0},
        (
            *(Case(k.lower(), (f32(4, 3),), {**_machine(5, 3), "n_supports": 5, "kernel_type": k}) for k in _KINDS),
            Case(
                "plane", (f32(4, 5),), {"coefficients": _random(7, 5), "rho": (0.1,), "kernel_params": (0.0, 0.0, 0.0)}
            ),
            Case("one_class", (f32(20, 3),), {**_machine(5, 3), "n_supports": 5, "one_class": 1}),
        ),
    ),
    ml_op(
        "SVMClassifier",
        1,
        _infer,
        _classify,
        {
            **_MACHINE,
            **dict.fromkeys(("classlabels_ints", "classlabels_strings", "prob_a", "prob_b", "vectors_per_class")),
        },
        _cases(),
    ),
)
