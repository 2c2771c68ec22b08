"""Transposes behind what computes the same in any layout, as TFLite's graphs need it, whose images have channels last.

tf2onnx leaves them around operators that it does not know to move them past; there they keep convolutions from what
follows or precedes them.
"""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node

ACTIVATIONS = (
    *("HardSwish", "HardSigmoid", "Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Softplus", "Mish", "Swish", "Gelu"),
)
"""Of one input, element by element."""


def _activated(match: Match) -> Replacement:
    """The activation, and the Transpose of its result."""
    act, name = match.root, made_name(match.root.outputs[0], "activated")
    before = Node(act.op, (match.values["x"],), (name,), act.attrs, opset=act.opset)
    swap = match.nodes["swap"]
    return Replacement(Node("Transpose", (name,), act.outputs, swap.attrs, name=swap.name), before=(before,))


ACTIVATION = Fusion(
    name="activation_before_transpose",
    patterns=(node(ACTIVATIONS, node("Transpose", "x", name="swap")),),
    guard=lambda match: match.draft.made_by.get(match.values["x"]) in ("Conv", "ConvTranspose"),
    build=_activated,
    example="""
        example (float[B, 2, 4, 5] x) => (float[B, 4, 5, 3] y) <float[3, 2, 1, 1] w = {1, -2, 3, 0.5, -1, 2}> {
            c = Conv(x, w)
            t = Transpose <perm = [0, 2, 3, 1]> (c)
            y = HardSwish(t)
        }""",
    near_misses=(
        """
        of_no_convolution (float[B, 2, 4, 5] x) => (float[B, 4, 5, 2] y) {
            t = Transpose <perm = [0, 2, 3, 1]> (x)
            y = HardSwish(t)
        }""",
        """
        along_an_axis (float[B, 2, 4, 5] x) => (float[B, 4, 5, 3] y) <float[3, 2, 1, 1] w = {1, -2, 3, 0.5, -1, 2}> {
            c = Conv(x, w)
            t = Transpose <perm = [0, 2, 3, 1]> (c)
            y = Softmax(t)
        }""",
        """
        transpose_is_an_output (float[B, 2, 4, 5] x) => (float[B, 4, 5, 3] y, float[B, 4, 5, 3] t)
        <float[3, 2, 1, 1] w = {1, -2, 3, 0.5, -1, 2}> {
            c = Conv(x, w)
            t = Transpose <perm = [0, 2, 3, 1]> (c)
            y = HardSwish(t)
        }""",
    ),
)


def _feeds_convolution(match: Match) -> bool:
    """What convolutions have beyond their input, around every axis, which only they read."""
    pad, perm, pads = match.nodes["pad"], match.root.attrs.get("perm"), match.constant("pads")
    readers = match.draft.readers.get(match.root.outputs[0], {}).values()
    fill = match.number("fill") if "fill" in match.values else 0
    reads = bool(readers) and all(_beyond(match, n) == fill for n in readers)
    constant = pad.attrs.get("mode", "constant") == "constant"
    return reads and constant and perm is not None and pads.dtype == np.int64 and pads.shape == (2 * len(perm),)


def _beyond(match: Match, n: Node) -> float | None:
    """What a convolution has beyond its input: the zero point of integers. None of other nodes."""
    if n.qualified != "infera.QuantizedConv":
        return 0 if n.qualified in ("Conv", "com.microsoft.FusedConv") else None
    zero = match.graph.constants.get(n.inputs[5]) if len(n.inputs) > 5 and n.inputs[5] else np.zeros(1)
    return float(zero.item()) if zero is not None and zero.size == 1 else None


def _padded(match: Match) -> Replacement:
    """The Transpose, and the Pad of its result."""
    pad, perm, out = match.nodes["pad"], list(match.root.attrs["perm"]), match.root.outputs[0]
    swapped, name = made_name(out, "swapped"), made_name(out, "pads")
    pads = match.constant("pads").reshape(2, -1)[:, perm].reshape(-1)
    before = Node("Transpose", (match.values["x"],), (swapped,), match.root.attrs)
    inputs = (swapped, name, *((match.values["fill"],) if "fill" in match.values else ()))
    return Replacement(Node("Pad", inputs, match.root.outputs, pad.attrs, name=pad.name), {name: pads}, (before,))


