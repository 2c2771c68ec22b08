"""Products of rows whose columns become axes, as tf2onnx writes the einsums of Keras' projections to heads and back."""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, infera, node
from infera_gpu.passes.heads import laid_out
from infera_gpu.passes.pattern import P
from infera_gpu.passes.sizes import Sizes, product


def _made(match: Match) -> Sizes | None:
    """The shape that the rows of a product have in the end."""
    rows, weight, mm = match.spec("rows"), match.constant("w"), match.nodes["mm"]
    if weight.ndim != 2 or mm.attrs.get("transA", 0) or (mm.op == "Gemm" and float(mm.attrs.get("alpha", 1.0)) != 1.0):
        return None
    columns = weight.shape[-2 if mm.attrs.get("transB", 0) else -1]
    if rows is None or not rows.ranked or rows.ndim != 2 or rows.dtype != weight.dtype:
        return None
    return laid_out(match, (rows.shape[0], columns))


def _is_of_columns(match: Match) -> bool:
    """One value for each column, in the shape that the columns get."""
    made, bias, weight = _made(match), match.constant("b"), match.constant("w")
    columns = weight.size // weight.shape[-1 if match.nodes["mm"].attrs.get("transB", 0) else -2]
    shape = bias.shape if made is None or bias.ndim <= len(made) else ()
    if made is None or bias.dtype != weight.dtype or bias.size != columns:
        return False
    return made[len(made) - len(shape) :] == shape and bool(shape)


def _before_the_columns(match: Match) -> Replacement:
    mm, back, last = (match.nodes[name] for name in ("mm", "back", "last"))
    out = match.root.outputs[0]
    flat, biased, again = (made_name(out, name) for name in ("bias", "product", "columns"))
    attrs = {k: v for k, v in mm.attrs.items() if k == "transB"}
    product = Node("FusedMatMul", (match.values["rows"], match.values["w"], flat), (biased,), attrs, domain="infera")
    reshape = Node("Reshape", (biased, *back.inputs[1:]), (again,), back.attrs)
    squeeze = Node("Squeeze", (again, *last.inputs[1:]), match.root.outputs, last.attrs, name=match.root.name)
    return Replacement(squeeze, {flat: match.constant("b").reshape(-1)}, (product, reshape))


def _laid_out(made: P) -> P:
    return node("Squeeze", node("Reshape", made, "t", name="back"), "?#last_axes", name="last")


COLUMNS = Fusion(
    name="bias_of_columns",
    patterns=(node("Add", _laid_out(node(("MatMul", "Gemm"), "rows", "#w", name="mm")), "#b", commutes=True),),
    guard=_is_of_columns,
    build=_before_the_columns,
    example="""
        example (float[B, S, 3] x) => (float[B, S, 2, 2] y)
        <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[2, 2] b = {1, -2, 3, 0.5},
         int64[2] m = {-1, 3}, int64[2] i = {0, 1}, int64[2] n = {2, 2}, int64[1] one = {1}, int64[1] last = {4}> {
            s = Shape(x)
            g = Gather(s, i)
            t = Concat <axis = 0> (g, n, one)
            a = Reshape(x, m)
            p = Gemm <transB = 1, beta = 0.0> (a, w)
            c = Reshape(p, t)
            d = Squeeze(c, last)
            y = Add(d, b)
        }""",
    near_misses=(
        """
        one_value_a_column_of_other_axes (float[2, 3] x) => (float[2, 2, 2] y)
        <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[2, 2, 1] b = {1, -2, 3, 0.5},
         int64[4] t = {2, 2, 2, 1}, int64[1] last = {3}> {
            p = Gemm <transB = 1> (x, w)
            c = Reshape(p, t)
            d = Squeeze(c, last)
            y = Add(d, b)
        }""",
        """
        half_the_product (float[2, 3] x) => (float[2, 2, 2] y)
        <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[2, 2] b = {1, -2, 3, 0.5},
         int64[4] t = {2, 2, 2, 1}, int64[1] last = {3}> {
            p = Gemm <transB = 1, alpha = 0.5> (x, w)
            c = Reshape(p, t)
            d = Squeeze(c, last)
            y = Add(d, b)
        }""",
        """
        product_is_an_output (float[2, 3] x) => (float[2, 2, 2] y, float[2, 4] p)
        <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[2, 2] b = {1, -2, 3, 0.5},
         int64[4] t = {2, 2, 2, 1}, int64[1] last = {3}> {
            p = Gemm <transB = 1> (x, w)
            c = Reshape(p, t)
            d = Squeeze(c, last)
            y = Add(d, b)
        }""",
    ),
)

