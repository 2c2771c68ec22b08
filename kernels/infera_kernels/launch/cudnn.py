"""cuDNN, through the C interface of its backend: given a graph of operations (`launch.cudnn_graphs`), it makes plans,
best ones first. A plan runs in one call, which allocates nothing and which a stream can record.

Numbers are those of cudnn_graph.h of cuDNN 9.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
from collections.abc import Hashable, Mapping
from contextlib import suppress
from ctypes import byref, c_bool, c_char, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from infera_kernels.calls import Call
from infera_kernels.launch.cache import PlanCache
from infera_kernels.launch.nvidia import LibraryError, find, loads, release
from infera_kernels.launch.types import address_of

_log = logging.getLogger(__name__)

OFF = "INFERA_CUDNN"
"""Environment: 0 and it is not used."""

WORKSPACE = 8 << 20
"""Bytes: no plan that takes more is run."""

FARTHEST = 2**31 - 1
"""Elements from an array's first to its last: not all that it has can count further."""

REMEMBERED = 1024
"""Plans that are remembered: layers of a model ask for the same ones."""

ALIGNED = 16
"""Bytes: more alignment is of no use to it."""

TYPES = {"float16": 2, "bfloat16": 9}
"""cudnnDataType_t of the arrays it is given here; what lies between them is in FLOAT32."""

FLOAT32 = 0

_ENGINE, _CONFIGURATION, _HEURISTICS, _PLAN, _GRAPH, _PACK, _TENSOR = 2, 3, 4, 5, 15, 16, 17
"""cudnnBackendDescriptorType_t"""

WRITTEN = 405
"""CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION"""

_TREE = 3
"""CUDNN_HEUR_MODE_A, its decision trees"""

_REFUSED = frozenset(range(1, 9))
"""cudnnBackendNumericalNote_t of engines that are passed by: inputs made narrower, sums in half precision, sums through
Fourier's or Winograd's transforms, other bits in another run."""

_ASKED = 32
"""Configurations of engines that the library is asked for."""


class Kind(NamedTuple):
    """cudnnBackendAttributeType_t, and how ctypes calls its values."""

    number: int
    type: Any


HANDLE, TYPE, BOOLEAN, INTEGER = Kind(0, c_void_p), Kind(1, c_int), Kind(2, c_bool), Kind(3, c_int64)
FLOAT, POINTER, CONVOLUTION_MODE, HEURISTIC = Kind(4, c_float), Kind(6, c_void_p), Kind(7, c_int), Kind(8, c_int)
NANS, NOTE, FUNCTION, REDUCTION = (Kind(i, c_int) for i in (10, 11, 14, 18))
OBJECT, TEXT = Kind(15, c_void_p), Kind(24, c_char)

Attribute = tuple[int, Kind, Any]


@cache
def library() -> Any | None:
    """The library; None where it is not installed, or turned OFF, or without others that it cannot do without."""
    found = find("cudnn", OFF)
    if found is not None and (lacks := _lacking(found)):
        _log.warning("cuDNN is not used: %s is there, but nowhere the %s that it needs", found._name, lacks)
        return None
    return found


def _lacking(found: Any) -> str:
    """What is not there of the libraries for want of which it ends the process: its own part for graphs, and cuBLASLt
    of the CUDA that it is made for. Empty where all are, and loaded."""
    folder, graphs = Path(found._name).parent, "libcudnn_graph.so.9"
    if os.name != "posix":  # they are called otherwise
        return ""
    if not loads(graphs, folder):
        return graphs
    ask = found["cudnnGetCudartVersion"]
    ask.restype = c_size_t
    major = int(ask()) // 1000
    packages, blas = folder.parent.parent, f"libcublasLt.so.{major}"
    places = folder, packages / "cublas" / "lib", packages / f"cu{major}" / "lib"  # where it looks itself
    return "" if loads(blas, *places) or (find("cublasLt") is not None and loads(blas)) else blas


def installed() -> str:
    """The release of the library, as 9.28.1; empty where there is none."""
    return release(library(), "cudnnGetVersion")


