"""One-hot vectors times a matrix are rows of the matrix; what is done to each row alike is done to the matrix."""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import HostArray, made_name
from infera_gpu.passes.engine import CPU, Fusion, Match, Replacement, either, infera, node, standard
from infera_gpu.passes.epilogue import activated, activation_of
from infera_gpu.spec import dtype_of_onnx
from infera_kernels.portable.activation import FUNCTIONS, activation

MOST_ROWS = 4096
"""Of tables that activations are computed for: few beside what is looked up, as a rule."""


def _is_one_hot(match: Match) -> bool:
    """Integers with a last axis of 1 are compared with 0, 1, 2 ... along it, and multiply finite numbers."""
    ids, numbers, w = match.spec("ids"), match.constant("numbers"), match.constant("w")
    if ids is None or not ids.ranked or not ids.shape or ids.shape[-1] != 1 or ids.dtype.kind not in "iu":
        return False
    one_hot = numbers.ndim <= ids.ndim and numbers.shape[-1:] == (numbers.size,) == w.shape[:1]
    made = dtype_of_onnx(match.nodes["cast"].attrs["to"])
    return (
        one_hot
        and w.ndim == 2
        and made == w.dtype
        and w.dtype in (np.float32, np.float64)
        and np.array_equal(numbers.reshape(-1), np.arange(numbers.size))
        and bool(np.isfinite(w).all())
    )


def _with_table(match: Match, table: HostArray) -> Replacement:
    name = made_name(match.root.outputs[0], "table")
    shape = [match.values["shape"]] if "shape" in match.values else []
    return Replacement(infera(match, "Lookup", (match.values["ids"], name, *shape), {}), {name: table})


def _rows(match: Match) -> Replacement:
    w = match.constant("w")
    return _with_table(match, np.concatenate((w, np.zeros_like(w[:1]))))


ONE_HOT = Fusion(
    name="one_hot_product",
    patterns=(
        node(
            "MatMul",
            node(
                "Cast",
                node("Equal", either(node("Expand", "ids", "shape"), "ids"), "#numbers", commutes=True),
                name="cast",
            ),
            "#w",
        ),
    ),
    guard=_is_one_hot,
    build=_rows,
    kinds=CPU,
    example="""
        example (int32[B, 3, 1] x) => (float[B, 3, 2] y)
        <int32[1, 1, 3] n = {0, 1, 2}, float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            e = Equal(x, n)
            c = Cast <to = 1> (e)
            y = MatMul(c, w)
        }""",
    near_misses=(
        """
        last_axis_is_not_one (int32[B, 3, 3] x) => (float[B, 3, 2] y)
        <int32[3] n = {0, 1, 2}, float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            e = Equal(x, n)
            c = Cast <to = 1> (e)
            y = MatMul(c, w)
        }""",
        """
        other_numbers (int32[B, 3, 1] x) => (float[B, 3, 2] y)
        <int32[3] n = {1, 2, 3}, float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            e = Equal(x, n)
            c = Cast <to = 1> (e)
            y = MatMul(c, w)
        }""",
        """
        vectors_are_an_output (int32[B, 3, 1] x) => (float[B, 3, 2] y, float[B, 3, 3] c)
        <int32[3] n = {0, 1, 2}, float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            e = Equal(x, n)
            c = Cast <to = 1> (e)
            y = MatMul(c, w)
        }""",
        """
        floats (float[B, 3, 1] x) => (float[B, 3, 2] y)
        <float[3] n = {0, 1, 2}, float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            e = Equal(x, n)
            c = Cast <to = 1> (e)
            y = MatMul(c, w)
        }""",
    ),
)

_FOUND = node("infera.Lookup", "ids", "#table", "?shape")


def _is_row(match: Match) -> bool:
    """One number for each column, and no axis more than the rows that were found have."""
    table, row, ids = match.constant("table"), match.constant("row"), match.rank("ids")
    return row.dtype == table.dtype and row.shape[-1:] == (row.size,) == table.shape[1:] and row.ndim <= (ids or 1)


