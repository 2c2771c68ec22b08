"""ai.onnx.ml: linear models."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._families import uniform
from infera_gpu.ops._ml import both_columns, floats, labels_of, ml_op, post_transform, rows_of, table, winners
from infera_gpu.spec import Array, TensorSpec

F32 = np.dtype(np.float32)


def _matrix(site: Site, rows: int, features: int) -> Array:
    made = floats(site, "coefficients")
    if made.size != rows * features:
        raise site.fail(f"{made.size} coefficients for {rows} x {features}")
    return made.reshape(rows, features)


def _linear(xp: Any, site: Site, x: Array) -> Array:
    rows, n = table(x), int(site.attrs["targets"])
    made = rows @ _matrix(site, n, rows.shape[1]).T
    shift = floats(site, "intercepts")
    return post_transform(site, (made + shift if shift.size else made).astype(np.float32))


def _classes_infer(name: str) -> Any:
    def infer(site: Site) -> tuple[TensorSpec, TensorSpec]:
        labels = labels_of(site, name)
        return TensorSpec((rows_of(site),), labels.dtype), TensorSpec((rows_of(site), len(labels)), F32)

    return infer


def _linear_classes(xp: Any, site: Site, x: Array) -> tuple[Array, Array]:
    rows, labels = table(x), labels_of(site, "classlabels_ints")
    n = floats(site, "coefficients").size // max(rows.shape[1], 1)
    shift = floats(site, "intercepts")
    scores = rows @ _matrix(site, n, rows.shape[1]).T + (shift if shift.size else 0)
    scores = scores.astype(np.float32)
    if n == 1 and len(labels) == 2:
        return labels[(scores[:, 0] > 0).astype(int)], both_columns(site, scores[:, 0], complement=True)
    if n != len(labels):
        raise site.fail(f"coefficients for {n} classes, labels for {len(labels)}")
    return labels[winners(scores)], post_transform(site, scores)


_COEFFICIENTS = tuple(map(float, uniform(5, -1, 1, 12)))
_THREE = {"coefficients": _COEFFICIENTS, "classlabels_ints": (0, 4, 7), "intercepts": (0.1, 0.2, 0.3)}
_TWO = {"coefficients": _COEFFICIENTS[:4], "classlabels_ints": (3, 8), "intercepts": (0.1,)}
OPS: tuple[Op, ...] = (
    ml_op(
        "LinearRegressor",
        1,
        lambda site: (TensorSpec((rows_of(site), int(site.attrs["targets"])), F32),),
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
            Case(f"{name}{p.lower()}", (f32(5, 4),), {**attrs, "post_transform": p}, n_outs=2)
            for name, attrs in (("", _THREE), ("two_", _TWO))
            for p in ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO")
        ),
    ),
)
