"""Softmax and LogSoftmax written out along one axis."""

from __future__ import annotations

from collections.abc import Callable

from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, either, node, standard
from infera_gpu.passes.pattern import Arg, P, axis_in

_SHIFTED = node("Sub", "x", node("ReduceMax", "x", "?#axes_of_max", name="max"), name="shifted")


def _sum_of(exponentials: Arg) -> P:
    return node("ReduceSum", exponentials, "?#axes", name="sum")


def _quotients(x: Arg) -> tuple[P, P]:
    exponentials = node("Exp", x, name="exp")
    total = _sum_of(exponentials)
    inverse = either(node("Reciprocal", total), node("Div", 1.0, total))
    return node("Div", exponentials, total), node("Mul", exponentials, inverse, commutes=True)


def one_axis(match: Match, name: str) -> int | None:
    """The one axis that a named reduction keeps; None where there are more, or it is not known."""
    axes = match.axes(name)
    if axes is None or len(axes) != 1 or not match.nodes[name].attrs.get("keepdims", 1):
        return None
    (axis,), rank = axes, match.rank("x")
    return axis if rank is None else axis_in(axis, rank)


def _is_along_an_axis(match: Match) -> bool:
    """Floats, the maximum that is taken away is over the same axis, and the numbers add none."""
    x, axis = match.spec("x"), one_axis(match, "sum")
    if x is None or x.dtype.kind != "f" or axis is None or not match.keeps_shape():
        return False
    return "max" not in match.nodes or one_axis(match, "max") == axis


def _along(op: str) -> Callable[[Match], Replacement]:
    def build(match: Match) -> Replacement:
        return Replacement(standard(match, op, 13, (match.values["x"],), {"axis": one_axis(match, "sum")}))

    return build


SOFTMAX = Fusion(
    name="softmax",
    patterns=(*_quotients(_SHIFTED), *_quotients("x")),
    guard=_is_along_an_axis,
    build=_along("Softmax"),
    reassociates=True,
    example="""
        example (float[B, 5, 3] x) => (float[B, 5, 3] y) <int64[1] a = {1}> {
            m = ReduceMax <axes = [1]> (x)
            d = Sub(x, m)
            e = Exp(d)
            s = ReduceSum(e, a)
            y = Div(e, s)
        }""",
    near_misses=(
        """
        two_axes (float[B, 5, 3] x) => (float[B, 5, 3] y) <int64[2] a = {1, 2}> {
            e = Exp(x)
            s = ReduceSum(e, a)
            y = Div(e, s)
        }""",
        """
        sum_is_an_output (float[B, 5, 3] x) => (float[B, 5, 3] y, float[B, 1, 3] s) <int64[1] a = {1}> {
            e = Exp(x)
            s = ReduceSum(e, a)
            y = Div(e, s)
        }""",
        """
        other_exponentials (float[B, 5, 3] x, float[B, 5, 3] z) => (float[B, 5, 3] y) <int64[1] a = {1}> {
            e = Exp(x)
            f = Exp(z)
            s = ReduceSum(f, a)
            y = Div(e, s)
        }""",
    ),
)

_LOG_SOFTMAX_EXAMPLE = """
        example (float[B, 5, 3] x) => (float[B, 5, 3] y) <int64[1] a = {2}> {
            m = ReduceMax <axes = [-1]> (x)
            d = Sub(x, m)
            e = Exp(d)
            s = ReduceSum(e, a)
            l = Log(s)
            y = Sub(d, l)
        }"""

LOG_SOFTMAX = Fusion(
    name="log_softmax",
    patterns=(
        node("Sub", _SHIFTED, node("Log", _sum_of(node("Exp", _SHIFTED)))),
        node(
            "Sub",
            "x",
            either(node("ReduceLogSumExp", "x", "?#axes", name="sum"), node("Log", _sum_of(node("Exp", "x")))),
        ),
    ),
    guard=_is_along_an_axis,
    build=_along("LogSoftmax"),
    reassociates=True,
    example=_LOG_SOFTMAX_EXAMPLE,
    near_misses=(
        changed(_LOG_SOFTMAX_EXAMPLE, ("example (", "not_shifted_twice ("), ("y = Sub(d, l)", "y = Sub(x, l)")),
    ),
)

FUSIONS = (SOFTMAX, LOG_SOFTMAX)
