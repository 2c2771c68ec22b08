"""ai.onnx.ml: linear models and support vector machines."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._ml import floats, labels_of, ml_op, post_transform, table, winners
from infera_gpu.spec import Array, TensorSpec

F32 = np.dtype(np.float32)


def _matrix(site: Site, rows: int, features: int) -> Array:
    made = floats(site, "coefficients")
    if made.size != rows * features:
        raise site.fail(f"{made.size} coefficients for {rows} x {features}")
    return made.reshape(rows, features)


def _rows(site: Site) -> int:
    return site.spec(0).dims[0] if site.spec(0).ndim == 2 else 1


def _linear(xp: Any, site: Site, x: Array) -> Array:
    rows, n = table(x), int(site.attrs["targets"])
    made = rows @ _matrix(site, n, rows.shape[1]).T
    shift = floats(site, "intercepts")
    return post_transform(site, (made + shift if shift.size else made).astype(np.float32))


def _classes_infer(name: str) -> Any:
    def infer(site: Site) -> tuple[TensorSpec, TensorSpec]:
        labels = labels_of(site, name)
        return TensorSpec((_rows(site),), labels.dtype), TensorSpec((_rows(site), len(labels)), F32)

    return infer


def _linear_classes(xp: Any, site: Site, x: Array) -> tuple[Array, Array]:
    rows, labels = table(x), labels_of(site, "classlabels_ints")
    n = floats(site, "coefficients").size // max(rows.shape[1], 1)
    shift = floats(site, "intercepts")
    scores = rows @ _matrix(site, n, rows.shape[1]).T + (shift if shift.size else 0)
    if n == 1 and len(labels) == 2:
        pick = (scores[:, 0] > 0).astype(int)
        scores = np.concatenate((-scores, scores), axis=1)
    elif n == len(labels):
        pick = winners(scores)
    else:
        raise site.fail(f"coefficients for {n} classes, labels for {len(labels)}")
    return labels[pick], post_transform(site, scores.astype(np.float32))


def _kernel(site: Site, x: Array, vectors: Array) -> Array:
    """(rows, features), (vectors, features) -> (rows, vectors)"""
    kind = site.attrs["kernel_type"]
    gamma, coef0, degree = (*(site.attrs["kernel_params"] or ()), 0.0, 0.0, 0.0)[:3]
    if kind == "RBF":
        square = (x * x).sum(1)[:, None] + (vectors * vectors).sum(1) - 2 * (x @ vectors.T)
        return np.exp(-gamma * np.maximum(square, 0))
    product = x @ vectors.T
    made = {
        "LINEAR": lambda: product,
        "POLY": lambda: (gamma * product + coef0) ** degree,
        "SIGMOID": lambda: np.tanh(gamma * product + coef0),
    }
    if kind not in made:
        raise site.fail(f"kernel_type is '{kind}', expected LINEAR, POLY, RBF or SIGMOID")
    return made[kind]()


def _vectors(site: Site, count: int, features: int) -> Array:
    made = np.asarray(site.attrs["support_vectors"] or (), np.float64)
    if made.size != count * features:
        raise site.fail(f"{made.size} numbers for {count} support vectors of {features} features")
    return made.reshape(count, features)


def _svm_regress(xp: Any, site: Site, x: Array) -> Array:
    rows, n = table(x).astype(np.float64), int(site.attrs["n_supports"])
    weights, rho = np.asarray(site.attrs["coefficients"] or (), np.float64), floats(site, "rho")
    if n > 0:
        if len(weights) != n:
            raise site.fail(f"{len(weights)} coefficients for {n} support vectors")
        made = _kernel(site, rows, _vectors(site, n, rows.shape[1])) @ weights
    else:
        made = _kernel(site, rows, weights.reshape(1, -1))[:, 0]
    made = (made + (rho[0] if len(rho) else 0)).astype(np.float32)[:, None]
    return np.where(made > 0, 1, -1).astype(np.float32) if site.attrs["one_class"] else post_transform(site, made)


def _svm_params(rng: np.random.Generator, n: int, features: int) -> dict[str, Any]:
    return {
        "support_vectors": tuple(map(float, rng.uniform(-1, 1, n * features).astype(np.float32))),
        "coefficients": tuple(map(float, rng.uniform(-1, 1, n).astype(np.float32))),
        "rho": (0.25,),
        "kernel_params": (0.5, 0.3, 3.0),
        "n_supports": n,
    }


_RNG = np.random.default_rng(5)
_COEFFICIENTS = tuple(map(float, _RNG.uniform(-1, 1, 12).astype(np.float32)))
_THREE = {"coefficients": _COEFFICIENTS, "classlabels_ints": (0, 4, 7), "intercepts": (0.1, 0.2, 0.3)}
OPS: tuple[Op, ...] = (
    ml_op(
        "LinearRegressor",
        1,
        lambda site: (TensorSpec((_rows(site), int(site.attrs["targets"])), F32),),
        _linear,
        {"coefficients": None, "intercepts": None, "post_transform": "NONE", "targets": 1},
        (Case("three", (f32(5, 4),), {"coefficients": _COEFFICIENTS, "targets": 3, "intercepts": (0.1, 0.2, 0.3)}),),
    ),
    ml_op(
        "LinearClassifier",
        1,
        _classes_infer("classlabels_ints"),
        _linear_classes,
        {
            "classlabels_ints": None,
            "classlabels_strings": None,
            "coefficients": REQUIRED,
            "intercepts": None,
            "multi_class": 0,
            "post_transform": "NONE",
        },
        tuple(
            Case(
                p.lower(),
                (f32(5, 4),),
                {
                    "coefficients": _COEFFICIENTS,
                    "classlabels_ints": (0, 4, 7),
                    "intercepts": (0.1, 0.2, 0.3),
                    "post_transform": p,
                },
                n_outs=2,
            )
            for p in ("NONE", "SOFTMAX", "LOGISTIC")
        ),
    ),
    ml_op(
        "SVMRegressor",
        1,
        lambda site: (TensorSpec((_rows(site), 1), F32),),
        _svm_regress,
        {
            **dict.fromkeys(("coefficients", "kernel_params", "rho", "support_vectors")),
            "kernel_type": "LINEAR",
            "n_supports": 0,
            "one_class": 0,
            "post_transform": "NONE",
        },
        [
            Case(k.lower(), (f32(4, 3),), {**_svm_params(_RNG, 5, 3), "kernel_type": k})
            for k in ("LINEAR", "POLY", "RBF", "SIGMOID")
        ],
    ),
)
