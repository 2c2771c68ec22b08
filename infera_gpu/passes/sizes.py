"""Shapes that a graph computes, as far as they are known before a run: lists of numbers and of names of dimensions.

Exporters ask for a Shape, pick dimensions, multiply and join them, and reshape by what comes out. Followed here is what
they do in between, so that one sees that a Reshape gives the shape of another value, or which axes it merges. Equal
names are equal sizes: a dimension is named by the model's inputs, or by the value that it was first seen in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Protocol, TypeAlias

import numpy as np

from infera_gpu.graph import JOINT, HostArray, Node
from infera_gpu.spec import Dim, TensorSpec, dtype_of_onnx

Sizes: TypeAlias = tuple[Dim, ...]
"""Of a vector's elements, or the one of a scalar; None for what is not known."""

MOST = 64
"""Elements: there is no array of more axes."""

DEEP = 32
"""Nodes between a Shape and its use."""

_EXACT = 2**24
"""Whole numbers below it are numbers of float32."""

TIMES = "×"
LARGER = "∨"
LESSER = f"∧{JOINT}"
"""What the name of a size that is no more than a number begins with: the number follows, and the size it may be."""


class Known(Protocol):
    """What is asked of `Facts`."""

    producers: Mapping[str, Node]

    def constant(self, value: str) -> HostArray | None: ...

    def spec(self, value: str) -> TensorSpec | None: ...


def product(dims: Sequence[Dim]) -> Dim:
    """Of sizes: a number, or the names of its factors with the number before them, in one order."""
    number, names = 1, Counter[str]()
    for dim in dims:
        factors = _factors(dim)
        if factors is None:
            return None
        number *= factors[0]
        names += factors[1]
    if not names or not number:
        return number
    if number < 0:
        return None
    written = sorted(names.elements())
    return (
        written[0]
        if number == 1 and len(written) == 1
        else TIMES.join([*([str(number)] if number != 1 else []), *written])
    )