class Object:
    """A descriptor, which it owns, with those that it is made of."""

    def __init__(self, found: Any, kind: int, *attributes: Attribute, finished: bool = True) -> None:
        self._found, self.at, self._parts = found, c_void_p(), attributes
        _check(found, "BackendCreateDescriptor", kind, byref(self.at))
        for attribute, sort, value in attributes:
            values = value if isinstance(value, (list, tuple, bytes)) else (value,)
            array = sort.type * len(values)
            if isinstance(values, bytes):
                given = array.from_buffer_copy(values)
            else:
                given = array(*(v.at if isinstance(v, Object) else v for v in values))
            _check(found, "BackendSetAttribute", self.at, attribute, sort.number, c_int64(len(values)), given)
        if finished:
            _check(found, "BackendFinalize", self.at)

    def count(self, attribute: int, sort: Kind) -> int:
        """How many values an attribute has."""
        count = c_int64()
        self._get(attribute, sort, 0, count, None)
        return count.value

    def values(self, attribute: int, sort: Kind, most: int) -> list[Any]:
        count, held = c_int64(), (sort.type * most)()
        self._get(attribute, sort, most, count, held)
        return list(held)[: count.value]

    def text(self, attribute: int) -> bytes:
        count, held = c_int64(), (c_char * self.count(attribute, TEXT))()
        self._get(attribute, TEXT, len(held), count, held)
        return held.raw[: count.value]

    def objects(self, attribute: int, kind: int, most: int) -> list[Object]:
        """The library fills descriptors that are there."""
        made = [Object(self._found, kind, finished=False) for _ in range(most)]
        count, held = c_int64(), (c_void_p * most)(*(o.at for o in made))
        self._get(attribute, OBJECT, most, count, held)
        return made[: count.value]

    def _get(self, attribute: int, sort: Kind, most: int, count: Any, held: Any) -> None:
        _check(self._found, "BackendGetAttribute", self.at, attribute, sort.number, c_int64(most), byref(count), held)

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process the library may be gone
            self._found["cudnnBackendDestroyDescriptor"](self.at)


class Tensor(NamedTuple):
    """An array with its sizes and strides, in elements."""

    array: Any
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def reach(self) -> int:
        """Elements from the first to the last."""
        return sum((n - 1) * step for n, step in zip(self.sizes, self.strides, strict=True))


def tensor(found: Any, name: int, dtype: int, lies: Tensor, *more: Attribute) -> Object:
    """The descriptor of what a graph calls `name`; without an array, and nothing more, it never reaches memory."""
    virtual = lies.array is None
    aligned = ALIGNED if virtual else min(ALIGNED, (at := address_of(lies.array)) & -at)
    given = (906, INTEGER, name), (901, TYPE, dtype), (900, INTEGER, aligned), (907, BOOLEAN, virtual and not more)
    return Object(found, _TENSOR, *given, (902, INTEGER, lies.sizes), (903, INTEGER, lies.strides), *more)


class Graph(Protocol):
    """What the library is asked for."""

    def tensors(self) -> Mapping[int, Tensor]:
        """What lies in memory, by the names of tensors."""
        ...

    def scalars(self) -> Mapping[int, Any]:
        """Numbers that are read when a plan runs, of ctypes' types, by the names of tensors."""
        ...

    def key(self) -> Hashable:
        """What its operations depend on, tensors apart."""
        ...

    def operations(self, found: Any) -> list[Object]: ...


class Place(NamedTuple):
    """What graphs, the search for engines and plans are told of where they run."""

    graph: tuple[Attribute, ...]
    search: tuple[Attribute, ...]
    plan: tuple[Attribute, ...]


def place_of(handle: c_void_p) -> Place:
    return Place(((800, HANDLE, handle),), (), ((400, HANDLE, handle),))


def plan_of(found: Any, place: Place, asked: Graph, way: int) -> Object | None:
    """The plan of the `way`-th of the engines that the library takes to be fastest, from 1, _REFUSED ones not counted.

    None where it has none, or that takes more than WORKSPACE. Raises LibraryError for a graph that it does not take.
    """
    graph = Object(found, _GRAPH, *place.graph, (801, OBJECT, asked.operations(found)))
    search = Object(found, _HEURISTICS, *place.search, (201, OBJECT, graph), (200, HEURISTIC, _TREE))
    left = way
    for configuration in search.objects(202, _CONFIGURATION, min(_ASKED, search.count(202, OBJECT))):
        (engine,) = configuration.objects(300, _ENGINE, 1)
        if _REFUSED.isdisjoint(engine.values(1303, NOTE, 16)):
            left -= 1
        if not left:
            try:
                plan = Object(found, _PLAN, *place.plan, (401, OBJECT, configuration))
            except LibraryError as error:
                _log.debug("cuDNN offers an engine that it cannot prepare: %s", error)
                return None
            (nbytes,) = plan.values(402, INTEGER, 1)
            return plan if nbytes <= WORKSPACE else None
    return None


