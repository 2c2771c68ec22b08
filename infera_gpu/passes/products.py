"""Products of one value by several constant matrices are one product: queries, keys and values of attention."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import GPU, node, own_opset
from infera_gpu.passes.pattern import Match
from infera_gpu.passes.siblings import Joined, Siblings

DEFAULTS = {"transA": 0, "transB": 0, "alpha": 1.0, "activation": "", "matrices": 0}
"""The attributes of infera.FusedMatMul."""


def _attrs(match: Match) -> dict[str, object]:
    return {**DEFAULTS, **match.root.attrs}


def _columns(match: Match) -> int:
    return int(match.constant("w").shape[0 if _attrs(match)["transB"] else 1])


def _is_row(bias: HostArray, match: Match) -> bool:
    """One value of the weight's type a column, with no more axes than the product has."""
    row = bias.shape[-1:] == (bias.size,) == (_columns(match),) and bias.ndim <= (match.rank("x") or 1)
    return row and bias.dtype == match.constant("w").dtype


def _alike(match: Match) -> Hashable | None:
    """Products of one depth, type, scale and activation by matrices that nobody else needs.

    An output of the graph is left alone: as a part of a row it would be copied before it is handed out.
    """
    w, attrs = match.constant("w"), _attrs(match)
    if w.ndim != 2 or len(match.draft.readers[match.values["w"]]) > 1 or match.values["w"] in match.graph.outputs:
        return None
    if match.root.outputs[0] in match.graph.outputs or (
        "b" in match.values and not _is_row(match.constant("b"), match)
    ):
        return None
    return w.dtype.str, w.shape[1 if attrs["transB"] else 0], *attrs.items()


def _bias(match: Match) -> HostArray:
    """A match's bias; where it has none, what changes no number when it is added: -0, since -0 + 0 is 0."""
    w = match.constant("w")
    return match.constant("b").reshape(-1) if "b" in match.values else np.full(_columns(match), -0.0, w.dtype)


def _join(matches: Sequence[Match]) -> Joined:
    first, names = matches[0].root, tuple(match.root.outputs[0] for match in matches)
    attrs, product = _attrs(matches[0]), made_name(names[0], "joined")
    weight, bias, sizes = (made_name(product, what) for what in ("weight", "bias", "columns"))
    constants = {
        weight: np.concatenate([match.constant("w") for match in matches], axis=0 if attrs["transB"] else 1),
        sizes: np.array(list(map(_columns, matches)), np.int64),
    }
    inputs: tuple[str, ...] = (matches[0].values["x"], weight)
    if any("b" in match.values for match in matches):
        inputs, constants[bias] = (*inputs, bias), np.concatenate(list(map(_bias, matches)))
    label = first.name or names[0]
    split_opset = own_opset(matches[0].graph, 13)
    return Joined(
        (
            Node("FusedMatMul", inputs, (product,), attrs, "infera", f"{label}/joined"),
            Node("Split", (product, sizes), names, {"axis": -1}, name=f"{label}/parts", opset=split_opset),
        ),
        constants,
    )


_SQUARES = "float[3, 2] u = {1, 2, 3, 4, 5, 6}, float[3, 2] v = {-1, 7, 0.5, 4, -2, 8}"

