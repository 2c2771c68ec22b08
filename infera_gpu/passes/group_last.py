"""GroupNormalization of Keras, whose channels are last: means weighted by a mask, or by ones where there is none.

The mean of nothing is zero there, and no number elsewhere: nobody sees it, for then there is nothing to normalise.
"""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, either, node
from infera_gpu.passes.norm import inverse_root, squared
from infera_gpu.passes.pattern import Arg, axis_in
from infera_gpu.passes.sizes import Sizes, product

_GROUPS = node("Reshape", "x", "to", name="groups")
_ZEROS = node("ConstantOfShape", node("Shape", _GROUPS), name="zeros")
_TOTAL = node("ReduceSum", node("Add", "mask", _ZEROS, commutes=True), "?#axes_of_total", name="total")
_NOTHING = node("Equal", _TOTAL, 0.0)


def _mean(of: Arg, name: str) -> Arg:
    """Weighted by the mask; over the constant that its sum is where every size is known; or plain."""
    weighted = node("ReduceSum", node("Mul", "mask", of, commutes=True), f"?#axes_of_{name}", name=name)
    known = node("Div", node("ReduceSum", of, f"?#axes_of_{name}", name=name), f"#count_of_{name}")
    return either(
        node("Where", _NOTHING, 0.0, node("Div", weighted, _TOTAL)),
        node("Where", f"#nothing_of_{name}", 0.0, known),
        node("ReduceMean", of, f"?#axes_of_{name}", name=name),
    )


_MEAN = _mean(_GROUPS, "mean")
_VARIANCE = _mean(squared(node("Sub", _GROUPS, _MEAN)), "variance")
_ROOT = inverse_root(node("Add", _VARIANCE, "%epsilon", commutes=True))
_FACTOR = either(node("Mul", _ROOT, "scale", commutes=True), _ROOT)
_TERM = either(
    node("Sub", "shift", node("Mul", _MEAN, _FACTOR, commutes=True)),
    node("Mul", node("Neg", _MEAN), _FACTOR, commutes=True),
)


def _is_full_of(match: Match, value: str, number: float, grouped: Sizes) -> bool:
    """Whether a value of so many elements was made of this number alone."""
    made = match.producers.get(value)
    while made is not None and made.qualified == "Reshape":
        made = match.producers.get(made.inputs[0])
    if made is None or made.qualified != "ConstantOfShape":
        return False
    shape, count = _shape(match, made.outputs[0]), product(grouped)
    if shape is None or count is None or product(shape) != count:
        return False
    return float(np.asarray(made.attrs.get("value", 0.0)).reshape(-1)[0]) == number


def _shape(match: Match, value: str) -> Sizes | None:
    spec = match.draft.spec(value)
    return spec.shape if spec is not None and spec.ranked else None


def _is_weighted_evenly(match: Match, grouped: Sizes) -> bool:
    """The mask has ones for all, of which there are as many as are counted."""
    if not all(_is_count(match, name, grouped) for name in ("mean", "variance")):
        return False
    if "mask" not in match.values:
        return True
    mask, zeros = match.values["mask"], match.nodes["zeros"].outputs[0]
    ones = _is_full_of(match, mask, 1, grouped) and _shape(match, mask) == grouped
    return ones and _is_full_of(match, zeros, 0, grouped) and {"mean", "variance", "total"} <= match.nodes.keys()


def _is_count(match: Match, name: str, grouped: Sizes) -> bool:
    """Whether the constant that a sum is divided by, if it is one, is the number of elements in each group."""
    if f"count_of_{name}" not in match.values:
        return True
    count, nothing = (match.constant(f"{what}_of_{name}") for what in ("count", "nothing"))
    inner, wanted = product([*grouped[1:-2], grouped[-1]]), (grouped[0], *[1] * (len(grouped) - 3), grouped[-2], 1)
    return count.shape == nothing.shape == wanted and bool((count == inner).all()) and not nothing.any()


def _row(match: Match, name: str, grouped: Sizes) -> HostArray | None:
    """A value for each channel, laid out as channels of groups are; None where it is no constant."""
    value, wanted = match.values[name], (*[1] * (len(grouped) - 2), *grouped[-2:])
    made = match.producers.get(value)
    source = made.inputs[0] if made is not None and made.qualified == "Reshape" else value
    row = match.graph.constants.get(source)
    return row.reshape(-1) if row is not None and _shape(match, value) == wanted else None


def _grouped(match: Match) -> Sizes | None:
    """The shape of x with its channels as groups; None where it is none, or what is reduced is not each group."""
    x = match.spec("x")
    shape = _shape(match, match.nodes["groups"].outputs[0])
    if x is None or not x.ranked or x.ndim < 3 or x.dtype not in (np.float32, np.float64) or shape is None:
        return None
    groups, size = shape[-2:]
    if not (isinstance(groups, int) and isinstance(size, int)) or x.shape[-1] != groups * size or not groups:
        return None
    axes = [*range(1, x.ndim - 1), x.ndim]
    for name in ("mean", "variance", "total"):
        if name not in match.nodes:
            continue
        given = [axis_in(a, x.ndim + 1) for a in match.axes(name) or ()]
        if given != axes or not match.nodes[name].attrs.get("keepdims", 1):
            return None
    return shape if shape == (*x.shape[:-1], groups, size) else None


def _is_group_norm(match: Match) -> bool:
    """Scaled by finite numbers: infinity times x, less infinity times the mean, is none."""
    grouped, x = _grouped(match), match.spec("x")
    if grouped is None or x is None or not _is_weighted_evenly(match, grouped):
        return False
    rows = [_row(match, name, grouped) for name in ("scale", "shift") if name in match.values]
    if any(row is None or row.dtype != x.dtype for row in rows):
        return False
    if "scale" in match.values and rows[0] is not None and not np.isfinite(rows[0]).all():
        return False
    return match.draft.sizes(match.values["back"]) == x.shape and match.number("epsilon") >= 0 == match.numbers_rank


