"""BatchNormalization that no product can take, before an activation: a factor and a term, one step with it."""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, node
from infera_gpu.passes.weights import statistics

ACTIVATIONS = frozenset({"Relu", "LeakyRelu", "Clip", "Elu", "Selu", "Sigmoid", "Tanh", "HardSwish", "Swish"})


def _rows(match: Match) -> tuple[HostArray, HostArray] | None:
    """Factors and terms in float64; None where they are not one a channel, or no numbers of x's type."""
    x, attrs = match.spec("x"), match.nodes["bn"].attrs
    given = [match.constant(name) for name in ("scale", "shift", "mean", "var")]
    if x is None or not x.ranked or x.ndim < 2 or attrs.get("training_mode", 0) or not attrs.get("spatial", 1):
        return None
    if x.dtype not in (np.float32, np.float64):  # in 16 bits a mean far from 0 leaves nothing of x
        return None
    if any(row.shape != (x.shape[1],) or row.dtype != x.dtype for row in given):
        return None
    if (given[3].astype(np.float64) + float(attrs.get("epsilon", 1e-5)) <= 0).any():
        return None
    rows = statistics(match)
    return rows if all(np.isfinite(row.astype(x.dtype)).all() for row in rows) else None


def _comes_before_an_activation(match: Match) -> bool:
    readers = match.draft.readers.get(match.root.outputs[0], {}).values()
    return bool(readers) and all(n.qualified in ACTIVATIONS for n in readers) and _rows(match) is not None


def _apart(match: Match) -> Replacement:
    x, rows, out = match.spec("x"), _rows(match), match.root.outputs[0]
    assert x is not None
    assert rows is not None
    scaled, *names = (made_name(out, name) for name in ("scaled", "factor", "term"))
    shape = (-1, *(1,) * (x.ndim - 2))
    constants = {name: row.astype(x.dtype).reshape(shape) for name, row in zip(names, rows, strict=True)}
    before = Node("Mul", (match.values["x"], names[0]), (scaled,), {})
    return Replacement(Node("Add", (scaled, names[1]), (out,), {}, name=match.root.name), constants, (before,))


BATCH_NORM_APART = Fusion(
    name="batchnorm_apart",
    patterns=(node("BatchNormalization", "x", "#scale", "#shift", "#mean", "#var", name="bn"),),
    guard=_comes_before_an_activation,
    build=_apart,
    reassociates=True,
    example="""
        example (float[B, 2, 3] x) => (float[B, 2, 3] y)
        <float[2] s = {1, -2}, float[2] b = {0.5, 1}, float[2] m = {0.25, -1}, float[2] v = {1, 4}> {
            t = BatchNormalization <epsilon = 0.001> (x, s, b, m, v)
            y = Relu(t)
        }""",
    near_misses=(
        """
        channels_are_unknown (float[B, C, 3] x) => (float[B, 2, 3] y)
        <float[2] s = {1, -2}, float[2] b = {0.5, 1}, float[2] m = {0.25, -1}, float[2] v = {1, 4}> {
            t = BatchNormalization(x, s, b, m, v)
            y = Relu(t)
        }""",
        """
        sixteen_bits (float16[B, 2, 3] x) => (float16[B, 2, 3] y)
        <float16[2] s = {1, 1}, float16[2] b = {0, 0}, float16[2] m = {50, 3}, float16[2] v = {1, 4}> {
            n = BatchNormalization(x, s, b, m, v)
            y = Relu(n)
        }""",
        """
        variance_below_zero (float[B, 2, 3] x) => (float[B, 2, 3] y)
        <float[2] s = {1, -2}, float[2] b = {0.5, 1}, float[2] m = {0.25, -1}, float[2] v = {-1, 4}> {
            t = BatchNormalization(x, s, b, m, v)
            y = Relu(t)
        }""",
        """
        read_by_another (float[B, 2, 3] x) => (float[B, 2, 3] y, float[B, 3, 2] z)
        <float[2] s = {1, -2}, float[2] b = {0.5, 1}, float[2] m = {0.25, -1}, float[2] v = {1, 4}> {
            t = BatchNormalization(x, s, b, m, v)
            y = Relu(t)
            z = Transpose <perm = [0, 2, 1]> (t)
        }""",
    ),
)

FUSIONS = (BATCH_NORM_APART,)
