"""Quantise-dequantise pairs become products of integers, before constant folding makes floats of the weights.

The fusions make one product, com.microsoft.MatMulIntegerToFloat, of each of the ways in which exporters write it.
`passes/centre.py` then lets activations stay in float32 between quantisation and product on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infera_gpu.graph import Graph, HostArray, Node, made_name
from infera_gpu.passes.engine import CPU, Fusion, Match, Replacement, infera, node
from infera_kernels.portable.quant import sums_fit

DEQUANTIZE = ("DequantizeLinear", "com.microsoft.DequantizeLinear")
FLOAT = 1
"""ONNX's number of float32."""
INTEGERS = CPU | {"triton"}
"""The kinds of kernels that multiply integers."""


def is_byte(array: HostArray) -> bool:
    """Whether its elements are integers of 8 bits."""
    return array.dtype.name in ("int8", "uint8")


def _fits_columns(parameter: HostArray, columns: int) -> bool:
    """Whether it is one value, or one for each column of a matrix, and adds no axis to one."""
    return (parameter.size == 1 and parameter.ndim <= 2) or parameter.shape in ((columns,), (1, columns))


def _is_weight(weight: HostArray, scale: HostArray, zero: HostArray | None) -> bool:
    """Whether it is an 8-bit matrix with parameters that its columns take after the product.

    An infinite scale makes NaN of sums of weights that it made infinite, and infinity of the sum of the integers.
    """
    columns = weight.shape[-1] if weight.ndim else 0
    return (
        is_byte(weight)
        and weight.ndim == 2
        and scale.dtype == np.float32
        and bool(np.isfinite(scale).all())
        and _fits_columns(scale, columns)
        and (zero is None or (zero.dtype == weight.dtype and _fits_columns(zero, columns)))
    )


def _flat(match: Match, *names: str) -> tuple[list[str], dict[str, HostArray]]:
    """The names of constants, "" where they are left out; those of one row without its axis, as new constants."""
    values: list[str] = []
    made: dict[str, HostArray] = {}
    for name in names:
        value = match.values.get(name, "")
        if value and match.constant(name).ndim > 1:
            flat = made_name(match.root.outputs[0], name)
            made[flat] = match.constant(name).reshape(-1)
            value = flat
        values.append(value)
    return values, made


def integer_product(match: Match, inputs: Sequence[str], constants: dict[str, HostArray]) -> Replacement:
    """The product of integers that takes the match's place."""
    root = match.root
    name = root.name or root.outputs[0]
    return Replacement(
        Node("MatMulIntegerToFloat", tuple(inputs), root.outputs, domain="com.microsoft", name=name), constants
    )


# ---- weights and activations quantised on the way


def _is_dynamic(match: Match) -> bool:
    made_by = match.producers.get(match.values["q"])
    given = tuple(match.values[name] for name in ("q", "s", "z"))
    zero = match.constant("bz") if "bz" in match.values else None
    return (
        match.nodes["cast"].attrs.get("to") == FLOAT
        and made_by is not None
        and made_by.qualified == "DynamicQuantizeLinear"
        and made_by.outputs == given
        and _adds_no_axis(match, match.constant("w"), made_by.inputs[0])
        and _is_weight(match.constant("b"), match.constant("w"), zero)
    )


def _adds_no_axis(match: Match, scale: HostArray, x: str) -> bool:
    """Whether products with a matrix have the scale's axes: those of vectors have one axis."""
    spec = match.draft.spec(x)
    return scale.ndim < 2 or (spec is not None and spec.ranked and spec.ndim >= scale.ndim)


def _from_dynamic(match: Match) -> Replacement:
    (scale, zero), constants = _flat(match, "w", "bz")
    q, b, s, z = (match.values[name] for name in ("q", "b", "s", "z"))
    return integer_product(match, [q, b, s, scale, z, *([zero] if zero else [])], constants)