PAD = Fusion(
    name="pad_after_transpose",
    patterns=(node("Transpose", node("Pad", "x", "#pads", "?%fill", name="pad")),),
    guard=_feeds_convolution,
    build=_padded,
    reassociates=True,
    example="""
        example (float[B, 4, 5, 1] x) => (float[B, 3, 5, 9] y)
        <float[3, 1, 1, 1] w = {1, -2, 3}, int64[8] pads = {0, 0, 1, 0, 0, 1, 3, 0}> {
            p = Pad(x, pads)
            t = Transpose <perm = [0, 3, 1, 2]> (p)
            y = Conv(t, w)
        }""",
    near_misses=(
        """
        ones (float[B, 4, 5, 1] x) => (float[B, 3, 5, 9] y)
        <float[3, 1, 1, 1] w = {1, -2, 3}, int64[8] pads = {0, 0, 1, 0, 0, 1, 3, 0}, float one = {1}> {
            p = Pad(x, pads, one)
            t = Transpose <perm = [0, 3, 1, 2]> (p)
            y = Conv(t, w)
        }""",
        """
        read_by_another (float[B, 4, 5, 1] x) => (float[B, 1, 5, 9] y) <int64[8] pads = {0, 0, 1, 0, 0, 1, 3, 0}> {
            p = Pad(x, pads)
            t = Transpose <perm = [0, 3, 1, 2]> (p)
            y = Relu(t)
        }""",
        """
        pad_is_an_output (float[B, 4, 5, 1] x) => (float[B, 3, 5, 9] y, float[B, 5, 9, 1] p)
        <float[3, 1, 1, 1] w = {1, -2, 3}, int64[8] pads = {0, 0, 1, 0, 0, 1, 3, 0}> {
            p = Pad(x, pads)
            t = Transpose <perm = [0, 3, 1, 2]> (p)
            y = Conv(t, w)
        }""",
    ),
)


def _is_of_channels(match: Match) -> bool:
    """One value for each channel of a convolution, wherever the Transpose puts them."""
    perm, c, x = match.nodes["swap"].attrs.get("perm"), match.constant("c"), match.spec("x")
    made_by = match.draft.made_by.get(match.values["x"])
    if perm is None or x is None or made_by not in ("Conv", "ConvTranspose") or c.dtype != x.dtype:
        return False
    return c.ndim == len(perm) and c.size == c.shape[list(perm).index(1)] > 1


def _added(match: Match) -> Replacement:
    """The sum, and the Transpose of it."""
    swap, out = match.nodes["swap"], match.root.outputs[0]
    name, made = made_name(out, "channels"), made_name(out, "sum")
    channels = match.constant("c").reshape(-1, *(1,) * (match.constant("c").ndim - 2))
    before = Node("Add", (match.values["x"], name), (made,), {})
    return Replacement(
        Node("Transpose", (made,), match.root.outputs, swap.attrs, name=swap.name), {name: channels}, (before,)
    )


_BIAS = """
        example (float[B, 2, 4, 5] x) => (float[3, B, 4, 5] y)
        <float[3, 2, 1, 1] w = {1, -2, 3, 0.5, -1, 2}, float[3, 1, 1, 1] b = {1, 2, -3}> {
            c = Conv(x, w)
            t = Transpose <perm = [1, 0, 2, 3]> (c)
            y = Add(b, t)
        }"""

BIAS = Fusion(
    name="bias_before_transpose",
    patterns=(node("Add", node("Transpose", "x", name="swap"), "#c", commutes=True),),
    guard=_is_of_channels,
    build=_added,
    example=_BIAS,
    near_misses=(
        changed(
            _BIAS,
            ("example (", "values_of_rows ("),
            ("float[3, 1, 1, 1] b = {1, 2, -3}", "float[4, 1] b = {1, 2, -3, 4}"),
        ),
        changed(_BIAS, ("example (", "values_of_a_batch ("), ("float[3, 1, 1, 1] b", "float[1, 3, 1, 1] b")),
        changed(_BIAS, ("example (", "of_no_convolution ("), ("c = Conv(x, w)", "c = Relu(x)")),
        changed(_BIAS, ("example (", "transpose_is_an_output ("), ("y)", "y, float[3, B, 4, 5] t)")),
    ),
)

FUSIONS = (ACTIVATION, BIAS, PAD)
