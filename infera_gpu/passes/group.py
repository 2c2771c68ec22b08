"""GroupNormalization as PyTorch's exporters write it: InstanceNormalization of channels reshaped to groups."""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, either, node, standard

NORMALIZED = node(
    "Reshape",
    node("InstanceNormalization", node("Reshape", "x", "#groups"), "#ones", "#zeros", name="instance"),
    either(node("Shape", "x"), "#shape"),
    name="back",
)


def _returns(match: Match) -> bool:
    """The last Reshape gives the shape of x: asked for, or known."""
    x = match.spec("x")
    if "shape" not in match.values:
        return True
    shape = match.constant("shape").tolist()
    if x is None or not x.ranked or len(shape) != x.ndim or 0 in shape or match.nodes["back"].attrs.get("allowzero", 0):
        return False
    others = [d for d, size in zip(x.shape, shape, strict=True) if d != size]
    return not others or (len(others) == 1 and shape.count(-1) == 1)


def _row(match: Match, name: str) -> np.ndarray | None:
    """A constant with one value a channel of x, as a row; None for any other."""
    value, rank = match.constant(name), match.rank("x")
    if rank is None or value.ndim not in (rank, rank - 1) or value.size != value.shape[-(rank - 1)]:
        return None
    return value.reshape(-1)


def _is_grouped(match: Match) -> bool:
    groups, x = match.constant("groups").tolist(), match.spec("x")
    count = match.constant("ones").size
    if x is None or not x.ranked or x.ndim < 3 or groups not in ([0, count, -1], [x.shape[0], count, -1]):
        return False
    if any(match.constant(n).shape != (count,) or match.constant(n).dtype != x.dtype for n in ("ones", "zeros")):
        return False
    rows = [_row(match, name) for name in ("scale", "shift")]
    channels = {row.size for row in rows if row is not None}
    return (
        all(row is not None and row.dtype == x.dtype for row in rows)
        and len(channels) == 1
        and channels == {x.shape[1]}
        and bool((match.constant("ones") == 1).all())
        and not match.constant("zeros").any()
        and _returns(match)
    )


def _grouped(match: Match) -> Replacement:
    rows = {made_name(match.root.outputs[0], name): _row(match, name) for name in ("scale", "shift")}
    attrs = {
        "num_groups": int(match.constant("ones").size),
        "epsilon": float(match.nodes["instance"].attrs.get("epsilon", 1e-5)),
    }
    made = standard(match, "GroupNormalization", 21, (match.values["x"], *rows), attrs)
    return Replacement(made, {name: row for name, row in rows.items() if row is not None})


GROUP_NORM = Fusion(
    name="group_norm",
    patterns=(node("Add", node("Mul", NORMALIZED, "#scale", commutes=True), "#shift", commutes=True),),
    guard=_is_grouped,
    build=_grouped,
    example="""
        example (float[B, 4, 3, 5] x) => (float[B, 4, 3, 5] y)
        <int64[3] g = {0, 2, -1}, float[2] one = {1, 1}, float[2] zero = {0, 0},
         float[4, 1, 1] s = {1, 2, -0.5, 3}, float[4, 1, 1] b = {0, 1, 2, -3}> {
            r = Reshape(x, g)
            n = InstanceNormalization <epsilon = 0.001> (r, one, zero)
            t = Shape <start = 0> (x)
            u = Reshape(n, t)
            m = Mul(u, s)
            y = Add(m, b)
        }""",
    near_misses=(
        """
        scaled_by_group (float[B, 4, 3, 5] x) => (float[B, 4, 3, 5] y)
        <int64[3] g = {0, 2, -1}, float[2] one = {1, 2}, float[2] zero = {0, 0},
         float[4, 1, 1] s = {1, 2, -0.5, 3}, float[4, 1, 1] b = {0, 1, 2, -3}> {
            r = Reshape(x, g)
            n = InstanceNormalization(r, one, zero)
            t = Shape(x)
            u = Reshape(n, t)
            m = Mul(u, s)
            y = Add(m, b)
        }""",
        """
        channels_are_unknown (float[B, C, 3, 5] x) => (float[B, 4, 3, 5] y)
        <int64[3] g = {0, 1, -1}, float[1] one = {1}, float[1] zero = {0},
         float[4, 1, 1] s = {1, 2, -0.5, 3}, float[4, 1, 1] b = {0, 1, 2, -3}> {
            r = Reshape(x, g)
            n = InstanceNormalization(r, one, zero)
            t = Shape(x)
            u = Reshape(n, t)
            m = Mul(u, s)
            y = Add(m, b)
        }""",
        """
        groups_in_a_column (float[B, 4, 3, 5] x) => (float[B, 4, 3, 5] y)
        <int64[3] g = {0, 2, -1}, float[2, 1] one = {1, 1}, float[2] zero = {0, 0},
         float[4, 1, 1] s = {1, 2, -0.5, 3}, float[4, 1, 1] b = {0, 1, 2, -3}> {
            r = Reshape(x, g)
            n = InstanceNormalization(r, one, zero)
            t = Shape(x)
            u = Reshape(n, t)
            m = Mul(u, s)
            y = Add(m, b)
        }""",
        """
        scaled_by_row (float[B, 4, 4, 5] x) => (float[B, 4, 4, 5] y)
        <int64[3] g = {0, 2, -1}, float[2] one = {1, 1}, float[2] zero = {0, 0},
         float[4, 1] s = {1, 2, -0.5, 3}, float[4, 1] b = {0, 1, 2, -3}> {
            r = Reshape(x, g)
            n = InstanceNormalization(r, one, zero)
            t = Shape(x)
            u = Reshape(n, t)
            m = Mul(u, s)
            y = Add(m, b)
        }""",
        """
        part_of_the_shape (float[B, 4, 4, 5] x) => (float[B, 4, 5] y)
        <int64[3] g = {0, 2, -1}, float[2] one = {1, 1}, float[2] zero = {0, 0},
         float[4, 1, 1] s = {1, 2, -0.5, 3}, float[4, 1, 1] b = {0, 1, 2, -3}> {
            r = Reshape(x, g)
            n = InstanceNormalization(r, one, zero)
            t = Shape <start = 1> (x)
            u = Reshape(n, t)
            m = Mul(u, s)
            y = Add(m, b)
        }""",
        """
        another_shape (float[B, 4, 3, 5] x, float[B, 4, 5, 3] z) => (float[B, 4, 5, 3] y)
        <int64[3] g = {0, 2, -1}, float[2] one = {1, 1}, float[2] zero = {0, 0},
         float[4, 1, 1] s = {1, 2, -0.5, 3}, float[4, 1, 1] b = {0, 1, 2, -3}> {
            r = Reshape(x, g)
            n = InstanceNormalization(r, one, zero)
            t = Shape(z)
            u = Reshape(n, t)
            m = Mul(u, s)
            y = Add(m, b)
        }""",
    ),
)

FUSIONS = (GROUP_NORM,)
