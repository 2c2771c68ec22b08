"""Zeros around dequantised values that are quantised again, as tf2onnx writes TFLite's padding between two layers.

Zero is the zero point exactly, so nothing is rounded. On the CPU the second quantisation goes, where activations stay
floats; on GPUs the integers are padded, and products pad them by themselves.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import CPU, Fusion, Match, Replacement, maybe, node
from infera_gpu.passes.pad import PADDED, is_padded, value_of, with_pads
from infera_gpu.passes.quant import DEQUANTIZE, parameters_of
from infera_gpu.passes.quantized import TRITON, dequantized
from infera_gpu.spec import DType

_AGAIN = node("QuantizeLinear", PADDED, "#s", "#z", name="again")
_SMALLEST, _LARGEST = 1e-30, 1e30
"""Scales between them make normal numbers of 8-bit integers."""


def _grid(match: Match, n: Node | None) -> tuple[float, int, DType] | None:
    """The scale of a node that quantises or dequantises, how far its zero point is above the lowest integer, and their
    type. Onnxruntime's optimiser writes some int8 as uint8: the numbers are the same where the first two are."""
    known = None if n is None else parameters_of(match.graph, n)
    if known is None:
        return None
    scale, zero = known
    return float(scale.item()), int(zero.item()) - int(np.iinfo(zero.dtype).min), zero.dtype


def _is_exact(match: Match) -> bool:
    """Whether zeros are put around dequantised values, which are quantised to the same numbers."""
    pad, again = match.nodes["pad"].attrs, match.nodes["again"]
    before, after = _grid(match, dequantized(match, match.values["x"])), _grid(match, again)
    zeros = pad.get("mode", "constant") == "constant" and value_of(match) == 0
    if before is None or after is None or before[:2] != after[:2] or not zeros:
        return False
    return "output_dtype" not in again.attrs and _SMALLEST < before[0] < _LARGEST


def _keeps_type(match: Match) -> bool:
    """Whether integers become integers of the same type."""
    before, after = _grid(match, dequantized(match, match.values["x"])), _grid(match, match.nodes["again"])
    return before is not None and _is_exact(match) and before == after


# ---- floats


def _in_floats(match: Match) -> Replacement:
    pad, out = match.nodes["pad"], match.root.outputs[0]
    if "moved" not in match.nodes:
        return Replacement(replace(pad, outputs=match.root.outputs))
    padded = made_name(out, "padded")
    moved = replace(match.nodes["moved"], inputs=(padded,), outputs=(out,), name=match.root.name)
    return Replacement(moved, before=(replace(pad, outputs=(padded,)),))


_TEXT = """
    {name} (int8[1, 2, 4, 4] q) => ({outs})
    <float s = {{0.5}}, int8 z = {{3}}, float t = {{0.25}}, int8 low = {{-128}}, float one = {{1}},
     int64[8] pads = {{0, 0, 1, 0, 0, 0, 1, 2}}, int64[8] crop = {{0, 0, -1, 0, 0, 0, 1, 2}}> {{
        a = DequantizeLinear(q, s, z)
        {body}
    }}"""


def _text(body: str, name: str = "example", outs: str = "float[1, 6, 6, 2] y") -> str:
    return _TEXT.format(name=name, body=body, outs=outs)


_MOVED = "m = Transpose <perm = [0, 2, 3, 1]> (b)  y = DequantizeLinear(m, s, z)"

REQUANTIZED = Fusion(
    name="pad_quantized_again",
    patterns=(node(DEQUANTIZE, maybe("Transpose", _AGAIN, name="moved"), "#s2", "#z2", name="back"),),
    guard=lambda match: _is_exact(match) and _grid(match, match.nodes["again"]) == _grid(match, match.nodes["back"]),
    build=_in_floats,
    kinds=CPU,
    example=_text(f"p = Pad(a, pads)  b = QuantizeLinear(p, s, z)  {_MOVED}"),
    near_misses=(
        _text(f"p = Pad(a, pads)  b = QuantizeLinear(p, t, z)  {_MOVED}", "other_scale"),
        _text(f"p = Pad(a, pads)  b = QuantizeLinear(p, s, low)  {_MOVED}", "other_zero_point"),
        _text(f"p = Pad(a, pads, one)  b = QuantizeLinear(p, s, z)  {_MOVED}", "ones"),
        _text(f'p = Pad <mode = "reflect"> (a, pads)  b = QuantizeLinear(p, s, z)  {_MOVED}', "reflected"),
        _text(
            f"p = Pad(a, pads)  b = QuantizeLinear(p, s, z)  {_MOVED}",
            "integers_are_an_output",
            "float[1, 6, 6, 2] y, int8[1, 2, 6, 6] b",
        ),
    ),
)


# ---- integers


def _of_integers(match: Match) -> Replacement:
    """Padded with the zero point: an input from opset 11 on."""
    pad, made_by = match.nodes["pad"], match.producers[match.values["x"]]
    name = made_name(match.root.outputs[0], "zero")
    constants: dict[str, HostArray] = {name: match.constant("z").reshape(())}
    made = replace(pad, inputs=(made_by.inputs[0], pad.inputs[1], name), outputs=match.root.outputs)
    return Replacement(made, constants)


