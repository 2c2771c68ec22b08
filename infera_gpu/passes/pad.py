"""Pad goes into the window that follows it, and needs no axes that nothing is padded along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.passes.activation import bounds
from infera_gpu.passes.engine import Fusion, Match, Replacement, node
from infera_gpu.passes.pattern import axis_in

PADDED = node("Pad", "x", "?#pads", "?#value", "?#pad_axes", name="pad")


def _given(match: Match) -> Sequence[int]:
    """The padding as the node has it, all begins then all ends."""
    pad = match.nodes["pad"]
    given: Sequence[int] = pad.attrs["pads"] if "pads" in pad.attrs else match.constant("pads").reshape(-1).tolist()
    return _around_all(match, given) if "pad_axes" in match.values else given


def _around_all(match: Match, given: Sequence[int]) -> list[int]:
    """The padding of some axes as that of all. Raises ValueError where they are not known, or refused by planning."""
    rank, written = match.rank("x"), match.constant("pad_axes")
    axes = [axis_in(axis, rank) for axis in written.reshape(-1).tolist()] if rank is not None else []
    if rank is None or written.dtype.kind != "i" or len(given) != 2 * len(axes) or len({*axes}) < len(axes):
        raise ValueError
    made = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        if axis is None:
            raise ValueError
        made[axis], made[rank + axis] = given[i], given[len(axes) + i]
    return made


def _pads(match: Match) -> tuple[int, ...] | None:
    """The padding of spatial axes, all begins then all ends; None where other axes are padded, or any is cropped."""
    pad, given = match.nodes["pad"], _given(match)
    half = len(given) // 2
    begins, ends = given[:half], given[half:]
    if pad.attrs.get("mode", "constant") != "constant" or min(given) < 0 or half < 3:
        return None
    return None if any((*begins[:2], *ends[:2])) else (*map(int, begins[2:]), *map(int, ends[2:]))


def value_of(match: Match) -> float:
    """What is padded with. Raises ValueError where that is no one number of x's type, which planning refuses."""
    if "value" in match.values:
        value, x = match.constant("value"), match.spec("x")
        if value.size != 1 or (x is not None and x.dtype != value.dtype):
            raise ValueError
        return match.number("value")
    return float(match.nodes["pad"].attrs.get("value", 0.0))


def _own(window: Node, pads: tuple[int, ...]) -> tuple[int, ...] | None:
    """The window's own padding; None where it depends on the input's size."""
    none = (0,) * len(pads)
    match window.attrs.get("auto_pad", "NOTSET"):
        case "NOTSET":
            return tuple(window.attrs.get("pads", ())) or none
        case "VALID":  # whatever its pads
            return none
        case _:
            return None


def is_padded(match: Match, value: float) -> bool:
    """With a value that is the window's own beyond its input."""
    pads, window = _pads(match), match.nodes["window"]
    own = None if pads is None else _own(window, pads)
    return pads is not None and own is not None and len(own) == len(pads) and value_of(match) == value


def with_pads(match: Match, **attrs: int) -> Replacement:
    window, pads = match.nodes["window"], _pads(match)
    assert pads is not None
    own = _own(window, pads)
    assert own is not None
    together = tuple(a + b for a, b in zip(own, pads, strict=True))
    kept = {k: v for k, v in window.attrs.items() if k != "auto_pad"}
    inputs = (match.values["x"], *window.inputs[1:])
    return Replacement(replace(window, inputs=inputs, attrs={**kept, "pads": together, **attrs}))


def _kept(match: Match) -> list[int] | None:
    """The padding without the axes that are there for the Pad alone; None where they are not, or are padded."""
    added, dropped, given = match.axes("added"), match.axes("dropped"), _given(match)
    rank = len(given) // 2
    if added is None or dropped is None or len(given) % 2:
        return None
    axes = {axis_in(axis, rank) for axis in added}
    if axes != {axis_in(axis, rank) for axis in dropped} or any(i is None or given[i] or given[rank + i] for i in axes):
        return None
    return [size for i, size in enumerate(given) if i % rank not in axes]


