"""Products of rows: a value laid out as a matrix, times a matrix, laid out as before, is a product of the value itself.

tf2onnx writes a dense layer over more than two axes that way, and the Reshapes keep what follows it from the product.
"""

from __future__ import annotations

from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, either, infera, node
from infera_gpu.passes.sizes import product, reshaped

_PRODUCT = either(node("MatMul", "rows", "#w", name="mm"), node("Gemm", "rows", "#w", "?#b", name="mm"))


def _source(match: Match) -> str | None:
    """What was laid out as a matrix, whose rows are along its last axis."""
    made = match.producers.get(match.values["rows"])
    if made is None or made.qualified != "Reshape":
        return None
    x, target = match.draft.spec(made.inputs[0]), match.draft.sizes(made.inputs[1])
    if x is None or not x.ranked or not x.shape or target is None or len(target) != 2:
        return None
    every_row = target[0] is not None and target[0] in (-1, product(x.shape[:-1]))
    return made.inputs[0] if every_row and isinstance(x.shape[-1], int) and target[1] == x.shape[-1] > 0 else None


def _is_laid_out_again(match: Match) -> bool:
    """The last Reshape gives the axes of the value, and columns for its last one."""
    attrs, source = match.nodes["mm"].attrs, _source(match)
    weight, target = match.constant("w"), match.draft.sizes(match.values["t"])
    x = match.draft.spec(source) if source is not None else None
    if x is None or target is None or weight.ndim != 2 or attrs.get("transA", 0):
        return False
    depth, columns = weight.shape[:: -1 if attrs.get("transB", 0) else 1]
    wanted = (*x.shape[:-1], columns)
    if x.shape[-1] != depth or weight.dtype != x.dtype or len(target) != x.ndim or not _has_row_bias(match, columns):
        return False
    return (
        0 not in target
        and all(d in (size, -1) for d, size in zip(target, wanted, strict=True))
        and (target.count(-1) < 2 and reshaped(wanted, target, keeps=False) == wanted)
    )


def _has_row_bias(match: Match, columns: int) -> bool:
    """No bias, or one value a column."""
    if "b" not in match.values:
        return True
    bias, mm = match.constant("b"), match.nodes["mm"]
    whole = mm.op == "MatMul" or (float(mm.attrs.get("beta", 1.0)) == 1.0 and float(mm.attrs.get("alpha", 1.0)) == 1.0)
    return (
        whole
        and bias.ndim in (1, 2)
        and bias.size == bias.shape[-1] == columns
        and bias.dtype == match.constant("w").dtype
    )


def _of_itself(match: Match) -> Replacement:
    mm, source = match.nodes["mm"], _source(match)
    assert source is not None
    attrs = {k: v for k, v in mm.attrs.items() if k in ("transB", "alpha")}
    bias = (match.values["b"],) if "b" in match.values else ()
    return Replacement(infera(match, "FusedMatMul", (source, match.values["w"], *bias), attrs))


_EXAMPLE = """
        example (float[B, S, 3] x) => (float[B, S, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, int64[2] m = {-1, 3}, int64[2] i = {0, 1}, int32[1] n = {2}> {
            s = Shape(x)
            c = Cast <to = 6> (s)
            g = Gather(c, i)
            j = Concat <axis = 0> (g, n)
            t = Cast <to = 7> (j)
            a = Reshape(x, m)
            p = MatMul(a, w)
            y = Reshape(p, t)
        }"""

ROWS = Fusion(
    name="matmul_of_rows",
    patterns=(
        node("Reshape", _PRODUCT, "t"),
        node("Reshape", node("Add", node("MatMul", "rows", "#w", name="mm"), "#b", commutes=True), "t"),
    ),
    guard=_is_laid_out_again,
    build=_of_itself,
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE,
            ("example (", "axes_swapped ("),
            ("float[B, S, 2] y)", "float[S, B, 2] y)"),
            ("int64[2] i = {0, 1}", "int64[2] i = {1, 0}"),
        ),
        """
        rows_of_two_axes (float[B, 3, 2] x) => (float[B, 3, 2] y)
        <float[6, 6] w = {1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6,
         1, 2, 3, 4, 5, 6}, int64[2] m = {-1, 6}> {
            t = Shape(x)
            a = Reshape(x, m)
            p = MatMul(a, w)
            y = Reshape(p, t)
        }""",
        """
        sizes_joined_along_no_axis (float[B, S, 3] x) => (float[B, S, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, int64[2] m = {-1, 3}, int64[2] i = {0, 1}, int64[1] n = {2}> {
            s = Shape(x)
            g = Gather(s, i)
            t = Concat <axis = 1> (g, n)
            a = Reshape(x, m)
            p = MatMul(a, w)
            y = Reshape(p, t)
        }""",
        """
        another_count_of_rows (float[B, S, 3] x) => (float[B, S, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, int64[2] m = {5, 3}, int64[2] i = {0, 1}, int64[1] n = {2}> {
            s = Shape(x)
            g = Gather(s, i)
            t = Concat <axis = 0> (g, n)
            a = Reshape(x, m)
            p = MatMul(a, w)
            y = Reshape(p, t)
        }""",
        """
        columns_split (float[B, 3] x) => (float[B, 1, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, int64[2] m = {-1, 3}, int64[3] t = {-1, 1, 2}> {
            a = Reshape(x, m)
            p = MatMul(a, w)
            y = Reshape(p, t)
        }""",
        """
        half_of_the_bias (float[B, S, 3] x) => (float[B, S, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {1, 2}, int64[2] m = {-1, 3}, int64[2] i = {0, 1},
         int64[1] n = {2}> {
            s = Shape(x)
            g = Gather(s, i)
            t = Concat <axis = 0> (g, n)
            a = Reshape(x, m)
            p = Gemm <beta = 0.5> (a, w, b)
            y = Reshape(p, t)
        }""",
    ),
)

FUSIONS = (ROWS,)