PADDED_INTEGERS = Fusion(
    name="pad_of_integers",
    patterns=(_AGAIN,),
    guard=lambda match: match.opset() >= 13 and _keeps_type(match),
    build=_of_integers,
    kinds=TRITON,
    example=_text("p = Pad(a, pads)  y = QuantizeLinear(p, s, z)", outs="int8[1, 2, 6, 6] y"),
    near_misses=(
        _text("p = Pad(a, pads)  y = QuantizeLinear(p, t, z)", "other_scale", "int8[1, 2, 6, 6] y"),
        _text("p = Pad(a, pads, one)  y = QuantizeLinear(p, s, z)", "ones", "int8[1, 2, 6, 6] y"),
        _text(
            "p = Pad(a, pads)  y = QuantizeLinear(p, s, z)",
            "floats_are_an_output",
            "int8[1, 2, 6, 6] y, float[1, 2, 6, 6] p",
        ),
    ),
)


# ---- products of integers


def _pads_with_zero_point(match: Match) -> bool:
    zero = match.graph.constants.get(match.values["zero"]) if match.values.get("zero") else np.zeros(1)
    return zero is not None and zero.size == 1 and is_padded(match, float(zero.reshape(-1)[0]))


_CONV = """
    {name} (int8[1, 1, 3, 3] x) => (float[1, 2, {size}] y)
    <int8[2, 1, 2, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2] f = {{0.5, 0.25}}, int8 z = {{3}}, int8 other = {{0}},
     int64[8] pads = {{0, 0, 1, 0, 0, 0, 1, 2}}, int64[8] crop = {{0, 0, -1, 0, 0, 0, 1, 2}}> {{
        p = Pad(x, {pads}, {value})
        y = infera.QuantizedConv(p, w, , , f, z)
    }}"""


def _conv(name: str = "example", pads: str = "pads", value: str = "z", size: str = "4, 4") -> str:
    return _CONV.format(name=name, pads=pads, value=value, size=size)


INTO_PRODUCT = Fusion(
    name="pad_into_quantized_conv",
    patterns=(
        node(
            "infera.QuantizedConv",
            PADDED,
            *("w", "?b", "?r", "f", "?zero", "?rs", "?rz", "?to", "?to_zero"),
            name="window",
        ),
    ),
    guard=_pads_with_zero_point,
    build=with_pads,
    kinds=TRITON,
    example=_conv(),
    near_misses=(_conv("another_number", value="other"), _conv("cropped", pads="crop", size="2, 4")),
)


def _reads_what_was_padded(match: Match) -> bool:
    """The convolution takes the integers with the scale and the zero point that they were quantised by."""
    pairs = [("s", "s2"), ("z", "z2")]
    same = all(
        a.dtype == b.dtype and a.size == b.size == 1 and a.item() == b.item()
        for a, b in ((match.constant(x), match.constant(y)) for x, y in pairs)
    )
    return same and _keeps_type(match) and is_padded(match, 0.0)


def _padded_qlinear(match: Match) -> Replacement:
    made, made_by = with_pads(match).node, match.producers[match.values["x"]]
    return Replacement(replace(made, inputs=(made_by.inputs[0], *made.inputs[1:])))


_QLINEAR = """
    {name} (int8[1, 1, 3, 3] q) => ({outs})
    <float s = {{0.5}}, {kind} z = {{3}}, {kind} z2 = {{{zero}}}, int8 z0 = {{3}},
     int8[2, 1, 2, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float t = {{0.25}}, int8 none = {{0}},
     int64[8] pads = {{0, 0, 1, 0, 0, 0, 1, 2}}> {{
        a = DequantizeLinear(q, s, z0)
        p = Pad(a, pads)
        b = QuantizeLinear(p, s, z)
        y = QLinearConv(b, s, z2, w, t, none, s, none)
    }}"""


def _qlinear(name: str = "example", zero: int = 3, kind: str = "int8", outs: str = "int8[1, 2, 4, 4] y") -> str:
    return _QLINEAR.format(name=name, zero=zero, kind=kind, outs=outs)


INTO_QLINEAR = Fusion(
    name="pad_into_qlinear_conv",
    patterns=(node("QLinearConv", _AGAIN, "#s2", "#z2", *("w", "ws", "wz", "ys", "yz"), "?b", name="window"),),
    guard=_reads_what_was_padded,
    build=_padded_qlinear,
    example=_qlinear(),
    near_misses=(
        _qlinear("another_zero_point", zero=4),
        _qlinear("other_integers", kind="uint8"),
        _qlinear("padded_is_an_output", outs="int8[1, 2, 4, 4] y, int8[1, 1, 5, 5] b"),
    ),
)
"""As onnxruntime's optimiser leaves it, which takes a Pad for no part of what is quantised."""

EARLY = (REQUANTIZED, INTO_QLINEAR, PADDED_INTEGERS)
LATE = (INTO_PRODUCT,)