def _without_axes(match: Match) -> Replacement:
    pad, kept = match.nodes["pad"], _kept(match)
    assert kept is not None
    outputs = match.root.outputs
    if "pads" in pad.attrs:
        attrs = {**pad.attrs, "pads": tuple(kept)}
        return Replacement(replace(pad, inputs=(match.values["x"],), outputs=outputs, attrs=attrs))
    name = made_name(outputs[0], "pads")
    inputs = (match.values["x"], name, *pad.inputs[2:])
    return Replacement(replace(pad, inputs=inputs, outputs=outputs), {name: np.array(kept, np.int64)})


AXES = Fusion(
    name="pad_of_added_axes",
    patterns=(
        node(
            "Squeeze",
            node("Pad", node("Unsqueeze", "x", "?#axes", name="added"), "?#pads", "?#value", name="pad"),
            "?#axes_after",
            name="dropped",
        ),
    ),
    guard=lambda match: _kept(match) is not None,
    build=_without_axes,
    example="""
        example (float[1, 2, 3, 3] x) => (float[1, 2, 4, 6] y)
        <int64[1] two = {2}, int64[10] p = {0, 0, 0, 1, 2, 0, 0, 0, 0, 1}> {
            a = Unsqueeze(x, two)
            t = Pad <mode = "reflect"> (a, p)
            y = Squeeze(t, two)
        }""",
    near_misses=(
        """
        another_axis (float[1, 2, 3] x) => (float[3, 5, 1] y)
        <int64[1] three = {3}, int64[1] zero = {0}, int64[8] p = {0, 1, 1, 0, 0, 0, 1, 0}> {
            a = Unsqueeze(x, three)
            t = Pad(a, p)
            y = Squeeze(t, zero)
        }""",
        """
        first_of_what_is_added (float[1, 2, 3] x) => (float[2, 1, 2, 3] t)
        <int64[1] zero = {0}, int64[8] p = {1, 0, 0, 0, 0, 0, 0, 0}> {
            a = Unsqueeze(x, zero)
            t = Pad(a, p)
        }""",
        """
        begin_without_end (float[1, 2, 3] x) => (float[1, 2, 3] y) <int64[1] zero = {0}> {
            a = Unsqueeze(x, zero)
            t = Pad(a, zero)
            y = Squeeze(t, zero)
        }""",
        """
        axis_out_of_range (float[1, 2, 3] x) => (float[1, 2, 3] y)
        <int64[1] four = {4}, int64[1] zero = {0}, int64[8] p = {0, 1, 1, 0, 0, 0, 1, 0}> {
            a = Unsqueeze(x, four)
            t = Pad(a, p)
            y = Squeeze(t, zero)
        }""",
        """
        padded_and_cropped (float[1, 2, 3] x) => (float[1, 2, 3] y)
        <int64[1] zero = {0}, int64[8] p = {1, 0, 0, 0, -1, 0, 0, 0}> {
            a = Unsqueeze(x, zero)
            t = Pad(a, p)
            y = Squeeze(t, zero)
        }""",
    ),
)


