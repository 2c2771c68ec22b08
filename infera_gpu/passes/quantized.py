"""Convolutions and products whose sides are dequantised become products of integers, with all that follows them.

For GPUs, where `ops/quantized.py` has kernels that read and write 8-bit integers. The products and what reads residuals
are fused first of all, before constants are folded; activations and quantisation once activations are found.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, infera, node
from infera_gpu.passes.quant import DEQUANTIZE, parameters_of
from infera_kernels.portable.quant import sums_fit

TRITON = frozenset({"triton"})
"""The `kinds` of fusions whose operators have kernels in Triton alone."""

_FLOAT32 = np.dtype(np.float32)


def dequantized(match: Match, value: str) -> Node | None:
    """The node that makes a value of 8-bit integers with one known scale and zero point, None where none does."""
    n = match.producers.get(value)
    if n is None or n.qualified not in DEQUANTIZE or n.opset or n.inputs[0] in match.graph.constants:
        return None
    return n if parameters_of(match.graph, n) else None


def _constants(match: Match, n: Node) -> tuple[HostArray, HostArray] | None:
    """Integers and their scale, of a node that dequantises constants without a zero point, or one of 0."""
    given = [match.graph.constants.get(i) for i in n.inputs]
    if n.qualified not in DEQUANTIZE or n.opset or n.attrs.get("block_size", 0) or len(given) < 2:
        return None
    values, scale, zero = (*given, None)[:3]
    known = len(n.inputs) < 3 or not n.inputs[2] or (zero is not None and not zero.any())
    narrow = n.domain != "" or match.graph.opset_of(n) < 23
    if values is None or scale is None or scale.dtype != _FLOAT32 or not known or not narrow:
        return None
    return values, scale


def _weight(match: Match, value: str, axis: int) -> tuple[HostArray, HostArray] | None:
    """int8 weights, and their scales, one for each entry of an axis."""
    n = match.producers.get(value)
    found = None if n is None else _constants(match, n)
    if n is None or found is None:
        return None
    values, scale = found
    if values.dtype != np.int8 or values.ndim < 2 or not np.isfinite(scale).all() or not sums_fit(values, axis):
        return None
    channels = values.shape[axis]
    if scale.size == 1 and scale.ndim < 2:
        return values, np.full(channels, scale.reshape(()), _FLOAT32)
    along = int(n.attrs.get("axis", 1)) % values.ndim == axis
    return (values, scale) if along and scale.shape == (channels,) else None


def _bias(match: Match, value: str, channels: int) -> HostArray | None:
    """A bias that is known, one for each channel, in float32; None where it is not."""
    bias = match.graph.constants.get(value)
    made_by = match.producers.get(value)
    if bias is None and made_by is not None and (found := _constants(match, made_by)) is not None:
        bias = found[0].astype(_FLOAT32) * found[1]
    return bias if bias is not None and bias.dtype == _FLOAT32 and bias.shape == (channels,) else None


_Parts = tuple[Node, HostArray, HostArray, HostArray | None]
"""What dequantises the left side, weights, their scales, and the bias."""


def _parts(match: Match, axis: int) -> _Parts | None:
    """None where no kernel takes them: images have one or two spatial axes, and integers are int8 on either side. What
    is uint8 still (see `signed`) mostly enters the model so."""
    left = dequantized(match, match.values["a"])
    weight = _weight(match, match.values["b"], axis)
    if left is None or weight is None or weight[0].ndim > 4:
        return None
    if match.graph.constants[left.inputs[2]].dtype != np.int8:
        return None
    added = match.values.get("c", "")
    bias = _bias(match, added, weight[0].shape[axis]) if added else None
    return None if added and bias is None else (left, *weight, bias)


def _product(match: Match, op: str, parts: _Parts, attrs: Mapping[str, object], *, turned: bool = False) -> Replacement:
    """The operator over integers. Its scale is that of the left side times those of the weights."""
    left, weight, scales, bias = parts
    root = match.root
    names = {part: made_name(root.outputs[0], part) for part in ("weight", "bias", "factor")}
    constants = {names["factor"]: scales * match.graph.constants[left.inputs[1]].reshape(())}
    made_by = match.producers[match.values["b"]]
    w = made_by.inputs[0]
    if turned:
        w = names["weight"]
        constants[w] = np.ascontiguousarray(weight.T)
    if bias is not None:
        constants[names["bias"]] = bias
    inputs = (left.inputs[0], w, "" if bias is None else names["bias"], "", names["factor"], left.inputs[2])
    return Replacement(infera(match, op, inputs, attrs), constants)


# ---- convolutions


def _is_conv(match: Match) -> bool:
    return _parts(match, 0) is not None


def _conv(match: Match) -> Replacement:
    parts = _parts(match, 0)
    assert parts is not None
    return _product(match, "QuantizedConv", parts, match.root.attrs)


_CONV = """
    {name} ({kind}[1, 2, 3, 3] q{ins}) => (float[1, 2, 2, 2] y)
    <float s = {{0.5}}, {kind} z = {{3}}, {weight}[2, 2, 2, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}},
     float[2] t = {{0.5, 0.25}}, {weight}[2] p = {{{zero}, 0}}, int32[2] c = {{4, -8}}, float[2] u = {{0.25, 0.125}}> {{
        a = DequantizeLinear(q, s, z)
        b = DequantizeLinear <axis = {axis}> (w, t, p)
        d = DequantizeLinear <axis = 0> (c, u)
        y = Conv(a, b, {bias})
    }}"""


def _conv_text(
    name: str = "example",
    weight: str = "int8",
    axis: int = 0,
    zero: int = 0,
    bias: str = "d",
    ins: str = "",
    kind: str = "int8",
) -> str:
    return _CONV.format(name=name, kind=kind, weight=weight, axis=axis, zero=zero, bias=bias, ins=ins)


_VOLUMES = """
    volumes (int8[1, 1, 2, 2, 2] q) => (float[1, 1, 1, 1, 1] y)
    <float s = {0.5}, int8 z = {3}, int8[1, 1, 2, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float t = {0.5}> {
        a = DequantizeLinear(q, s, z)
        b = DequantizeLinear(w, t)
        y = Conv(a, b)
    }"""


CONV = Fusion(
    name="quantized_conv",
    patterns=(node("Conv", "a", "b", "?c"),),
    guard=_is_conv,
    build=_conv,
    example=_conv_text(),
    near_misses=(
        _conv_text("scales_of_inputs", axis=1),
        _conv_text("unsigned_weights", weight="uint8"),
        _conv_text("zero_points_of_weights", zero=1),
        _conv_text("bias_is_an_input", bias="f", ins=", float[2] f"),
        _conv_text("unsigned_input", kind="uint8"),
        _VOLUMES,
    ),
    reassociates=True,
    kinds=TRITON,
)


# ---- products


def _gemm_axis(match: Match) -> int:
    """Of the weights, along which the columns of the result lie."""
    return 0 if match.root.op == "Gemm" and match.root.attrs.get("transB", 0) else 1


def _is_product(match: Match) -> bool:
    attrs = match.root.attrs
    plain = not attrs.get("transA", 0) and attrs.get("alpha", 1.0) == 1.0 and attrs.get("beta", 1.0) == 1.0
    parts = _parts(match, _gemm_axis(match)) if plain else None
    return parts is not None and parts[1].ndim == 2


def _matmul(match: Match) -> Replacement:
    axis = _gemm_axis(match)
    parts = _parts(match, axis)
    assert parts is not None
    return _product(match, "QuantizedMatMul", parts, {}, turned=axis == 0)


_MATMUL = """
    {name} (int8[2, 3] q{ins}) => (float[2, 2] y)
    <float s = {{0.5}}, int8 z = {{3}}, {weight}[{shape}] w = {{1, 2, -3, 4, 5, 127}},
     float[{count}] t = {{{scales}}}, float[2] c = {{0.5, -2}}> {{
        a = DequantizeLinear(q, s, z)
        b = DequantizeLinear <axis = {axis}> (w, t)
        y = {product}
    }}"""


def _matmul_text(
    product: str,
    name: str = "example",
    weight: str = "int8",
    shape: str = "3, 2",
    axis: int = 1,
    scales: str = "0.5, 0.25",
    ins: str = "",
) -> str:
    count = scales.count(",") + 1
    return _MATMUL.format(
        name=name, weight=weight, shape=shape, axis=axis, scales=scales, count=count, product=product, ins=ins
    )


MATMUL = Fusion(
    name="quantized_matmul",
    patterns=(node("MatMul", "a", "b"), node("Gemm", "a", "b", "?c")),
    guard=_is_product,
    build=_matmul,
    example=_matmul_text("Gemm <transB = 1> (a, b, c)", shape="2, 3", axis=0),
    near_misses=(
        _matmul_text("MatMul(a, b)", "scales_of_rows", axis=0, scales="0.5, 0.25, 2"),
        _matmul_text("MatMul(a, b)", "unsigned_weights", weight="uint8"),
        _matmul_text("Gemm <alpha = 0.5> (a, b)", "scaled"),
        _matmul_text("Gemm(a, b, f)", "bias_is_an_input", ins=", float[2] f"),
    ),
    reassociates=True,
    kinds=TRITON,
)

FUSIONS = (CONV, MATMUL)
