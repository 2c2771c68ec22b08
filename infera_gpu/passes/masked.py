"""Scores that TensorFlow's GPT-2 masks by multiplication: w b - 10000 (1 - b), b being of their shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node, standard

# ---- the shape of scores, without the scores


def _product(match: Match) -> Node | None:
    """The product of as many axes on either side that a value was scaled from."""
    made = match.producers.get(match.values["scores"])
    if made is not None and made.qualified in ("Mul", "Div"):
        factor = match.graph.constants.get(made.inputs[1])
        made = match.producers.get(made.inputs[0]) if factor is not None and not factor.ndim else None
    if made is None or made.qualified != "MatMul":
        return None
    q, kt = (match.draft.spec(i) for i in made.inputs)
    known = q is not None and kt is not None and q.ranked and kt.ranked
    return made if known and q is not None and kt is not None and q.ndim == kt.ndim > 2 else None


def _stays(match: Match) -> bool:
    """Whether the scores are made all the same: what is wrong with their product is then told."""
    scores = match.values["scores"]
    return scores in match.graph.outputs or len(match.draft.readers.get(scores, ())) > 1


def _of_its_sides(match: Match) -> Replacement:
    """Axes before the last two broadcast: a size is that of the keys where that of the queries is 1."""
    product, out = _product(match), match.root.outputs[0]
    assert product is not None
    q, kt = product.inputs
    mine, theirs, rows, columns, one, single, lead = (
        made_name(out, name) for name in ("mine", "theirs", "rows", "columns", "one", "single", "lead")
    )
    before = (
        Node("Shape", (q,), (mine,), {"end": -2}, opset=15),
        Node("Shape", (kt,), (theirs,), {"end": -2}, opset=15),
        Node("Equal", (mine, one), (single,), {}, opset=13),
        Node("Where", (single, theirs, mine), (lead,), {}, opset=9),
        Node("Shape", (q,), (rows,), {"start": -2, "end": -1}, opset=15),
        Node("Shape", (kt,), (columns,), {"start": -1}, opset=15),
    )
    made = standard(match, "Concat", 4, (lead, rows, columns), {"axis": 0})
    return Replacement(made, {one: np.array([1], np.int64)}, before)


_SHAPE = """
        example (float[B, 3, S, 4] q, float[B, 3, 4, T] k) => (int64[4] y, float[B, 3, S, T] z) <float half = {0.5}> {
            a = MatMul(q, k)
            b = Mul(a, half)
            y = Shape(b)
            z = Softmax(b)
        }"""

SHAPE = Fusion(
    name="shape_of_scores",
    patterns=(node("Shape", "scores"),),
    guard=lambda match: _product(match) is not None and _stays(match),
    build=_of_its_sides,
    example=_SHAPE,
    near_misses=(
        changed(_SHAPE, ("example (", "axes_are_added ("), ("float[B, 3, 4, T] k", "float[4, T] k")),
        changed(
            _SHAPE,
            ("example (", "nobody_else_reads_them ("),
            ("y, float[B, 3, S, T] z)", "y)"),
            ("            z = Softmax(b)\n", ""),
        ),
        changed(
            _SHAPE,
            ("example (", "factors_may_be_wider ("),
            ("T] k)", "T] k, float[S, 1] half)"),
            ("<float half = {0.5}>", ""),
        ),
        changed(
            _SHAPE,
            ("example (", "part_of_the_shape ("),
            ("Shape(b)", "Shape <start = 1> (b)"),
            ("int64[4] y", "int64[3] y"),
        ),
    ),
)


# ---- the mask

_MOVES = ("Expand", "Reshape", "Squeeze", "Unsqueeze")


def _condition(match: Match) -> tuple[Node, ...] | None:
    """The nodes that lay out booleans as the mask is, whose Cast it was made from; None where none does."""
    moves: list[Node] = []
    made = match.producers.get(match.values["b"])
    while made is not None and made.qualified in _MOVES and not made.opset:
        moves.append(made)
        made = match.producers.get(made.inputs[0])
    x = match.draft.spec(made.inputs[0]) if made is not None and made.qualified == "Cast" else None
    if made is None or x is None or x.dtype != np.bool_ or match.graph.opset_of(made) < 9:
        return None
    value, laid_out = made.inputs[0], []
    for i, move in enumerate(reversed(moves)):
        name = made_name(match.root.outputs[0], f"condition {i}")
        laid_out.append(replace(move, inputs=(value, *move.inputs[1:]), outputs=(name,), name=name))
        value = name
    return (*laid_out, Node("Identity", (value,), (made_name(match.root.outputs[0], "condition"),)))


def _goes_into_softmax(match: Match) -> bool:
    readers = [*match.draft.readers.get(match.root.outputs[0], {}).values()]
    while len(readers) == 1 and readers[0].qualified == "Add":
        readers = [*match.draft.readers.get(readers[0].outputs[0], {}).values()]
    return len(readers) == 1 and readers[0].qualified == "Softmax"


def _is_mask(match: Match) -> bool:
    x = match.spec("x")
    floats = x is not None and x.dtype in (np.float32, np.float64) and np.isfinite(match.number("fill"))
    return bool(floats) and match.numbers_rank == 0 and _goes_into_softmax(match) and _condition(match) is not None


def _filled(match: Match) -> Replacement:
    before, name = _condition(match), made_name(match.root.outputs[0], "fill")
    assert before is not None
    constants: dict[str, HostArray] = {name: np.negative(match.constant("fill"))}
    inputs = (before[-1].outputs[0], match.values["x"], name)
    return Replacement(standard(match, "Where", 9, inputs, {}), constants, before)


_MASK = """
        example (float[B, 3, S, T] x, bool[S, T] seen) => (float[B, 3, S, T] y)
        <float one = {1}, float low = {10000}, int64[2] first = {0, 1}> {
            a = Cast <to = 1> (seen)
            b = Unsqueeze(a, first)
            c = Mul(x, b)
            d = Sub(one, b)
            e = Mul(d, low)
            f = Sub(c, e)
            y = Softmax(f)
        }"""

MASK = Fusion(
    name="mask_by_multiplication",
    patterns=(
        node(
            "Sub",
            node("Mul", "x", "b", commutes=True),
            node("Mul", node("Sub", 1.0, "b"), "%fill", commutes=True),
        ),
    ),
    guard=_is_mask,
    build=_filled,
    reassociates=True,
    example=_MASK,
    near_misses=(
        changed(_MASK, ("example (", "any_factors ("), ("bool[S, T] seen", "float[S, T] seen")),
        changed(
            _MASK,
            ("example (", "another_mask ("),
            ("x, bool", "x, float[S, T] z, bool"),
            ("Sub(one, b)", "Sub(one, z)"),
        ),
        changed(_MASK, ("example (", "zeros_are_kept ("), ("c = Mul(x, b)", "g = Sub(one, b)  c = Mul(x, g)")),
        changed(_MASK, ("example (", "no_scores ("), ("y = Softmax(f)", "y = Relu(f)")),
        changed(
            _MASK, ("example (", "masked_is_an_output ("), ("[B, 3, S, T] y)", "[B, 3, S, T] y, float[B, 3, S, T] c)")
        ),
    ),
)
"""Exact where scores are finite: by multiplication, an infinite or no number that the mask hides makes all NaN."""

FUSIONS = (SHAPE, MASK)