# ---- back from heads


def _source(match: Match) -> str | None:
    """What rows were made of, of which the first two axes are those of the result, and the others a row."""
    made, laid = match.producers.get(match.values["rows"]), _made(match)
    y = match.draft.spec(made.inputs[0]) if made is not None and made.qualified == "Reshape" else None
    if made is None or laid is None or len(laid) != 3 or y is None or not y.ranked or y.shape[:2] != laid[:2]:
        return None
    rows, weight = match.spec("rows"), match.constant("w")
    columns = weight.shape[-2 if match.nodes["mm"].attrs.get("transB", 0) else -1]
    matrix = product(y.shape[:2]), product(y.shape[2:])
    fits = rows is not None and rows.shape == matrix and isinstance(matrix[1], int) and laid[2] == columns
    return made.inputs[0] if fits and _has_row_bias(match, columns) else None


def _has_row_bias(match: Match, columns: int) -> bool:
    """No bias, or one value a column."""
    bias = match.spec("b") if match.values.get("b") else None
    row = bias is not None and bias.ranked and 0 < bias.ndim < 3 and product(bias.shape) == bias.shape[-1] == columns
    return row or not match.values.get("b")


def _of_three_axes(match: Match) -> Replacement:
    source, rows, mm, out = _source(match), match.spec("rows"), match.nodes["mm"], match.root.outputs[0]
    assert source is not None
    assert rows is not None
    shape, merged = made_name(out, "shape"), made_name(out, "rows")
    before = Node("Reshape", (source, shape), (merged,), {})
    constants = {shape: np.array([0, 0, rows.shape[1]], np.int64)}
    return Replacement(infera(match, "FusedMatMul", (merged, *mm.inputs[1:]), mm.attrs), constants, (before,))


_MERGED_EXAMPLE = """
        example (float[B, S, 2, 3] x) => (float[B, S, 2] y)
        <float[6, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[2] b = {1, -2},
         int64[2] m = {-1, 6}, int64[2] i = {0, 1}, int64[1] n = {2}, int64[1] one = {1}, int64[1] last = {3}> {
            s = Shape(x)
            g = Gather(s, i)
            t = Concat <axis = 0> (g, n, one)
            a = Reshape(x, m)
            p = infera.FusedMatMul(a, w, b)
            c = Reshape(p, t)
            y = Squeeze(c, last)
        }"""

MERGED = Fusion(
    name="matmul_of_merged_axes",
    patterns=(_laid_out(node("infera.FusedMatMul", "rows", "#w", "?b", name="mm")),),
    guard=lambda match: _source(match) is not None,
    build=_of_three_axes,
    example=_MERGED_EXAMPLE,
    near_misses=(
        changed(
            _MERGED_EXAMPLE,
            ("example (", "axes_swapped ("),
            ("float[B, S, 2] y)", "float[S, B, 2] y)"),
            ("int64[2] i = {0, 1}", "int64[2] i = {1, 0}"),
        ),
        """
        rows_of_part_of_the_axes (float[B, S, 2, 3] x) => (float[B, S, 4] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {1, -2},
         int64[2] m = {-1, 3}, int64[2] i = {0, 1}, int64[1] n = {4}, int64[1] one = {1}, int64[1] last = {3}> {
            s = Shape(x)
            g = Gather(s, i)
            t = Concat <axis = 0> (g, n, one)
            a = Reshape(x, m)
            p = infera.FusedMatMul(a, w, b)
            c = Reshape(p, t)
            y = Squeeze(c, last)
        }""",
        changed(
            _MERGED_EXAMPLE, ("example (", "another_count_of_rows ("), ("int64[2] m = {-1, 6}", "int64[2] m = {5, 6}")
        ),
        changed(
            _MERGED_EXAMPLE,
            ("example (", "one_value_a_row ("),
            ("float[B, S, 2, 3] x)", "float[B, 2, 2, 3] x)"),
            ("float[B, S, 2] y)", "float[B, 2, 2] y)"),
            ("float[2] b = {1, -2}", "float[2, 1] b = {1, -2}"),
        ),
    ),
)

FUSIONS = (COLUMNS, MERGED)
