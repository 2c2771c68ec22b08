"""What follows a convolution's sums: bias, residual, activation, in place while they are in cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.activation import blockwise
from infera_kernels.cpu.elementwise import BLOCK, blocks, clamp

Activation: TypeAlias = tuple[str | float, ...]
"""A name of `ACTIVATIONS`, then its parameters."""

Epilogue: TypeAlias = Callable[[Array, Array | None, Array | None], list[Call]]
"""`finish(y, b, residual)`: the calls that turn a block of sums into activation(y + b + residual), in place."""

ACTIVATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "relu": (),
        "clip": ("low", "high"),
        "gelu": (),
        "gelu_tanh": (),
        "leaky_relu": ("alpha",),
        "hard_sigmoid": ("alpha", "beta"),
        "hard_swish": (),
        "mish": (),
        "sigmoid": (),
        "softplus": (),
        "swish": (),
        "tanh": (),
    }
)
"""Name -> its parameters, in order."""


def activator(
    activation: Activation | None, size: int, dtype: Any, scratch: Scratch
) -> tuple[list[Call], Callable[[Array, Array], list[Call]]]:
    """The calls to make once, and `apply(x, y)`: y = activation(x), of at most `size` elements; `y` may be `x`.

    Without an activation there are no calls, and `y` is `x`. Raises KeyError for an unknown name and ValueError for
    missing parameters.
    """
    if activation is None:
        return [], lambda x, y: []
    name = str(activation[0])
    attrs = {k: float(v) for k, v in zip(ACTIVATIONS[name], activation[1:], strict=True)}
    if name in ("relu", "clip"):
        low, high = (np.asarray(bound, dtype) for bound in (attrs.get("low", 0), attrs.get("high", np.inf)))
        return [], lambda x, y: [clamp(x, low, high, y)]
    once, emit = blockwise(name, min(size, BLOCK), dtype, scratch, **attrs)
    return once, lambda x, y: [c for source, target in blocks(x, y) for c in emit(source, target)]


def epilogue(activation: Activation | None, size: int, dtype: Any, scratch: Scratch) -> tuple[list[Call], Epilogue]:
    """The calls to make once, and the epilogue of blocks of at most `size` elements. The bias broadcasts."""
    once, apply = activator(activation, size, dtype, scratch)

    def finish(y: Array, b: Array | None, residual: Array | None) -> list[Call]:
        return [*((np.add, (y, term, y)) for term in (b, residual) if term is not None), *apply(y, y)]

    return once, finish