SHARED_INPUT = Siblings(
    name="products_of_one_input",
    patterns=(node("MatMul", "x", "#w"), node("infera.FusedMatMul", "x", "#w", "?#b")),
    alike=_alike,
    join=_join,
    reassociates=True,
    kinds=GPU,
    example="""
        example (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] u = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -1}, float[3, 1] v = {-1, 7, 0.5}> {
            q = infera.FusedMatMul(x, u, b)
            r = Tanh(q)
            k = MatMul(x, v)
            y = Mul(r, k)
        }""",
    near_misses=(
        f"""
        of_two_inputs (float[2, 3] x, float[2, 3] z) => (float[2, 2] y) <{_SQUARES}> {{
            q = MatMul(x, u)
            k = MatMul(z, v)
            y = Mul(q, k)
        }}""",
        """
        weight_is_an_input (float[2, 3] x, float[3, 2] u) => (float[2, 2] y) <float[3, 2] v = {1, 2, 3, 4, 5, 6}> {
            q = MatMul(x, u)
            k = MatMul(x, v)
            y = Mul(q, k)
        }""",
        f"""
        bias_is_an_input (float[2, 3] x, float[2] b) => (float[2, 2] y) <{_SQUARES}> {{
            q = infera.FusedMatMul(x, u, b)
            k = MatMul(x, v)
            y = Mul(q, k)
        }}""",
        f"""
        weight_read_elsewhere (float[2, 3] x) => (float[2, 2] y, float[3, 2] z) <{_SQUARES}> {{
            q = MatMul(x, u)
            k = MatMul(x, v)
            y = Mul(q, k)
            z = Neg(v)
        }}""",
        f"""
        output_of_the_graph (float[2, 3] x) => (float[2, 2] y, float[2, 2] q) <{_SQUARES}> {{
            q = MatMul(x, u)
            k = MatMul(x, v)
            y = Mul(q, k)
        }}""",
        f"""
        activated_differently (float[2, 3] x) => (float[2, 2] y) <{_SQUARES}> {{
            q = infera.FusedMatMul <activation = "relu"> (x, u)
            k = infera.FusedMatMul <activation = "tanh"> (x, v)
            y = Mul(q, k)
        }}""",
        f"""
        scaled_differently (float[2, 3] x) => (float[2, 2] y) <{_SQUARES}> {{
            q = infera.FusedMatMul <alpha = 0.5> (x, u)
            k = MatMul(x, v)
            y = Mul(q, k)
        }}""",
        """
        of_another_depth (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] u = {1, 2, 3, 4, 5, 6}, float[4, 2] v = {1, 2, 3, 4, 5, 6, 7, 8}> {
            q = MatMul(x, u)
            k = MatMul(x, v)
            y = Mul(q, k)
        }""",
        """
        transposed_in_one (float[3, 3] x) => (float[3, 2] y)
        <float[3, 2] u = {1, 2, 3, 4, 5, 6}, float[2, 3] v = {1, 2, 3, 4, 5, 6}> {
            q = MatMul(x, u)
            k = infera.FusedMatMul <transB = 1> (x, v)
            y = Mul(q, k)
        }""",
        """
        by_several_matrices (float[2, 3] x) => (float[1, 2, 2] y)
        <float[1, 3, 2] u = {1, 2, 3, 4, 5, 6}, float[1, 3, 2] v = {-1, 7, 0.5, 4, -2, 8}> {
            q = MatMul(x, u)
            k = MatMul(x, v)
            y = Mul(q, k)
        }""",
        f"""
        residual_in_one (float[2, 3] x, float[2, 2] r) => (float[2, 2] y) <{_SQUARES}> {{
            q = infera.FusedMatMul(x, u, , r)
            k = MatMul(x, v)
            y = Mul(q, k)
        }}""",
        f"""
        bias_of_one_value (float[2, 3] x) => (float[2, 2] y) <{_SQUARES}, float[1] b = {{0.5}}> {{
            q = infera.FusedMatMul(x, u, b)
            k = MatMul(x, v)
            y = Mul(q, k)
        }}""",
        """
        of_another_type (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] u = {1, 2, 3, 4, 5, 6}, double[3, 2] v = {-1, 7, 0.5, 4, -2, 8}> {
            q = MatMul(x, u)
            k = MatMul(x, v)
            y = Mul(q, k)
        }""",
        """
        one_product (float[2, 3] x) => (float[2, 2] y) <float[3, 2] u = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, u) }""",
    ),
)


SIBLINGS = (SHARED_INPUT,)
