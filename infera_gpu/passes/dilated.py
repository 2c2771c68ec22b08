"""Dilated convolutions of images of unknown size, which tf2onnx writes as TensorFlow does: of parts of the image, in
each of which a pixel's neighbours are those that the kernel reads.

The image is padded to whole parts, which become a batch (SpaceToDepth of the batch's axis), and what the padding made
is cropped from what they are put together to.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node
from infera_gpu.passes.pad import value_of
from infera_gpu.passes.residues import Residue

_BATCH_SECOND = (1, 0, 2, 3)
_PADDED = node("Pad", "x", "pads", "?#value", name="pad")
_APART = node("SpaceToDepth", node("Transpose", _PADDED, name="first"), name="apart")
_CONV = node("Conv", node("Transpose", _APART, name="parts"), "#w", "?b", name="conv")
_TOGETHER = node("DepthToSpace", node("Transpose", _CONV, name="made"), name="together")


def _is_of_parts(match: Match) -> bool:
    """The same number of parts along both axes on either side, and a convolution that nothing else is done to."""
    nodes, conv = match.nodes, match.nodes["conv"].attrs
    perms = [tuple(nodes[name].attrs.get("perm", ())) for name in ("parts", "made")]
    blocks = {int(nodes[name].attrs["blocksize"]) for name in ("apart", "together")}
    plain = conv.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(conv.get("pads", ()))
    moves = any(stride != 1 for stride in conv.get("strides", ()))
    order = nodes["together"].attrs.get("mode", "DCR")
    return perms == [_BATCH_SECOND] * 2 and len(blocks) == 1 and plain and not moves and order == "DCR"


def _block(match: Match) -> int:
    return int(match.nodes["apart"].attrs["blocksize"])


def _reach(match: Match, axis: int) -> int:
    """How far apart the first and the last pixel are that the whole kernel reads along an axis of the image."""
    dilations = match.nodes["conv"].attrs.get("dilations", (1, 1))
    return _block(match) * int(dilations[axis]) * (int(match.constant("w").shape[2 + axis]) - 1)


def _residues(match: Match, size: int | str | None) -> Iterator[Residue]:
    block = _block(match)
    if isinstance(size, str):
        yield from (Residue(match.draft, size, block, remainder) for remainder in range(block))
    else:
        yield Residue(match.draft, "", block, 0)


def _pads(match: Match, axis: int) -> tuple[int, int] | None:
    """What padding and cropping leave before and behind an axis of the image, of any size; None where they do not, or
    the padded image is not of whole parts."""
    x, perm = match.spec("x"), match.nodes["first"].attrs["perm"]
    if x is None or not x.ranked or x.ndim != 4 or match.constant("axes").tolist() != [2, 3]:
        return None
    at, block, found = int(perm[2 + axis]), _block(match), set[tuple[int, int]]()
    for residue in _residues(match, x.shape[at]):
        size = residue.of(x.shape[at])
        pads = [residue.line(match.values["pads"], at), residue.line(match.values["pads"], 4 + at)]
        cut = [residue.line(match.values[name], axis) for name in ("starts", "ends")]
        known = [line for line in (size, *pads, *cut) if line is not None]
        if len(known) < 5 or any(a for a, _ in known[1:]):
            return None
        (a, b), (_, before), (_, behind), (_, start), (_, end) = known
        crop = 0 if end >= np.iinfo(np.int32).max else -end
        if a % block or (b + before + behind) % block or min(start, crop, before - start, behind - crop) < 0:
            return None
        if crop == 0 and end < 0:
            return None
        found.add((before - start, behind - crop))
    made = found.pop() if len(found) == 1 else None
    return made if made is not None and sum(made) == _reach(match, axis) else None


def _is_dilated(match: Match) -> bool:
    pad, w = match.nodes["pad"].attrs, match.constant("w")
    if w.ndim != 4 or not _is_of_parts(match) or pad.get("mode", "constant") != "constant" or value_of(match) != 0:
        return False
    whole = Residue(match.draft, "", 1, 0)
    others = [int(axis) + side for axis in match.nodes["first"].attrs["perm"][:2] for side in (0, 4)]
    unpadded = all(whole.line(match.values["pads"], i) == (0, 0) for i in others)
    return unpadded and all(_pads(match, axis) is not None for axis in (0, 1))


def _dilated(match: Match) -> Replacement:
    conv, out, perm = match.nodes["conv"], match.root.outputs[0], match.nodes["first"].attrs["perm"]
    rows, columns = _pads(match, 0), _pads(match, 1)
    assert rows is not None
    assert columns is not None
    first, made = made_name(out, "first"), made_name(out, "made")
    kept = {k: v for k, v in conv.attrs.items() if k not in ("auto_pad", "pads", "dilations")}
    dilations = tuple(_block(match) * int(d) for d in conv.attrs.get("dilations", (1, 1)))
    attrs = {**kept, "pads": (rows[0], columns[0], rows[1], columns[1]), "dilations": dilations}
    before = (
        Node("Transpose", (match.values["x"],), (first,), {"perm": (perm[1], perm[0], *perm[2:])}),
        Node("Conv", (first, *conv.inputs[1:]), (made,), attrs, name=conv.name),
    )
    return Replacement(Node("Transpose", (made,), (out,), {"perm": _BATCH_SECOND}, name=match.root.name), before=before)


_EXAMPLE = """
        example (float[B, 1, S, 5] x) => (float[3, B, S, 5] y)
        <float[3, 1, 3, 2] w = {1, -2, 3, 0.5, -1, 2, 1, -2, 3, 0.5, -1, 2, 1, -2, 3, 0.5, -1, 2}, int64[1] none = {0},
         int64[1] two = {2}, int64[1] three = {3}, int64[1] four = {4}, int64[2] axes = {2, 3}, int64[1] one = {1},
         int64[1] far = {2147483647}> {
            s = Shape(x)
            n = Slice(s, two, three, none)
            a = Add(n, four)
            d = Div(a, two)
            m = Mul(d, two)
            mod = Sub(a, m)
            r = Sub(two, mod)
            rd = Div(r, two)
            rm = Mul(rd, two)
            extra = Sub(r, rm)
            end = Add(two, extra)
            pads = Concat <axis = 0> (none, none, two, one, none, none, end, two)
            p = Pad(x, pads)
            t = Transpose <perm = [1, 0, 2, 3]> (p)
            apart = SpaceToDepth <blocksize = 2> (t)
            u = Transpose <perm = [1, 0, 2, 3]> (apart)
            c = Conv(u, w)
            v = Transpose <perm = [1, 0, 2, 3]> (c)
            together = DepthToSpace <blocksize = 2> (v)
            starts = Concat <axis = 0> (none, none)
            is = Equal(extra, none)
            isnt = Not(is)
            yes = Cast <to = 7> (is)
            no = Cast <to = 7> (isnt)
            minus = Neg(no)
            cut = Mul(extra, minus)
            whole = Mul(far, yes)
            bound = Add(cut, whole)
            minus_one = Neg(one)
            ends = Concat <axis = 0> (bound, minus_one)
            y = Slice(together, starts, ends, axes)
        }"""

DILATED = Fusion(
    name="dilated_conv",
    patterns=(node("Slice", _TOGETHER, "starts", "ends", "#axes"),),
    guard=_is_dilated,
    build=_dilated,
    example=_EXAMPLE,
    near_misses=(
        changed(_EXAMPLE, ("example (", "cropped_otherwise ("), ("cut = Mul(extra, minus)", "cut = Mul(two, minus)")),
        changed(_EXAMPLE, ("example (", "padded_to_other_parts ("), ("r = Sub(two, mod)", "r = Sub(three, mod)")),
        changed(
            _EXAMPLE,
            ("example (", "ones_outside ("),
            ("p = Pad(x, pads)", "p = Pad(x, pads, unit)"),
            ("int64[1] two = {2}", "float unit = {1}, int64[1] two = {2}"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "other_parts_together ("),
            ("DepthToSpace <blocksize = 2>", 'DepthToSpace <blocksize = 2, mode = "CRD">'),
        ),
        changed(_EXAMPLE, ("example (", "strides ("), ("c = Conv(u, w)", "c = Conv <strides = [1, 2]> (u, w)")),
        changed(_EXAMPLE, ("example (", "channels_padded ("), ("(none, none, two, one,", "(none, one, two, one,")),
        changed(
            _EXAMPLE,
            ("example (", "size_of_another_axis ("),
            ("n = Slice(s, two, three, none)", "n = Slice(s, none, one, none)"),
        ),
        changed(_EXAMPLE, ("example (", "parts_are_an_output ("), ("y)", "y, float[P, Q, R, 4] apart)")),
    ),
)

FUSIONS = (DILATED,)