_DYNAMIC = """
    {name} (float[2, 3] x) => ({outs}) <int8[3, 2] b = {{1, 2, -3, 4, 5, 127}}, float[2] w = {{0.5, 0.25}}> {{
        q, s, z = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, b, {zero})
        f = Cast <to = {to}> (i)
        t = Mul({scale}, w)
        y = Mul(t, f)
    }}"""


def _dynamic(name: str = "example", outs: str = "float[2, 2] y", zero: str = "z", to: int = 1, scale: str = "s") -> str:
    return _DYNAMIC.format(name=name, outs=outs, zero=zero, to=to, scale=scale)


DYNAMIC = Fusion(
    name="dynamic_quantized_matmul",
    patterns=(
        node(
            "Mul",
            node("Cast", node("MatMulInteger", "q", "#b", "z", "?#bz"), name="cast"),
            node("Mul", "s", "#w", commutes=True),
            commutes=True,
        ),
    ),
    guard=_is_dynamic,
    build=_from_dynamic,
    example=_dynamic(),
    near_misses=(
        _dynamic("no_zero_point", zero=""),
        _dynamic("sums_are_an_output", outs="float[2, 2] y, int32[2, 2] i"),
        """
        scale_of_another_value (float[2, 3] x, float[2, 3] v) => (float[2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float[2] w = {0.5, 0.25}> {
            q, s, z = DynamicQuantizeLinear(x)
            r, t, p = DynamicQuantizeLinear(v)
            i = MatMulInteger(q, b, z)
            f = Cast <to = 1> (i)
            m = Mul(t, w)
            y = Mul(m, f)
        }""",
        """
        scale_adds_an_axis (float[3] x) => (float[1, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float[1, 2] w = {0.5, 0.25}> {
            q, s, z = DynamicQuantizeLinear(x)
            i = MatMulInteger(q, b, z)
            f = Cast <to = 1> (i)
            m = Mul(s, w)
            y = Mul(m, f)
        }""",
        """
        scale_of_rows (float[2, 3] x) => (float[2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float[2, 1] w = {0.5, 0.25}> {
            q, s, z = DynamicQuantizeLinear(x)
            i = MatMulInteger(q, b, z)
            f = Cast <to = 1> (i)
            m = Mul(s, w)
            y = Mul(m, f)
        }""",
    ),
    kinds=INTEGERS,
)


# ---- both sides dequantised


def parameters_of(graph: Graph, n: Node) -> tuple[HostArray, HostArray] | None:
    """Scale and zero point of a node that quantises to 8 bits or back, where both are known and single.

    From opset 23 on the float's type is no longer that of the scale.
    """
    scale, zero = (graph.constants.get(i) for i in (n.inputs[1], n.inputs[2] if len(n.inputs) > 2 else ""))
    if scale is None or zero is None or scale.dtype != np.float32 or not is_byte(zero):
        return None
    single = scale.size == zero.size == 1 and 0 < scale.item() < np.inf
    plain = not n.attrs.get("block_size", 0) and (n.domain or graph.opset_of(n) < 23)
    return (scale, zero) if single and plain else None


def _columns_of(graph: Graph, n: Node) -> bool:
    """Whether a node dequantises a constant matrix whose columns share scale and zero point."""
    given = [graph.constants.get(i) for i in n.inputs]
    weight, scale, zero = (*given, None)[:3]
    if weight is None or scale is None or (len(n.inputs) > 2 and n.inputs[2] and zero is None):
        return False
    along = scale.size == 1 or n.attrs.get("axis", 1) in (1, -1)
    plain = not n.attrs.get("block_size", 0) and (n.domain or graph.opset_of(n) < 23)
    return bool(plain) and along and _is_weight(weight, scale, zero) and sums_fit(weight, 1, zero)


def _dequantized(match: Match, name: str) -> Node | None:
    made_by = match.producers.get(match.values[name])
    return made_by if made_by is not None and made_by.qualified in DEQUANTIZE else None


