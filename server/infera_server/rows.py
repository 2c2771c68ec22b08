"""Many requests' rows in one array, and back."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

HostArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Arrays: TypeAlias = Mapping[str, HostArray]


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

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows`."""
        return next(b for b in self.buckets if b >= rows)


def value_of(array: HostArray) -> Hashable:
    """The value of an array of one element, where NaN equals itself."""
    return array.item() if array.dtype.hasobject else array.tobytes()


def in_order(feeds: Arrays) -> Arrays:
    """The feeds, contiguous and aligned: bytes off the wire start anywhere. Copies only what is not."""
    return {
        n: a if (f := a.flags).c_contiguous and f.aligned else np.require(a, None, ["C", "A"]) for n, a in feeds.items()
    }


class Gatherer:
    """Concatenates feeds along the axis of each input, in memory that is kept: it grows to the largest batch yet.

    `shared` inputs are those of the first feed.
    """

    def __init__(self, axes: Mapping[str, int], shared: Iterable[str] = ()) -> None:
        self._axes, self._shared = axes, tuple(shared)
        self._kept: dict[str, HostArray] = {}

    def __call__(self, feeds: Sequence[Arrays], rows: int, padded: int) -> Arrays:
        """The `rows` rows of all feeds, then padding, which repeats the last row: it fails only where that row does.

        The arrays are valid until the next call.
        """
        gathered: dict[str, HostArray] = {name: feeds[0][name] for name in self._shared}
        for name, axis in self._axes.items():
            parts = [feed[name] for feed in feeds]
            shape = list(parts[0].shape)
            shape[axis] = padded
            whole = self._array(name, parts[0].dtype, shape)
            ahead = (slice(None),) * axis
            np.concatenate(parts, axis=axis, out=whole[(*ahead, slice(rows))])
            if rows < padded:
                whole[(*ahead, slice(rows, None))] = whole[(*ahead, slice(rows - 1, rows))]
            gathered[name] = whole
        return gathered

    def _array(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> HostArray:
        """An uninitialised array in the memory kept for this input; strings have none."""
        if dtype.hasobject:
            return np.empty(shape, dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        kept = self._kept.get(name)
        if kept is None or kept.nbytes < nbytes:
            kept = self._kept[name] = np.empty(nbytes, np.uint8)
        return kept[:nbytes].view(dtype).reshape(shape)


def split(outputs: Arrays, layout: Layout, counts: Sequence[int], padded: int) -> Iterator[Arrays]:
    """Views of the outputs with `counts[0]` rows, then `counts[1]`, and so on; the padding at the end is left out.

    Raises ValueError where an output does not have `padded` rows.
    """
    for name, axis in layout.outputs.items():
        if outputs[name].shape[axis] != padded:
            raise ValueError(f"output '{name}' is {outputs[name].shape} for a batch of {padded} rows")
    start = 0
    for count in counts:
        rows = slice(start, start := start + count)
        yield {name: outputs[name][(slice(None),) * axis + (rows,)] for name, axis in layout.outputs.items()}
