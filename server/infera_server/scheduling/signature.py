"""What a served model takes and gives, in the terms of the V2 protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infera_server.codec import datatype_of
from infera_server.runtime import Specs
from infera_server.scheduling.rows import Layout


def agree(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes, with -1 for open dimensions, can be those of one array."""
    return len(a) == len(b) and all(-1 in (x, y) or x == y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. `shape` has -1 for every dimension that is not fixed, the batch included.

    An `optional` input has a value in the model. `labels` are the names of an output's classes, as far as they go.
    """

    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    optional: bool = False
    labels: tuple[str, ...] = ()

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether the fixed dimensions are as declared."""
        return len(shape) == len(self.shape) and all(
            want in (-1, got) for want, got in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Signature:
    """A model version's tensors; with a layout, requests have at most `layout.max_rows` rows.

    A `decoupled` model gives any number of responses to a request: it takes those that say who gets `each`.
    """

    name: str
    version: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    layout: Layout | None
    decoupled: bool = False

    def same_tensors(self, other: Signature) -> bool:
        """Whether what is a request for one is a request for the other, with replies of equal form."""
        return (self.inputs, self.outputs, self.decoupled) == (other.inputs, other.outputs, other.decoupled)

    @property
    def leading(self) -> bool:
        """Whether the batch is the first axis of every tensor, which is all that Triton's configuration can say."""
        layout = self.layout
        return layout is not None and not any((*layout.inputs.values(), *layout.outputs.values(), *layout.shared))


def tensors(specs: Specs, *, optional: bool = False) -> dict[str, Tensor]:
    """The specs in the protocol's terms. Raises ValueError for a dtype that has no name there."""
    return {
        name: Tensor(
            name,
            datatype_of(spec.dtype, name),
            spec.dtype,
            tuple(d if isinstance(d, int) else -1 for d in spec.shape),
            optional,
        )
        for name, spec in specs.items()
    }
