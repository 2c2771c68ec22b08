"""Products of heads as tf2onnx writes an einsum: both sides laid out as three axes, with axes of one element between.

A product of two values with the same leading axes is found by following where each axis comes from, by the names of the
dimensions (`sizes`).
"""

from __future__ import annotations

from dataclasses import dataclass

from infera_gpu.graph import Node, made_name
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node
from infera_gpu.passes.pattern import axis_in
from infera_gpu.passes.sizes import Sizes, product, reshaped


@dataclass(frozen=True)
class Side:
    """A value of which a transposition is one side of a product: its axes in that order, and their sizes."""

    value: str
    perm: tuple[int, ...]
    dims: Sizes

    @property
    def swapped(self) -> Side:
        """With the last two axes the other way round."""
        return Side(self.value, (*self.perm[:-2], *self.perm[:-3:-1]), (*self.dims[:-2], *self.dims[:-3:-1]))

    def read(self, name: str) -> tuple[str, tuple[Node, ...]]:
        """The value in the order of the product, and the Transpose that makes it where there must be one."""
        if self.perm == tuple(range(len(self.perm))):
            return self.value, ()
        return name, (Node("Transpose", (self.value,), (name,), {"perm": self.perm}),)


def _moved(match: Match, value: str) -> Side | None:
    """The value behind a Transpose and an Unsqueeze, and where its axes went."""
    perm: tuple[int, ...] | None = None
    made = match.producers.get(value)
    if made is not None and made.qualified == "Transpose" and made.attrs.get("perm"):
        perm, value = tuple(made.attrs["perm"]), made.inputs[0]
        made = match.producers.get(value)
    added: set[int | None] = set()
    if made is not None and made.qualified == "Unsqueeze":
        spec, axes = (
            match.draft.spec(value),
            match.draft.sizes(made.inputs[1]) if len(made.inputs) > 1 else made.attrs["axes"],
        )
        if spec is None or not spec.ranked or axes is None:
            return None
        added, value = {axis_in(int(a or 0), spec.ndim) for a in axes}, made.inputs[0]
    x = match.draft.spec(value)
    if x is None or not x.ranked or None in added:
        return None
    rank = x.ndim + len(added)
    kept = [axis for axis in range(rank) if axis not in added]
    order = tuple(kept.index(axis) for axis in (perm or range(rank)) if axis not in added)
    return Side(value, order, tuple(x.shape[axis] for axis in order)) if len(order) == x.ndim else None


def side(match: Match, value: str) -> Side | None:
    """One side of a product of three axes, of which the first is the first two of four; it may be transposed."""
    made = match.producers.get(value)
    if made is not None and made.qualified == "Transpose" and tuple(made.attrs.get("perm", ())) == (0, 2, 1):
        found = side(match, made.inputs[0])
        return found.swapped if found is not None else None
    if made is None or made.qualified != "Reshape":
        return None
    before, target, found = (
        match.draft.spec(made.inputs[0]),
        match.draft.sizes(made.inputs[1]),
        _moved(match, made.inputs[0]),
    )
    if before is None or not before.ranked or target is None or found is None or len(found.dims) != 4:
        return None
    keeps = not made.attrs.get("allowzero", 0)
    wanted = (product(found.dims[:2]), *found.dims[2:])
    return found if None not in wanted and reshaped(before.shape, target, keeps) == wanted else None


def laid_out(match: Match, product: Sizes, name: str = "t", axes: str = "last") -> Sizes | None:
    """The shape that a product of three axes has after the Reshape and the Squeeze of a match."""
    target, gone = match.draft.sizes(match.values[name]), match.axes(axes)
    if target is None or gone is None or match.nodes["back"].attrs.get("allowzero", 0):
        return None
    made = reshaped(product, target, keeps=True)
    dropped = {axis_in(a, len(made)) for a in gone}
    if any(a is None or made[a] != 1 for a in dropped):
        return None
    return tuple(d for i, d in enumerate(made) if i not in dropped)


def _sides(match: Match) -> tuple[Side, Side] | None:
    """Both sides, where they have the same first axes."""
    left, right = side(match, match.values["left"]), side(match, match.values["right"])
    if left is None or right is None or left.dims[:2] != right.dims[:2] or left.dims[3] != right.dims[2]:
        return None
    return left, right


def _is_of_heads(match: Match) -> bool:
    found = _sides(match)
    if found is None:
        return False
    left, right = found
    made = (*left.dims[:3], right.dims[3])
    return laid_out(match, (product(made[:2]), *made[2:])) == made


def _of_heads(match: Match) -> Replacement:
    found, out = _sides(match), match.root.outputs[0]
    assert found is not None
    (a, first), (b, second) = (s.read(made_name(out, n)) for s, n in zip(found, ("left", "right"), strict=True))
    return Replacement(
        Node("MatMul", (a, b), match.root.outputs, {}, name=match.root.name or out), before=first + second
    )


_EXAMPLE = """
        example (float[B, S, 3, 2] q, float[B, T, 3, 2] k) => (float[B, 3, S, T] y)
        <int64[1] first = {1}, int64[1] third = {3}, int64[2] heads = {0, 1}, int64[1] two = {2}, int64[1] rest = {-1},
         int64[1] one = {1}, int64[1] fourth = {3}, int64[1] fifth = {4}> {
            a = Unsqueeze(k, first)
            b = Transpose <perm = [0, 3, 1, 2, 4]> (a)
            c = Unsqueeze(q, third)
            d = Transpose <perm = [0, 2, 1, 3, 4]> (c)
            e = Shape(b)
            f = Shape(d)
            g = Gather(e, fourth)
            h = Gather(f, two)
            i = Gather(e, fifth)
            j = Gather(f, fifth)
            l = Gather(e, heads)
            m = ReduceProd <keepdims = 1> (l)
            n = Gather(f, heads)
            o = ReduceProd <keepdims = 1> (n)
            p = Max(n, l)
            t = Concat <axis = 0> (p, h, g, one)
            r = Concat <axis = 0> (m, rest, i)
            s = Reshape(b, r)
            u = Transpose <perm = [0, 2, 1]> (s)
            v = Concat <axis = 0> (o, rest, j)
            w = Reshape(d, v)
            x = MatMul(w, u)
            z = Reshape(x, t)
            y = Squeeze(z, fifth)
        }"""

HEADS = Fusion(
    name="matmul_of_heads",
    patterns=(
        node(
            "Squeeze",
            node("Reshape", node("MatMul", "left", "right", name="product"), "t", name="back"),
            "?#last_axes",
            name="last",
        ),
    ),
    guard=_is_of_heads,
    build=_of_heads,
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE,
            ("example (", "batches_of_other_sizes ("),
            ("float[B, T, 3, 2] k) => (float[B, 3, S, T] y)", "float[C, T, 3, 2] k) => (float[B, 3, S, T] y)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "queries_not_by_head ("),
            ("d = Transpose <perm = [0, 2, 1, 3, 4]> (c)", "d = Transpose <perm = [0, 1, 2, 3, 4]> (c)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "laid_out_the_other_way ("),
            ("t = Concat <axis = 0> (p, h, g, one)", "t = Concat <axis = 0> (p, g, h, one)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "product_is_an_output ("),
            ("float[B, 3, S, T] y)", "float[B, 3, S, T] y, float[C, S, T] x)"),
        ),
    ),
)

FUSIONS = (HEADS,)
