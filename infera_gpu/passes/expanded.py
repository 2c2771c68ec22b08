"""Shapes that exporters compute for an Expand and the Reshape behind it become constants, as far as they are known.

PaddlePaddle's exporter asks for the Shape of what it repeats, before and after: whoever reads that value by its Shape
keeps it from being fused.
"""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import HostArray, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node, standard


def _sides(match: Match) -> tuple[tuple[int | str | None, ...], tuple[int | str | None, ...]] | None:
    """The shape of x, and the one that is asked for and not a constant; None where either is not known."""
    x, target = match.spec("x"), match.draft.sizes(match.values["t"])
    if x is None or not x.ranked or target is None or match.values["t"] in match.graph.constants:
        return None
    return x.shape, target


def _widened(match: Match) -> list[int] | None:
    """What an Expand is asked for, 1 where it keeps a size; None where it may widen an axis of unknown size."""
    sides = _sides(match)
    if sides is None or len(sides[0]) != len(sides[1]) or match.draft.made_by.get(match.values["x"]) != "Unsqueeze":
        return None
    wanted = [1 if t in (1, d) else t if d == 1 and isinstance(t, int) else None for d, t in zip(*sides, strict=True)]
    known = [size for size in wanted if size is not None and size > 0]
    return known if len(known) == len(wanted) else None


def _laid_out(match: Match) -> list[int] | None:
    """What a Reshape is asked for, 0 where it keeps the size of an axis; None where that does not say it."""
    sides = _sides(match)
    if sides is None or match.root.attrs.get("allowzero", 0) or match.draft.made_by.get(match.values["x"]) != "Expand":
        return None
    shape, target = sides
    wanted: list[int] = []
    for i, size in enumerate(target):
        if isinstance(size, int) and (size > 0 or size == -1):
            wanted.append(size)
        elif isinstance(size, str) and i < len(shape) and shape[i] == size:
            wanted.append(0)
        else:
            return None
    return wanted if wanted.count(-1) < 2 else None


def _constant(match: Match, target: list[int] | None, since: int) -> Replacement:
    name = made_name(match.root.outputs[0], "shape")
    constants: dict[str, HostArray] = {name: np.array(target, np.int64)}
    return Replacement(standard(match, match.root.op, since, (match.values["x"], name), {}), constants)


_EXAMPLE = """
        example (float[B, S, 2] x) => (float[B, S, 3, 2] y)
        <int64[1] two = {2}, int64[4] sizes = {-1, -1, 3, -1}> {
            a = Unsqueeze(x, two)
            s = Shape(a)
            t = Max(s, sizes)
            y = Expand(a, t)
        }"""

EXPAND = Fusion(
    name="expand_to_known_sizes",
    patterns=(node("Expand", "x", "t"),),
    guard=lambda match: _widened(match) is not None,
    build=lambda match: _constant(match, _widened(match), 8),
    example=_EXAMPLE,
    near_misses=(
        changed(_EXAMPLE, ("example (", "may_widen_a_sequence_of_one ("), ("{-1, -1, 3, -1}", "{-1, 2, 3, -1}")),
        changed(
            _EXAMPLE,
            ("example (", "sizes_are_an_input ("),
            ("[B, S, 2] x)", "[B, S, 2] x, int64[4] sizes)"),
            (", int64[4] sizes = {-1, -1, 3, -1}", ""),
        ),
        changed(
            _EXAMPLE,
            ("example (", "nothing_was_added ("),
            ("a = Unsqueeze(x, two)", "a = Neg(x)"),
            ("int64[4] sizes = {-1, -1, 3, -1}", "int64[3] sizes = {-1, -1, -1}"),
            ("float[B, S, 3, 2] y", "float[B, S, 2] y"),
        ),
    ),
)

_MERGED = """
        example (float[B, S, 2] x) => (float[B, S, 6] y)
        <int64[1] two = {2}, int64[4] wide = {1, 1, 3, 1}, int64[2] first = {0, 1}, int64[1] rest = {-1}> {
            a = Unsqueeze(x, two)
            b = Expand(a, wide)
            s = Shape(b)
            u = Gather(s, first)
            t = Concat <axis = 0> (u, rest)
            y = Reshape(b, t)
        }"""

RESHAPE = Fusion(
    name="reshape_to_known_sizes",
    patterns=(node("Reshape", "x", "t"),),
    guard=lambda match: _laid_out(match) is not None,
    build=lambda match: _constant(match, _laid_out(match), 5),
    example=_MERGED,
    near_misses=(
        changed(
            _MERGED,
            ("example (", "axes_swapped ("),
            ("int64[2] first = {0, 1}", "int64[2] first = {1, 0}"),
            ("float[B, S, 6] y", "float[S, B, 6] y"),
        ),
        changed(
            _MERGED,
            ("example (", "shape_of_another_value ("),
            ("[B, S, 2] x)", "[B, S, 2] x, float[C, S, 3, 2] z)"),
            ("s = Shape(b)", "s = Shape(z)"),
        ),
        changed(
            _MERGED, ("example (", "zero_is_a_size ("), ("y = Reshape(b, t)", "y = Reshape <allowzero = 1> (b, t)")
        ),
        changed(
            _MERGED,
            ("example (", "nothing_was_repeated ("),
            ("b = Expand(a, wide)", "b = Neg(a)"),
            ("float[B, S, 6] y", "float[B, S, 2] y"),
        ),
    ),
)

FUSIONS = (EXPAND, RESHAPE)
