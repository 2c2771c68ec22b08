"""Convolutions that onnxruntime's optimiser gave channels last, for diffusion models on its GPUs, are Conv again.

It writes a Transpose before and behind each, which then cancel out: where channels come last is for `layout` to say.
"""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node


def _is_image(match: Match) -> bool:
    """Whether x has as many axes as the weights, which are (outputs, spatial..., inputs a group)."""
    x, w = match.spec("x"), match.constant("w")
    return x is not None and x.ranked and x.ndim == w.ndim > 2 and x.dtype == w.dtype


def _channels_first(match: Match) -> Replacement:
    weight, out, last = match.constant("w"), match.root.outputs[0], match.constant("w").ndim - 1
    first, made, w = (made_name(out, name) for name in ("first", "made", "weight"))
    constants: dict[str, HostArray] = {w: np.ascontiguousarray(np.moveaxis(weight, -1, 1))}
    bias = (match.values["b"],) if "b" in match.values else ()
    before = (
        Node("Transpose", (match.values["x"],), (first,), {"perm": (0, last, *range(1, last))}),
        Node("Conv", (first, w, *bias), (made,), match.root.attrs, name=match.root.name),
    )
    back = Node("Transpose", (made,), (out,), {"perm": (0, *range(2, last + 1), 1)}, name=out)
    return Replacement(back, constants, before)


_EXAMPLE = """
        example (float[1, 3, 4, 2] x) => (float[1, 2, 4, 2] y)
        <float[2, 2, 1, 2] w = {1, -2, 3, 0.5, -1, 2, 0.25, 4}, float[2] b = {0.5, -1}> {
            y = com.microsoft.NhwcConv(x, w, b)
        }"""

NHWC_CONV = Fusion(
    name="conv_of_channels_last",
    patterns=(node("com.microsoft.NhwcConv", "x", "#w", "?b"),),
    guard=_is_image,
    build=_channels_first,
    reassociates=True,
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE,
            ("example (", "weights_are_an_input ("),
            ("float[1, 3, 4, 2] x)", "float[1, 3, 4, 2] x, float[2, 2, 1, 2] w)"),
            ("float[2, 2, 1, 2] w = {1, -2, 3, 0.5, -1, 2, 0.25, 4}, ", ""),
        ),
        changed(
            _EXAMPLE,
            ("example (", "other_axes ("),
            ("float[1, 3, 4, 2] x)", "float[1, 4, 2] x)"),
        ),
    ),
)

FUSIONS = (NHWC_CONV,)
