"""Many requests' rows in one array, and back."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

HostArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Arrays: TypeAlias = Mapping[str, HostArray]


@dataclass(frozen=True, slots=True)
class PadRule:
    """What an operator declares: the symbolic axis, what ids and values are padded with, the input that is a mask.

    Without an axis nothing is padded.
    """

    axis: str = ""
    value: float = 0.0
    mask: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Padding:
    """How rows of unequal length are made equal: longer at the end, and what comes out cut back.

    `inputs` and `outputs` say which axis is the length, of those tensors that have it; `values` what is added to each
    input. Lengths in `refused` are run as they are: the model cannot be run at the length that they would get.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    values: Mapping[str, float]
    refused: set[int] = field(default_factory=set)

    def length(self, feeds: Arrays) -> int:
        """What the rows are made as long as; 0 where they stay as they are."""
        lengths = {feeds[name].shape[axis] for name, axis in self.inputs.items()}
        if len(lengths) != 1:
            return 0
        padded = padded_length(lengths.pop())
        return 0 if padded in self.refused else padded

    def own_length(self, feeds: Arrays) -> int:
        name, axis = next(iter(self.inputs.items()))
        return int(feeds[name].shape[axis])


def padded_length(length: int) -> int:
    """The next multiple of 8, from 64 on of a quarter of the power of two below: less than a fifth is padding there."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a batch lie: the batch axis of every input and output, and the sizes a batch is padded to.

    `buckets` is ascending; the last one is the most rows a batch, and so a request, may have. The `shared` inputs, of
    one element, have no batch axis: only requests with the same values share a batch.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    buckets: tuple[int, ...]
    shared: tuple[str, ...] = ()
    padding: Padding | None = None

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]


def value_of(array: HostArray) -> Hashable:
    """The value of an array of one element, where NaN equals itself."""
    return array.item() if array.dtype.hasobject else array.tobytes()


class Gatherer:
    """Concatenates feeds along the batch axes, in memory that is kept: it grows to the largest batch yet.

    Inputs without such an axis are those of the first feed.
    """

    def __init__(self, layout: Layout) -> None:
        self._axes, self._shared = layout.inputs, layout.shared
        self._padding = layout.padding
        self._kept: dict[str, HostArray] = {}

    def __call__(self, feeds: Sequence[Arrays], rows: int, padded: int, length: int = 0) -> Arrays:
        """The `rows` rows of all feeds, made as long as `length` unless that is 0, then padding.

        Rows of padding repeat the last row: they fail only where that row does. The arrays are valid until the next
        call.
        """
        gathered: dict[str, HostArray] = {name: feeds[0][name] for name in self._shared}
        for name, axis in self._axes.items():
            parts = [feed[name] for feed in feeds]
            shape = list(parts[0].shape)
            shape[axis] = padded
            along = self._padding.inputs.get(name) if self._padding and length else None
            if along is not None:
                shape[along] = length
            whole = self._array(name, parts[0].dtype, shape)
            ahead = (slice(None),) * axis
            if along is None:
                np.concatenate(parts, axis=axis, out=whole[(*ahead, slice(rows))])
            else:
                self._lengthen(name, parts, whole, axis, along)
            if rows < padded:
                whole[(*ahead, slice(rows, None))] = whole[(*ahead, slice(rows - 1, rows))]
            gathered[name] = whole
        return gathered

    def _lengthen(self, name: str, parts: Sequence[HostArray], whole: HostArray, axis: int, along: int) -> None:
        assert self._padding is not None
        value, start = self._padding.values[name], 0
        index: list[slice] = [slice(None)] * whole.ndim
        for part in parts:
            index[axis] = slice(start, start := start + part.shape[axis])
            index[along] = slice(part.shape[along])
            whole[tuple(index)] = part
            index[along] = slice(part.shape[along], None)
            whole[tuple(index)] = value

    def _array(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> HostArray:
        """An uninitialised array in the memory kept for this input; strings have none."""
        if dtype.hasobject:
            return np.empty(shape, dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        kept = self._kept.get(name)
        if kept is None or kept.nbytes < nbytes:
            kept = self._kept[name] = np.empty(nbytes, np.uint8)
        return kept[:nbytes].view(dtype).reshape(shape)


def split(
    outputs: Arrays, layout: Layout, counts: Sequence[int], padded: int, lengths: Sequence[int] = (), length: int = 0
) -> Iterator[Arrays]:
    """Views of the outputs with `counts[0]` rows, then `counts[1]`, and so on; the padding at the end is left out.

    Where rows were made as long as `length`, each view is cut to its own of `lengths`. Raises ValueError where an
    output does not have `padded` rows of that length.
    """
    cut = layout.padding.outputs if layout.padding is not None and length else {}
    for name, axis in layout.outputs.items():
        shape = outputs[name].shape
        if shape[axis] != padded or (name in cut and shape[cut[name]] != length):
            long = f" of length {length}" if name in cut else ""
            raise ValueError(f"output '{name}' is {shape} for a batch of {padded} rows{long}")
    start = 0
    whole = [(name, outputs[name], (slice(None),) * axis, cut.get(name, -1)) for name, axis in layout.outputs.items()]
    for i, count in enumerate(counts):
        rows = slice(start, start := start + count)
        views = {name: array[(*ahead, rows)] for name, array, ahead, _ in whole}
        for name, _, _, along in whole if cut else ():
            if along >= 0:
                views[name] = views[name][(slice(None),) * along + (slice(lengths[i]),)]
        yield views
