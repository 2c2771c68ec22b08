"""Products of one quantised value by several constant matrices are one product, as in `products.py`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import node, own_opset
from infera_gpu.passes.pattern import Match
from infera_gpu.passes.siblings import Joined, Siblings

_ORDER: Mapping[str, Sequence[str]] = MappingProxyType(
    {"QuantizedMatMul": ("x", "w", "b", "r", "f", "z"), "MatMulIntegerToFloat": ("x", "w", "s", "f", "z", "p", "b")}
)
"""What the patterns call the inputs."""


def _is_free(match: Match) -> bool:
    """Whether its matrix is nobody else's, its output none of the graph's, and scales and biases one a column."""
    w = match.constant("w")
    if match.root.outputs[0] in match.graph.outputs or len(match.draft.readers[match.values["w"]]) > 1:
        return False
    return all(match.constant(name).shape == w.shape[1:] for name in ("f", "b") if name in match.values)


def _alike_integers(match: Match) -> Hashable | None:
    """Products of integers with nothing but a bias beside them, by matrices that nobody else needs."""
    if not _is_free(match):
        return None
    return match.constant("w").shape[0], match.values.get("z", ""), *sorted(match.root.attrs.items())


def _biases(matches: Sequence[Match], factors: Sequence[HostArray]) -> HostArray:
    """The biases side by side; -0 for the columns of a match that has none."""
    rows = zip(matches, factors, strict=True)
    return np.concatenate([m.constant("b") if "b" in m.values else np.full_like(f, -0.0) for m, f in rows])


def _join(matches: Sequence[Match]) -> Joined:
    first, names = matches[0].root, tuple(match.root.outputs[0] for match in matches)
    product = made_name(names[0], "joined")
    weight, bias, factor, sizes = (made_name(product, what) for what in ("weight", "bias", "factor", "columns"))
    factors = [match.constant("f") for match in matches]
    constants = {
        weight: np.concatenate([match.constant("w") for match in matches], axis=1),
        factor: np.concatenate(factors),
        sizes: np.array([f.size for f in factors], np.int64),
    }
    if biased := any("b" in match.values for match in matches):
        constants[bias] = _biases(matches, factors)
    instead = {"w": weight, "f": factor, "b": bias if biased else ""}
    inputs = tuple(instead.get(name) or matches[0].values.get(name, "") for name in _ORDER[first.op])
    label, split_opset = first.name or names[0], own_opset(matches[0].graph, 13)
    return Joined(
        (
            Node(first.op, inputs, (product,), dict(first.attrs), first.domain, f"{label}/joined"),
            Node("Split", (product, sizes), names, {"axis": -1}, name=f"{label}/parts", opset=split_opset),
        ),
        constants,
    )


_INTEGERS = """
    {name} (int8[2, 3] x, float[2, 2] v) => ({outs})
    <int8[3, 2] u = {{1, 2, 3, 4, 5, 6}}, int8[3, 2] w = {{-1, 7, 0, 4, -2, 8}}, float[2] f = {{0.5, 0.25}},
     float[2] b = {{0.5, -1}}, int8 z = {{3}}, int8 p = {{4}}, float s = {{0.5}}> {{
        q = infera.QuantizedMatMul(x, u, b, , f, z)
        k = {other}
        y = Mul(q, k)
    }}"""


def _integers(other: str, name: str = "example", outs: str = "float[2, 2] y") -> str:
    return _INTEGERS.format(name=name, other=other, outs=outs)


SHARED_INTEGERS = Siblings(
    name="quantized_products_of_one_input",
    patterns=(node("infera.QuantizedMatMul", "x", "#w", "?#b", "?r", "#f", "?#z"),),
    alike=_alike_integers,
    join=_join,
    kinds=frozenset({"triton"}),
    example=_integers("infera.QuantizedMatMul(x, w, , , f, z)"),
    near_misses=(
        _integers("infera.QuantizedMatMul(x, w, , , f, p)", "other_zero_point"),
        _integers("infera.QuantizedMatMul(x, w, , v, f, z)", "residual_in_one"),
        _integers('infera.QuantizedMatMul <activation = "relu"> (x, w, , , f, z)', "activated_differently"),
        _integers("infera.QuantizedMatMul(x, w, , , f, z)", "output_of_the_graph", "float[2, 2] y, float[2, 2] k"),
        _integers("infera.QuantizedMatMul(x, u, , , f, z)", "one_matrix_twice"),
    ),
)


def _alike_scaled(match: Match) -> Hashable | None:
    """Products of integers with a scale and a bias for each column, or none, by matrices that nobody else needs."""
    w = match.constant("w")
    if w.ndim != 2 or "p" in match.values or not _is_free(match):
        return None
    return w.dtype.str, w.shape[0], match.values["s"], match.values["z"], *sorted(match.root.attrs.items())


_SCALED = """
    {name} (uint8[2, 3] q, float r) => ({outs})
    <int8[3, 2] u = {{1, 2, 3, 4, 5, 6}}, int8[3, 2] w = {{-1, 7, 0, 4, -2, 8}}, float[2] f = {{0.5, 0.25}},
     float[2] b = {{0.5, -1}}, float s = {{0.2}}, float t = {{0.1}}, float e = {{0.5}}, uint8 z = {{3}},
     int8 p = {{4}}> {{
        h = com.microsoft.MatMulIntegerToFloat(q, u, s, f, z, , b)
        k = com.microsoft.MatMulIntegerToFloat({other})
        m = Mul(h, k)
        y = Mul(m, r)
    }}"""


def _scaled(other: str, name: str = "example", outs: str = "float[2, 2] y") -> str:
    return _SCALED.format(name=name, other=other, outs=outs)


SHARED_DYNAMIC = Siblings(
    name="dynamic_products_of_one_input",
    patterns=(node("com.microsoft.MatMulIntegerToFloat", "x", "#w", "s", "#f", "z", "?p", "?#b"),),
    alike=_alike_scaled,
    join=_join,
    kinds=frozenset({"triton"}),
    example=_scaled("q, w, s, f, z"),
    near_misses=(
        _scaled("q, w, t, f, z", "other_scale"),
        _scaled("q, w, r, f, z", "scale_is_an_input"),
        _scaled("q, w, s, f", "no_zero_point"),
        _scaled("q, w, s, e, z", "scale_of_the_whole"),
        _scaled("q, w, s, f, z, p", "weights_have_a_zero_point"),
        _scaled("q, w, s, f, z", "output_of_the_graph", "float[2, 2] y, float[2, 2] k"),
        _scaled("q, u, s, f, z", "one_matrix_twice"),
    ),
)

SIBLINGS = (SHARED_INTEGERS, SHARED_DYNAMIC)