def _channels_first(match: Match) -> Replacement:
    """ONNX's operator between two Transposes, which go where an image's channels came first before."""
    x, grouped, out = match.spec("x"), _grouped(match), match.root.outputs[0]
    assert x is not None
    assert grouped is not None
    groups, size = grouped[-2:]
    assert isinstance(groups, int)
    assert isinstance(size, int)
    names = {name: made_name(out, name) for name in ("scale", "shift")}
    rows: dict[str, HostArray] = {}
    for name, fill in (("scale", 1), ("shift", 0)):
        row = _row(match, name, grouped) if name in match.values else None
        rows[names[name]] = np.full(groups * size, fill, x.dtype) if row is None else row
    first, normalized = made_name(out, "first"), made_name(out, "normalized")
    attrs = {"num_groups": groups, "epsilon": match.number("epsilon")}
    last = x.ndim - 1
    before = (
        Node("Transpose", (match.values["x"],), (first,), {"perm": (0, last, *range(1, last))}),
        Node("GroupNormalization", (first, *rows), (normalized,), attrs, opset=21),
    )
    perm = (0, *range(2, x.ndim), 1)
    return Replacement(Node("Transpose", (normalized,), (out,), {"perm": perm}, name=match.root.name), rows, before)


_EXAMPLE = """
        example (float[B, S, 4] x) => (float[B, S, 4] y)
        <float[4] g = {1, 2, -0.5, 3}, float[4] b = {0, 1, 2, -3}, float e = {0.001}, float none = {0},
         int64[1] zero = {0}, int64[1] two = {2}, int64[1] three = {3}, int64[2] axes = {1, 3},
         int32[1] groups = {2}, int32[2] single = {1, 1}> {
            s = Shape(x)
            c = Cast <to = 6> (s)
            back = Cast <to = 7> (c)
            lead = Slice(c, zero, two, zero)
            channels = Slice(c, two, three, zero)
            size = Div(channels, groups)
            sizes = Concat <axis = 0> (lead, groups, size)
            to = Cast <to = 7> (sizes)
            ones = ConstantOfShape <value = float[1] {1.0}> (s)
            w = Reshape(ones, to)
            r = Reshape(x, to)
            rs = Shape(r)
            zeros = ConstantOfShape <value = float[1] {0.0}> (rs)
            wz = Add(w, zeros)
            total = ReduceSum(wz, axes)
            nothing = Equal(total, none)
            wr = Mul(w, r)
            sum = ReduceSum(wr, axes)
            quotient = Div(sum, total)
            mean = Where(nothing, none, quotient)
            d = Sub(r, mean)
            dd = Mul(d, d)
            wd = Mul(w, dd)
            squares = ReduceSum(wd, axes)
            spread = Div(squares, total)
            variance = Where(nothing, none, spread)
            v = Add(variance, e)
            root = Sqrt(v)
            inverse = Reciprocal(root)
            rows = Concat <axis = 0> (single, groups, size)
            wide = Cast <to = 7> (rows)
            scale = Reshape(g, wide)
            shift = Reshape(b, wide)
            f = Mul(inverse, scale)
            rf = Mul(r, f)
            mf = Mul(mean, f)
            t = Sub(shift, mf)
            z = Add(rf, t)
            y = Reshape(z, back)
        }"""

GROUP_NORM_LAST = Fusion(
    name="group_norm_of_last_axis",
    patterns=(
        node("Reshape", node("Add", node("Mul", _GROUPS, _FACTOR, commutes=True), _TERM, commutes=True), "back"),
    ),
    guard=_is_group_norm,
    build=_channels_first,
    reassociates=True,
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE,
            ("example (", "masked ("),
            ("[B, S, 4] x)", "[B, S, 4] x, float[B, S, 2, 2] w)"),
            ("w = Reshape(ones, to)", ""),
        ),
        changed(_EXAMPLE, ("example (", "weights_of_two ("), ("float[1] {1.0}", "float[1] {2.0}")),
        changed(_EXAMPLE, ("example (", "groups_in_turn ("), ("int64[2] axes = {1, 3}", "int64[2] axes = {1, 2}")),
        changed(_EXAMPLE, ("example (", "of_every_place ("), ("int64[2] axes = {1, 3}", "int64[1] axes = {3}")),
        changed(
            _EXAMPLE,
            ("example (", "laid_out_otherwise ("),
            ("y = Reshape(z, back)", "y = Reshape(z, to)"),
            ("=> (float[B, S, 4] y)", "=> (float[B, S, 2, 2] y)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "scaled_by_place ("),
            ("int32[2] single = {1, 1}", "int32[2] single = {1, 2}"),
            ("rows = Concat <axis = 0> (single, groups, size)", "rows = Concat <axis = 0> (single, groups, one)"),
            ("int64[1] two", "int32[1] one = {1}, int64[1] two"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "another_count_of_ones ("),
            ("float[B, S, 4] x)", "float[B, S, 4] x, float[B, T, 4] other)"),
            ("s = Shape(x)", "s = Shape(x)  so = Shape(other)"),
            ("ConstantOfShape <value = float[1] {1.0}> (s)", "ConstantOfShape <value = float[1] {1.0}> (so)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "scaled_by_infinity ("),
            ("float[4] g = {1, 2, -0.5, 3}", "float[4] g = {1, 2, inf, 3}"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "mean_is_an_output ("),
            ("=> (float[B, S, 4] y)", "=> (float[B, S, 4] y, float[B, 1, 2, 1] mean)"),
        ),
    ),
)

FUSIONS = (GROUP_NORM_LAST,)