CONV = Fusion(
    name="pad_into_conv",
    patterns=(
        node("Conv", PADDED, "w", "?b", name="window"),
        node("com.microsoft.FusedConv", PADDED, "w", "?b", "?z", name="window"),
    ),
    guard=lambda match: is_padded(match, 0.0),
    build=with_pads,
    opset=18,
    example="""
        example (float[1, 1, 3, 3] x) => (float[1, 2, 4, 3] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[8] p = {0, 0, 0, 0, 0, 0, 1, 0}> {
            t = Pad(x, p)
            y = Conv <pads = [1, 0, 0, 1]> (t, w)
        }""",
    near_misses=(
        """
        one_outside (float[1, 1, 3, 3] x) => (float[1, 2, 3, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[8] p = {0, 0, 0, 0, 0, 0, 1, 0}, float v = {1}> {
            t = Pad(x, p, v)
            y = Conv(t, w)
        }""",
        """
        number_of_another_type (float[1, 1, 3, 3] x) => (float[1, 2, 3, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[8] p = {0, 0, 0, 0, 0, 0, 1, 0}, double v = {0}> {
            t = Pad(x, p, v)
            y = Conv(t, w)
        }""",
        """
        zeros (float[1, 1, 3, 3] x) => (float[1, 2, 3, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[8] p = {0, 0, 0, 0, 0, 0, 1, 0}, float[2] v = {0, 0}> {
            t = Pad(x, p, v)
            y = Conv(t, w)
        }""",
        """
        cropped (float[1, 1, 4, 3] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[8] p = {0, 0, 0, 0, 0, 0, -1, 0}> {
            t = Pad(x, p)
            y = Conv(t, w)
        }""",
        """
        reflected (float[1, 1, 3, 3] x) => (float[1, 2, 3, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[8] p = {0, 0, 0, 0, 0, 0, 1, 0}> {
            t = Pad <mode = "reflect"> (x, p)
            y = Conv(t, w)
        }""",
        """
        channels (float[1, 1, 3, 3] x) => (float[1, 1, 2, 2] y)
        <float[1, 2, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[8] p = {0, 1, 0, 0, 0, 0, 0, 0}> {
            t = Pad(x, p)
            y = Conv(t, w)
        }""",
        """
        channels_by_axes (float[1, 1, 3, 3] x) => (float[1, 1, 2, 2] y)
        <float[1, 2, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[2] p = {1, 0}, int64[1] axes = {-3}> {
            t = Pad(x, p, , axes)
            y = Conv(t, w)
        }""",
        """
        an_axis_twice (float[1, 1, 3, 3] x) => (float[1, 2, 4, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[4] p = {1, 0, 0, 1}, int64[2] axes = {-2, 2}> {
            t = Pad(x, p, , axes)
            y = Conv(t, w)
        }""",
        """
        axes_of_another_number (float[1, 1, 3, 3] x) => (float[1, 2, 3, 2] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[4] p = {1, 0, 0, 1}, int64[1] axes = {2}> {
            t = Pad(x, p, , axes)
            y = Conv(t, w)
        }""",
        """
        padding_read_elsewhere (float[1, 1, 3, 3] x) => (float[1, 2, 3, 2] y, float[1, 1, 4, 3] t)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[8] p = {0, 0, 0, 0, 0, 0, 1, 0}> {
            t = Pad(x, p)
            y = Conv(t, w)
        }""",
    ),
)


def _is_averaged(match: Match) -> bool:
    """Padding counts, which it does where the pool has none of its own; a last partial window counts otherwise."""
    window = match.nodes["window"]
    counts = bool(window.attrs.get("count_include_pad", 0)) or not any(window.attrs.get("pads", ()))
    return counts and not window.attrs.get("ceil_mode", 0) and is_padded(match, 0.0)


AVERAGE = Fusion(
    name="pad_into_average_pool",
    patterns=(node("AveragePool", PADDED, name="window"),),
    guard=_is_averaged,
    build=lambda match: with_pads(match, count_include_pad=1),
    opset=18,
    example="""
        example (float[1, 2, 4, 3] x) => (float[1, 2, 2, 2] y)
        <int64[4] p = {1, 0, 0, 0}, int64[2] axes = {-1, 2}> {
            t = Pad(x, p, , axes)
            y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        }""",
    near_misses=(
        """
        own_padding_does_not_count (float[1, 2, 4, 3] x) => (float[1, 2, 3, 2] y)
        <int64[8] p = {0, 0, 0, 1, 0, 0, 0, 0}> {
            t = Pad(x, p)
            y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], pads = [1, 0, 1, 0]> (t)
        }""",
    ),
)


def _is_maximum(match: Match) -> bool:
    """Nothing is below what is padded with, and no window is left out for beginning in a padding of the pool's own."""
    x = match.spec("x")
    if match.nodes["window"].attrs.get("ceil_mode", 0):
        return False
    lowest = float(np.iinfo(x.dtype).min) if x is not None and x.dtype.kind in "iu" else -np.inf
    if value_of(match) == lowest:
        return is_padded(match, lowest)
    return _is_not_negative(match) and _is_covered(match)