def _is_qdq(match: Match) -> bool:
    a, b = _dequantized(match, "a"), _dequantized(match, "b")
    return (
        a is not None
        and b is not None
        and a.inputs[0] not in match.graph.constants
        and parameters_of(match.graph, a) is not None
        and _columns_of(match.graph, b)
    )


def _from_qdq(match: Match) -> Replacement:
    a, b = (match.producers[match.values[name]] for name in ("a", "b"))
    return integer_product(match, [a.inputs[0], b.inputs[0], a.inputs[1], b.inputs[1], a.inputs[2], *b.inputs[2:]], {})


_QDQ = """
    {name} (float[2, 3] x) => ({outs})
    <int8[3, 2] w = {{1, 2, -3, 4, 5, 127}}, float s = {{0.05}}, uint8 z = {{120}}, float[2] t = {{0.5, 0.25}},
     float[3] r = {{0.5, 0.25, 2}}, int8[2] p = {{0, -3}}, int8[3] o = {{0, 1, 2}}> {{
        q = QuantizeLinear(x, s, z)
        a = DequantizeLinear(q, s, z)
        b = DequantizeLinear <axis = {axis}> (w, {parameters})
        y = MatMul({order})
    }}"""


def _qdq(
    name: str = "example", outs: str = "float[2, 2] y", axis: int = 1, parameters: str = "t, p", order: str = "a, b"
) -> str:
    return _QDQ.format(name=name, outs=outs, axis=axis, parameters=parameters, order=order)


QDQ = Fusion(
    name="dequantized_matmul",
    patterns=(node("MatMul", "a", "b"),),
    guard=_is_qdq,
    build=_from_qdq,
    example=_qdq(),
    near_misses=(
        _qdq("scales_of_rows", axis=0, parameters="r, o"),
        _qdq("weights_on_the_left", outs="float[3, 3] y", order="b, a"),
    ),
    reassociates=True,
    kinds=INTEGERS,
)


# ---- weights alone are narrow


def _is_narrow(match: Match) -> bool:
    cast = match.nodes.get("cast")
    return (cast is None or cast.attrs.get("to") == FLOAT) and _is_weight(
        match.constant("b"), match.constant("s"), None
    )


def _from_narrow(match: Match) -> Replacement:
    (scale,), constants = _flat(match, "s")
    return Replacement(infera(match, "NarrowMatMul", (match.values["a"], match.values["b"], scale), {}), constants)


NARROW = Fusion(
    name="narrow_matmul",
    patterns=(node("MatMul", "a", node("Mul", node("Cast", "#b", name="cast"), "#s", commutes=True)),),
    guard=_is_narrow,
    build=_from_narrow,
    example="""
        example (float[2, 3] a) => (float[2, 2] y) <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float[1, 2] s = {0.5, 0.3}> {
            f = Cast <to = 1> (b)
            w = Mul(f, s)
            y = MatMul(a, w)
        }""",
    near_misses=(
        """
        scales_of_rows (float[2, 3] a) => (float[2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float[3, 1] s = {0.5, 0.3, 2}> {
            f = Cast <to = 1> (b)
            w = Mul(f, s)
            y = MatMul(a, w)
        }""",
        """
        scale_adds_an_axis (float[2, 3] a) => (float[1, 2, 2] y)
        <int8[3, 2] b = {1, 2, -3, 4, 5, 127}, float[1, 1, 1] s = {0.5}> {
            f = Cast <to = 1> (b)
            w = Mul(f, s)
            y = MatMul(a, w)
        }""",
        """
        wide_weights (float[2, 3] a) => (float[2, 2] y)
        <int32[3, 2] b = {1, 2, -3, 4, 5, 127}, float[1, 2] s = {0.5, 0.3}> {
            f = Cast <to = 1> (b)
            w = Mul(f, s)
            y = MatMul(a, w)
        }""",
    ),
    reassociates=True,
    kinds=CPU,
)

FUSIONS = (DYNAMIC, QDQ, NARROW)
