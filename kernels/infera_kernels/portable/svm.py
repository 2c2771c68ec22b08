"""Support vector machines, for NumPy and CuPy: kernel functions, votes of pairs of classes, their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array

KERNELS = ("LINEAR", "POLY", "RBF", "SIGMOID")


def kernel(xp: Any, kind: str, x: Array, vectors: Array, gamma: float, coef0: float, degree: float) -> Array:
    """How alike rows and vectors are, by one of KERNELS: (rows, features), (vectors, features) -> (rows, vectors)."""
    product = x @ vectors.T
    if kind == "LINEAR":
        return product
    if kind == "RBF":
        square = (x * x).sum(1)[:, None] + (vectors * vectors).sum(1) - 2 * product
        return xp.exp(-gamma * xp.maximum(square, 0))
    shifted = gamma * product + coef0
    return xp.tanh(shifted) if kind == "SIGMOID" else shifted**degree


def _pairs(classes: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(classes) for j in range(i + 1, classes)]


def duels(xp: Any, similar: Array, weights: Array, rho: Array, counts: Sequence[int]) -> tuple[Array, Array]:
    """Each pair of classes (0, 1), (0, 2), ... (1, 2), ... decided: scores (rows, pairs), votes (rows, classes).

    The vectors lie class by class, `counts` of each; `weights` is (classes - 1, vectors): row k holds what the vectors
    of a class i say against class k, or k + 1 where k >= i. A positive score is a vote for the pair's first class.
    """
    classes, ends = len(counts), np.cumsum(counts)
    own = [slice(int(end - n), int(end)) for end, n in zip(ends, counts, strict=True)]
    pairs = _pairs(classes)
    scores = [
        similar[:, own[i]] @ weights[j - 1, own[i]] + similar[:, own[j]] @ weights[i, own[j]] + rho[k]
        for k, (i, j) in enumerate(pairs)
    ]
    votes = xp.zeros((len(similar), classes), np.int64)
    for (i, j), score in zip(pairs, scores, strict=True):
        votes[:, i] += score > 0
        votes[:, j] += ~(score > 0)
    return xp.stack(scores, axis=1), votes


def coupled(xp: Any, scores: Array, a: Array, b: Array, classes: int) -> Array:
    """Probabilities of the classes from the scores of their pairs: (rows, pairs) -> (rows, classes).

    A pair's first class wins with 1 / (1 + exp(a · score + b)). These are coupled by the second method of Wu, Lin and
    Weng, "Probability Estimates for Multi-class Classification by Pairwise Coupling" (2004), with the start and the end
    of libsvm's iteration. In float32, step by step as onnxruntime does: rows end at different steps.
    """
    f = np.float32
    won = xp.clip(1 / (1 + xp.exp(scores.astype(f) * a.astype(f) + b.astype(f))), f(1e-7), f(1) - f(1e-7))
    rows = len(scores)
    r = xp.zeros((classes, classes, rows), f)
    for k, (i, j) in enumerate(_pairs(classes)):
        r[i, j], r[j, i] = won[:, k], 1 - won[:, k]
    q = -r * r.transpose(1, 0, 2)
    for i in range(classes):
        q[i, i] = (r[:, i] * r[:, i]).sum(axis=0)
    p = xp.full((classes, rows), f(1) / f(classes), f)
    going = xp.ones(rows, np.bool_)
    for _ in range(100):
        qp = (q * p[None]).sum(axis=1)
        pqp = (p * qp).sum(axis=0)
        going = going & (xp.abs(qp - pqp).max(axis=0) >= f(0.005) / f(classes))
        if not going.any():
            break
        new = p.copy()
        for i in range(classes):
            step = (pqp - qp[i]) / q[i, i]
            new[i] += step
            pqp = (pqp + step * (step * q[i, i] + 2 * qp[i])) / (1 + step) / (1 + step)
            qp = (qp + step * q[i]) / (1 + step)
            new /= 1 + step
        p = xp.where(going, new, p)
    return p.T
