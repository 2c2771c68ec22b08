"""Types of what moves, cuts, joins and counts elements: see `facts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from infera_gpu.graph import JOINT, Node
from infera_gpu.passes.known import MAX_RANK, Asked, Known, Rule, broadcast, unranked
from infera_gpu.passes.sizes import Sizes, lesser, reshaped
from infera_gpu.spec import Dim, TensorSpec


def _transposed(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x, given = ins[0], n.attrs.get("perm")
    if x is None or not x.ranked:
        return TensorSpec((None,) * len(given), x.dtype) if x is not None and given else unranked(x)
    perm = given or range(x.ndim)[::-1]
    return TensorSpec(tuple(x.shape[p] for p in perm), x.dtype)


def _reshaped(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x, target, of = ins[0], facts.sizes(n.inputs[1]), ins[1]
    if x is None or target is None:
        rank = of.shape[0] if of is not None and of.ranked and of.ndim == 1 else None
        if x is None or not isinstance(rank, int) or rank > MAX_RANK:
            return unranked(x)
        return TensorSpec((None,) * rank, x.dtype)
    shape = x.shape if x.ranked else (None,) * MAX_RANK
    return TensorSpec(reshaped(shape, target, not n.attrs.get("allowzero", 0)), x.dtype)


def _flattened(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    return None if ins[0] is None else TensorSpec((None, None), ins[0].dtype)


def _given_axes(facts: Asked, n: Node) -> tuple[int, ...] | None:
    """Axes from the attribute or from constant input 1; None where they are left out. Raises where they are unknown."""
    if "axes" in n.attrs:
        return tuple(n.attrs["axes"])
    if len(n.inputs) < 2 or not n.inputs[1]:
        return None
    found = facts.constant(n.inputs[1])
    if found is None or found.dtype.kind != "i":
        raise LookupError
    return tuple(found.reshape(-1).tolist())


def _reduced(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x = ins[0]
    if x is None or not x.ranked:
        return unranked(x)
    axes = _given_axes(facts, n)
    gone = {a % x.ndim for a in axes} if axes else set(range(0 if n.attrs.get("noop_with_empty_axes") else x.ndim))
    if n.attrs.get("keepdims", 1):
        return TensorSpec(tuple(1 if i in gone else d for i, d in enumerate(x.shape)), x.dtype)
    return TensorSpec(tuple(d for i, d in enumerate(x.shape) if i not in gone), x.dtype)


def _unsqueezed(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x, axes = ins[0], _given_axes(facts, n)
    if x is None or not x.ranked or axes is None:
        return unranked(x)
    rank = x.ndim + len(axes)
    new, old = {a % rank for a in axes}, iter(x.shape)
    if len(new) != len(axes):  # which planning refuses
        return unranked(x)
    return TensorSpec(tuple(1 if i in new else next(old) for i in range(rank)), x.dtype)


def _squeezed(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x, axes = ins[0], _given_axes(facts, n)
    if x is None or not x.ranked or (axes is None and not x.is_static):
        return unranked(x)
    gone = {i for i, d in enumerate(x.shape) if d == 1} if axes is None else {a % x.ndim for a in axes}
    return TensorSpec(tuple(d for i, d in enumerate(x.shape) if i not in gone), x.dtype)


def _gathered(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x, index = ins[:2]
    if x is None or index is None or not (x.ranked and index.ranked):
        return unranked(x)
    axis = int(n.attrs.get("axis", 0)) % x.ndim
    return TensorSpec((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]), x.dtype)


def _gathered_blocks(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Rows of a table, of the scales' type. Bytes hold several elements, along the last axis."""
    table, index, scales = ins[:3]
    known = table is not None and index is not None and table.ranked and index.ranked and table.ndim > 1
    if table is None or index is None or scales is None or not known or n.attrs.get("gather_axis", 0) != 0:
        return unranked(scales)
    last = table.shape[-1]
    if table.dtype == np.uint8 and isinstance(last, int):
        last *= 8 // int(n.attrs.get("bits", 4))
    return TensorSpec((*index.shape, *table.shape[1:-1], last), scales.dtype)


