"""Convolutions by cuDNN, through the C interface of its backend: one is a graph of operations, which the library makes
plans for, best ones first. A plan runs in one call, which allocates nothing and which a stream can record.

Numbers are those of cudnn_graph.h of cuDNN 9. A sum is finished as activation(sum + residual + bias), in this order:
for others the library has no kernels ready.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from ctypes import byref, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from math import prod
from typing import Any, NamedTuple

from infera_kernels.calls import Call
from infera_kernels.launch.nvidia import LibraryError, find
from infera_kernels.launch.types import address_of

_log = logging.getLogger(__name__)

OFF = "INFERA_CUDNN"
"""Environment: 0 and it is not used."""

WORKSPACE = 8 << 20
"""Bytes: no plan that takes more is run."""

REMEMBERED = 1024
"""Plans that are remembered: layers of a model ask for the same ones."""

TYPES = {"float16": 2, "bfloat16": 9}
"""cudnnDataType_t of the images it is given here; sums and what follows them are in _FLOAT32."""

_FLOAT32 = 0

ACTIVATIONS = {"relu": 100, "tanh": 101, "sigmoid": 102, "gelu": 104, "silu": 106, "gelu_tanh": 107}
"""cudnnPointwiseMode_t; others than "relu" the library compiles when a plan is made, where it can."""

_ADD, _RELU = 0, 100

_POINTWISE, _CONVOLUTION, _ENGINE, _CONFIGURATION, _HEURISTICS, _PLAN = 0, 1, 2, 3, 4, 5
_CONVOLVE, _APPLY, _GRAPH, _PACK, _TENSOR = 10, 13, 15, 16, 17
"""cudnnBackendDescriptorType_t"""

_TREE = 3
"""CUDNN_HEUR_MODE_A, its decision trees"""

_REFUSED = frozenset({1, 2, 3, 4, 5, 6, 7, 8})
"""cudnnBackendNumericalNote_t of engines that are passed by: inputs made narrower, sums in half precision, sums through
Fourier's or Winograd's transforms, other bits in another run."""

_ASKED = 32
"""Configurations of engines that the library is asked for."""


class _Kind(NamedTuple):
    """cudnnBackendAttributeType_t, and how ctypes calls its values."""

    number: int
    type: Any


_HANDLE, _DATA, _BOOLEAN, _INTEGER = _Kind(0, c_void_p), _Kind(1, c_int), _Kind(2, c_bool), _Kind(3, c_int64)
_FLOAT, _POINTER, _MODE, _TRIAL = _Kind(4, c_float), _Kind(6, c_void_p), _Kind(7, c_int), _Kind(8, c_int)
_NANS, _NOTE, _FUNCTION, _OBJECT = _Kind(10, c_int), _Kind(11, c_int), _Kind(14, c_int), _Kind(15, c_void_p)

Attribute = tuple[int, _Kind, Any]


class Tensor(NamedTuple):
    """An array with its sizes (N, C, spatial...) and strides, in elements."""

    array: Any
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


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


@cache
def library() -> Any | None:
    """The library; None where it is not installed, or turned OFF."""
    return find("cudnn", OFF)


def installed() -> str:
    """The release of the library, as 9.28.1; empty where there is none."""
    found = library()
    if found is None:
        return ""
    ask = found["cudnnGetVersion"]
    ask.restype = c_size_t
    number = int(ask())
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


class _Object:
    """A descriptor, which it owns, with those that it is made of."""

    def __init__(self, found: Any, kind: int, *attributes: Attribute, finished: bool = True) -> None:
        self._found, self.at, self.parts = found, c_void_p(), attributes
        _check(found, "BackendCreateDescriptor", kind, byref(self.at))
        for attribute, sort, value in attributes:
            values = value if isinstance(value, (list, tuple)) else (value,)
            given = (sort.type * len(values))(*(v.at if isinstance(v, _Object) else v for v in values))
            _check(found, "BackendSetAttribute", self.at, attribute, sort.number, c_int64(len(values)), given)
        if finished:
            _check(found, "BackendFinalize", self.at)

    def count(self, attribute: int, sort: _Kind) -> int:
        """How many values an attribute has."""
        count = c_int64()
        self._get(attribute, sort, 0, count, None)
        return count.value

    def values(self, attribute: int, sort: _Kind, most: int) -> list[Any]:
        count, held = c_int64(), (sort.type * most)()
        self._get(attribute, sort, most, count, held)
        return list(held)[: count.value]

    def objects(self, attribute: int, kind: int, most: int) -> list[_Object]:
        """The library fills descriptors that are there."""
        made = [_Object(self._found, kind, finished=False) for _ in range(most)]
        count, held = c_int64(), (c_void_p * most)(*(o.at for o in made))
        self._get(attribute, _OBJECT, most, count, held)
        return made[: count.value]

    def _get(self, attribute: int, sort: _Kind, most: int, count: Any, held: Any) -> None:
        _check(self._found, "BackendGetAttribute", self.at, attribute, sort.number, c_int64(most), byref(count), held)

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process the library may be gone
            self._found["cudnnBackendDestroyDescriptor"](self.at)


class Place(NamedTuple):
    """What graphs, the search for engines and plans are told of where they run."""

    graph: tuple[Attribute, ...]
    search: tuple[Attribute, ...]
    plan: tuple[Attribute, ...]


def place_of(handle: c_void_p) -> Place:
    return Place(((800, _HANDLE, handle),), (), ((400, _HANDLE, handle),))


def plan_of(found: Any, place: Place, made: Convolution, way: int) -> _Object | None:
    """The plan of the `way`-th of the engines that the library takes to be fastest, from 1, _REFUSED ones not counted.

    None where it has none, or that takes more than WORKSPACE. Raises LibraryError for a graph that it does not take.
    """
    graph = _Object(found, _GRAPH, *place.graph, (801, _OBJECT, _operations(found, made)))
    asked = _Object(found, _HEURISTICS, *place.search, (201, _OBJECT, graph), (200, _TRIAL, _TREE))
    left = way
    for configuration in asked.objects(202, _CONFIGURATION, min(_ASKED, asked.count(202, _OBJECT))):
        (engine,) = configuration.objects(300, _ENGINE, 1)
        if _REFUSED.isdisjoint(engine.values(1303, _NOTE, 16)):
            left -= 1
        if not left:
            try:
                plan = _Object(found, _PLAN, *place.plan, (401, _OBJECT, configuration))
            except LibraryError as error:
                _log.debug("cuDNN offers an engine that it cannot prepare: %s", error)
                return None
            (nbytes,) = plan.values(402, _INTEGER, 1)
            return plan if nbytes <= WORKSPACE else None
    return None


ALIGNED = 16
"""Bytes: more alignment is of no use to it."""

_X, _W, _OUT, _RESIDUAL, _BIAS, _BETWEEN = 1, 2, 3, 4, 5, 6
"""What tensors of a graph are called."""


def _operations(found: Any, made: Convolution) -> list[_Object]:
    terms = [(name, term) for name, term in _terms(made) if term is not None]
    added = [_tensor(found, made, name, term) for name, term in terms]
    names = iter(range(_BETWEEN, _BETWEEN + len(added) + 1))
    left = len(added) + (made.activation is not None)
    sums = _result(found, made, names, left)
    window = _Object(
        found,
        _CONVOLUTION,
        (100, _DATA, _FLOAT32),
        (101, _MODE, 1),  # a window that is not turned
        (102, _INTEGER, made.dilations),
        (103, _INTEGER, made.strides),
        (104, _INTEGER, [after for _, after in made.pads]),
        (105, _INTEGER, [before for before, _ in made.pads]),
        (106, _INTEGER, len(made.pads)),
    )
    factors = [_tensor(found, made, name, of) for name, of in ((_W, made.w), (_X, made.x))]
    given = [
        (attribute, _OBJECT, o) for attribute, o in zip((702, 703, 704, 705), (window, *factors, sums), strict=True)
    ]
    operations = [_Object(found, _CONVOLVE, *given, (700, _FLOAT, 1.0), (701, _FLOAT, 0.0))]
    add = _Object(found, _POINTWISE, (0, _FUNCTION, _ADD), (1, _DATA, _FLOAT32))
    for term in added:
        left -= 1
        total = _result(found, made, names, left)
        operations.append(_applied(found, add, sums, total, (752, _OBJECT, term)))
        sums = total
    if made.activation is not None:
        function = ACTIVATIONS[made.activation]
        nans = ((2, _NANS, 1),) if function == _RELU else ()  # else it makes 0 of NaN
        act = _Object(found, _POINTWISE, (0, _FUNCTION, function), (1, _DATA, _FLOAT32), *nans)
        operations.append(_applied(found, act, sums, _result(found, made, names, 0)))
    return operations


def _applied(found: Any, how: _Object, of: _Object, to: _Object, *more: Attribute) -> _Object:
    return _Object(found, _APPLY, (750, _OBJECT, how), (751, _OBJECT, of), (753, _OBJECT, to), *more)


def _terms(made: Convolution) -> tuple[tuple[int, Tensor | None], ...]:
    """What is added to sums, in turn, with its name; a bias as an image of one pixel."""
    channels, axes = made.out.sizes[1], len(made.pads)
    bias = Tensor(made.bias, (1, channels, *(1,) * axes), (channels, 1, *(channels,) * axes))
    return (_RESIDUAL, made.residual), (_BIAS, None if made.bias is None else bias)


def _tensor(found: Any, made: Convolution, name: int, of: Tensor) -> _Object:
    at = address_of(of.array)
    return _described(found, name, TYPES[made.dtype], of.sizes, of.strides, min(ALIGNED, at & -at))


def _result(found: Any, made: Convolution, names: Iterator[int], left: int) -> _Object:
    """What an operation makes: the output where none is `left`, else float32 that never reach memory."""
    if not left:
        return _tensor(found, made, _OUT, made.out)
    sizes = made.out.sizes
    return _described(found, next(names), _FLOAT32, sizes, channels_last(sizes), ALIGNED, (907, _BOOLEAN, True))


def _described(
    found: Any, name: int, dtype: int, sizes: Sequence[int], strides: Sequence[int], aligned: int, *more: Attribute
) -> _Object:
    return _Object(
        found,
        _TENSOR,
        (906, _INTEGER, name),
        (901, _DATA, dtype),
        (900, _INTEGER, aligned),
        (902, _INTEGER, sizes),
        (903, _INTEGER, strides),
        *more,
    )


def channels_last(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of (N, C, spatial...) in one piece, channels next to each other."""
    _, channels, *space = sizes
    inner = [channels * prod(space[i + 1 :]) for i in range(len(space))]
    return (channels * prod(space), 1, *inner)


