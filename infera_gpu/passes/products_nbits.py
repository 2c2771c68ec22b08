"""Products of one value by several matrices of few bits are one product, as in `products.py`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import changed, node, own_opset
from infera_gpu.passes.pattern import Match
from infera_gpu.passes.siblings import Joined, Siblings

_NAMES = ("w", "s", "z", "b")
"""What the pattern calls weights, scales, zero points and the bias, each with a row a column of the product."""
_APART = frozenset({"N"})


def _columns(match: Match) -> int:
    return int(match.root.attrs["N"])


def _alike(match: Match) -> Hashable | None:
    """Products of one depth, with blocks of one kind, by matrices that nobody else needs.

    An output of the graph is left alone: as a part of a row it would be copied before it is handed out.
    """
    given = [name for name in _NAMES if name in match.values]
    alone = all(len(match.draft.readers[match.values[name]]) == 1 for name in given)
    outputs = {match.root.outputs[0], *(match.values[name] for name in given)}
    if "g" in match.values or not alone or not outputs.isdisjoint(match.graph.outputs):
        return None
    rows = [_row(match, name) for name in _NAMES]
    if any(size is None for _, size in rows):
        return None
    return *rows[:3], *sorted((k, v) for k, v in match.root.attrs.items() if k not in _APART)


def _row(match: Match, name: str) -> tuple[str, int | None]:
    """The type and size of a constant's rows, "" and 0 without it; no size where it is not as many as there are
    columns."""
    if name not in match.values:
        return "", 0
    given, columns = match.constant(name), _columns(match)
    whole = columns > 0 and given.size % columns == 0 and (name != "b" or given.shape == (columns,))
    return given.dtype.str, given.size // columns if whole else None


def _joined(matches: Sequence[Match], name: str) -> HostArray:
    """Constants with a row a column of the product, one after another; -0, which changes no number, for the bias of a
    match that has none."""
    if name != "b":
        return np.concatenate([match.constant(name).reshape(_columns(match), -1) for match in matches])
    dtype = next(match.constant(name).dtype for match in matches if name in match.values)
    missing = (np.full(_columns(match), -0.0, dtype) for match in matches)
    return np.concatenate(
        [m.constant(name) if name in m.values else row for m, row in zip(matches, missing, strict=True)]
    )


def _join(matches: Sequence[Match]) -> Joined:
    first, names = matches[0].root, tuple(match.root.outputs[0] for match in matches)
    product = made_name(names[0], "joined")
    instead = {name: made_name(product, name) for name in _NAMES if any(name in match.values for match in matches)}
    sizes, columns = made_name(product, "columns"), list(map(_columns, matches))
    constants = {value: _joined(matches, name) for name, value in instead.items()}
    constants[sizes] = np.array(columns, np.int64)
    inputs = [matches[0].values["x"], *(instead.get(name, "") for name in ("w", "s", "z", "g", "b"))]
    while not inputs[-1]:
        inputs.pop()
    label, split_opset = first.name or names[0], own_opset(matches[0].graph, 13)
    attrs = {**first.attrs, "N": sum(columns)}
    return Joined(
        (
            Node(first.op, tuple(inputs), (product,), attrs, first.domain, f"{label}/joined"),
            Node("Split", (product, sizes), names, {"axis": -1}, name=f"{label}/parts", opset=split_opset),
        ),
        constants,
    )


_EXAMPLE = """
        example (float[2, 3] x) => (float[2, 2] y)
        <uint8[2, 1, 8] u = {16, 50, 84, 118, 152, 186, 220, 254, 1, 35, 69, 103, 137, 171, 205, 239},
         float[2, 1] f = {0.5, 0.25}, uint8[1, 8] v = {33, 67, 101, 135, 169, 203, 237, 16}, float[1] h = {2},
         float[2] b = {3, -4}, uint8[2, 1] p = {7, 9}, uint8[1] z = {5}> {
            q = com.microsoft.MatMulNBits <K = 3, N = 2, block_size = 16> (x, u, f, p, "", b)
            k = com.microsoft.MatMulNBits <K = 3, N = 1, block_size = 16> (x, v, h, z)
            y = Mul(q, k)
        }"""

FEW_BITS = Siblings(
    name="few_bits_of_one_input",
    patterns=(node("com.microsoft.MatMulNBits", "x", "#w", "#s", "?#z", "?g", "?#b"),),
    alike=_alike,
    join=_join,
    reassociates=True,
    kinds=frozenset({"triton"}),
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE, ("example (float[2, 3] x", "of_two_values (float[2, 3] x, float[2, 3] w"), ("(x, v", "(w, v")
        ),
        changed(_EXAMPLE, ("example (", "output ("), ("float[2, 2] y)", "float[2, 2] y, float[2, 1] k)")),
        changed(_EXAMPLE, ("example (", "symmetric_in_one ("), ("(x, v, h, z)", "(x, v, h)")),
        changed(
            _EXAMPLE, ("example (", "of_other_bits ("), ("N = 1, block_size = 16", "N = 1, bits = 2, block_size = 32")
        ),
        changed(_EXAMPLE, ("example (", "of_a_scale_too_many ("), ("float[1] h = {2}", "float[2] h = {2, 1}")),
        changed(_EXAMPLE, ("example (", "of_a_bias_too_few ("), ("float[2] b = {3, -4}", "float[1] b = {3}")),
        changed(
            _EXAMPLE,
            ("example (", "in_groups ("),
            ("uint8[1] z = {5}", "uint8[1] z = {5}, int32[3] g = {0, 0, 0}"),
            ("(x, v, h, z)", "(x, v, h, z, g)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "scales_read_elsewhere ("),
            ("float[2, 2] y)", "float[2, 2] y, float[2, 1] e)"),
            ("k = com", "e = Exp(f) k = com"),
        ),
        changed(
            _EXAMPLE,
            ("example (float[2, 3] x", "scales_are_an_input (float[2, 3] x, float[1] h"),
            (" float[1] h = {2},", ""),
        ),
    ),
)

SIBLINGS = (FEW_BITS,)
