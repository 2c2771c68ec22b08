"""What an exported architecture is, in any framework: how to build and call it, what goes in at which sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Any]
Sizes = Mapping[str, int]
VOCABULARY = 300
LAYERS, WIDTH, HEADS = 2, 64, 4


@dataclass(frozen=True, slots=True)
class Input:
    """One input: an integer is a fixed dimension, a name a free one, `a+b` the sum of two free ones."""

    make: Callable[[np.random.Generator, tuple[int, ...]], Array]
    dims: tuple[int | str, ...]

    def array(self, rng: np.random.Generator, sizes: Sizes) -> Array:
        return self.make(rng, tuple(d if isinstance(d, int) else total(d, sizes) for d in self.dims))

    def free(self) -> dict[int, str]:
        """The free dimensions by axis."""
        return {axis: d for axis, d in enumerate(self.dims) if isinstance(d, str)}


def total(dim: str, sizes: Sizes) -> int:
    return sum(sizes[name] for name in dim.split("+"))


@dataclass(frozen=True, slots=True)
class Architecture:
    """`call(build(), tensors)` gives the outputs by name. The first of `sizes` is the one exported with."""

    summary: str
    build: Callable[[], Any]
    call: Callable[[Any, Tensors], Tensors]
    inputs: Mapping[str, Input]
    sizes: tuple[Sizes, ...]
    outputs: Mapping[str, tuple[int | str, ...]]
    """Dimensions, where the exporter is to be told which are free; the names of the outputs in their order."""
    exporters: tuple[str, ...] = ()
    """Those that write something of their own for it; all unless given."""


# ---- inputs


def normal(*dims: int | str) -> Input:
    return Input(lambda rng, shape: rng.standard_normal(shape, np.float32), dims)


def tokens(*dims: int | str) -> Input:
    return Input(lambda rng, shape: rng.integers(2, VOCABULARY, shape), dims)


def steps(*dims: int | str) -> Input:
    return Input(lambda rng, shape: rng.integers(0, 1000, shape), dims)


def right_padded(*dims: int | str) -> Input:
    """Row i of the mask ends i tokens early, as an encoder's batch does."""
    return Input(lambda _, shape: _mask(shape, lambda i, n: np.arange(n) < max(n - i, 1)), dims)


def left_padded(*dims: int | str) -> Input:
    """Row i of the mask starts i tokens late, as a generated batch does."""
    return Input(lambda _, shape: _mask(shape, lambda i, n: np.arange(n) >= min(i, n - 1)), dims)


def _mask(shape: tuple[int, ...], row: Callable[[int, int], Array]) -> Array:
    return np.stack([row(i, shape[1]) for i in range(shape[0])]).astype(np.int64)


KEY_VALUE = ("key", "value")


def pairs(prefix: str, dims: tuple[int | str, ...], layers: int = LAYERS) -> dict[str, tuple[int | str, ...]]:
    return {f"{prefix}.{i}.{part}": dims for i in range(layers) for part in KEY_VALUE}


def cached(prefix: str, length: str, heads: int = HEADS) -> dict[str, Input]:
    """The keys and values of `length` tokens as inputs."""
    dims = ("batch", heads, length, WIDTH // HEADS)
    return {name: normal(*dims) for name in pairs(prefix, dims)}


def stored(prefix: str, length: str, heads: int = HEADS) -> dict[str, tuple[int | str, ...]]:
    """The keys and values of `length` tokens as outputs."""
    return pairs(prefix, ("batch", heads, length, WIDTH // HEADS))
