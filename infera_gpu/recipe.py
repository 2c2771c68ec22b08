"""Bound plans told without addresses, so that a plan can be bound again without asking its kernels.

Kernels look at shapes, lay weights out and cut what they compute into blocks: for a small model that takes as long as
the inference itself. What comes of it are calls of few functions with arrays, which lie in an arena, in constants, in
what was packed of those, or which a kernel made for itself. A recipe names all of these. It holds no code: a function
is named, and it is one of NUMPYS, of METHODS or of kernels that say that another process may be told to call them
(`sendable`). Steps with calls of other functions are left out, and bound by their kernels.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.graph_codec import Unencodable, code_of
from infera_gpu.op import Call
from infera_gpu.spec import DType, dtype_of_onnx
from infera_kernels.cpu.aligned import address, root_of
from infera_kernels.cpu.packed import copied

NUMPYS = frozenset({"copyto", "einsum"})
"""Functions of NumPy's that a recipe may name, beside ufuncs."""

METHODS = frozenset({"argmax", "argmin", "clip", "put", "take"})
"""Methods of arrays that a recipe may name."""

UFUNC_METHODS = frozenset({"reduce", "accumulate", "at", "reduceat"})
"""Methods of ufuncs that a recipe may name."""

ALIGNED = 16
"""Bytes that NumPy aligns memory to: what begins with so many begins with a cache line where a recipe is followed."""

_NUMPYS = {getattr(np, name): name for name in NUMPYS}
_METHODS = {getattr(np.ndarray, name): name for name in METHODS}
_KERNELS = "infera_kernels.cpu."
_PLAIN = (bool, int, float, str, type(None))

Block: TypeAlias = list[Any]
"""["arena"], ["constant", name], ["packed", name of the constant, tag, array] or ["own", array]: memory."""

Form: TypeAlias = tuple[str, str, HostArray]
"""What was packed of a constant: the constant's name, a tag, and what it is; a constant itself has an empty tag."""

View: TypeAlias = list[int]
"""An array: which block, its first byte there, and where its shape, strides and dtype are told."""


class Recipe(NamedTuple):
    """The calls of a plan's steps. Numbers from 0 on mean views, those below mean values: -1 the first."""

    blocks: list[Block]
    dtypes: list[int | str]
    tuples: list[list[int]]
    views: list[View]
    values: list[list[Any]]
    """Each what kind, and of what; those that others are made of come before these."""
    steps: list[list[Any] | None]
    """Of each step its calls, [function, arguments], or lists of such lists that are made at the same time."""

    @property
    def forms(self) -> list[Form]:
        """What was packed, as far as it is there."""
        return [(name, tag, array) for _, name, tag, array in (b for b in self.blocks if len(b) == 4)]


class Written(NamedTuple):
    """A recipe in few objects, without what was packed: plans stay, and garbage collection looks through them."""

    text: str
    """JSON, without the arrays of blocks."""
    own: tuple[HostArray, ...]
    """Those of blocks, in their order, but for what was packed."""
    packed: tuple[tuple[str, str], ...]
    """Names and tags of what was packed."""

    @classmethod
    def of(cls, recipe: Recipe) -> Written:
        own = tuple([block[1] for block in recipe.blocks if block[0] == "own"])
        packed = tuple([(name, tag) for name, tag, _ in recipe.forms])
        blocks = [["own"] if block[0] == "own" else block[:3] for block in recipe.blocks]
        return cls(json.dumps([blocks, *recipe[1:]], separators=(",", ":")), own, packed)

    def recipe(self) -> Recipe:
        """Without what was packed. Raises ValueError, TypeError or LookupError where there is none."""
        blocks, *rest = json.loads(self.text)
        own = iter(self.own)
        read = [["own", next(own)] if block[0] == "own" else block for block in blocks]
        return Recipe(read, *rest)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.own)


Parts: TypeAlias = Callable[[Call], "Sequence[Sequence[Call]] | None"]
"""The calls that a call makes at the same time; None of any other."""


