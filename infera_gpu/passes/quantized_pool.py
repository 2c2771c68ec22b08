"""Pools, sums and moves between a dequantisation and a quantisation work on 8-bit integers, for GPUs."""

from __future__ import annotations

from infera_gpu.graph import Node
from infera_gpu.passes.engine import Fusion, Match, Replacement, either, node
from infera_gpu.passes.quant import parameters_of
from infera_gpu.passes.quantized import TRITON, dequantized
from infera_gpu.spec import DType
from infera_kernels.portable.quant import bounds


def _result_type(match: Match) -> DType | None:
    """The type that the root quantises to, where its parameters are known and single."""
    known = parameters_of(match.graph, match.root)
    return None if known is None or "output_dtype" in match.root.attrs else known[1].dtype


def _type_of(match: Match, n: Node) -> DType:
    return match.graph.constants[n.inputs[2]].dtype


_TEXT = """
    {name} (int8[1, 2, 4, 4] q, int8[1, 2, 4, 4] p) => ({outs})
    <float s = {{0.5}}, int8 z = {{3}}, float t = {{0.25}}, int8 low = {{-128}}, uint8 u = {{3}}> {{
        a = DequantizeLinear(q, s, z)
        b = DequantizeLinear(p, t, low)
        {body}
    }}"""


def _text(body: str, name: str = "example", outs: str = "int8[1, 2, 3, 3] y") -> str:
    return _TEXT.format(name=name, body=body, outs=outs)


# ---- what only chooses among elements: the largest of a window is the largest integer


def _keeps_parameters(match: Match) -> bool:
    made_by = dequantized(match, match.values["a"])
    if made_by is None or _result_type(match) != _type_of(match, made_by) or match.opset() < 12:
        return False
    pairs = zip(made_by.inputs[1:3], match.root.inputs[1:3], strict=True)
    constants = match.graph.constants
    return all(constants[i].item() == constants[j].item() for i, j in pairs)


def _of_integers(match: Match) -> Replacement:
    moved, made_by = match.nodes["moved"], match.producers[match.values["a"]]
    inputs = (made_by.inputs[0], *moved.inputs[1:])
    return Replacement(Node(moved.op, inputs, match.root.outputs, moved.attrs, name=moved.name))


MOVE = Fusion(
    name="quantized_move",
    patterns=(
        node("QuantizeLinear", node(("MaxPool", "Flatten", "Transpose"), "a", name="moved"), "#s", "#z"),
        node("QuantizeLinear", node(("Reshape", "Squeeze", "Unsqueeze"), "a", "?to", name="moved"), "#s", "#z"),
    ),
    guard=_keeps_parameters,
    build=_of_integers,
    example=_text("m = MaxPool <kernel_shape = [2, 2]> (a)  y = QuantizeLinear(m, s, z)"),
    near_misses=(
        _text("m = MaxPool <kernel_shape = [2, 2]> (a)  y = QuantizeLinear(m, t, z)", "other_scale"),
        _text("m = MaxPool <kernel_shape = [2, 2]> (a)  y = QuantizeLinear(m, s, low)", "other_zero_point"),
        _text(
            "m = MaxPool <kernel_shape = [2, 2]> (a)  y = QuantizeLinear(m, s, u)",
            "other_type",
            "uint8[1, 2, 3, 3] y",
        ),
    ),
    kinds=TRITON,
)


# ---- means


def _is_mean(match: Match) -> bool:
    made_by = dequantized(match, match.values["a"])
    return made_by is not None and _result_type(match) == _type_of(match, made_by)


def _mean(match: Match) -> Replacement:
    made_by, root = match.producers[match.values["a"]], match.root
    inputs = (*made_by.inputs[:3], *root.inputs[1:3])
    name = root.name or root.outputs[0]
    made = Node("QLinearGlobalAveragePool", inputs, root.outputs, {"channels_last": 0}, "com.microsoft", name)
    return Replacement(made)


MEAN = Fusion(
    name="quantized_mean",
    patterns=(node("QuantizeLinear", node("GlobalAveragePool", "a"), "#s", "#z"),),
    guard=_is_mean,
    build=_mean,
    example=_text("m = GlobalAveragePool(a)  y = QuantizeLinear(m, t, low)", outs="int8[1, 2, 1, 1] y"),
    near_misses=(
        _text("m = GlobalAveragePool(a)  y = QuantizeLinear(m, s, u)", "other_type", "uint8[1, 2, 1, 1] y"),
        _text(
            "m = GlobalAveragePool(a)  y = QuantizeLinear(m, s, z)",
            "read_elsewhere",
            "int8[1, 2, 1, 1] y, float[1, 2, 1, 1] m",
        ),
    ),
    reassociates=True,
    kinds=TRITON,
)


# ---- sums


def _is_sum(match: Match) -> bool:
    sides = [dequantized(match, match.values[name]) for name in ("a", "b")]
    made = _result_type(match)
    if made is None or any(n is None or _type_of(match, n) != made for n in sides):
        return False
    lowest = match.constant("z").item() == bounds(made)[0]
    return "relu" not in match.nodes or lowest


def _sum(match: Match) -> Replacement:
    root = match.root
    sides = [i for name in ("a", "b") for i in match.producers[match.values[name]].inputs[:3]]
    name = root.name or root.outputs[0]
    return Replacement(Node("QLinearAdd", (*sides, *root.inputs[1:3]), root.outputs, domain="com.microsoft", name=name))


_ADD = node("Add", "a", "b")

SUM = Fusion(
    name="quantized_sum",
    patterns=(node("QuantizeLinear", either(node("Relu", _ADD, name="relu"), _ADD), "#s", "#z"),),
    guard=_is_sum,
    build=_sum,
    example=_text("c = Add(a, b)  r = Relu(c)  y = QuantizeLinear(r, s, low)", outs="int8[1, 2, 4, 4] y"),
    near_misses=(
        _text(
            "c = Add(a, b)  r = Relu(c)  y = QuantizeLinear(r, s, z)",
            "rectified_above_the_lowest",
            "int8[1, 2, 4, 4] y",
        ),
        _text("c = Add(a, b)  y = QuantizeLinear(c, s, u)", "other_type", "uint8[1, 2, 4, 4] y"),
    ),
    reassociates=True,
    kinds=TRITON,
)

FUSIONS = (MOVE, MEAN, SUM)
