"""Two movements of data that are one, or none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from infera_gpu.graph import Node
from infera_gpu.passes.engine import Fusion, Match, Replacement, node, standard
from infera_gpu.passes.pattern import axis_in
from infera_gpu.spec import DType, dtype_of_onnx


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of the narrow type is one of the wide type."""
    if narrow.kind in "iu" and wide.kind == "f":
        info = np.iinfo(narrow)
        return bool(info.bits - (info.kind == "i") <= ml_dtypes.finfo(wide).nmant + 1)
    return bool(np.can_cast(narrow, wide, "safe"))


def _is_lossless(match: Match) -> bool:
    """What is between holds every value, and the result is what it was or of the same kind as both."""
    x, between, made = match.spec("x"), match.nodes["first"].attrs["to"], match.root.attrs["to"]
    if x is None or x.dtype == object:
        return False
    types = [x.dtype, dtype_of_onnx(between), dtype_of_onnx(made)]
    alike = types[0] == types[2] or len({t.kind for t in types}) == 1
    return alike and types[0].kind in "biuf" and types[2].kind in "biuf" and _holds(types[1], types[0])


CASTS = Fusion(
    name="cast_pair",
    patterns=(node("Cast", node("Cast", "x", name="first")),),
    guard=_is_lossless,
    build=lambda match: Replacement(standard(match, "Cast", 6, (match.values["x"],), {"to": match.root.attrs["to"]})),
    example="example (float[3] x) => (float[3] y) { a = Cast <to = 11> (x)  y = Cast <to = 1> (a) }",
    near_misses=(
        "narrower_between (float[3] x) => (float[3] y) { a = Cast <to = 10> (x)  y = Cast <to = 1> (a) }",
        "fractions_dropped (float[3] x) => (float[3] y) { a = Cast <to = 7> (x)  y = Cast <to = 1> (a) }",
        "large_integers (int64[3] x) => (int64[3] y) { a = Cast <to = 11> (x)  y = Cast <to = 7> (a) }",
    ),
)


def _transposed(match: Match) -> Replacement:
    first, second = (match.nodes[n].attrs["perm"] for n in ("first", "second"))
    perm = tuple(int(first[p]) for p in second)
    if perm == tuple(range(len(perm))):
        return Replacement(Node("Identity", (match.values["x"],), match.root.outputs, name=match.root.name))
    return Replacement(standard(match, "Transpose", 1, (match.values["x"],), {"perm": perm}))


TRANSPOSES = Fusion(
    name="transpose_pair",
    patterns=(node("Transpose", node("Transpose", "x", name="first"), name="second"),),
    build=_transposed,
    example="""
        example (float[2, 3, 4] x) => (float[4, 2, 3] y) {
            a = Transpose <perm = [1, 0, 2]> (x)
            y = Transpose <perm = [2, 1, 0]> (a)
        }""",
    near_misses=(
        """
        read_elsewhere (float[2, 3, 4] x) => (float[4, 2, 3] y, float[3, 2, 4] a) {
            a = Transpose <perm = [1, 0, 2]> (x)
            y = Transpose <perm = [2, 1, 0]> (a)
        }""",
        """
        reversed (float[2, 3, 4] x) => (float[4, 2, 3] y) {
            a = Transpose(x)
            y = Transpose <perm = [0, 2, 1]> (a)
        }""",
    ),
)


def _is_shape(sizes: Sequence[int]) -> bool:
    """Whether a Reshape may ask for these sizes: one of them at most is left open."""
    return all(size >= -1 for size in sizes) and sizes.count(-1) <= 1


def _reshapes(match: Match, last: Sequence[int]) -> bool:
    """Whether the first of two Reshapes is possible wherever the last one is: it hides no error then."""
    x, between = match.spec("x"), match.graph.constants.get(match.values["between"])
    if between is None:
        return False
    sizes: list[int] = between.reshape(-1).tolist()
    if not _is_shape(sizes):
        return False
    keeps = not match.nodes["first"].attrs.get("allowzero", 0)
    copied = [i for i, size in enumerate(sizes) if size == 0] if keeps else []
    asked = math.prod(size for size in sizes if size > 0 or (size == 0 and not keeps))
    if x is not None and x.ranked and all(i < x.ndim for i in copied):
        rest = [d for i, d in enumerate(x.shape) if i not in copied]
        if all(isinstance(d, int) for d in rest):
            count = math.prod(d for d in rest if isinstance(d, int))
            return asked > 0 and count % asked == 0 if -1 in sizes else count == asked
    if copied or 0 in last:
        return False
    count = math.prod(size for size in last if size > 0)
    return count % max(asked, 1) == 0 if -1 in sizes else -1 not in last and count == asked


