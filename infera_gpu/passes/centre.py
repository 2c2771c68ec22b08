"""Activations stay float32 between quantisation and product: see `ops/quant_narrow.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from infera_gpu.graph import Graph, Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, infera, node
from infera_gpu.passes.gathered import gathered
from infera_gpu.passes.quant import DEQUANTIZE, parameters_of

_PRODUCT = "com.microsoft.MatMulIntegerToFloat"
_QUANTIZE = ("QuantizeLinear", "com.microsoft.QuantizeLinear")
_DYNAMIC = "DynamicQuantizeLinear"


def _reads_as(graph: Graph, product: Node, q: str, zero: str) -> bool:
    """Whether a node is a product that takes `q`, with this zero point, as its left side alone, and known weights."""
    if product.qualified != _PRODUCT or product.inputs.count(q) != 1 or len(product.inputs) < 5:
        return False
    weight, points = graph.constants.get(product.inputs[1]), product.inputs[5:6]
    known = not points or not points[0] or points[0] in graph.constants
    return product.inputs[0] == q and product.inputs[4] == zero and known and weight is not None and weight.ndim == 2


def _on_floats(product: Node, centred: str, reach: int) -> Node:
    _, b, a_scale, scale, _, *rest = product.inputs
    zero, *bias = rest or [""]
    return Node(
        "NarrowMatMul",
        (centred, b, scale, zero, a_scale, *bias),
        product.outputs,
        {"reach": reach},
        domain="infera",
        name=product.name,
    )


def _dynamic_centred(graph: Graph, n: Node, readers: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    q, scale, zero = n.outputs
    if readers and all(_reads_as(graph, r, q, zero) for r in readers):
        centred = made_name(q, "centred")
        yield n, Node("DynamicCentre", n.inputs, (centred, scale), domain="infera", name=n.name)
        for r in readers:
            yield r, _on_floats(r, centred, 255)


def _same(graph: Graph, a: Node, b: Node, at: tuple[int, int]) -> bool:
    """Whether two nodes have the same constants as their inputs at 1 and 2, and at `at`."""
    pairs = zip((a.inputs[1], a.inputs[2]), (b.inputs[i] for i in at), strict=True)
    found = [(graph.constants[i], graph.constants.get(j)) for i, j in pairs]
    return all(
        y is not None and x.dtype == y.dtype and x.size == y.size == 1 and x.item() == y.item() for x, y in found
    )


def _static_centred(graph: Graph, n: Node, readers: Sequence[Node], integers: bool) -> Iterator[tuple[Node, Node]]:
    parameters = parameters_of(graph, n)
    if parameters is None or not readers:
        return
    info, point = np.iinfo(parameters[1].dtype), int(parameters[1].item())
    reach = max(int(info.max) - point, point - int(info.min))
    q, products, floats = n.outputs[0], [], []
    for r in readers:
        if r.qualified in DEQUANTIZE and len(r.inputs) > 2 and parameters_of(graph, r) and _same(graph, n, r, (1, 2)):
            floats.append(r)
        elif _reads_as(graph, r, q, r.inputs[4] if len(r.inputs) > 4 else "") and _same(graph, n, r, (2, 4)):
            products.append(r)
        else:
            return
    if not products and (integers or len(floats) == 1):
        for r in floats:
            yield r, Node("Centre", n.inputs, r.outputs, {"dequantize": 1}, domain="infera", name=r.name)
    if integers or len(floats) == 1 > len(products):
        return
    centred = made_name(q, "centred")
    yield n, Node("Centre", n.inputs, (centred,), domain="infera", name=n.name)
    for r in products:
        yield r, _on_floats(r, centred, reach)
    for r in floats:
        if parameters[0].ndim:  # Mul would give a scalar the scale's axis
            yield r, Node("Centre", n.inputs, r.outputs, {"dequantize": 1}, domain="infera", name=r.name)
        else:
            yield r, Node("Mul", (centred, n.inputs[1]), r.outputs, name=r.name)


def centred(graph: Graph, *, integers: bool = False) -> Graph:
    """Values that are quantised only to be multiplied or dequantised never become 8-bit integers.

    Rows of tables that were quantised before are gathered first. `integers` says that products take 8-bit integers:
    then only values that are dequantised and nothing else are changed.
    """
    graph = gathered(graph)
    if not any(n.qualified == _DYNAMIC or n.qualified in _QUANTIZE for n in graph.nodes):
        return graph
    readers = graph.readers()
    made: dict[int, Node] = {}
    for n in graph.nodes:
        dynamic = n.qualified == _DYNAMIC
        inner = [o for o in n.outputs if o and not (dynamic and o == n.outputs[1])]
        if (
            (n.opset and not dynamic)
            or not (dynamic or n.qualified in _QUANTIZE)
            or (dynamic and integers)
            or any(o in graph.outputs for o in inner)
        ):
            continue
        found = list({id(r): r for o in inner for r in readers.get(o, ())}.values())
        steps = _dynamic_centred(graph, n, found) if dynamic else _static_centred(graph, n, found, integers)
        made.update({id(old): new for old, new in steps})
    return replace(graph, nodes=tuple(made.get(id(n), n) for n in graph.nodes)) if made else graph


# ---- what rectifiers and a second quantisation leave to do


def _with_relu(match: Match) -> Replacement:
    inner = match.nodes["centre"]
    return Replacement(infera(match, "Centre", inner.inputs, {**inner.attrs, "relu": 1}))


RELU = Fusion(
    name="centre_relu",
    patterns=(node("Relu", node("infera.Centre", "x", "#s", "#z", name="centre")),),
    guard=lambda match: bool((match.constant("s") > 0).all()),
    build=_with_relu,
    example="""
        example (float[2, 3] x) => (float[2, 3] y) <float s = {0.02}, int8 z = {-5}> {
            c = infera.Centre <dequantize = 1> (x, s, z)
            y = Relu(c)
        }""",
    near_misses=(
        """
        negative_scale (float[2, 3] x) => (float[2, 3] y) <float s = {-0.02}, int8 z = {-5}> {
            c = infera.Centre <dequantize = 1> (x, s, z)
            y = Relu(c)
        }""",
    ),
)

_SMALLEST, _LARGEST = 1e-30, 1e30
"""Scales between them make normal numbers of 8-bit integers."""


def _is_same(match: Match) -> bool:
    """Whether what was quantised and dequantised is quantised by the same parameters: to the same integers."""
    first, second = ((match.constant(f"s{i}"), match.constant(f"z{i}")) for i in (1, 2))
    pairs = zip(first, second, strict=True)
    same = all(a.dtype == b.dtype and a.size == b.size == 1 and a.item() == b.item() for a, b in pairs)
    return same and _SMALLEST < first[0].item() < _LARGEST


def _is_again(match: Match) -> bool:
    return bool(match.nodes["inner"].attrs.get("dequantize", 0)) and _is_same(match)


def _once(match: Match) -> Replacement:
    inner, outer = match.nodes["inner"].attrs, match.nodes["outer"].attrs
    relu = int(bool(inner.get("relu", 0) or outer.get("relu", 0)))
    attrs = {"dequantize": outer.get("dequantize", 0), "relu": relu}
    return Replacement(infera(match, "Centre", match.nodes["inner"].inputs, attrs))


AGAIN = Fusion(
    name="centre_again",
    patterns=(
        node("infera.Centre", node("infera.Centre", "x", "#s1", "#z1", name="inner"), "#s2", "#z2", name="outer"),
    ),
    guard=_is_again,
    build=_once,
    example="""
        example (float[2, 3] x) => (float[2, 3] y) <float s = {0.02}, int8 z = {-5}> {
            c = infera.Centre <dequantize = 1, relu = 1> (x, s, z)
            y = infera.Centre(c, s, z)
        }""",
    near_misses=(
        """
        other_scale (float[2, 3] x) => (float[2, 3] y) <float s = {0.02}, float t = {0.04}, int8 z = {-5}> {
            c = infera.Centre <dequantize = 1> (x, s, z)
            y = infera.Centre(c, t, z)
        }""",
        """
        other_zero_point (float[2, 3] x) => (float[2, 3] y) <float s = {0.02}, int8 z = {-5}, int8 p = {0}> {
            c = infera.Centre <dequantize = 1> (x, s, z)
            y = infera.Centre(c, s, p)
        }""",
        """
        integers (float[2, 3] x) => (float[2, 3] y) <float s = {0.02}, int8 z = {-5}> {
            c = infera.Centre(x, s, z)
            y = infera.Centre(c, s, z)
        }""",
    ),
)


def _gives_back(match: Match) -> bool:
    outer = match.nodes["outer"].attrs
    inner = parameters_of(match.graph, match.nodes["inner"])
    return inner is not None and _is_same(match) and bool(outer.get("dequantize", 0)) and not outer.get("relu", 0)


def _dequantized_alone(match: Match) -> Replacement:
    return Replacement(replace(match.nodes["inner"], outputs=match.root.outputs))


BACK = Fusion(
    name="centre_of_dequantized",
    patterns=(node("infera.Centre", node(DEQUANTIZE, "q", "#s1", "#z1", name="inner"), "#s2", "#z2", name="outer"),),
    guard=_gives_back,
    build=_dequantized_alone,
    example="""
        example (int8[2, 3] q) => (float[2, 3] y) <float s = {0.02}, int8 z = {-5}> {
            x = DequantizeLinear(q, s, z)
            y = infera.Centre <dequantize = 1> (x, s, z)
        }""",
    near_misses=(
        """
        other_scale (int8[2, 3] q) => (float[2, 3] y) <float s = {0.02}, float t = {0.01}, int8 z = {-5}> {
            x = DequantizeLinear(q, s, z)
            y = infera.Centre <dequantize = 1> (x, t, z)
        }""",
        """
        integers (int8[2, 3] q) => (float[2, 3] y) <float s = {0.02}, int8 z = {-5}> {
            x = DequantizeLinear(q, s, z)
            y = infera.Centre(x, s, z)
        }""",
        """
        rectified (int8[2, 3] q) => (float[2, 3] y) <float s = {0.02}, int8 z = {-5}> {
            x = DequantizeLinear(q, s, z)
            y = infera.Centre <dequantize = 1, relu = 1> (x, s, z)
        }""",
    ),
)

FUSIONS = (RELU, AGAIN, BACK)
