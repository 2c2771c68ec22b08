"""Factors and terms by channel, of BatchNormalization or spelled out, go into the weights of the product beside them.

What is folded is computed in float64 and rounded once; what would not fit the weights' type is not folded.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, either, infera, node
from infera_gpu.spec import DType

LINEAR = (
    *(node(op, "x", "#w", "?#b", name="linear") for op in ("Conv", "ConvTranspose", "Gemm", "infera.FusedMatMul")),
    node("MatMul", "x", "#w", name="linear"),
)
"""Products by constant weights, and a constant added."""

_MATRICES = ("Gemm", "FusedMatMul", "MatMul")


def _groups(linear: Node) -> int:
    return int(linear.attrs.get("group", 1))


def _channel_axis(linear: Node) -> int:
    """The axis of the weights that runs over output channels, those of one group for ConvTranspose."""
    if linear.op in ("Conv", "ConvTranspose"):
        return 0 if linear.op == "Conv" else 1
    return 0 if linear.attrs.get("transB", 0) else 1


def _channels(match: Match) -> int:
    linear, weight = match.nodes["linear"], match.constant("w")
    return int(weight.shape[_channel_axis(linear)]) * (_groups(linear) if linear.op == "ConvTranspose" else 1)


def _is_linear(match: Match) -> bool:
    """Weights and bias are floats of one type, one bias a channel, and nothing follows the sums yet."""
    linear, weight = match.nodes["linear"], match.constant("w")
    if weight.dtype.kind != "f" or linear.attrs.get("activation", "") or linear.attrs.get("beta", 1.0) != 1:
        return False
    if linear.op in _MATRICES and (weight.ndim != 2 or len(match.draft.readers[match.values["w"]]) > 1):
        return False
    if linear.op not in _MATRICES and weight.ndim < 3:
        return False
    if "b" not in match.values:
        return True
    bias = match.constant("b")
    return bias.dtype == weight.dtype and bias.size == bias.shape[-1] == _channels(match)


def _by_channel(linear: Node, weight: HostArray, factor: HostArray) -> HostArray:
    """The weights with every output channel multiplied by its factor, in float64."""
    wide, axis = weight.astype(np.float64), _channel_axis(linear)
    if linear.op != "ConvTranspose":
        return wide * factor.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    groups = _groups(linear)
    split = wide.reshape(groups, -1, *weight.shape[1:])
    return (split * factor.reshape(groups, 1, -1, *(1,) * (weight.ndim - 2))).reshape(weight.shape)


def _rounded(wide: HostArray, dtype: DType) -> HostArray:
    """Weights in their type.

    Raises FloatingPointError where the largest is no normal number of it: they would be infinite, or lose their digits.
    """
    largest, info = max(wide.max(initial=0), -wide.min(initial=0)), np.finfo(dtype)
    if not (largest == 0 or info.tiny <= largest <= info.max):
        raise FloatingPointError
    return wide.astype(dtype)


def _finite(wide: HostArray, dtype: DType) -> HostArray:
    """A bias in its type. Raises FloatingPointError where it does not fit."""
    made = wide.astype(dtype)
    if not np.isfinite(made).all():
        raise FloatingPointError
    return made


def _rescaled(match: Match, factor: HostArray | None, shift: HostArray) -> Replacement:
    """The product whose output is factor · output + shift, channel by channel; None for a factor of 1."""
    linear, weight, name = match.nodes["linear"], match.constant("w"), match.root.outputs[0]
    bias = match.constant("b").astype(np.float64).reshape(-1) if "b" in match.values else np.zeros(shift.shape)
    made: dict[str, HostArray] = {}
    kept = match.values["w"]
    if factor is not None:
        kept = made_name(name, "weight")
        made[kept] = _rounded(_by_channel(linear, weight, factor), weight.dtype)
        bias = bias * factor
    inputs: tuple[str, ...] = (match.values["x"], kept)
    if "b" in match.values or shift.any():
        inputs = (*inputs, made_name(name, "bias"))
        made[inputs[-1]] = _finite(bias + shift, weight.dtype)
    if linear.op == "MatMul":
        return Replacement(infera(match, "FusedMatMul", inputs, {}), made)
    return Replacement(replace(linear, inputs=inputs, outputs=match.root.outputs), made)


# ---- BatchNormalization


def statistics(match: Match) -> tuple[HostArray, HostArray]:
    """What BatchNormalization multiplies channels by, and then adds."""
    scale, shift, mean, var = (match.constant(n).astype(np.float64) for n in ("scale", "shift", "mean", "var"))
    factor = scale / np.sqrt(var + float(match.nodes["bn"].attrs.get("epsilon", 1e-5)))
    return factor, shift - mean * factor


def _is_inference(match: Match, channels: int) -> bool:
    attrs = match.nodes["bn"].attrs
    rows = [match.constant(n) for n in ("scale", "shift", "mean", "var")]
    plain = not attrs.get("training_mode", 0) and bool(attrs.get("spatial", 1))
    return plain and all(row.shape == (channels,) and row.dtype == match.constant("w").dtype for row in rows)


def _normalizes_channels(match: Match) -> bool:
    """Axis 1 of the product is that of its channels: for a matrix, where it has no axis before its rows."""
    linear = match.nodes["linear"]
    columns = linear.op not in ("FusedMatMul", "MatMul") or match.rank("x") == 2
    return columns and _is_linear(match) and _is_inference(match, _channels(match))


_STATISTICS = ("#scale", "#shift", "#mean", "#var")

BATCH_NORM = Fusion(
    name="batchnorm_into_weights",
    patterns=(node("BatchNormalization", either(*LINEAR), *_STATISTICS, name="bn"),),
    guard=_normalizes_channels,
    build=lambda match: _rescaled(match, *statistics(match)),
    reassociates=True,
    example="""
        example (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] s = {1.5, 0.5}, float[2] b = {0.1, -3},
         float[2] m = {0.3, 0.7}, float[2] v = {1.2, 0.4}> {
            t = Conv(x, w)
            y = BatchNormalization <epsilon = 0.001> (t, s, b, m, v)
        }""",
    near_misses=(
        """
        conv_read_elsewhere (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] z)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] s = {1.5, 0.5}, float[2] b = {0.1, -3},
         float[2] m = {0.3, 0.7}, float[2] v = {1.2, 0.4}> {
            t = Conv(x, w)
            y = BatchNormalization(t, s, b, m, v)
            z = Add(y, t)
        }""",
        """
        statistics_are_inputs (float[1, 1, 3, 3] x, float[2] m) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] s = {1.5, 0.5}, float[2] b = {0.1, -3},
         float[2] v = {1.2, 0.4}> {
            t = Conv(x, w)
            y = BatchNormalization(t, s, b, m, v)
        }""",
        """
        channels_are_no_columns (float[B, 2, 3] x) => (float[B, 2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] s = {1.5, 0.5}, float[2] b = {0.1, -3},
         float[2] m = {0.3, 0.7}, float[2] v = {1.2, 0.4}> {
            t = MatMul(x, w)
            y = BatchNormalization(t, s, b, m, v)
        }""",
    ),
)

# ---- factors and terms spelled out


def is_per_channel(match: Match) -> bool:
    """The constant has one value a channel, or one value, and does not widen the output."""
    linear, weight, c = match.nodes["linear"], match.constant("w"), match.constant("c")
    if match.root.op == "Div" and not c.all():
        return False
    if not _is_linear(match) or c.dtype != weight.dtype or c.size not in (1, _channels(match)):
        return False
    if linear.op in _MATRICES:
        rank = 2 if linear.op == "Gemm" else match.rank("x")
        return c.size == (c.shape[-1] if c.ndim else 1) and c.ndim <= (rank or 1)
    shape = (1,) * (weight.ndim - c.ndim) + c.shape
    return len(shape) == weight.ndim and shape[1] == c.size


def affine(match: Match) -> Replacement:
    op, channels = match.root.op, _channels(match)
    value = np.broadcast_to(match.constant("c").astype(np.float64).reshape(-1), (channels,))
    if op in ("Mul", "Div"):
        return _rescaled(match, value if op == "Mul" else 1 / value, np.zeros(channels))
    return _rescaled(match, None, value if op == "Add" else -value)


AFFINE = Fusion(
    name="affine_into_weights",
    patterns=(
        node(("Add", "Mul"), either(*LINEAR), "#c", commutes=True),
        node(("Sub", "Div"), either(*LINEAR), "#c"),
    ),
    guard=is_per_channel,
    build=affine,
    reassociates=True,
    example="""
        example (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[1, 2, 1, 1] c = {1.5, -0.5}> {
            t = Conv(x, w)
            y = Add(c, t)
        }""",
    near_misses=(
        """
        one_value_a_column (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] c = {1.5, -0.5}> {
            t = Conv(x, w)
            y = Add(t, c)
        }""",
        """
        constant_less_product (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[1, 2, 1, 1] c = {1.5, -0.5}> {
            t = Conv(x, w)
            y = Sub(c, t)
        }""",
        """
        one_value_a_row (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2, 1] c = {1.5, -0.5}> {
            t = MatMul(x, w)
            y = Mul(t, c)
        }""",
        """
        weights_would_be_infinite (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] w = {1e20, 2, 3, 4, 5, 6}, float[2] c = {1e25, 1}> {
            t = MatMul(x, w)
            y = Mul(t, c)
        }""",
        """
        weights_would_lose_their_digits (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] w = {1e-20, 2e-20, 3e-21, 4e-20, 5e-20, 6e-20}, float[2] c = {1e-22, 1e-21}> {
            t = MatMul(x, w)
            y = Mul(t, c)
        }""",
        """
        weight_read_twice (float[2, 3] x, float[2, 3] z) => (float[2, 2] y, float[2, 2] u)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] c = {1.5, -0.5}> {
            t = MatMul(x, w)
            y = Mul(t, c)
            u = MatMul(z, w)
        }""",
    ),
)

# ---- in front of the product


def _is_unpadded(linear: Node) -> bool:
    return not any(linear.attrs.get("pads", ())) and linear.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _inputs(match: Match) -> int:
    """Input channels of a Conv, rows of a Gemm's weights."""
    linear, weight = match.nodes["linear"], match.constant("w")
    return int(weight.shape[1] * _groups(linear) if linear.op == "Conv" else weight.shape[1 - _channel_axis(linear)])


def _may_be_preceded(match: Match) -> bool:
    linear = match.nodes["linear"]
    plain = _is_unpadded(linear) if linear.op == "Conv" else not linear.attrs.get("transA", 0)
    return plain and _is_linear(match) and _is_inference(match, _inputs(match))


def _preceded(match: Match) -> Replacement:
    """The product that takes what BatchNormalization takes: of the weights by input channel, in float64."""
    linear, weight, name = match.nodes["linear"], match.constant("w"), match.root.outputs[0]
    factor, shift = statistics(match)
    wide = weight.astype(np.float64)
    if linear.op == "Conv":
        groups = _groups(linear)
        split = wide.reshape(groups, -1, weight.shape[1], *weight.shape[2:])
        by_input = (groups, 1, -1, *(1,) * (weight.ndim - 2))
        added = (split * shift.reshape(by_input)).sum(axis=tuple(range(2, split.ndim))).reshape(-1)
        scaled = (split * factor.reshape(by_input)).reshape(weight.shape)
    else:
        by_input = (1, -1) if linear.attrs.get("transB", 0) else (-1, 1)
        added = (wide * shift.reshape(by_input)).sum(axis=1 - _channel_axis(linear)) * linear.attrs.get("alpha", 1.0)
        scaled = wide * factor.reshape(by_input)
    bias = match.constant("b").astype(np.float64).reshape(-1) if "b" in match.values else 0.0
    made = {
        made_name(name, "weight"): _rounded(scaled, weight.dtype),
        made_name(name, "bias"): _finite(bias + added, weight.dtype),
    }
    return Replacement(replace(linear, inputs=(match.values["x"], *made)), made)


BATCH_NORM_IN_FRONT = Fusion(
    name="batchnorm_in_front",
    patterns=(
        node(("Conv", "Gemm"), node("BatchNormalization", "x", *_STATISTICS, name="bn"), "#w", "?#b", name="linear"),
    ),
    guard=_may_be_preceded,
    build=_preceded,
    reassociates=True,
    example="""
        example (float[1, 4, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 2, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 1, -2, 3, -4, 5, -6, 7, -8}, float[4] s = {1.5, 0.5, 1, 2},
         float[4] b = {0.1, -3, 2, 1}, float[4] m = {0.3, 0.7, 0, -1}, float[4] v = {1.2, 0.4, 1, 2}> {
            t = BatchNormalization <epsilon = 0.001> (x, s, b, m, v)
            y = Conv <group = 2> (t, w)
        }""",
    near_misses=(
        """
        padded_with_zeros (float[1, 1, 3, 3] x) => (float[1, 2, 4, 4] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[1] s = {1.5}, float[1] b = {0.1}, float[1] m = {0.3},
         float[1] v = {1.2}> {
            t = BatchNormalization(x, s, b, m, v)
            y = Conv <pads = [1, 1, 1, 1]> (t, w)
        }""",
        """
        read_elsewhere (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y, float[1, 1, 3, 3] t)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[1] s = {1.5}, float[1] b = {0.1}, float[1] m = {0.3},
         float[1] v = {1.2}> {
            t = BatchNormalization(x, s, b, m, v)
            y = Conv(t, w)
        }""",
    ),
)

FUSIONS = (BATCH_NORM, AFFINE, BATCH_NORM_IN_FRONT)