def _is_possible(match: Match, last: Sequence[int]) -> bool:
    """Whether the first of two nodes can do what it is asked, as far as the last one can."""
    first, rank = match.nodes["first"], match.rank("x")
    if first.op == "Reshape":
        return _reshapes(match, last)
    if first.op == "Squeeze" and "axes" not in first.attrs and len(first.inputs) < 2:
        return True
    if rank is None:
        return False
    if first.op == "Flatten":
        return -rank <= int(first.attrs.get("axis", 1)) <= rank
    axes = match.axes("first")
    rank += len(axes or ()) if first.op == "Unsqueeze" else 0
    places = [axis_in(a, rank) for a in axes or ()]
    if axes is None or None in places or len(set(places)) < len(places):
        return False
    x = match.spec("x")
    return first.op == "Unsqueeze" or (x is not None and all(x.shape[i] == 1 for i in places if i is not None))


def _are_one(match: Match) -> bool:
    """No size of the last shape is taken from the one between, and what is left out could not have failed."""
    last = match.constant("shape").reshape(-1).tolist()
    named = 0 not in last or bool(match.root.attrs.get("allowzero", 0))
    return named and _is_shape(last) and _is_possible(match, last)


def _reshaped(match: Match) -> Replacement:
    inputs = (match.values["x"], match.values["shape"])
    return Replacement(standard(match, "Reshape", 5, inputs, match.root.attrs))


RESHAPES = Fusion(
    name="reshape_pair",
    patterns=(
        node("Reshape", node("Reshape", "x", "between", name="first"), "#shape"),
        node("Reshape", node(("Flatten", "Squeeze", "Unsqueeze"), "x", "?axes", name="first"), "#shape"),
    ),
    guard=_are_one,
    build=_reshaped,
    example="""
        example (float[2, 3, 4] x) => (float[4, 6] y) <int64[2] s = {6, 4}, int64[2] t = {4, -1}> {
            a = Reshape(x, s)
            y = Reshape(a, t)
        }""",
    near_misses=(
        """
        keeps_a_size (float[2, 3, 4] x) => (float[6, 4] y) <int64[2] s = {6, 4}, int64[2] t = {0, -1}> {
            a = Reshape(x, s)
            y = Reshape(a, t)
        }""",
        """
        may_be_impossible (float[B, 3, 4] x) => (float[4, N] y) <int64[2] s = {6, 4}, int64[2] t = {4, -1}> {
            a = Reshape(x, s)
            y = Reshape(a, t)
        }""",
        """
        copies_what_is_not_there (float[24] x) => (float[4, 6] y) <int64[2] s = {-1, 0}, int64[2] t = {4, -1}> {
            a = Reshape(x, s)
            y = Reshape(a, t)
        }""",
        """
        may_be_more_than_one (float[B, C, 4] x) => (float[4, N] y) <int64[1] one = {1}, int64[2] t = {4, -1}> {
            a = Squeeze(x, one)
            y = Reshape(a, t)
        }""",
        """
        no_such_axis (float[B, 4] x) => (float[4, N] y) <int64[1] three = {3}, int64[2] t = {4, -1}> {
            a = Unsqueeze(x, three)
            y = Reshape(a, t)
        }""",
        """
        shape_is_an_input (float[2, 3, 4] x, int64[2] t) => (float[4, 6] y) <int64[2] s = {6, 4}> {
            a = Reshape(x, s)
            y = Reshape(a, t)
        }""",
    ),
)

_SPREAD = node("Expand", "v", node("Shape", "x"))


def _unspread(match: Match) -> Replacement:
    """The same arithmetic, which broadcasts by itself."""
    inputs = [match.values["x"], match.values["v"]]
    if match.root.inputs[0] != match.values["x"]:
        inputs.reverse()
    return Replacement(standard(match, match.root.op, 7, tuple(inputs), {}))


EXPANDED = Fusion(
    name="expand_in_arithmetic",
    patterns=(
        node(("Add", "Sub", "Mul", "Div"), "x", _SPREAD),
        node(("Add", "Sub", "Mul", "Div"), _SPREAD, "x"),
    ),
    build=_unspread,
    example="""
        example (float[2, 3] x, float[2, 1] v) => (float[2, 3] y) {
            s = Shape(x)
            e = Expand(v, s)
            y = Div(x, e)
        }""",
    near_misses=(
        """
        shape_of_another_value (float[1, 3] x, float[2, 1] v, float[2, 3] z) => (float[2, 3] y) {
            s = Shape(z)
            e = Expand(v, s)
            y = Div(x, e)
        }""",
        """
        part_of_the_shape (float[3, 1] x, float[1] v) => (float[3, 3] y) {
            s = Shape <end = 1> (x)
            e = Expand(v, s)
            y = Div(x, e)
        }""",
    ),
)

FUSIONS = (CASTS, TRANSPOSES, RESHAPES, EXPANDED)
