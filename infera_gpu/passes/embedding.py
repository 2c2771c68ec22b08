"""Rows of embedding tables, their sum and its layer normalisation are one launch, as BERT's exporters write them.

Each of them reads and writes every token's vector, for which a GPU needs a launch of its own; what remains of shapes
that are known ahead, the rows of known positions, is a table too.
"""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import HostArray, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, either, infera, node
from infera_gpu.passes.pattern import Arg, P, axis_in

_FLOATS = ("float16", "bfloat16", "float32")
_PARTS = ("words", "places", "kinds")


def _looked_up(name: str) -> P:
    return node("Gather", f"#{name}", f"{name} at", name=name)


def _sum(first: Arg, second: Arg) -> P:
    return node("Add", first, second, commutes=True)


def _normalized(total: P) -> P:
    return node("LayerNormalization", total, "#scale", "?#bias", name="norm")


_WORDS, _PLACES, _KINDS = map(_looked_up, _PARTS)
_SUMS = (
    _sum(_sum(_WORDS, _PLACES), either(_KINDS, "#rows")),
    _sum(_sum(_WORDS, "#rows"), _KINDS),
    _sum(_WORDS, either(_PLACES, "#rows")),
)


def _is_of_rows(match: Match) -> bool:
    """Rows of matrices of one type, normalised each by itself."""
    norm, words = match.nodes["norm"], match.constant("words")
    if words.ndim != 2 or words.dtype.name not in _FLOATS or not words.size:
        return False
    for name in ("places", "kinds"):
        if name in match.values and (match.constant(name).ndim != 2 or not match.constant(name).size):
            return False
    floats = [match.constant(name) for name in (*_PARTS, "rows", "scale", "bias") if name in match.values]
    if any(x.dtype != words.dtype or x.shape[-1:] != words.shape[1:] for x in floats):
        return False
    if any(match.constant(name).ndim != 1 for name in ("scale", "bias") if name in match.values):
        return False
    if any(match.nodes[name].attrs.get("axis", 0) not in (0, -2) for name in _PARTS if name in match.nodes):
        return False
    x = match.draft.spec(norm.inputs[0])
    axis, rank = int(norm.attrs.get("axis", -1)), x.ndim if x is not None and x.ranked else 0
    last = axis == -1 or (rank and axis_in(axis, rank) == rank - 1)
    return bool(last) and norm.attrs.get("stash_type", 1) == 1 and _rows_are_a_table(match)


def _rows_are_a_table(match: Match) -> bool:
    """Whether what is added as it is has one row for each place along the last axis of the indices."""
    if "rows" not in match.values:
        return True
    rows = match.constant("rows")
    return rows.ndim >= 2 and rows.size == rows.shape[-1] * rows.shape[-2] > 0


def _embedded(match: Match) -> Replacement:
    out, constants = match.root.outputs[0], dict[str, HostArray]()
    inputs: list[str] = []
    for name in _PARTS:
        if name in match.values:
            inputs += [match.values[f"{name} at"], match.values[name]]
    if "rows" in match.values:
        rows = match.constant("rows")
        table, places = made_name(out, "rows"), made_name(out, "places")
        constants = {table: rows.reshape(-1, rows.shape[-1]), places: np.arange(rows.shape[-2])}
        inputs += [places, table]
    inputs += [""] * (6 - len(inputs))
    inputs += [match.values["scale"], *([match.values["bias"]] if "bias" in match.values else [])]
    attrs = {"epsilon": float(match.nodes["norm"].attrs.get("epsilon", 1e-5))}
    return Replacement(infera(match, "EmbeddedNormalization", tuple(inputs), attrs), constants)


_EXAMPLE = """
        example (int64[B, S] ids, int64[B, S] kinds, int64[1, S] at) => (float[B, S, 2] y)
        <float[4, 2] w = {1, -2, 3, 0.5, -1, 2, 1, 4}, float[4, 2] k = {1, 2, -3, 0.5, 2, 2, 1, 3},
         float[4, 2] p = {0.5, 1, 2, -1, 3, 4, 5, -2}, float[2] s = {1, -2}, float[2] b = {0.5, 1}> {
            c = Gather(w, ids)
            d = Gather(k, kinds)
            e = Gather(p, at)
            f = Add(c, d)
            g = Add(f, e)
            y = LayerNormalization <axis = -1, epsilon = 0.1> (g, s, b)
        }"""

EMBEDDED = Fusion(
    name="embedded_norm",
    patterns=tuple(map(_normalized, _SUMS)),
    guard=_is_of_rows,
    build=_embedded,
    reassociates=True,
    kinds=frozenset({"triton"}),
    example=_EXAMPLE,
    near_misses=(
        changed(_EXAMPLE, ("example (", "sum_is_an_output ("), ("2] y)", "2] y, float[B, S, 2] g)")),
        changed(
            _EXAMPLE,
            ("example (", "sum_is_read_by_another ("),
            ("2] y)", "2] y, float[B, S, 2] z)"),
            ("e)\n", "e)  z = Relu(g)\n"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "columns_of_a_table ("),
            ("Gather(k, kinds)", "Gather <axis = 1> (k, one)"),
            ("<float[4", "<int64[2] one = {1, 0}, float[4"),
        ),
        changed(_EXAMPLE, ("example (", "tokens_together ("), ("axis = -1", "axis = 1")),
        changed(
            _EXAMPLE,
            ("example (", "numbers_for_every_token ("),
            ("S] at)", "S] at, float[B, S, 2] n)"),
            ("Gather(p, at)", "Relu(n)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "scale_is_an_input ("),
            ("S] at)", "S] at, float[2] s)"),
            ("float[2] s = {1, -2}, ", ""),
        ),
    ),
)
"""The sum is not rounded in between. On the CPU the parts are as fast."""

FUSIONS = (EMBEDDED,)
