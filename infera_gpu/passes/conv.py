"""Conv with the normalisation, bias, residual and activation that follow it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.graph import HostArray, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, infera, node


def _rescaled(match: Match, scale: HostArray, shift: HostArray) -> Replacement:
    """The Conv whose output is scale · conv + shift, channel by channel; computed in float64."""
    conv = match.nodes["conv"]
    weight = match.constant("w")
    bias = match.constant("b") if "b" in match.values else np.zeros(weight.shape[0], weight.dtype)
    wide = weight.astype(np.float64) * scale.reshape((-1,) + (1,) * (weight.ndim - 1))
    name = match.root.outputs[0]
    constants = {
        made_name(name, "weight"): wide.astype(weight.dtype),
        made_name(name, "bias"): (bias.astype(np.float64) * scale + shift).astype(weight.dtype),
    }
    made = replace(conv, inputs=(match.values["x"], *constants), outputs=match.root.outputs)
    return Replacement(made, constants)


def _fits(match: Match, *others: str) -> bool:
    """The weight is one of a convolution; bias and the constants named have one value a channel, all of one type."""
    weight = match.constant("w")
    rows = [match.constant(name) for name in (*others, *(["b"] if "b" in match.values else []))]
    return (
        weight.ndim > 2
        and weight.dtype.kind == "f"
        and all(row.shape == weight.shape[:1] and row.dtype == weight.dtype for row in rows)
    )


def _normalized(match: Match) -> Replacement:
    scale, shift, mean, var = (match.constant(n).astype(np.float64) for n in ("scale", "shift", "mean", "var"))
    factor = scale / np.sqrt(var + float(match.nodes["bn"].attrs.get("epsilon", 1e-5)))
    return _rescaled(match, factor, shift - mean * factor)


def _is_inference(match: Match) -> bool:
    attrs = match.nodes["bn"].attrs
    plain = not attrs.get("training_mode", 0) and bool(attrs.get("spatial", 1))
    return plain and _fits(match, "scale", "shift", "mean", "var")


CONV = node("Conv", "x", "#w", "?#b", name="conv")

BATCH_NORM = Fusion(
    name="conv_batchnorm",
    patterns=(node("BatchNormalization", CONV, "#scale", "#shift", "#mean", "#var", name="bn"),),
    guard=_is_inference,
    build=_normalized,
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
    ),
)


def _per_channel(match: Match) -> bool:
    """The constant has one value a channel, or one value, and does not widen the output."""
    weight, c = match.constant("w"), match.constant("c")
    if not _fits(match):
        return False
    rank, channels = weight.ndim, weight.shape[0]
    shape = (1,) * (rank - c.ndim) + c.shape
    return len(shape) == rank and c.size in (1, channels) and shape[1] == c.size and c.dtype == weight.dtype


def _affine(match: Match) -> Replacement:
    channels = match.constant("w").shape[0]
    value = np.broadcast_to(match.constant("c").astype(np.float64).reshape(-1), (channels,))
    if match.root.op == "Mul":
        return _rescaled(match, value, np.zeros(channels))
    return _rescaled(match, np.ones(channels), value)


AFFINE = Fusion(
    name="conv_affine",
    patterns=(node(("Add", "Mul"), CONV, "#c", commutes=True),),
    guard=_per_channel,
    build=_affine,
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
    ),
)


def _with_residual(match: Match) -> Replacement:
    conv = match.nodes["conv"]
    inputs = (*conv.inputs, *[""] * (3 - len(conv.inputs)), match.values["r"])
    return Replacement(infera(match, "FusedConv", inputs, conv.attrs))


RESIDUAL = Fusion(
    name="conv_residual",
    patterns=(node(("Add", "Sum"), CONV, "r", commutes=True),),
    guard=lambda match: match.values["r"] not in match.graph.constants,
    build=_with_residual,
    example="""
        example (float[1, 1, 3, 3] x, float[1, 2, 2, 2] r) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = Add(r, t)
        }""",
    near_misses=(
        """
        the_convolution_twice (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = Add(t, t)
        }""",
        """
        sum_of_three (float[1, 1, 3, 3] x, float[1, 2, 2, 2] r) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = Sum(r, t, r)
        }""",
    ),
)

WITHOUT_ACTIVATION = (
    node("Conv", "x", "#w", "?#b", name="conv"),
    node("infera.FusedConv", "x", "#w", "?#b", "?r", name="conv"),
)


def _bounds(match: Match) -> tuple[float, float] | None:
    """The bounds of a Clip, from its attributes or its constant inputs; None where they are not known."""
    clip = match.root
    limits = []
    for i, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
        if len(clip.inputs) > i and clip.inputs[i]:
            constant = match.graph.constants.get(clip.inputs[i])
            if constant is None or constant.size != 1 or constant.dtype.kind != "f":
                return None
            limits.append(float(constant.reshape(-1)[0]))
        else:
            limits.append(float(clip.attrs.get(name, default)))
    return limits[0], limits[1]


def _can_activate(match: Match) -> bool:
    if match.nodes["conv"].attrs.get("activation", ""):
        return False
    return match.root.op != "Clip" or _bounds(match) is not None


def _with_activation(match: Match) -> Replacement:
    conv, root = match.nodes["conv"], match.root
    attrs = dict(conv.attrs)
    if root.op == "Clip":
        bounds = _bounds(match)
        assert bounds is not None
        attrs |= {"activation": "clip", "activation_params": bounds}
    elif root.op == "LeakyRelu":
        attrs |= {"activation": "leaky_relu", "activation_params": (float(root.attrs.get("alpha", 0.01)),)}
    else:
        attrs |= {"activation": "relu"}
    return Replacement(infera(match, "FusedConv", conv.inputs, attrs))


ACTIVATION = Fusion(
    name="conv_activation",
    patterns=tuple(
        pattern
        for conv in WITHOUT_ACTIVATION
        for pattern in (node(("Relu", "LeakyRelu"), conv), node("Clip", conv, "?#low", "?#high"))
    ),
    guard=_can_activate,
    build=_with_activation,
    example="""
        example (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float low = {-1.0}, float high = {6.0}> {
            t = Conv(x, w)
            y = Clip(t, low, high)
        }""",
    near_misses=(
        """
        activated_already (float[1, 1, 3, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = infera.FusedConv <activation = "relu"> (x, w)
            y = LeakyRelu(t)
        }""",
        """
        bounds_are_inputs (float[1, 1, 3, 3] x, float low) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            t = Conv(x, w)
            y = Clip(t, low)
        }""",
    ),
)

FUSIONS = (BATCH_NORM, AFFINE, RESIDUAL, ACTIVATION)
