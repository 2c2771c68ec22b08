"""Attention whose scores have keys before queries, as tf2onnx writes the einsums of Keras' MultiHeadAttention."""

from __future__ import annotations

from dataclasses import replace

from infera_gpu.graph import made_name
from infera_gpu.passes.engine import CPU_AND_TRITON, Fusion, Match, Replacement, changed, either, infera, node
from infera_gpu.passes.heads import HEADS, Side, laid_out, side
from infera_gpu.passes.pattern import Matcher
from infera_gpu.passes.sizes import larger, product

SWAPPED = (0, 1, 3, 2)
_SCORES = node("MatMul", "k", "qt", name="scores")
_WEIGHTS = node("Softmax", either(node("Add", _SCORES, "mask", commutes=True), _SCORES), name="softmax")


def _weights(match: Match) -> Match | None:
    """The match of the weights: a part of this one, or what a side of its product was laid out from for it alone."""
    if "softmax" in match.nodes:
        return match
    left, draft = side(match, match.values["left"]), match.draft
    made = match.producers.get(left.value) if left is not None else None
    if left is None or made is None or left.perm != SWAPPED or made.qualified != "Softmax":
        return None
    alone = len(draft.readers[left.value]) == 1 and left.value not in draft.graph.outputs
    return next(Matcher(draft).match(_WEIGHTS, made), None) if alone else None


def _last_two_swapped(match: Match, name: str) -> Side | None:
    """A value of four axes with the last two swapped, read where it came from if that was transposed."""
    value = match.values[name]
    made, spec = match.producers.get(value), match.spec(name)
    if spec is None or not spec.ranked or spec.ndim != 4:
        return None
    x = Side(value, (0, 1, 2, 3), spec.shape)
    if made is not None and made.qualified == "Transpose" and made.attrs.get("perm"):
        x = Side(made.inputs[0], tuple(made.attrs["perm"]), spec.shape)
    return x.swapped


def _is_over_keys(weights: Match) -> bool:
    """Whether the softmax goes along the first of the last two of four axes."""
    axis = int(weights.nodes["softmax"].attrs.get("axis", -1))
    return axis in (2, -2) and weights.opset() >= 13


def _values(match: Match) -> Side | None:
    """Values as attention takes them; None where they are laid out otherwise, or the result is."""
    if "v" in match.values:
        spec = match.spec("v")
        return Side(match.values["v"], (0, 1, 2, 3), spec.shape) if spec is not None and spec.ndim == 4 else None
    left, right = side(match, match.values["left"]), side(match, match.values["right"])
    if left is None or right is None:
        return None
    (batch, heads, length), (other, like, _, size) = left.dims[:3], right.dims
    if heads != like or not isinstance(heads, int) or heads < 2:
        return None
    made = laid_out(match, (product((batch, heads)), length, size))
    return right if made in [(b, heads, length, size) for b in (batch, other, larger(batch, other))] else None


def _operands(match: Match) -> tuple[Side, ...] | None:
    """Queries, keys, values and the mask as attention takes them; None where they are no attention's."""
    turned = tuple(match.nodes["turned"].attrs.get("perm", ())) if "turned" in match.nodes else SWAPPED
    weights, values = _weights(match), _values(match)
    if turned != SWAPPED or weights is None or values is None or not _is_over_keys(weights):
        return None
    found = [_last_two_swapped(weights, name) for name in ("qt", "k", "mask") if name in weights.values]
    known = [x for x in found if x is not None]
    return (*known[:2], values, *known[2:]) if len(known) == len(found) else None


def _unscaled(match: Match, x: Side) -> tuple[Side, float]:
    """Queries without a factor that they were multiplied by, and the factor."""
    made, constants = match.producers.get(x.value), match.graph.constants
    inputs = made.inputs if made is not None and made.qualified == "Mul" else ()
    for i, factor in enumerate(inputs):
        number = constants.get(factor)
        if number is not None and number.size == 1 and number.ndim <= len(x.perm):
            return replace(x, value=inputs[1 - i]), float(number.reshape(-1)[0])
    return x, 1.0