def _is_not_negative(match: Match) -> bool:
    """Whether what is padded is known to have no element below zero."""
    n, constants = match.producers.get(match.values["x"]), match.graph.constants
    if n is None:
        return False
    if n.qualified in ("DequantizeLinear", "infera.Centre"):
        scale, zero = (constants.get(n.inputs[i]) if len(n.inputs) > i else None for i in (1, 2))
        lowest = zero is not None and zero.dtype.kind in "iu" and bool((zero == np.iinfo(zero.dtype).min).all())
        floats = n.op == "DequantizeLinear" or bool(n.attrs.get("dequantize", 0))
        return lowest and floats and scale is not None and bool((scale > 0).all())
    if n.qualified == "com.microsoft.FusedConv":
        return len(n.inputs) < 4 and n.attrs.get("activation") in ("Relu", "Sigmoid")
    limits = bounds(constants, n) if n.qualified == "Clip" else None
    return n.qualified in ("Relu", "Sigmoid", "Softplus") or (limits is not None and limits[0] >= 0)


def _is_covered(match: Match) -> bool:
    """Zeros around what is not negative: every window must reach inside, or its maximum would be -inf."""
    pads, kernel = _pads(match), match.nodes["window"].attrs["kernel_shape"]
    dilated = any(d != 1 for d in match.nodes["window"].attrs.get("dilations", ()))
    own = any(match.nodes["window"].attrs.get("pads", ()))
    reach = pads is not None and all(p < k for p, k in zip(pads, (*kernel, *kernel), strict=True))
    return reach and not dilated and not own and is_padded(match, 0.0)


MAXIMUM = Fusion(
    name="pad_into_max_pool",
    patterns=(node("MaxPool", PADDED, name="window"),),
    guard=_is_maximum,
    build=with_pads,
    example="""
        example (float[1, 2, 4, 3] x) => (float[1, 2, 2, 2] y) <int64[8] p = {0, 0, 0, 1, 0, 0, 0, 0}> {
            r = Relu(x)
            t = Pad(r, p)
            y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        }""",
    near_misses=(
        """
        zeros_among_negatives (float[1, 2, 4, 3] x) => (float[1, 2, 2, 2] y) <int64[8] p = {0, 0, 0, 1, 0, 0, 0, 0}> {
            t = Pad(x, p)
            y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        }""",
        """
        last_window_begins_in_padding (float[1, 2, 4, 4] x) => (float[1, 2, 2, 3] y)
        <int64[8] p = {0, 0, 0, 0, 0, 0, 0, 1}> {
            r = Relu(x)
            t = Pad(r, p)
            y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (t)
        }""",
        """
        zeros_among_negatives_that_were_quantised (int8[1, 2, 4, 3] q) => (float[1, 2, 2, 2] y)
        <int64[8] p = {0, 0, 0, 1, 0, 0, 0, 0}, float s = {0.5}, int8 z = {-127}> {
            r = DequantizeLinear(q, s, z)
            t = Pad(r, p)
            y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        }""",
        """
        bound_below_zero (float[1, 2, 4, 3] x) => (float[1, 2, 2, 2] y)
        <int64[8] p = {0, 0, 0, 1, 0, 0, 0, 0}, float low = {-0.5}> {
            r = Clip(x, low)
            t = Pad(r, p)
            y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        }""",
        """
        zeros_among_integers (int8[1, 2, 4, 3] x) => (int8[1, 2, 2, 2] y)
        <int64[8] p = {0, 0, 0, 1, 0, 0, 0, 0}, int8 zero = {-127}> {
            t = Pad(x, p, zero)
            y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        }""",
        """
        window_of_zeros (float[1, 2, 4, 2] x) => (float[1, 2, 2, 2] y) <int64[8] p = {0, 0, 0, 2, 0, 0, 0, 0}> {
            r = Relu(x)
            t = Pad(r, p)
            y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        }""",
    ),
)

FUSIONS = (AXES, CONV, AVERAGE, MAXIMUM)