def tell(
    calls: Sequence[Call],
    starts: Sequence[int],
    arena: HostArray,
    held: Iterable[Form],
    direct: Mapping[str, Any],
    parts: Parts,
) -> Recipe:
    """The recipe of steps that make the calls from `starts[i]` to `starts[i + 1]`.

    `held` are constants and what was packed of them. `direct` are the objects by input name whose `copy_to` calls may
    be.
    """
    teller, steps = _Teller(arena, held, direct, parts), [calls[start:stop] for start, stop in pairwise(starts)]
    teller.find(steps)
    return teller.told._replace(steps=[teller.step(some) for some in steps])


def _span(a: HostArray, at: int) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one that an array reaches, which has elements, the first `at`."""
    low = high = at
    for size, stride in zip(a.shape, a.strides, strict=True):
        reach = (size - 1) * stride
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + a.itemsize


class _Teller:
    """What has been told so far."""

    def __init__(self, arena: HostArray, held: Iterable[Form], direct: Mapping[str, Any], parts: Parts) -> None:
        self.told = Recipe([], [], [], [], [], [])
        self._parts = parts
        self._direct = {id(given): name for name, given in direct.items()}
        self._spans: list[tuple[int, int, Block]] = []
        """Addresses at which what may be named begins and ends, in order."""
        self._nothing: Block = ["own", np.zeros(0, np.uint8)]
        self._places: dict[int, tuple[int, int, Block]] = {}
        """Of arrays, by their id: the address of the first element, that of a block, and the block."""
        self._numbers: dict[Any, int] = {}
        self._add(["arena"], arena)
        for name, tag, array in held:
            self._add(["packed", name, tag, array] if tag else ["constant", name], array)
        self._spans.sort(key=lambda span: span[0])

    def _add(self, block: Block, array: HostArray) -> None:
        if array.size and array.flags.c_contiguous:
            self._spans.append((*_span(array, address(array)), block))

    def find(self, steps: Sequence[Sequence[Call]]) -> None:
        """Finds the blocks that arrays lie in, and makes blocks of those that kernels made for themselves: one for all
        that share memory."""
        roots: dict[int, list[tuple[HostArray, int, int, int]]] = {}
        for array in _arrays([one for calls in steps for call in calls for one in self._all(call)]):
            if id(array) in self._places or array.dtype.hasobject:
                continue
            at = address(array)
            self._places[id(array)] = at, at, self._nothing
            if array.size:
                low, high = _span(array, at)
                place = self._place(low, high)
                if place is not None:
                    self._places[id(array)] = at, *place
                else:
                    root = root_of(array)
                    roots.setdefault(id(root), []).append((array, at, low, high))
        for arrays in roots.values():
            low, high = min(low for *_, low, _ in arrays), max(high for *_, high in arrays)
            low -= low % ALIGNED
            room = np.zeros(high - low, np.uint8)
            block = ["own", room]
            for array, at, _, _ in arrays:
                np.ndarray(array.shape, array.dtype, room, at - low, array.strides)[...] = array
                self._places[id(array)] = at, low, block

    def _all(self, call: Call) -> Iterator[Any]:
        """What a call consists of, and those that it makes at the same time."""
        parts = self._parts(call)
        if parts is None:
            yield call
        else:
            yield from (one for part in parts for one in part)

    def _place(self, low: int, high: int) -> tuple[int, Block] | None:
        """The block that bytes [low, high) lie in, and where it begins."""
        at = bisect_right(self._spans, low, key=lambda span: span[0])
        while at:  # one may lie within another
            at -= 1
            begin, end, block = self._spans[at]
            if high <= end:
                return begin, block
        return None

    def step(self, calls: Sequence[Call]) -> list[Any] | None:
        """The calls of one step; None where one cannot be told."""
        counts, numbers = [len(some) for some in self.told], len(self._numbers)
        try:
            return [self._call(call) for call in calls]
        except Unencodable:
            lists: tuple[list[Any], ...] = tuple(self.told)
            for some, count in zip(lists, counts, strict=True):
                del some[count:]
            while len(self._numbers) > numbers:
                self._numbers.popitem()
            return None

    def _call(self, call: Call) -> list[Any]:
        parts = self._parts(call)
        if parts is not None:
            return [[self._call(one) for one in part] for part in parts]
        fn, args = call
        return [self._number(fn), [self._number(a) for a in args]]

    def _number(self, value: Any) -> int:
        """Of a view or of a value."""
        if isinstance(value, np.ndarray):
            return self._view(value)
        said = self._value(value)
        key = ("value", *map(repr, said))
        found = self._numbers.get(key)
        if found is None:
            self.told.values.append(said)
            found = self._numbers[key] = -len(self.told.values)
        return found

    def _value(self, value: Any) -> list[Any]:
        if type(value) in _PLAIN:
            return ["plain", value]
        if isinstance(value, np.generic):
            return ["scalar", code_of(value.dtype), value.item()]
        if type(value) is tuple or type(value) is list:
            return [type(value).__name__, [self._number(v) for v in value]]
        if isinstance(value, np.dtype):
            return ["dtype", code_of(value)]
        if isinstance(value, slice):
            return ["slice", [self._number(v) for v in (value.start, value.stop, value.step)]]
        return self._function(value)

    def _function(self, fn: Any) -> list[Any]:
        if not callable(fn):
            raise Unencodable(f"a {type(fn).__name__}")
        name, owner = str(getattr(fn, "__name__", "")), getattr(fn, "__self__", None)
        if type(fn) is partial:
            keywords = {k: self._number(v) for k, v in fn.keywords.items()}
            return ["partial", self._number(fn.func), [self._number(a) for a in fn.args], keywords]
        if isinstance(fn, np.ufunc) and getattr(np, name, None) is fn:
            return ["ufunc", name]
        if fn in _METHODS:
            return ["ndarray", _METHODS[fn]]
        if fn in _NUMPYS:
            return ["numpy", _NUMPYS[fn]]
        if isinstance(fn, MethodType) and id(owner) in self._direct and name == "copy_to":
            return ["direct", self._direct[id(owner)]]
        if isinstance(fn, BuiltinMethodType) and name in _methods_of(owner):
            return ["method", self._number(owner), name]
        if isinstance(fn, FunctionType):
            return ["kernel", *_kernel(fn)]
        if getattr(fn, "sendable", False):
            maker, args = fn.__reduce__()
            return ["made", *_kernel(maker), [self._number(a) for a in args]]
        raise Unencodable(f"a call of {fn!r}")

    def _view(self, a: HostArray) -> int:
        if type(a) is not np.ndarray or a.dtype.hasobject:
            raise Unencodable(f"an array of {a.dtype}")
        at, begin, block = self._places[id(a)]
        key = (at, a.shape, a.strides, a.dtype)
        found = self._numbers.get(key)
        if found is None:
            number = self._listed(("block", id(block)), block, self.told.blocks)
            self.told.views.append(
                [number, at - begin, self._tuple(a.shape), self._tuple(a.strides), self._dtype(a.dtype)]
            )
            found = self._numbers[key] = len(self.told.views) - 1
        return found

    def _tuple(self, numbers: tuple[int, ...]) -> int:
        return self._listed(("tuple", numbers), list(numbers), self.told.tuples)

    def _dtype(self, dtype: DType) -> int:
        said = f"V{dtype.itemsize}" if dtype.type is np.void and dtype.names is None else code_of(dtype)
        return self._listed(("dtype", said), said, self.told.dtypes)

    def _listed(self, key: Any, said: Any, told: list[Any]) -> int:
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(told)
            told.append(said)
        return found


def _methods_of(owner: object) -> frozenset[str]:
    """Names of methods that a recipe may name."""
    if isinstance(owner, np.ufunc):
        return UFUNC_METHODS
    return METHODS if isinstance(owner, np.ndarray) else frozenset()


def _kernel(fn: Any) -> tuple[str, str]:
    """Module and name of a kernel's function that may be told. Raises Unencodable."""
    module, name = str(fn.__module__), str(fn.__qualname__)
    if not module.startswith(_KERNELS) or not getattr(fn, "sendable", False):
        raise Unencodable(f"a call of {module}.{name}")
    return module, name