def _embedded(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """A row of a table for each of the indices, which broadcast to each other."""
    indices = [s for s, name in zip(ins[:6:2], n.inputs[:6:2], strict=True) if name]
    table, shapes = ins[1], [s.shape for s in indices if s is not None and s.ranked]
    if table is None or not table.ranked or len(shapes) < len(indices):
        return unranked(table)
    return TensorSpec((*broadcast(shapes), table.shape[1]), table.dtype)


def _gathered_along_axes(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Each index in the last axis of the indices is along one of the first axes of the data."""
    x, index = ins[:2]
    if x is None or index is None or not (x.ranked and index.ranked) or n.attrs.get("batch_dims", 0):
        return unranked(x)
    count = index.shape[-1]
    if not isinstance(count, int) or not 0 < count <= x.ndim:
        return unranked(x)
    return TensorSpec((*index.shape[:-1], *x.shape[count:]), x.dtype)


def _looked_up(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Rows of a table, in place of the indices' last axis."""
    ids, table = ins[:2]
    if ids is None or table is None or not (ids.ranked and table.ranked) or len(n.inputs) > 2:
        return unranked(table)
    return TensorSpec((*ids.shape[:-1], table.shape[-1]), table.dtype)


def _of_same_rank(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Resize: which dimensions stay is not followed."""
    x = ins[0]
    return unranked(x) if x is None or not x.ranked else TensorSpec((None,) * x.ndim, x.dtype)


def _listed(facts: Asked, n: Node, attr: str, at: int) -> list[int] | None:
    """Integers of an attribute or of a constant input; None where they are neither."""
    if attr in n.attrs:
        return [int(i) for i in n.attrs[attr]]
    found = facts.constant(n.inputs[at]) if len(n.inputs) > at and n.inputs[at] else None
    return None if found is None or found.dtype.kind != "i" else [int(i) for i in found.reshape(-1).tolist()]


def _sliced(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Axes that it does not name stay as they are."""
    x, axes = ins[0], _listed(facts, n, "axes", 3)
    if x is None or not x.ranked:
        return unranked(x)
    starts, ends, steps = (_listed(facts, n, name, i) for i, name in ((1, "starts"), (2, "ends"), (4, "steps")))
    if axes is None and (len(n.inputs) < 4 or not n.inputs[3]):
        axes = list(range(len(starts or x.shape)))
    if axes is None:
        return TensorSpec((None,) * x.ndim, x.dtype)
    if steps is None and (len(n.inputs) < 5 or not n.inputs[4]):
        steps = [1] * len(axes)
    made = list(x.shape)
    to = ends if ends is not None or len(n.inputs) < 3 else facts.sizes(n.inputs[2])
    for i, axis in enumerate(axes):
        whole, known = x.shape[axis], starts is not None and to is not None and steps is not None
        start, end, step = (starts[i], to[i], steps[i]) if starts and to and steps else (0, 0, 1)
        if isinstance(end, int):
            made[axis] = len(range(whole)[start:end:step]) if known and isinstance(whole, int) else None
        else:
            made[axis] = lesser(whole, end) if (start, step) == (0, 1) else None
    return TensorSpec(tuple(made), x.dtype)


def _padded(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x = ins[0]
    if x is None or not x.ranked:
        return unranked(x)
    pads: Sizes | None = tuple(n.attrs["pads"]) if "pads" in n.attrs else facts.sizes(n.inputs[1])
    if pads is None or len(pads) != 2 * x.ndim or (len(n.inputs) > 3 and n.inputs[3]):
        return TensorSpec((None,) * x.ndim, x.dtype)
    made: list[Dim] = []
    for size, begin, end in zip(x.shape, pads[: x.ndim], pads[x.ndim :], strict=True):
        numbers = [d for d in (size, begin, end) if isinstance(d, int)]
        made.append(size if begin == end == 0 else sum(numbers) if len(numbers) == 3 else None)
    return TensorSpec(tuple(made), x.dtype)


def _split(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Of every part: its size is followed where all have the same."""
    x = ins[0]
    if x is None or not x.ranked:
        return unranked(x)
    axis, count = int(n.attrs.get("axis", 0)) % x.ndim, len(n.outputs)
    whole, even = x.shape[axis], "split" not in n.attrs and (len(n.inputs) < 2 or not n.inputs[1])
    part = whole // count if even and isinstance(whole, int) and whole % count == 0 else None
    lengths = _listed(facts, n, "split", 1)
    if lengths and lengths == [lengths[0]] * count:
        part = lengths[0]
    return TensorSpec(tuple(part if i == axis else d for i, d in enumerate(x.shape)), x.dtype)


def _counted(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """A Range: from 0 in steps of 1 as many as its end, which may be a size."""
    start, end, step = (facts.sizes(i) for i in n.inputs)
    count = end[0] if (start, step) == ((0,), (1,)) and end is not None else None
    return None if ins[0] is None else TensorSpec((max(count, 0) if isinstance(count, int) else count,), ins[0].dtype)


def _joined(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x = ins[0]
    if x is None or not all(s is not None and s.ranked and s.ndim == x.ndim for s in ins):
        return unranked(x)
    axis = int(n.attrs["axis"]) % x.ndim
    along = [*zip(*(s.shape for s in ins if s is not None), strict=True)]
    numbers = [d for d in along[axis] if isinstance(d, int)]
    whole = sum(numbers) if len(numbers) == len(ins) else None
    return TensorSpec(tuple(whole if i == axis else _best(dims) for i, dims in enumerate(along)), x.dtype)


def _best(dims: Sequence[Dim]) -> Dim:
    """What is best known of equal sizes: a number, a dimension of the model's inputs, or the first of their names."""
    return min(dims, key=lambda d: 0 if isinstance(d, int) else 1 if d is not None and JOINT not in d else 2)


def _expanded(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    (x, target), shape = ins, facts.sizes(n.inputs[1])
    if x is None or not x.ranked:
        return unranked(x)
    if shape is not None and all(not isinstance(d, int) or d >= 0 for d in shape):
        return TensorSpec(broadcast([x.shape, shape]), x.dtype)
    count = target.shape[0] if target is not None and target.ranked and target.ndim == 1 else None
    if not isinstance(count, int) or count > MAX_RANK:
        return unranked(x)
    return TensorSpec((None,) * max(x.ndim, count), x.dtype)


def _filled(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """ConstantOfShape: of the value's type, a float where there is none."""
    shape, value = facts.sizes(n.inputs[0]), n.attrs.get("value")
    dtype = np.dtype(np.float32) if value is None else value.dtype
    return TensorSpec((), dtype, ranked=False) if shape is None else TensorSpec(shape, dtype)


def _size(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    return TensorSpec((), np.dtype(np.int64))


def _shape(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    x = ins[0]
    axes = range(x.ndim)[n.attrs.get("start", 0) : n.attrs.get("end")] if x is not None and x.ranked else None
    return TensorSpec((None if axes is None else len(axes),), np.dtype(np.int64))


def _einsum(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """As many axes as the equation names."""
    x, (_, arrow, made) = ins[0], str(n.attrs["equation"]).partition("->")
    if x is None or not arrow or "." in made:
        return unranked(x)
    return TensorSpec((None,) * len(made.replace(" ", "")), x.dtype)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Transpose": _transposed,
        "Reshape": _reshaped,
        "Flatten": _flattened,
        **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"), _reduced),
        **dict.fromkeys(("ReduceL2", "ReduceSumSquare"), _reduced),
        "Unsqueeze": _unsqueezed,
        "Squeeze": _squeezed,
        "Gather": _gathered,
        "com.microsoft.GatherBlockQuantized": _gathered_blocks,
        **dict.fromkeys(("GatherND", "com.microsoft.GatherND"), _gathered_along_axes),
        "infera.Lookup": _looked_up,
        "infera.EmbeddedNormalization": _embedded,
        "Slice": _sliced,
        "Pad": _padded,
        "Resize": _of_same_rank,
        "Split": _split,
        "Concat": _joined,
        "Einsum": _einsum,
        "Expand": _expanded,
        "Shape": _shape,
        "Size": _size,
        "ConstantOfShape": _filled,
        "Range": _counted,
    }
)
"""Operator -> its rule."""
