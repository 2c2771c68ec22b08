"""What cuDNN is asked for: convolutions and attention, as graphs of operations in the forms that it has kernels for.

A convolution's sums are finished as activation(sums + residual + bias), in this order: for others there are no kernels
ready, they are compiled when a plan is made. Attention is spelled out as NVIDIA's frontend does (cudnn-frontend,
`CompositeSDPANode`), which the library takes for one operation; it wants the logarithms of softmax's sums among the
rest, though nobody reads them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from ctypes import c_float, c_int32
from itertools import count
from math import prod
from typing import Any, NamedTuple

from infera_kernels.launch.cudnn import (
    BOOLEAN,
    CONVOLUTION_MODE,
    FLOAT,
    FLOAT32,
    FUNCTION,
    INTEGER,
    NANS,
    OBJECT,
    REDUCTION,
    TYPE,
    TYPES,
    Attribute,
    Object,
    Tensor,
    tensor,
)

ACTIVATIONS = {"relu": 100, "tanh": 101, "sigmoid": 102, "gelu": 104, "silu": 106, "gelu_tanh": 107}
"""cudnnPointwiseMode_t"""

_ADD, _MUL, _DIV, _SUB, _EXP, _LOG, _RELU, _NOT_LESS, _INDEX, _SELECT = 0, 1, 6, 9, 13, 15, 100, 303, 501, 601
_INT32, _BOOL = 4, 11

_POINTWISE, _WINDOW, _CONVOLVE, _APPLY, _PRODUCT, _MULTIPLY, _REDUCER, _REDUCE = 0, 1, 10, 13, 18, 19, 21, 22
"""cudnnBackendDescriptorType_t"""


_LOWEST = -3.4028234663852886e38
"""Of float32: what keys count that are not seen. Its infinity is for releases from 9.10 on."""


class _Operations(list[Object]):
    """Operations one after the other; what they make is called by numbers from `first` on."""

    def __init__(self, found: Any, first: int) -> None:
        self.found, self._names = found, count(first)

    def between(self, sizes: Sequence[int], strides: Sequence[int], dtype: int = FLOAT32) -> Object:
        """What never reaches memory."""
        return tensor(self.found, next(self._names), dtype, Tensor(None, tuple(sizes), tuple(strides)))

    def add(self, kind: int, *attributes: Attribute) -> None:
        self.append(Object(self.found, kind, *attributes))

    def apply(
        self,
        function: int,
        x: Object,
        to: Object,
        *others: tuple[int, Object],
        dtype: int = FLOAT32,
        how: Sequence[Attribute] = (),
    ) -> Object:
        """A function of each element of x and of `others`, which are called 752 (b) and 758 (t)."""
        made = Object(self.found, _POINTWISE, (0, FUNCTION, function), (1, TYPE, dtype), *how)
        given = (750, made), (751, x), (753, to), *others
        self.add(_APPLY, *((name, OBJECT, value) for name, value in given))
        return to


class Convolution(NamedTuple):
    """out = activation(conv(x, w) + residual + bias): x (N, C, spatial...) with two or three spatial axes, w (O, C /
    groups, kernel...), out and residual (N, O, spatial...), bias (O,); all of one type, summed in float32."""

    dtype: str
    x: Tensor
    w: Tensor
    out: Tensor
    pads: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    residual: Tensor | None = None
    bias: Any = None
    activation: str | None = None

    def tensors(self) -> dict[int, Tensor]:
        """A bias is an image of one pixel."""
        channels, axes = self.out.sizes[1], len(self.pads)
        bias = Tensor(self.bias, (1, channels, *(1,) * axes), (channels, 1, *(channels,) * axes))
        given = self.x, self.w, self.out, self.residual, None if self.bias is None else bias
        return {name: lies for name, lies in enumerate(given, 1) if lies is not None}

    def scalars(self) -> dict[int, Any]:
        return {}

    def key(self) -> Hashable:
        return self.dtype, self.pads, self.strides, self.dilations, self.activation

    def operations(self, found: Any) -> list[Object]:
        made, dtype = _Operations(found, 6), TYPES[self.dtype]
        x, w, out, *terms = (tensor(found, name, dtype, lies) for name, lies in self.tensors().items())
        sizes = self.out.sizes
        steps = len(terms) + (self.activation is not None)
        sums = made.between(sizes, channels_last(sizes)) if steps else out
        window = Object(
            found,
            _WINDOW,
            (100, TYPE, FLOAT32),
            (101, CONVOLUTION_MODE, 1),  # a window that is not turned
            (102, INTEGER, self.dilations),
            (103, INTEGER, self.strides),
            (104, INTEGER, [after for _, after in self.pads]),
            (105, INTEGER, [before for before, _ in self.pads]),
            (106, INTEGER, len(self.pads)),
        )
        operands = (702, window), (703, w), (704, x), (705, sums)
        factors: list[Attribute] = [(700, FLOAT, 1.0), (701, FLOAT, 0.0)]
        made.add(_CONVOLVE, *((name, OBJECT, value) for name, value in operands), *factors)
        for term in terms:
            steps -= 1
            sums = made.apply(_ADD, sums, made.between(sizes, channels_last(sizes)) if steps else out, (752, term))
        if self.activation is not None:
            function = ACTIVATIONS[self.activation]
            nans = [(2, NANS, 1)] if function == _RELU else []  # else it makes 0 of NaN
            made.apply(function, sums, out, how=nans)
        return made


class Attention(NamedTuple):
    """out = softmax(scale q kᵀ) v: q and out (B, H, M, size), k and v (B, H / repeats, N, size), all of one type, with
    sums and weights' sums in float32. If `causal`, query i of the last M sees no key after it."""

    dtype: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    causal: bool

    def tensors(self) -> dict[int, Tensor]:
        sizes, strides = self.k.sizes, self.k.strides
        turned = Tensor(self.k.array, (*sizes[:2], *sizes[:1:-1]), (*strides[:2], *strides[:1:-1]))
        return {1: self.q, 2: turned, 3: self.v, 4: self.out}

    def scalars(self) -> dict[int, Any]:
        found: dict[int, Any] = {5: c_float(self.scale)}
        if self.causal:
            found[6] = c_float(_LOWEST)
            if self._before:
                found[7] = c_int32(self._before)
        return found

    @property
    def _before(self) -> int:
        """Keys before the first query."""
        return self.k.sizes[2] - self.q.sizes[2]

    def key(self) -> Hashable:
        return self.dtype, self.causal

    def operations(self, found: Any) -> list[Object]:
        made, dtype = _Operations(found, 8), TYPES[self.dtype]
        q, k, v, out = (tensor(found, name, dtype, lies) for name, lies in self.tensors().items())
        batch, heads, m, _ = self.q.sizes
        scores, rows = (batch, heads, m, self.k.sizes[2]), (batch, heads, m, 1)

        def each(kind: int = FLOAT32) -> Object:
            return made.between(scores, in_rows(scores), kind)

        def row() -> Object:
            return made.between(rows, in_rows(rows))

        def number(name: int, kind: int = FLOAT32) -> tuple[int, Object]:
            one = (1,) * 4
            lies = Tensor(None, one, one)
            return 752, tensor(found, name, kind, lies, (908, BOOLEAN, True))

        def multiplied(a: Object, b: Object, to: Object) -> Object:
            how = Object(found, _PRODUCT, (1500, TYPE, FLOAT32))
            given = (1520, a), (1521, b), (1522, to), (1523, how)
            made.add(_MULTIPLY, *((name, OBJECT, value) for name, value in given))
            return to

        def reduced(how: int, x: Object, to: Object) -> Object:
            reducer = Object(found, _REDUCER, (1600, REDUCTION, how), (1601, TYPE, FLOAT32))
            given = (1610, x), (1611, to), (1612, reducer)
            made.add(_REDUCE, *((name, OBJECT, value) for name, value in given))
            return to

        x = made.apply(_MUL, multiplied(q, k, each()), each(), number(5))
        if self.causal:
            place = made.apply(_INDEX, x, each(_INT32), how=[(9, INTEGER, 2)])
            if self._before:
                place = made.apply(_ADD, place, each(_INT32), number(7, _INT32), dtype=_INT32)
            key = made.apply(_INDEX, x, each(_INT32), how=[(9, INTEGER, 3)])
            seen = made.apply(_NOT_LESS, place, each(_BOOL), (752, key), dtype=_BOOL)
            x = made.apply(_SELECT, x, each(), number(6), (758, seen))
        most = reduced(3, x, row())
        powers = made.apply(_EXP, made.apply(_SUB, x, each(), (752, most)), each())
        total = reduced(0, powers, row())
        made.apply(_ADD, most, row(), (752, made.apply(_LOG, total, row())))
        multiplied(made.apply(_DIV, powers, each(dtype), (752, total)), v, out)
        return made


def channels_last(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of (N, C, spatial...) in one piece, channels next to each other."""
    _, channels, *space = sizes
    return (channels * prod(space), 1, *(channels * prod(space[i + 1 :]) for i in range(len(space))))


def in_rows(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of an array in one piece, as it is."""
    return tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))