def _arrays(value: Any) -> Iterator[HostArray]:
    """The arrays in nested tuples and lists, and in functions that have arguments by now."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _arrays(one)
    elif type(value) is partial:
        yield from _arrays([value.func, value.args, list(value.keywords.values())])
    elif isinstance(value, BuiltinMethodType):
        yield from _arrays(value.__self__)
    elif getattr(value, "sendable", False) and not isinstance(value, FunctionType):
        yield from _arrays(value.__reduce__()[1])


class Surroundings(NamedTuple):
    """What a recipe is followed with."""

    arena: HostArray
    constant: Callable[[str], HostArray]
    packed: Callable[[str, str], HostArray]
    """What was packed of a constant of this name, by its tag."""
    direct: Mapping[str, Any]
    parallel: Callable[[Sequence[Iterable[Call]]], list[Call]]


def followed(recipe: Recipe, around: Surroundings) -> list[list[Call] | None]:
    """The calls of each step; None of one that the recipe leaves out.

    Raises an exception of Python's where it does not suit: no array reaches beyond its block.
    """
    blocks = [_memory(block, around) for block in recipe.blocks]
    dtypes = [_dtype(said) for said in recipe.dtypes]
    tuples = [tuple(said) for said in recipe.tuples]
    views = [
        np.ndarray(tuples[shape], dtypes[dtype], blocks[block], start, tuples[strides])
        for block, start, shape, strides, dtype in recipe.views
    ]
    values: list[Any] = []

    def of(number: int) -> Any:
        return views[number] if number >= 0 else values[~number]

    for kind, *said in recipe.values:
        values.append(_MADE[kind](of, around, *said))

    def calls(told: Sequence[Any]) -> list[Call]:
        made: list[Call] = []
        for call in told:
            if call and isinstance(call[0], int):
                made.append((of(call[0]), tuple([of(a) for a in call[1]])))
            else:
                made += around.parallel([calls(part) for part in call])
        return made

    return [None if step is None else calls(step) for step in recipe.steps]


def _dtype(said: int | str) -> DType:
    """Raises ValueError for one whose elements are Python's objects."""
    if isinstance(said, str):
        return np.dtype((np.void, int(said.removeprefix("V"))))
    found = dtype_of_onnx(said)
    if found.hasobject:
        raise ValueError("an array of objects")
    return found