def restored(found: Any, place: Place, written: bytes) -> Object:
    """A plan as the library has written it down. Raises LibraryError where it does not take it."""
    return Object(found, _PLAN, *place.plan, (WRITTEN, TEXT, written))


_idle: dict[int, list[c_void_p]] = {}
"""Handles that nobody uses, by GPU: to destroy one waits for the GPU. No lock is around it: one comes back whenever the
garbage collector runs, which may be while another is taken."""


class Cudnn:
    """Graphs on one GPU and one stream. It is used with that GPU current.

    Plans are `kept` on disk, since many take longer to compile than a run; `where` is whatever they are for alone: the
    release of the library, the card and its driver.
    """

    def __init__(
        self, found: Any, device_id: int, stream: int, *, kept: PlanCache | None = None, where: str = ""
    ) -> None:
        self._found, self._device_id, self._stream = found, device_id, stream
        self._kept, self._where = kept, where
        self._handle: c_void_p | None = None
        self._plans: dict[Hashable, Object | None] = {}
        self._lock = threading.Lock()
        self._broken = False

    def call(self, asked: Graph, way: int, workspace: Any) -> Call | None:
        """A graph, which may use `workspace` while it runs and nobody else meanwhile: WORKSPACE bytes of the GPU. `way`
        as in `plan_of`.

        None where the library has no such way, or does not work here. Raises LibraryError.
        """
        tensors, scalars = asked.tensors(), asked.scalars()
        if any(t.reach > FARTHEST for t in tensors.values()):
            return None
        at = [address_of(t.array) for t in tensors.values()]
        lies = [
            (name, t.sizes, t.strides, min(ALIGNED, a & -a)) for (name, t), a in zip(tensors.items(), at, strict=True)
        ]
        key = (type(asked).__name__, asked.key(), *lies, way)
        with self._lock:
            handle = self._opened()
            if handle is None:
                return None
            if key not in self._plans:
                if len(self._plans) >= REMEMBERED:
                    self._plans.clear()
                self._plans[key] = self._planned(place_of(handle), asked, way, f"{self._where} {key}")
            plan = self._plans[key]
        if plan is None:
            return None
        pack = Object(
            self._found,
            _PACK,
            (1000, INTEGER, [*tensors, *scalars]),
            (1001, POINTER, [*at, *map(ctypes.addressof, scalars.values())]),
            (1003, POINTER, address_of(workspace)),
        )
        return self._run, (plan, pack, asked, scalars, workspace)

    def _opened(self) -> c_void_p | None:
        if self._handle is None and not self._broken:
            try:
                handle = _idle.setdefault(self._device_id, []).pop()
            except IndexError:
                handle = c_void_p()
            status = 0 if handle else self._found["cudnnCreate"](byref(handle))
            status = status or self._found["cudnnSetStream"](handle, c_void_p(self._stream))
            self._broken = bool(status)
            if status:
                _log.warning("cuDNN is not used, it does not start on GPU %d: status %d", self._device_id, status)
            else:
                self._handle = handle
        return self._handle

    def _planned(self, place: Place, asked: Graph, way: int, about: str) -> Object | None:
        key = hashlib.sha256(about.encode()).hexdigest()
        if (written := self._kept.get(key) if self._kept else None) is not None:
            try:
                return restored(self._found, place, written)
            except LibraryError as error:
                _log.warning("a plan that is kept is made anew, cuDNN does not take it: %s", error)
        try:
            plan = plan_of(self._found, place, asked, way)
        except LibraryError as error:
            _log.debug("a %s that cuDNN does not take: %s", type(asked).__name__, error)
            return None
        if plan is not None and self._kept:
            with suppress(LibraryError):
                self._kept.put(key, about, plan.text(WRITTEN))
        return plan

    def _run(self, plan: Object, pack: Object, *kept: Any) -> None:
        """One at a time: a handle is for one thread."""
        with self._lock:
            _check(self._found, "BackendExecute", self._handle, plan.at, pack.at)

    def __del__(self) -> None:
        if self._handle is not None:
            with suppress(Exception):
                _idle[self._device_id].append(self._handle)


def _check(found: Any, name: str, *args: Any) -> None:
    """Calls a function. Raises LibraryError where that fails."""
    if status := found[f"cudnn{name}"](*args):
        raise LibraryError(f"cudnn{name} failed with status {status}; {OFF}=0 leaves its work to Triton's kernels")