def quotient(dims: Sequence[Dim], by: Sequence[Dim]) -> Dim:
    """The product of some sizes over that of others; None where that is not known to be whole."""
    whole, part = _factors(product(dims)), _factors(product(by))
    if whole is None or part is None or not part[0] or whole[0] % part[0] or part[1] - whole[1]:
        return None
    return product([whole[0] // part[0], *(whole[1] - part[1]).elements()])


def _factors(dim: Dim) -> tuple[int, Counter[str]] | None:
    if dim is None:
        return None
    if isinstance(dim, int):
        return dim, Counter()
    number, *names = dim.split(TIMES)
    return (int(number), Counter(names)) if names and number.isdecimal() else (1, Counter([number, *names]))


def sizes(known: Known, value: str, found: dict[str, Sizes | None], depth: int = DEEP) -> Sizes | None:
    """The elements of a vector or scalar of whole numbers, as sizes; None where not even their count is known.

    `found` is what was found out before, and is added to.
    """
    if value not in found:
        given, n = known.constant(value), known.producers.get(value)
        rule = RULES.get(n.qualified) if n is not None and depth else None
        made: Sizes | None = None
        if given is not None:
            listed = given.ndim < 2 and given.size <= MOST and _is_whole(given)
            made = tuple([int(size) for size in given.reshape(-1).tolist()]) if listed else None
        elif n is not None and rule is not None:
            inputs = n.inputs
            made = rule(known, n, lambda i: sizes(known, inputs[i], found, depth - 1))
        if made is not None and n is not None and n.op == "Split":
            made = _part(known, n, made, n.outputs.index(value))
        found[value] = made if made is not None and len(made) <= MOST else None
    return found[value]


def _is_whole(values: HostArray) -> bool:
    """Integers, or floats that are some, as PaddlePaddle's exporter has it where Max takes floats alone."""
    if values.dtype.kind != "f":
        return values.dtype.kind == "i"
    return values.dtype.itemsize > 2 and bool((np.abs(values) < _EXACT).all() and (values == np.rint(values)).all())


Input: TypeAlias = Callable[[int], Sizes | None]
Rule: TypeAlias = Callable[[Known, Node, Input], Sizes | None]


def _shape(known: Known, n: Node, given: Input) -> Sizes | None:
    x = known.spec(n.inputs[0])
    return x.shape[n.attrs.get("start", 0) : n.attrs.get("end")] if x is not None and x.ranked else None


def _cast(known: Known, n: Node, given: Input) -> Sizes | None:
    """Sizes fit into 32 bits, and are numbers of float32, where whoever wrote the file made them so."""
    return given(0) if dtype_of_onnx(n.attrs["to"]) in (np.int32, np.int64, np.float32, np.float64) else None


def _gather(known: Known, n: Node, given: Input) -> Sizes | None:
    x, index = given(0), known.constant(n.inputs[1])
    if x is None or index is None or index.ndim > 1 or n.attrs.get("axis", 0) not in (0, -1):
        return None
    return tuple(x[i] for i in index.reshape(-1).tolist())


def _slice(known: Known, n: Node, given: Input) -> Sizes | None:
    x, axes = (
        given(0),
        n.attrs["axes"] if "axes" in n.attrs else given(3) if len(n.inputs) > 3 and n.inputs[3] else (0,),
    )
    if axes not in ((0,), (-1,)):
        return None
    bounds = [n.attrs[k] if k in n.attrs else given(i) for i, k in ((1, "starts"), (2, "ends"))]
    bounds.append(given(4) if len(n.inputs) > 4 and n.inputs[4] else (1,))
    numbers = [b[0] for b in bounds if b is not None and len(b) == 1 and isinstance(b[0], int)]
    return x[slice(*numbers)] if x is not None and len(numbers) == len(bounds) else None


def _concat(known: Known, n: Node, given: Input) -> Sizes | None:
    """Vectors, along the axis that they have: anything else is refused, or makes no vector."""
    specs, parts = [known.spec(i) for i in n.inputs], [given(i) for i in range(len(n.inputs))]
    if n.attrs["axis"] not in (0, -1) or any(s is None or not s.ranked or s.ndim != 1 for s in specs):
        return None
    made: list[Dim] = []
    for spec, part in zip(specs, parts, strict=True):
        count = spec.shape[0] if spec is not None else None
        if part is None and not (isinstance(count, int) and count <= MOST):
            return None
        made += (None,) * int(count or 0) if part is None else part
    return tuple(made)


def _split(known: Known, n: Node, given: Input) -> Sizes | None:
    """Of all outputs together, of a vector."""
    spec = known.spec(n.inputs[0])
    return given(0) if spec is not None and spec.ranked and spec.ndim == 1 else None


def _part(known: Known, n: Node, whole: Sizes, output: int) -> Sizes | None:
    """Of one output of a Split."""
    count = len(n.outputs)
    lengths: Sequence[int] = n.attrs.get("split", ())
    if len(n.inputs) > 1 and n.inputs[1]:
        given = known.constant(n.inputs[1])
        lengths = () if given is None else given.reshape(-1).tolist()
    elif not lengths and len(whole) % count == 0:
        lengths = [len(whole) // count] * count
    if len(lengths) != count or sum(lengths) != len(whole) or min(lengths) < 0:
        return None
    begin = sum(lengths[:output])
    return whole[begin : begin + lengths[output]]


def _reshaped(known: Known, n: Node, given: Input) -> Sizes | None:
    """One element as a scalar or as a vector."""
    x = given(0)
    return x if x is not None and len(x) == 1 else None


def _product(known: Known, n: Node, given: Input) -> Sizes | None:
    x = given(0)
    return None if x is None or n.attrs.get("noop_with_empty_axes", 0) else (product(x),)


def _times(known: Known, n: Node, given: Input) -> Sizes | None:
    a, b = given(0), given(1)
    return None if a is None or b is None or len(a) != 1 or len(b) != 1 else (product([*a, *b]),)


def _over(known: Known, n: Node, given: Input) -> Sizes | None:
    """Integers are rounded down."""
    a, b, x = given(0), given(1), known.spec(n.inputs[0])
    if a is None or b is None or len(a) != 1 or len(b) != 1:
        return None
    whole, part = a[0], b[0]
    if isinstance(whole, int) and isinstance(part, int) and x is not None and x.dtype.kind == "i":
        return (whole // part,) if whole >= 0 < part else None
    return (quotient(a, b),)


def larger(a: Dim, b: Dim) -> Dim:
    """Of two sizes, of which one may be known to be the larger; where it is not, the two in one order."""
    if a is None or b is None or a == b:
        return a if b is not None else None
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    for size, least in ((a, b), (b, a)):
        if isinstance(least, int) and least <= 0:  # no size is less
            return size
    names = sorted(map(str, (a, b)))
    return None if any(TIMES in name for name in names) else LARGER.join(names)


def lesser(most: Dim, size: Dim) -> Dim:
    """A size, where it is no more than a number."""
    if most == size:
        return size
    named = isinstance(most, int) and isinstance(size, str) and TIMES not in size
    return f"{LESSER}{most}{JOINT}{size}" if named else None


def is_lesser(dim: Dim, sizes: AbstractSet[Dim]) -> bool:
    """Whether it is one of these sizes, or a number that is less."""
    return isinstance(dim, str) and dim.startswith(LESSER) and dim.split(JOINT, 2)[-1] in sizes


def _largest(known: Known, n: Node, given: Input) -> Sizes | None:
    """Of two lists, one by one: what exporters compute of axes that broadcast."""
    lists = [given(i) for i in range(len(n.inputs))]
    first, second = lists if len(lists) == 2 else (None, None)
    if first is None or second is None or len(first) != len(second):
        return None
    return tuple(map(larger, first, second))


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Shape": _shape,
        "Cast": _cast,
        "Gather": _gather,
        "Slice": _slice,
        "Concat": _concat,
        "Split": _split,
        **dict.fromkeys(("Squeeze", "Unsqueeze", "Reshape"), _reshaped),
        "Identity": lambda known, n, given: given(0),
        "ReduceProd": _product,
        "Mul": _times,
        "Div": _over,
        "Max": _largest,
    }
)
"""Operator -> its rule."""


def reshaped(shape: Sizes, target: Sizes, keeps: bool) -> Sizes:
    """The shape that a Reshape to `target` gives; `keeps` says that 0 means the size of that axis before.

    A size that -1 stands for is what the others leave.
    """
    made = [shape[i] if size == 0 and keeps and i < len(shape) else size for i, size in enumerate(target)]
    if made.count(-1) == 1:
        i = made.index(-1)
        made[i] = quotient(shape, [*made[:i], *made[i + 1 :]])
    return tuple(None if d == -1 else d for d in made)
