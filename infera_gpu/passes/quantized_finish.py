"""What follows a quantised convolution or product becomes a part of it: bias, residual, activation, quantisation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.passes.engine import Fusion, Match, Replacement, node
from infera_gpu.passes.epilogue import activated, activation_of
from infera_gpu.passes.quant import parameters_of
from infera_gpu.passes.quantized import TRITON, dequantized

_BIAS, _RESIDUAL, _R_SCALE, _R_ZERO, _SCALE, _ZERO = 2, 3, 6, 7, 8, 9
PRODUCTS = ("infera.QuantizedConv", "infera.QuantizedMatMul")
_PRODUCT = node(PRODUCTS, "x", "#w", "?b", "?r", "#f", "?z", "?rs", "?rz", "?s", "?sz", name="product")
_FLOAT32 = np.dtype(np.float32)


def _has(match: Match, *inputs: int) -> bool:
    given = match.nodes["product"].inputs
    return any(i < len(given) and given[i] for i in inputs)


def _is_bare(match: Match) -> bool:
    """Whether nothing follows the sums but a bias."""
    return not _has(match, _RESIDUAL, _SCALE) and not match.nodes["product"].attrs.get("activation", "")


def _with(match: Match, values: dict[int, str], **attrs: object) -> Replacement:
    """The product with further inputs and attributes, in the place of the last node of the match."""
    product = match.nodes["product"]
    inputs = [*product.inputs, *[""] * (max(values, default=-1) + 1 - len(product.inputs))]
    for i, value in values.items():
        inputs[i] = value
    made = replace(product, inputs=tuple(inputs), outputs=match.root.outputs, attrs={**product.attrs, **attrs})
    return Replacement(made)


_EXAMPLE = """
    {name} (int8[2, 3] x, float[2, 2] v, int8[2, 2] q) => ({outs})
    <int8[3, 2] w = {{1, 2, -3, 4, 5, 127}}, float[2] f = {{0.5, 0.25}}, float[2] b = {{0.5, -1}},
     float s = {{0.5}}, int8 z = {{3}}, int16 wide = {{3}}, float low = {{-1}}, float high = {{6}},
     float[2] two = {{0.5, 0.25}}, int8[2] zeros = {{0, 1}}, float[1, 1, 2] axes = {{1, 2}}> {{
        {body}
    }}"""


def _text(body: str, name: str = "example", outs: str = "float[2, 2] y") -> str:
    return _EXAMPLE.format(name=name, body=body, outs=outs)


_MADE = "t = infera.QuantizedMatMul(x, w, , , f)"


# ---- bias


def _takes_bias(match: Match) -> bool:
    bias = match.constant("bias")
    return (
        _is_bare(match)
        and not _has(match, _BIAS)
        and match.nodes["product"].op == "QuantizedMatMul"
        and bias.dtype == _FLOAT32
        and bias.shape == match.constant("f").shape
    )


BIAS = Fusion(
    name="quantized_bias",
    patterns=(node("Add", _PRODUCT, "#bias", commutes=True),),
    guard=_takes_bias,
    build=lambda match: _with(match, {_BIAS: match.values["bias"]}),
    example=_text(f"{_MADE}  y = Add(b, t)"),
    near_misses=(
        _text("t = infera.QuantizedMatMul(x, w, b, , f)  y = Add(t, two)", "two_biases"),
        _text(f"{_MADE}  y = Add(t, axes)", "adds_axes", "float[1, 2, 2] y"),
        _text('t = infera.QuantizedMatMul <activation = "relu"> (x, w, , , f)  y = Add(t, b)', "activated_before"),
    ),
    kinds=TRITON,
)


# ---- residual


def _takes_residual(match: Match) -> bool:
    return _is_bare(match) and match.values["v"] not in match.graph.constants and not _broadcasts(match)


def _broadcasts(match: Match) -> bool:
    """Whether the residual is known to have other sizes than the product: the kernel reads one for each element."""
    residual, product = match.spec("v"), match.draft.spec(match.nodes["product"].outputs[0])
    if residual is None or product is None or not residual.ranked or not product.ranked:
        return False
    pairs = tuple(zip(residual.shape, product.shape, strict=False))
    return residual.ndim != product.ndim or any(a != b and 1 in (a, b) for a, b in pairs)


def _with_residual(match: Match) -> Replacement:
    made_by = dequantized(match, match.values["v"])
    if made_by is None:
        return _with(match, {_RESIDUAL: match.values["v"]})
    q, scale, zero = made_by.inputs[:3]
    return _with(match, {_RESIDUAL: q, _R_SCALE: scale, _R_ZERO: zero})


RESIDUAL = Fusion(
    name="quantized_residual",
    patterns=(node(("Add", "Sum"), _PRODUCT, "v", commutes=True),),
    guard=_takes_residual,
    build=_with_residual,
    example=_text(f"{_MADE}  d = DequantizeLinear(q, s, z)  y = Add(d, t)"),
    near_misses=(
        _text("t = infera.QuantizedMatMul(x, w, , v, f)  y = Add(t, v)", "two_residuals"),
        _text(f"{_MADE}  y = Add(t, t)", "the_product_twice"),
        _text(f"{_MADE}  m = ReduceMax <axes = [1]> (v)  y = Add(t, m)", "one_for_each_row"),
        _text(f"{_MADE}  m = ReduceMax <axes = [0], keepdims = 0> (v)  y = Add(t, m)", "a_row"),
        _text(f"{_MADE}  y = Add(t, axes)", "constant", "float[1, 2, 2] y"),
        _text('t = infera.QuantizedMatMul <activation = "relu"> (x, w, , , f)  y = Add(t, v)', "activated_before"),
    ),
    kinds=TRITON,
)


# ---- activation


def _takes_activation(match: Match) -> bool:
    active = match.nodes["product"].attrs.get("activation", "")
    return not active and not _has(match, _SCALE) and activation_of(match, match.root) is not None


def _with_activation(match: Match) -> Replacement:
    found = activation_of(match, match.root)
    assert found is not None
    name, params = found
    return _with(match, {}, activation=name, **({"activation_params": params} if params else {}))


ACTIVATION = Fusion(
    name="quantized_activation",
    patterns=activated(_PRODUCT),
    guard=_takes_activation,
    build=_with_activation,
    example=_text(f"{_MADE}  y = Clip(t, low, high)"),
    near_misses=(
        _text('t = infera.QuantizedMatMul <activation = "relu"> (x, w, , , f)  y = LeakyRelu(t)', "activated_already"),
        _text(f"{_MADE}  y = Relu(t)", "read_elsewhere", "float[2, 2] y, float[2, 2] t"),
        _text("t = infera.QuantizedMatMul(x, w, , , f, , , , s, z)  y = Relu(t)", "quantised_before", "int8[2, 2] y"),
    ),
    kinds=TRITON,
)


# ---- quantisation


def _takes_result(match: Match) -> bool:
    known = parameters_of(match.graph, match.root)
    return known is not None and not _has(match, _SCALE) and "output_dtype" not in match.root.attrs


RESULT = Fusion(
    name="quantized_result",
    patterns=(node("QuantizeLinear", _PRODUCT, "#qs", "#qz"),),
    guard=_takes_result,
    build=lambda match: _with(match, {_SCALE: match.values["qs"], _ZERO: match.values["qz"]}),
    example=_text(f"{_MADE}  y = QuantizeLinear(t, s, z)", outs="int8[2, 2] y"),
    near_misses=(
        _text(f"{_MADE}  y = QuantizeLinear(t, s, z)", "read_elsewhere", "int8[2, 2] y, float[2, 2] t"),
        _text(f"{_MADE}  y = QuantizeLinear <axis = 1> (t, two, zeros)", "scales_of_columns", "int8[2, 2] y"),
    ),
    reassociates=True,
    kinds=TRITON,
)

EARLY = (BIAS, RESIDUAL)
LATE = (ACTIVATION, RESULT)