LOOKUP_BIAS = Fusion(
    name="lookup_bias",
    patterns=(node("Add", _FOUND, "#row", commutes=True),),
    guard=_is_row,
    build=lambda match: _with_table(match, match.constant("table") + match.constant("row").reshape(-1)),
    kinds=CPU,
    example="""
        example (int32[2, 3, 1] x) => (float[2, 3, 2] y)
        <float[4, 2] t = {1, 2, 3, 4, 5, 6, 0, 0}, float[1, 1, 2] b = {7, 8}> {
            f = infera.Lookup(x, t)
            y = Add(b, f)
        }""",
    near_misses=(
        """
        one_number_a_row (int32[2, 3, 1] x) => (float[2, 3, 2] y)
        <float[4, 2] t = {1, 2, 3, 4, 5, 6, 0, 0}, float[3, 1] b = {7, 8, 9}> {
            f = infera.Lookup(x, t)
            y = Add(b, f)
        }""",
        """
        axes_more (int32[3, 1] x) => (float[1, 3, 2] y)
        <float[4, 2] t = {1, 2, 3, 4, 5, 6, 0, 0}, float[1, 1, 2] b = {7, 8}> {
            f = infera.Lookup(x, t)
            y = Add(b, f)
        }""",
    ),
)


def _is_plain(match: Match) -> bool:
    """An activation without parameters, of a small table."""
    found = activation_of(match, match.root)
    return found is not None and not found[1] and found[0] in FUNCTIONS and len(match.constant("table")) <= MOST_ROWS


def _activated(match: Match) -> Replacement:
    found = activation_of(match, match.root)
    assert found is not None
    return _with_table(match, activation(np, found[0], match.constant("table")))


LOOKUP_ACTIVATION = Fusion(
    name="lookup_activation",
    patterns=activated(_FOUND),
    guard=_is_plain,
    build=_activated,
    kinds=CPU,
    reassociates=True,
    example="""
        example (int32[2, 3, 1] x) => (float[2, 3, 2] y) <float[4, 2] t = {1, 2, -3, 4, 5, -6, 0, 0}> {
            f = infera.Lookup(x, t)
            y = infera.Gelu <approximate = "tanh"> (f)
        }""",
    near_misses=(
        """
        parameters (int32[2, 3, 1] x) => (float[2, 3, 2] y) <float[4, 2] t = {1, 2, -3, 4, 5, -6, 0, 0}> {
            f = infera.Lookup(x, t)
            y = LeakyRelu(f)
        }""",
        """
        rows_are_an_output (int32[2, 3, 1] x) => (float[2, 3, 2] y, float[2, 3, 2] f)
        <float[4, 2] t = {1, 2, -3, 4, 5, -6, 0, 0}> {
            f = infera.Lookup(x, t)
            y = Relu(f)
        }""",
    ),
)


def _alone(match: Match) -> str | None:
    """The indices that stand alone along a new last axis of GatherND's; None where they do not."""
    made_by = match.producers.get(match.values["index"])
    if made_by is None or made_by.qualified != "Unsqueeze" or match.nodes["gather"].attrs.get("batch_dims", 0):
        return None
    given = match.graph.constants.get(made_by.inputs[1]) if len(made_by.inputs) > 1 else made_by.attrs["axes"]
    ids = match.draft.spec(made_by.inputs[0])
    last = {-1} if ids is None or not ids.ranked else {-1, ids.ndim}
    axes = [] if given is None else np.ravel(given).tolist()
    return made_by.inputs[0] if len(axes) == 1 and axes[0] in last else None


def _of_rows(match: Match) -> Replacement:
    ids = _alone(match)
    assert ids is not None
    return Replacement(standard(match, "Gather", 11, (match.values["table"], ids), {"axis": 0}))


ROWS = Fusion(
    name="gathered_rows",
    patterns=(node("GatherND", "table", "index", name="gather"),),
    guard=lambda match: _alone(match) is not None,
    build=_of_rows,
    example="""
        example (float[5, 2] table, int64[B, 3] ids) => (float[B, 3, 2] y) <int64[1] last = {-1}> {
            i = Unsqueeze(ids, last)
            y = GatherND(table, i)
        }""",
    near_misses=(
        """
        indices_of_elements (float[5, 2] table, int64[2] ids) => (float[1] y) <int64[1] zero = {0}> {
            i = Unsqueeze(ids, zero)
            y = GatherND(table, i)
        }""",
        """
        a_table_each (float[3, 5, 2] table, int64[3] ids) => (float[3, 2] y) <int64[1] last = {-1}> {
            i = Unsqueeze(ids, last)
            y = GatherND <batch_dims = 1> (table, i)
        }""",
    ),
)

FUSIONS = (ROWS, ONE_HOT, LOOKUP_BIAS, LOOKUP_ACTIVATION)
