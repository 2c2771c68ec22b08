"""Layer normalisation as a batch norm of rows: Keras lays every row out as a channel, to use its fused operator."""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node, standard
from infera_gpu.passes.sizes import product
from infera_gpu.spec import Dim

AXES = [0, 2, 3]
"""Of a batch norm's statistics: all but the channels."""


def _rows(match: Match) -> tuple[str, int] | None:
    """What was laid out as one image with a row in each channel, and the first of its axes that make a row, counted
    from the last."""
    made = match.producers.get(match.values["r"])
    if made is None or made.qualified != "Reshape":
        return None
    x, target = match.draft.spec(made.inputs[0]), match.draft.sizes(made.inputs[1])
    if x is None or not x.ranked or x.dtype.kind != "f" or target is None or len(target) != 4:
        return None
    count, row = target[1:3]
    if target[::3] != (1, 1) or not isinstance(row, int) or row < 1 or count == 0:
        return None
    axis = next((axis for axis in range(-1, -x.ndim, -1) if product(x.shape[axis:]) == row), None)
    if axis is None or not all(isinstance(d, int) for d in x.shape[axis:]):
        return None
    return (made.inputs[0], axis) if count is not None and count in (-1, product(x.shape[:axis])) else None


def _are_all(match: Match, name: str, number: float, count: Dim) -> bool:
    """Whether a vector of so many elements has this number in every place: a constant, or one widened."""
    value, constants = match.values[name], match.graph.constants
    made = match.producers.get(value)
    if made is not None and made.qualified == "Expand":
        unit = constants.get(made.inputs[0])
        shape = match.draft.sizes(made.inputs[1])
        return unit is not None and unit.size == 1 and unit.ndim < 2 and unit.item() == number and shape == (count,)
    row = constants.get(value)
    return row is not None and row.shape == (count,) and bool((row == number).all())


def _is_layer_norm(match: Match) -> bool:
    found, bn = _rows(match), match.nodes["bn"].attrs
    r = match.spec("r")
    if found is None or r is None or not r.ranked or bn.get("training_mode", 0):
        return False
    if not (_are_all(match, "one", 1, r.shape[1]) and _are_all(match, "zero", 0, r.shape[1])):
        return False
    x = match.draft.spec(found[0])
    mean, squares = match.nodes["mean"].attrs, match.nodes["squares"].attrs
    same_axes = match.axes("mean") == match.axes("squares") == tuple(AXES) == match.axes("flat")
    if not same_axes or not mean.get("keepdims", 1) or squares.get("keepdims", 1):
        return False
    if x is None or match.draft.sizes(match.values["back"]) != x.shape:
        return False
    return _counts(match, product([r.shape[i] for i in AXES]))


def _counts(match: Match, size: Dim) -> bool:
    """Whether "count" is so many: cast from a size, or a number where that is known."""
    value = match.values["count"]
    known, made = match.graph.constants.get(value), match.producers.get(value)
    if known is not None:
        return known.size == 1 and known.ndim < 2 and known.item() == size
    return made is not None and made.qualified == "Cast" and match.draft.sizes(made.inputs[0]) == (size,)


def _normalized(match: Match) -> Replacement:
    found = _rows(match)
    assert found is not None
    value, axis = found
    x, name = match.draft.spec(value), made_name(match.root.outputs[0], "scale")
    assert x is not None
    attrs = {"axis": axis, "epsilon": float(match.nodes["bn"].attrs.get("epsilon", 1e-5))}
    rows = {name: np.ones([d for d in x.shape[axis:] if isinstance(d, int)], x.dtype)}
    return Replacement(standard(match, "LayerNormalization", 1, (value, name), attrs), rows)


_MEAN = node("ReduceMean", "r", "?#mean_axes", name="mean")
_SQUARES = node("ReduceSumSquare", node("Sub", "r", _MEAN), "?#axes", name="squares")

_EXAMPLE = """
        example (float[B, S, 4] x) => (float[B, S, 4] y)
        <int64[4] rows = {1, -1, 4, 1}, int64[1] first = {0}, int64[1] third = {2}, float unit = {1}, float none = {0},
         int64[3] axes = {0, 2, 3}> {
            s = Shape(x)
            c = Cast <to = 6> (s)
            back = Cast <to = 7> (c)
            r = Reshape(x, rows)
            d = Slice(c, first, third, first)
            p = ReduceProd <axes = [0], keepdims = 0> (d)
            q = Unsqueeze(p, first)
            n = Cast <to = 7> (q)
            zero = Expand(none, n)
            one = Expand(unit, n)
            t = Shape(r)
            u = Gather(t, axes)
            v = ReduceProd <axes = [0], keepdims = 0> (u)
            count = Cast <to = 1> (v)
            m = ReduceMean <axes = [0, 2, 3]> (r)
            e = Sub(r, m)
            f = ReduceSumSquare <axes = [0, 2, 3], keepdims = 0> (e)
            g = Squeeze(m, axes)
            h = Div(f, count)
            b = BatchNormalization <epsilon = 0.001> (r, one, zero, g, h)
            y = Reshape(b, back)
        }"""

LAYER_NORM_AS_BATCH_NORM = Fusion(
    name="layer_norm_as_batch_norm",
    patterns=(
        node(
            "Reshape",
            node(
                "BatchNormalization",
                "r",
                "one",
                "zero",
                node("Squeeze", _MEAN, "?#flat_axes", name="flat"),
                node("Div", _SQUARES, "count"),
                name="bn",
            ),
            "back",
        ),
    ),
    guard=_is_layer_norm,
    build=_normalized,
    reassociates=True,
    opset=15,
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE,
            ("example (", "two_rows_a_channel ("),
            ("int64[4] rows = {1, -1, 4, 1}", "int64[4] rows = {1, -1, 8, 1}"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "rows_among_others ("),
            ("float[B, S, 4] x)", "float[B, 2, 4] x)"),
            ("float[B, S, 4] y)", "float[B, 2, 4] y)"),
            ("int64[4] rows = {1, -1, 4, 1}", "int64[4] rows = {-1, 2, 4, 1}"),
        ),
        changed(
            _EXAMPLE, ("example (", "another_count ("), ("u = Gather(t, axes)", "u = Slice(t, first, third, first)")
        ),
        changed(
            _EXAMPLE,
            ("example (", "another_number ("),
            ("float none = {0},", "float none = {0}, float count = {3},"),
            ("            count = Cast <to = 1> (v)\n", ""),
        ),
        changed(_EXAMPLE, ("example (", "doubled ("), ("float unit = {1}", "float unit = {2}")),
        changed(
            _EXAMPLE,
            ("example (", "batch_norm_is_an_output ("),
            ("float[B, S, 4] y)", "float[B, S, 4] y, float[1, R, 4, 1] b)"),
        ),
    ),
)

FUSIONS = (LAYER_NORM_AS_BATCH_NORM,)