_idle: dict[int, list[c_void_p]] = {}
"""Handles that nobody uses, by GPU: to destroy one waits for the GPU."""
_idle_lock = threading.Lock()


class Cudnn:
    """Convolutions on one GPU and one stream. It is used with that GPU current."""

    def __init__(self, found: Any, device_id: int, stream: int) -> None:
        self._found, self._device_id, self._stream = found, device_id, stream
        self._handle: c_void_p | None = None
        self._plans: dict[Hashable, _Object | None] = {}
        self._lock = threading.Lock()
        self._broken = False

    def call(self, made: Convolution, way: int, workspace: Any) -> Call | None:
        """The convolution, which may use `workspace` while it runs and nobody else meanwhile: WORKSPACE bytes of the
        GPU. `way` as in `plan_of`.

        None where the library has no such way, or does not work here. Raises LibraryError.
        """
        given = ((_X, made.x), (_W, made.w), (_OUT, made.out), *_terms(made))
        tensors = {name: tensor for name, tensor in given if tensor is not None}
        at = [address_of(t.array) for t in tensors.values()]
        key = (
            *(made.dtype, made.pads, made.strides, made.dilations, made.activation, way),
            *((name, *t[1:]) for name, t in tensors.items()),
            *(min(ALIGNED, address & -address) for address in at),
        )
        with self._lock:
            handle = self._opened()
            if handle is None:
                return None
            if key not in self._plans:
                if len(self._plans) >= REMEMBERED:
                    self._plans.clear()
                self._plans[key] = self._planned(place_of(handle), made, way)
            plan = self._plans[key]
        if plan is None:
            return None
        values = (1000, _INTEGER, list(tensors)), (1001, _POINTER, at), (1003, _POINTER, address_of(workspace))
        pack = _Object(self._found, _PACK, *values)
        return self._run, (plan, pack, made, workspace)

    def _opened(self) -> c_void_p | None:
        if self._handle is None and not self._broken:
            with _idle_lock:
                free = _idle.setdefault(self._device_id, [])
                handle = free.pop() if free else c_void_p()
            status = 0 if handle else self._found["cudnnCreate"](byref(handle))
            status = status or self._found["cudnnSetStream"](handle, c_void_p(self._stream))
            self._broken = bool(status)
            if status:
                _log.warning("cuDNN is not used, it does not start on GPU %d: status %d", self._device_id, status)
            else:
                self._handle = handle
        return self._handle

    def _planned(self, place: Place, made: Convolution, way: int) -> _Object | None:
        try:
            return plan_of(self._found, place, made, way)
        except LibraryError as error:
            _log.debug("a convolution that cuDNN does not take: %s", error)
            return None

    def _run(self, plan: _Object, pack: _Object, *kept: Any) -> None:
        """One at a time: a handle is for one thread."""
        with self._lock:
            _check(self._found, "BackendExecute", self._handle, plan.at, pack.at)

    def __del__(self) -> None:
        if self._handle is not None:
            with suppress(Exception), _idle_lock:
                _idle[self._device_id].append(self._handle)


def _check(found: Any, name: str, *args: Any) -> None:
    """Calls a function. Raises LibraryError where that fails."""
    if status := found[f"cudnn{name}"](*args):
        raise LibraryError(f"cudnn{name} failed with status {status}; {OFF}=0 leaves convolutions to Triton's kernels")
