"""A mixture of experts: tokens go to the experts that a router chooses, whose outputs are weighed and added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infera_kernels.calls import Array
from infera_kernels.portable.activation import activation
from infera_kernels.portable.softmax import softmax

Layer = Callable[[int, Array], Array]
"""`f(expert, x)`: rows (n, K) through that expert's linear layer, in float32."""


def routes(xp: Any, logits: Array, k: int, weights: Array | None = None, *, normalize: bool) -> Array:
    """(tokens, experts): the weight of the `k` likeliest experts of each token, 0 for the others.

    A token's weights are its probabilities, or what `weights` (tokens, experts) gives; with `normalize` they add up
    to 1. Of equals the expert with the higher number goes first.
    """
    chances = softmax(xp, logits.astype(xp.float32))
    ranks = xp.argsort(xp.argsort(chances, axis=-1, kind="stable"), axis=-1, kind="stable")
    made = xp.where(ranks >= chances.shape[1] - k, chances if weights is None else weights.astype(xp.float32), 0)
    total = made.sum(axis=-1, keepdims=True)
    return made / xp.where(total == 0, 1, total) if normalize else made


def swiglu(xp: Any, x: Array, *, alpha: float, beta: float, limit: float, interleaved: bool) -> Array:
    """swish(gate) (up + beta): gates and the rest alternate in the last axis, or come one after the other."""
    half = x.shape[-1] // 2
    gate, up = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    gate, up = xp.minimum(gate, limit), xp.clip(up, -limit, limit)
    return activation(xp, "swish", gate, alpha=alpha) * (up + beta)


def mixture(
    xp: Any, x: Array, weights: Array, first: Layer, act: Callable[[Array], Array], second: Layer, width: int
) -> Array:
    """(tokens, width) in float32: the sum of second(act(first(x))) over a token's experts, those whose `weights`
    (tokens, experts) are positive, times these."""
    made = xp.zeros((len(x), width), xp.float32)
    for expert in range(weights.shape[1]):
        rows = xp.flatnonzero(weights[:, expert] > 0)
        if rows.size:
            out = second(expert, act(first(expert, x[rows].astype(xp.float32))))
            made[rows] += weights[rows, expert][:, None] * out
    return made