def _memory(block: Block, around: Surroundings) -> HostArray:
    """The bytes of a block."""
    kind, *said = block
    if kind == "arena":
        return around.arena
    if kind == "own":
        made: HostArray = copied(said[0])  # calls may write to it
        return made
    found = around.constant(*said) if kind == "constant" else around.packed(*said)
    return found.reshape(-1).view(np.uint8)


_Of: TypeAlias = Callable[[int], Any]


def _partial(of: _Of, around: Surroundings, fn: int, args: Sequence[int], keywords: Mapping[str, int]) -> Any:
    return partial(of(fn), *map(of, args), **{k: of(v) for k, v in keywords.items()})


def _ufunc(of: _Of, around: Surroundings, name: str) -> np.ufunc:
    found = getattr(np, name)
    if not isinstance(found, np.ufunc):
        raise TypeError(f"np.{name} is no ufunc")
    return found


def _allowed(of: Any, name: str, names: frozenset[str]) -> Any:
    if name not in names:
        raise LookupError(name)
    return getattr(of, name)


def _method(of: _Of, around: Surroundings, number: int, name: str) -> Any:
    owner = of(number)
    return _allowed(owner, name, _methods_of(owner))


def _found(of: _Of, around: Surroundings, module: str, name: str) -> Any:
    fn = getattr(import_module(module), name) if module.startswith(_KERNELS) else None
    if not getattr(fn, "sendable", False):
        raise LookupError(f"{module}.{name}")
    return fn


_MADE: Mapping[str, Callable[..., Any]] = {
    "plain": lambda of, around, value: value,
    "scalar": lambda of, around, code, value: dtype_of_onnx(code).type(value),
    "tuple": lambda of, around, numbers: tuple(map(of, numbers)),
    "list": lambda of, around, numbers: list(map(of, numbers)),
    "dtype": lambda of, around, code: dtype_of_onnx(code),
    "slice": lambda of, around, numbers: slice(*map(of, numbers)),
    "partial": _partial,
    "ufunc": _ufunc,
    "ndarray": lambda of, around, name: _allowed(np.ndarray, name, METHODS),
    "direct": lambda of, around, name: around.direct[name].copy_to,
    "kernel": _found,
    "method": _method,
    "numpy": lambda of, around, name: _allowed(np, name, NUMPYS),
    "made": lambda of, around, module, name, args: _found(of, around, module, name)(*map(of, args)),
}
