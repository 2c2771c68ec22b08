"""Steps that add one operator to a draft: elementwise, views and copies, along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.drafts import BOOL, FLOAT, INT, Draft, Shape, Unfit, filled, joined, joins

# ---- elementwise


def unary(d: Draft) -> None:
    x = d.pick()
    op = d.rng.choice(("Relu", "Neg", "Abs", "Sigmoid", "Tanh", "Floor", "Identity", "Erf", "Softplus", "HardSwish"))
    d.emit(op, [x], d.shape(x))


def binary(d: Draft) -> None:
    x = d.pick((FLOAT, FLOAT, INT))
    kind, shape = d.values[x]
    if d.maybe(0.8):
        y = d.pick((kind,), joins(shape))
        out = joined(shape, d.shape(y))
    else:
        size = d.rng.choice(((), (1,), shape, shape[-1:]))
        y = d.constant(d.numbers.standard_normal(size) * 2, np.float32 if kind == FLOAT else np.int64)
        out = joined(shape, size)
    d.emit(d.rng.choice(("Add", "Sub", "Mul", "Max", "Min")), d.rng.sample([x, y], 2), out, kind)


def doubled(d: Draft) -> None:
    x = d.pick((FLOAT, INT))
    d.emit(d.rng.choice(("Add", "Mul", "Sub")), [x, x], d.shape(x), d.kind(x))


def variadic(d: Draft) -> None:
    names = [d.pick()]
    for _ in range(d.rng.choice((0, 1, 2, 7))):
        names.append(d.pick(fits=joins(joined(*map(d.shape, names)))))
    d.emit(d.rng.choice(("Sum", "Mean", "Max", "Min")), names, joined(*map(d.shape, names)))


def compare(d: Draft) -> None:
    x = d.pick((FLOAT, INT))
    y = d.pick((d.kind(x),), joins(d.shape(x)))
    d.emit(d.rng.choice(("Less", "Greater", "Equal")), [x, y], joined(d.shape(x), d.shape(y)), BOOL)


def where(d: Draft) -> None:
    c = d.pick((BOOL,))
    x = d.pick(fits=joins(d.shape(c)))
    y = d.pick(fits=joins(joined(d.shape(c), d.shape(x))))
    d.emit("Where", [c, x, y], joined(*map(d.shape, (c, x, y))))


def clip(d: Draft) -> None:
    x = d.pick()
    low = d.constant(-0.5, np.float32) if d.maybe() else ""
    d.emit("Clip", [x, low, d.constant(1, np.float32)], d.shape(x))


def cast(d: Draft) -> None:
    x, to = d.pick((FLOAT, INT, BOOL)), d.rng.choice((FLOAT, INT, BOOL))
    if (d.kind(x), to) == (FLOAT, INT):
        x = d.emit("Clip", [x, d.constant(-9, np.float32), d.constant(9, np.float32)], d.shape(x))
    d.emit("Cast", [x], d.shape(x), to, to=to)


# ---- views and copies


def transpose(d: Draft) -> None:
    x = d.pick((FLOAT, FLOAT, INT, BOOL), lambda shape: len(shape) > 0)
    kind, shape = d.values[x]
    perm = d.rng.sample(range(len(shape)), len(shape))
    d.emit("Transpose", [x], tuple(shape[i] for i in perm), kind, perm=perm)


def reshape(d: Draft) -> None:
    x = d.pick((FLOAT, FLOAT, INT))
    kind, shape = d.values[x]
    if 0 in shape:
        new = tuple(d.rng.sample(shape, len(shape)))
        d.emit("Reshape", [x, d.constant(new)], new, kind, allowzero=1)
        return
    new, way = shape, d.rng.random()
    if way < 0.3:
        new = (math.prod(shape),)
    elif way < 0.6 and len(shape) > 1:
        i = d.rng.randrange(len(shape) - 1)
        new = (*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :])
    else:
        new = tuple(d.rng.sample(shape, len(shape)))
    wanted = list(new)
    if new and d.maybe(0.3):
        wanted[d.rng.randrange(len(new))] = -1
    d.emit("Reshape", [x, d.constant(wanted)], new, kind)


def reshape_like(d: Draft) -> None:
    x = d.pick()
    y = d.pick(fits=lambda shape: 0 < math.prod(shape) == math.prod(d.shape(x)))
    d.emit("Reshape", [x, *d.node("Shape", [y])], d.shape(y))


def slice_(d: Draft) -> None:
    x = d.pick((FLOAT, FLOAT, INT), lambda shape: len(shape) > 0)
    kind, shape = d.values[x]
    axis, step = d.rng.randrange(len(shape)), d.rng.choice((1, 1, 2, -1, -2))
    start, end = (d.rng.randint(-shape[axis], shape[axis] + 1) for _ in range(2))
    count = len(range(shape[axis])[start:end:step])
    if not count and d.maybe(0.9):
        raise Unfit
    ins = [x, *(d.constant([v]) for v in (start, end, axis, step))]
    d.emit("Slice", ins, (*shape[:axis], count, *shape[axis + 1 :]), kind)


def expand(d: Draft) -> None:
    x = d.pick((FLOAT, INT))
    kind, shape = d.values[x]
    new = (*((2,) if d.maybe(0.4) else ()), *(d.rng.choice((2, 3)) if n == 1 else n for n in shape))
    d.emit("Expand", [x, d.constant(new)], new, kind)


def squeeze(d: Draft) -> None:
    x = d.pick(fits=lambda shape: 1 in shape)
    d.emit("Squeeze", [x], tuple(n for n in d.shape(x) if n != 1))


def unsqueeze(d: Draft) -> None:
    x = d.pick((FLOAT, INT, BOOL), lambda shape: len(shape) < 4)
    kind, shape = d.values[x]
    axis = d.rng.randint(0, len(shape))
    d.emit("Unsqueeze", [x, d.constant([axis])], (*shape[:axis], 1, *shape[axis:]), kind)


def concat(d: Draft) -> None:
    x = d.pick((FLOAT, FLOAT, INT), lambda shape: len(shape) > 0)
    kind, shape = d.values[x]
    axis = d.rng.randrange(len(shape))

    def fits(other: Shape) -> bool:
        return len(other) == len(shape) and all(
            a == b for i, (a, b) in enumerate(zip(other, shape, strict=True)) if i != axis
        )

    parts = [x, *(d.pick((kind,), fits) for _ in range(d.rng.choice((0, 1, 2))))]
    size = sum(d.shape(p)[axis] for p in parts)
    d.emit("Concat", parts, (*shape[:axis], size, *shape[axis + 1 :]), kind, axis=axis)


def split(d: Draft) -> None:
    x = d.pick(fits=lambda shape: max(shape, default=0) > 1)
    shape = d.shape(x)
    axis = shape.index(max(shape))
    sizes = [d.rng.randint(0, shape[axis])]
    sizes.append(shape[axis] - sizes[0])
    for name, size in zip(d.node("Split", [x, d.constant(sizes)], 2, axis=axis), sizes, strict=True):
        d.values[name] = (FLOAT, (*shape[:axis], size, *shape[axis + 1 :]))


def gather(d: Draft) -> None:
    x = d.pick((FLOAT, INT), filled)
    kind, shape = d.values[x]
    axis = d.rng.randrange(len(shape))
    indices = np.array(d.rng.choice((0, -1, [0], [0, -1], [[0, 0]], [])), np.int64)
    d.emit("Gather", [x, d.constant(indices)], (*shape[:axis], *indices.shape, *shape[axis + 1 :]), kind, axis=axis)


def scatter(d: Draft) -> None:
    x = d.pick(fits=filled)
    shape = d.shape(x)
    if d.maybe():
        updates = d.pick(fits=lambda other: other == (1, *shape[1:]))
        d.emit("ScatterND", [x, d.constant([[shape[0] - 1]]), updates], shape)
        return
    axis = d.rng.randrange(len(shape))
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    updates = d.pick(fits=lambda other: other == one)
    d.emit("ScatterElements", [x, d.constant(np.full(one, shape[axis] - 1)), updates], shape, axis=axis)


def tile_or_pad(d: Draft) -> None:
    x = d.pick(fits=filled)
    shape = d.shape(x)
    if d.maybe():
        repeats = [d.rng.choice((1, 2)) for _ in shape]
        d.emit("Tile", [x, d.constant(repeats)], tuple(n * r for n, r in zip(shape, repeats, strict=True)))
        return
    pads = [d.rng.choice((0, 0, 1)) for _ in range(2 * len(shape))]
    new = tuple(n + pads[i] + pads[len(shape) + i] for i, n in enumerate(shape))
    d.emit("Pad", [x, d.constant(pads), d.constant(0.3, np.float32)], new)


# ---- along an axis


def reduce(d: Draft) -> None:
    x = d.pick(fits=filled)
    shape = d.shape(x)
    axis, keep = d.rng.randrange(len(shape)), d.rng.randint(0, 1)
    op = d.rng.choice(("ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin", "ArgMax", "ArgMin"))
    new = (*shape[:axis], *((1,) * keep), *shape[axis + 1 :])
    if op.startswith("Arg"):
        d.emit(op, [x], new, INT, axis=axis, keepdims=keep)
    elif op == "ReduceSum":
        d.emit(op, [x, d.constant([axis])], new, keepdims=keep)
    else:
        d.emit(op, [x], new, axes=[axis], keepdims=keep)


def rowwise(d: Draft) -> None:
    x = d.pick(fits=filled)
    shape = d.shape(x)
    axis = d.rng.randrange(len(shape))
    op = d.rng.choice(("Softmax", "LogSoftmax", "CumSum", "TopK", "Trilu"))
    if op == "CumSum":
        d.emit(op, [x, d.constant(axis)], shape, exclusive=d.rng.randint(0, 1), reverse=d.rng.randint(0, 1))
    elif op == "TopK":
        k = d.rng.randint(1, shape[axis])
        names = d.node(op, [x, d.constant([k])], 2, axis=axis)
        for name, kind in zip(names, (FLOAT, INT), strict=True):
            d.values[name] = (kind, (*shape[:axis], k, *shape[axis + 1 :]))
    elif op == "Trilu":
        if len(shape) < 2:
            raise Unfit
        d.emit(op, [x, d.constant(d.rng.randint(-1, 1))], shape, upper=d.rng.randint(0, 1))
    else:
        d.emit(op, [x], shape, axis=axis - len(shape))


def layer_norm(d: Draft) -> None:
    x = d.pick(fits=lambda shape: filled(shape) and shape[-1] > 1)
    row = d.shape(x)[-1:]
    ins = [x, d.normal(*row), *([d.normal(*row)] if d.maybe() else [])]
    d.emit("LayerNormalization", ins, d.shape(x), axis=-1)


STEPS: tuple[Callable[[Draft], None], ...] = (
    *(unary, unary, binary, binary, doubled, variadic, compare, where, clip, cast),
    *(transpose, transpose, reshape, reshape_like, slice_, expand, squeeze, unsqueeze, concat, split, gather, scatter),
    *(tile_or_pad, reduce, rowwise, layer_norm),
)