def _attention(match: Match) -> Replacement:
    found, out = _operands(match), match.root.outputs[0]
    assert found is not None
    q, factor = _unscaled(match, found[0])
    read = [x.read(made_name(out, str(i))) for i, x in enumerate((q, *found[1:]))]
    attrs = {"alike": int("v" not in match.values), "scale": factor}
    made = infera(match, "Attention", tuple(value for value, _ in read), attrs)
    return Replacement(made, before=tuple(n for _, nodes in read for n in nodes))


_EXAMPLE = """
        example (float[B, S, 3, 2] q, float[B, T, 3, 2] k, float[B, T, 3, 2] v, float[B, 1, T, 1] mask)
            => (float[B, 3, S, 2] y)
        <int64[1] first = {1}, int64[1] third = {3}, int64[2] heads = {0, 1}, int64[1] two = {2}, int64[1] rest = {-1},
         int64[1] one = {1}, int64[1] fourth = {3}, int64[1] fifth = {4}, float half = {0.5}> {
            qs = Mul(q, half)
            kh = Transpose <perm = [0, 2, 1, 3]> (k)
            qt = Transpose <perm = [0, 2, 3, 1]> (qs)
            a = MatMul(kh, qt)
            b = Add(a, mask)
            c = Softmax <axis = 2> (b)
            d = Unsqueeze(c, two)
            e = Transpose <perm = [0, 1, 4, 2, 3]> (d)
            f = Shape(e)
            g = Gather(f, two)
            h = Gather(f, fifth)
            i = Gather(f, heads)
            j = ReduceProd <keepdims = 1> (i)
            l = Concat <axis = 0> (j, rest, h)
            m = Reshape(e, l)
            n = Unsqueeze(v, two)
            o = Transpose <perm = [0, 3, 2, 4, 1]> (n)
            p = Shape(o)
            r = Gather(p, fourth)
            s = Gather(p, fifth)
            u = Gather(p, heads)
            w = ReduceProd <keepdims = 1> (u)
            x = Concat <axis = 0> (w, rest, s)
            z = Max(i, u)
            t = Concat <axis = 0> (z, g, r, one)
            aa = Reshape(o, x)
            ab = Transpose <perm = [0, 2, 1]> (aa)
            ac = MatMul(m, ab)
            ad = Reshape(ac, t)
            y = Squeeze(ad, fifth)
        }"""

ATTENTION = Fusion(
    name="attention_of_heads",
    patterns=(*HEADS.patterns, node("MatMul", node("Transpose", _WEIGHTS, name="turned"), "v")),
    guard=lambda match: _operands(match) is not None,
    build=_attention,
    reassociates=True,
    kinds=CPU_AND_TRITON,
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE,
            ("example (", "softmax_over_queries ("),
            ("c = Softmax <axis = 2> (b)", "c = Softmax <axis = 3> (b)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "weights_are_an_output ("),
            ("=> (float[B, 3, S, 2] y)", "=> (float[B, 3, S, 2] y, float[B, 3, T, S] c)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "weights_not_turned ("),
            ("float[B, T, 3, 2] v, float[B, 1, T, 1] mask)", "float[B, S, 3, 2] v, float[B, 1, T, 1] mask)"),
            ("=> (float[B, 3, S, 2] y)", "=> (float[B, 3, T, 2] y)"),
            ("e = Transpose <perm = [0, 1, 4, 2, 3]> (d)", "e = Transpose <perm = [0, 1, 3, 2, 4]> (d)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "one_head ("),
            (
                "float[B, S, 3, 2] q, float[B, T, 3, 2] k, float[B, T, 3, 2] v, float[B, 1, T, 1] mask)",
                "float[B, S, 1, 2] q, float[B, T, 1, 2] k, float[B, T, 1, 2] v, float[B, 1, T, 1] mask)",
            ),
            ("=> (float[B, 3, S, 2] y)", "=> (float[B, 1, S, 2] y)"),
        ),
    ),
)

FUSIONS = (ATTENTION,)
