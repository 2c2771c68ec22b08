"""What the declarations of ai.onnx.ml share: labels, transformations of scores. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site
from infera_gpu.spec import Array
from infera_kernels.portable.softmax import softmax


def ml_op(
    name: str,
    since: int,
    infer: Any,
    compute: Callable[..., Any],
    attrs: dict[str, Any],
    cases: Sequence[Case],
    *,
    host: bool = False,
) -> Op:
    return Op(name, since, infer, compute, tuple(cases), attrs, domain="ai.onnx.ml", host=host, portable=False)


def floats(site: Site, name: str) -> Array:
    """A list of floats, empty where it is left out."""
    return np.asarray(site.attrs[name] or (), np.float32)


def table(x: Array) -> Array:
    """(features,) or (rows, features) as float32 rows."""
    return x.reshape(1, -1).astype(np.float32) if x.ndim == 1 else x.astype(np.float32)


def rows_of(site: Site) -> int:
    """How many rows `table` makes of the input. Raises PlanError where it has neither form."""
    x = site.spec(0)
    if x.ndim not in (1, 2) or not x.dims[-1]:
        raise site.fail(f"its input is {x}, expected (rows, features)")
    return x.dims[0] if x.ndim == 2 else 1


def labels_of(site: Site, ints: str) -> Array:
    """The classes' labels, from `classlabels_strings` or the attribute named. Raises PlanError where there are none."""
    words, numbers = site.attrs["classlabels_strings"], site.attrs[ints]
    if not words and not numbers:
        raise site.fail(f"it has no labels: expected {ints} or classlabels_strings")
    return np.asarray(words, object) if words else np.asarray(numbers, np.int64)


def winners(scores: Array) -> Array:
    """The class with the highest score in each row, the first of equals."""
    return scores.argmax(axis=1)


def _softmax_zero(x: Array) -> Array:
    """Softmax over what is not 0; zeros stay."""
    e = np.where(np.abs(x) > 1e-7, np.exp(x - x.max(axis=1, keepdims=True)), 0)
    total = e.sum(axis=1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def _probit(x: Array) -> Array:
    """√2 erf⁻¹(2x - 1), by Winitzki's approximation as onnxruntime computes it."""
    y = 2 * x.astype(np.float32) - 1
    log = np.log((1 - y) * (1 + y))
    v = 2 / (np.float32(3.14159265358979323846) * np.float32(0.147)) + np.float32(0.5) * log
    root = np.sqrt(-v + np.sqrt(v * v - log / np.float32(0.147)))
    return np.float32(1.41421356) * np.sign(y) * root


TRANSFORMS: dict[str, Any] = {
    "NONE": lambda x: x,
    "SOFTMAX": lambda x: softmax(np, x),
    "LOGISTIC": lambda x: 1 / (1 + np.exp(-x)),
    "SOFTMAX_ZERO": _softmax_zero,
    "PROBIT": _probit,
}


def post_transform(site: Site, scores: Array, name: str | None = None) -> Array:
    """The scores (rows, classes) as the attribute `post_transform` says, or `name`."""
    name = site.attrs["post_transform"] if name is None else name
    if name not in TRANSFORMS:
        raise site.fail(f"post_transform is '{name}', expected one of {', '.join(TRANSFORMS)}")
    return np.asarray(TRANSFORMS[name](scores)).astype(scores.dtype)


def both_columns(site: Site, score: Array, *, complement: bool) -> Array:
    """Two classes' scores from the one that is known, (rows,) -> (rows, 2), as onnxruntime fills them in.

    LOGISTIC gives two probabilities. Else the first column is 1 - score with `complement`, or -score, and SOFTMAX and
    SOFTMAX_ZERO change neither. PROBIT, of which onnxruntime leaves a column unset, is that of 1 - score and score.
    """
    post = site.attrs["post_transform"]
    if post == "LOGISTIC":
        return post_transform(site, np.stack((-score, score), axis=1))
    if post == "PROBIT":
        return post_transform(site, np.stack((1 - score, score), axis=1))
    return post_transform(site, np.stack((1 - score if complement else -score, score), axis=1), "NONE")


OPS: tuple[Op, ...] = ()
