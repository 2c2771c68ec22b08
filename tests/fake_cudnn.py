"""Enough of cuDNN's backend, over NumPy, to compute what its descriptors say: convolutions, products, sums and more, of
tensors at addresses of the host.

It refuses what the library refuses: attributes of a descriptor that is finished, or unfinished ones among them, sizes
that do not fit a window, pointers that are aligned less than their tensors say. It shows nothing about the library's
speed or a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from infera_kernels.launch import nominal_target
from infera_kernels.launch.cudnn import Cudnn
from tests.kernels.windows import convolved

BAD, UNSUPPORTED = 2000, 3000
TYPES: Mapping[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    2: np.dtype(np.float16),
    4: np.dtype(np.int32),
    9: np.dtype(ml_dtypes.bfloat16),
    11: np.dtype(np.bool_),
}
FUNCTIONS: Mapping[int, Callable[[Any], Any]] = {
    100: lambda x: np.maximum(x, 0),
    101: np.tanh,
    102: lambda x: 1 / (1 + np.exp(-x)),
    106: lambda x: x / (1 + np.exp(-x)),
    107: lambda x: x / 2 * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    13: np.exp,
    15: np.log,
}
COMBINED: Mapping[int, Callable[..., Any]] = {
    0: np.add,
    1: np.multiply,
    6: np.divide,
    9: np.subtract,
    303: np.greater_equal,
    601: lambda x, other, where: np.where(where, x, other),
}
REDUCED: Mapping[int, Callable[..., Any]] = {0: np.sum, 3: np.max}


@dataclass
class Descriptor:
    """cudnnBackendDescriptor_t: values by attribute; descriptors among them stand for themselves."""

    kind: int
    attributes: dict[int, list[Any]] = field(default_factory=dict)
    finished: bool = False

    def one(self, attribute: int) -> Any:
        (value,) = self.attributes[attribute]
        return value


def of_window(x: Any, w: Any, window: Descriptor) -> Any:
    """x (N, C, spatial...), w (O, C / groups, kernel...)."""
    pads = list(zip(window.attributes[105], window.attributes[104], strict=True))
    x, w = (np.moveaxis(a, 1, -1) for a in (x, w))
    return np.moveaxis(convolved(x, w, window.attributes[103], pads, window.attributes[102]), -1, 1)


class FakeCudnn:
    """Functions by name. `notes` are those of the engines that it offers for a graph, best ones first, `workspace` what
    their plans take, `unprepared` the places of those that become no plan. `asked` are the graphs that were computed;
    `status`, by name, is what a function returns instead of working."""

    def __init__(self, notes: Sequence[Sequence[int]] = ((0,), (0, 2), (0,), (4,), ()), workspace: int = 131) -> None:
        self.notes, self.workspace, self.unprepared = notes, workspace, set[int]()
        self.asked: list[Descriptor] = []
        self.alive: dict[int, Any] = {}
        self.status: dict[str, int] = {}
        self.plans = 0
        self.written: dict[bytes, tuple[int, Descriptor]] = {}
        self._numbers = itertools.count(1)

    def __getitem__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if status := self.status.get(name, 0):
                return status
            found: Any = getattr(self, name.removeprefix("cudnn"))(*args)
            return int(found or 0)

        return call

    def _new(self, pointer: Any, made: Any) -> None:
        pointer._obj.value = next(self._numbers)
        self.alive[pointer._obj.value] = made

    _name = "/site/nvidia/cudnn/lib/libcudnn.so.9"

    def GetVersion(self) -> int:
        return 92801

    def GetCudartVersion(self) -> int:
        return 13050

    def Create(self, pointer: Any) -> None:
        self._new(pointer, {"stream": None})

    def SetStream(self, handle: Any, stream: Any) -> None:
        self.alive[handle.value]["stream"] = stream.value

    def BackendCreateDescriptor(self, kind: int, pointer: Any) -> None:
        self._new(pointer, Descriptor(kind))

    def BackendDestroyDescriptor(self, made: Any) -> None:
        del self.alive[made.value]

    def BackendSetAttribute(self, made: Any, attribute: int, type: int, count: Any, values: Any) -> int:
        found = self.alive[made.value]
        assert count.value == len(values)
        if found.finished:
            return BAD
        given = list(values)
        if type == 15:
            given = [self.alive[value] for value in given]
            if not all(x.finished for x in given):
                return BAD
        found.attributes[attribute] = given
        return 0

    def BackendFinalize(self, made: Any) -> int:
        found = self.alive[made.value]
        if found.finished:
            return BAD
        found.finished = True
        return int(getattr(self, f"_finish_{found.kind}", lambda found: 0)(found))

    def BackendGetAttribute(self, made: Any, attribute: int, type: int, most: Any, count: Any, held: Any) -> int:
        found = self.alive[made.value]
        if not found.finished:
            return BAD
        values = found.attributes[attribute]
        count._obj.value = min(len(values), most.value) if held is not None else len(values)
        for i, value in enumerate(values[: most.value]):
            if type == 15:
                filled = self.alive[held[i]]
                assert (filled.kind, filled.finished) == (value.kind, False)
                filled.attributes, filled.finished = value.attributes, True
            else:
                held[i] = value
        return 0

    def _finish_10(self, made: Descriptor) -> int:
        """A convolution: sizes must fit."""
        window, w, x, y = (made.one(i) for i in (702, 703, 704, 705))
        found = [
            (i + before + after - d * (k - 1) - 1) // s + 1
            for i, k, before, after, d, s in zip(
                x.attributes[902][2:],
                w.attributes[902][2:],
                *(window.attributes[i] for i in (105, 104, 102, 103)),
                strict=True,
            )
        ]
        fits = y.attributes[902] == [x.attributes[902][0], w.attributes[902][0], *found]
        return 0 if fits and window.one(106) == len(found) and window.one(101) == 1 else BAD

    def _finish_4(self, made: Descriptor) -> int:
        """Engines of a graph."""
        assert self.alive[made.one(201).one(800)] is not None
        made.attributes[202] = [
            Descriptor(3, {300: [Descriptor(2, {1303: list(notes)}, True)], 0: [place, made.one(201)]}, True)
            for place, notes in enumerate(self.notes)
        ]
        return 0

    def _finish_5(self, made: Descriptor) -> int:
        """A plan, of an engine or as it was written down."""
        if 405 in made.attributes:
            written = b"".join(made.attributes[405])
            if written not in self.written:
                return BAD
            place, graph = self.written[written]
        else:
            place, graph = made.one(401).attributes[0]
            self.plans += 1
        written = f"the plan of engine {place} for graph {id(graph)}".encode()
        self.written[written] = place, graph
        made.attributes[0], made.attributes[402] = [graph], [self.workspace]
        made.attributes[405] = [bytes([c]) for c in written]
        return UNSUPPORTED if place in self.unprepared else 0

    def BackendExecute(self, handle: Any, plan: Any, pack: Any) -> int:
        assert self.alive[handle.value]["stream"]
        graph, given = self.alive[plan.value].one(0), self.alive[pack.value]
        at = dict(zip(given.attributes[1000], given.attributes[1001], strict=True))
        values: dict[int, Any] = {}

        def read(tensor: Descriptor) -> Any:
            name = tensor.one(906)
            found = values[name] if tensor.one(907) else self._at(tensor, at[name])
            return found.astype(np.float64) if tensor.one(901) in (0, 2, 9) else found

        for operation in graph.attributes[801]:
            to, made = getattr(self, f"_compute_{operation.kind}")(operation, read)
            if to.one(907):
                made = made.astype(TYPES[to.one(901)]) if to.one(901) else made
                assert list(made.shape) == to.attributes[902]
                values[to.one(906)] = made
            else:
                self._at(to, at[to.one(906)])[...] = made
        assert given.one(1003), "plans may use their workspace"
        self.asked.append(graph)
        return 0

    def _compute_10(self, made: Descriptor, read: Any) -> tuple[Descriptor, Any]:
        """A convolution."""
        window, w, x, to = (made.one(i) for i in (702, 703, 704, 705))
        assert (made.one(700), made.one(701), window.one(100)) == (1.0, 0.0, 0)
        return to, of_window(read(x), read(w), window)

    def _compute_13(self, made: Descriptor, read: Any) -> tuple[Descriptor, Any]:
        """A function of elements; what it computes in is what it makes, or float32."""
        how, x, to = (made.one(i) for i in (750, 751, 753))
        others = [read(made.one(i)) for i in (752, 758) if i in made.attributes]
        function = how.one(0)
        if function == 501:
            axis = how.one(9)
            shape = [n if i == axis else 1 for i, n in enumerate(x.attributes[902])]
            return to, np.broadcast_to(np.arange(shape[axis]).reshape(shape), x.attributes[902])
        assert how.one(1) == (to.one(901) if to.one(901) in (4, 11) else 0)
        return to, COMBINED[function](read(x), *others) if others else FUNCTIONS[function](read(x))

    def _compute_19(self, made: Descriptor, read: Any) -> tuple[Descriptor, Any]:
        """Products; heads of b stand against several of a."""
        a, b, to, how = (made.one(i) for i in (1520, 1521, 1522, 1523))
        assert how.one(1500) == 0
        left, right = read(a), read(b)
        return to, left @ np.repeat(right, left.shape[1] // right.shape[1], 1)

    def _compute_22(self, made: Descriptor, read: Any) -> tuple[Descriptor, Any]:
        """Sums and maxima over the axes of which one element is left."""
        x, to, how = (made.one(i) for i in (1610, 1611, 1612))
        sizes, left = x.attributes[902], to.attributes[902]
        axes = tuple(i for i, (n, m) in enumerate(zip(sizes, left, strict=True)) if n != m)
        assert how.one(1601) == 0
        return to, REDUCED[how.one(1600)](read(x), axis=axes, keepdims=True)

    def _at(self, tensor: Descriptor, address: int) -> Any:
        assert address % tensor.one(900) == 0
        dtype, sizes, strides = TYPES[tensor.one(901)], tensor.attributes[902], tensor.attributes[903]
        reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
        memory = (ctypes.c_uint8 * (reach * dtype.itemsize)).from_address(address)
        return np.ndarray(sizes, dtype, memory, 0, [s * dtype.itemsize for s in strides])


def with_cudnn(launcher: Any, library: FakeCudnn) -> Any:
    """The launcher, with cuDNN 9.28.1."""
    launcher.cudnn = Cudnn(library, 0, 0x50)
    launcher.target = replace(nominal_target(90), cudnn="9.28.1")
    return launcher
