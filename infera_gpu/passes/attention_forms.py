"""Attention whose weights are made in single precision of halves, or whose hidden scores are hidden after the mask."""

from __future__ import annotations

import numpy as np

from infera_gpu.passes.attention import core, filled, fused, is_last_axis, plain
from infera_gpu.passes.engine import CPU_AND_TRITON, Fusion, Match, changed, node
from infera_gpu.passes.pattern import Arg
from infera_gpu.spec import dtype_of_onnx

# ---- halves


def _widened(scores: Arg) -> Arg:
    """Weights in single precision of scores in half of it."""
    return node("Cast", plain(node("Cast", scores, name="widened")), name="narrowed")


def _is_widened(match: Match) -> bool:
    """The softmax is as precise as the operator's own, and its weights are of the type of queries again."""
    q, wide, narrow = match.spec("q"), match.nodes["widened"].attrs["to"], match.nodes["narrowed"].attrs["to"]
    if q is None or q.dtype.name not in ("float16", "bfloat16") or dtype_of_onnx(narrow) != q.dtype:
        return False
    return dtype_of_onnx(wide) in (np.float32, np.float64) and is_last_axis(match)


_WIDENED = """
        example (float16[2, 3, 4, 5] q, float16[2, 3, 5, 6] kt, float16[2, 3, 6, 5] v, float16[2, 1, 1, 6] m)
            => (float16[2, 3, 4, 5] y) <float16 half = {14336}> {
            a = MatMul(q, kt)
            b = Mul(a, half)
            c = Add(m, b)
            d = Cast <to = 1> (c)
            e = Softmax <axis = -1> (d)
            f = Cast <to = 10> (e)
            y = MatMul(f, v)
        }"""

HALF = Fusion(
    name="attention_of_halves",
    patterns=(core(_widened),),
    guard=_is_widened,
    build=fused,
    reassociates=True,
    kinds=frozenset({"triton"}),
    example=_WIDENED,
    near_misses=(
        changed(_WIDENED, ("example (", "weights_stay_wide ("), ("Cast <to = 10> (e)", "Cast <to = 1> (e)")),
        changed(_WIDENED, ("example (", "of_integers ("), ("Cast <to = 1> (c)", "Cast <to = 7> (c)")),
        changed(
            _WIDENED,
            ("example (", "wide_weights_are_an_output ("),
            ("5] y)", "5] y, float[2, 3, 4, 6] e)"),
        ),
        changed(
            _WIDENED,
            ("example (", "mask_in_single_precision ("),
            ("float16[2, 1, 1, 6] m", "float[2, 1, 1, 6] m"),
            ("c = Add(m, b)", "g = Cast <to = 1> (b)  c = Add(m, g)"),
            ("d = Cast <to = 1> (c)", "d = Identity(c)"),
        ),
    ),
)
"""NumPy has no arithmetic of halves: on the CPU each part is quicker by its own kernel."""


# ---- what is hidden last

_MOVING = ("Gather", "Transpose", "Unsqueeze", "Squeeze", "Reshape", "Slice", "Expand", "Identity")


def _hidden_last(scores: Arg) -> Arg:
    """Hidden scores have one number, whatever their mask."""
    return filled(node("Add", scores, "mask", commutes=True))


def _is_low(match: Match, value: str) -> bool:
    """Whether a value has finite numbers and -inf alone, in every run."""
    for _ in range(len(match.draft)):
        constant, made = match.graph.constants.get(value), match.producers.get(value)
        if constant is not None:
            return constant.dtype.kind == "f" and bool((constant < np.inf).all())
        if made is None or made.qualified not in _MOVING:
            return False
        value = made.inputs[0]
    return False


def _is_hidden(match: Match) -> bool:
    """What is hidden stays so where the mask is added later."""
    return match.number("fill") == -np.inf and _is_low(match, match.values["mask"]) and is_last_axis(match)


_HIDDEN = """
        example (float[2, 3, 4, 5] q, float[2, 3, 5, 6] kt, float[2, 3, 6, 5] v, bool[4, 6] seen)
            => (float[2, 3, 4, 5] y)
        <float[1, 6] table = {0.5, 1, -2, 0, 3, -1}, int64[1] all = {0}, float low = {-inf}, float zero = {0}> {
            a = MatMul(q, kt)
            m = Gather(table, all)
            b = Add(a, m)
            c = Where(seen, b, low)
            d = Softmax <axis = -1> (c)
            e = IsNaN(d)
            f = Where(e, zero, d)
            y = MatMul(f, v)
        }"""

HIDDEN = Fusion(
    name="attention_hidden_after_mask",
    patterns=(core(plain, _hidden_last),),
    guard=_is_hidden,
    build=fused,
    reassociates=True,
    kinds=CPU_AND_TRITON,
    example=_HIDDEN,
    near_misses=(
        changed(_HIDDEN, ("example (", "a_number_that_is_added_to ("), ("low = {-inf}", "low = {-10000}")),
        changed(_HIDDEN, ("example (", "mask_with_infinity ("), ("{0.5, 1,", "{inf, 1,")),
        changed(
            _HIDDEN,
            ("example (", "mask_of_any_numbers ("),
            ("bool[4, 6] seen", "bool[4, 6] seen, float[1, 6] n"),
            ("Add(a, m)", "Add(a, n)"),
        ),
    ),
)

FUSIONS = (HALF, HIDDEN)
