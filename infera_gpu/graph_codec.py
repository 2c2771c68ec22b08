"""Graphs as bytes and back: JSON, and behind it the arrays as they lie in memory.

The layout: MAGIC, a checksum of all that follows, the lengths of the JSON and of the arrays, the JSON, then the arrays,
each from a cache line on. Nothing in it is code. What it cannot say, `encoded` refuses.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import EMPTY, Graph, HostArray, Node, T
from infera_gpu.spec import (
    MapSpec,
    OptionalSpec,
    SequenceSpec,
    TensorSpec,
    ValueSpec,
    dtype_of_onnx,
    onnx_of_dtype,
)

MAGIC = b"infera1\n"
_HEAD = struct.Struct("<8sIQQ")

LINE = 64
"""Bytes of a cache line."""

_PLAIN = (int, float, str, bool, type(None))


class Unencodable(Exception):
    """A graph has what cannot be written down: strings in tensors, arrays with gaps, attributes of other types."""


class Damaged(Exception):
    """Bytes that `encoded` did not make, or no longer what it made."""


def encoded(graph: Graph) -> bytes:
    """The graph as bytes, of which `decoded` makes an equal one. Raises Unencodable."""
    writer = Writer()
    return framed(writer.graph(graph), writer.arrays)


def framed(said: Any, arrays: Sequence[HostArray]) -> bytes:
    """What a `Writer` said, and the arrays that it met."""
    text = json.dumps(said, separators=(",", ":")).encode()
    start = _HEAD.size + len(text)
    parts, size = [b"\0" * (-start % LINE)], -start % LINE
    for array in arrays:
        parts += [array.tobytes(), b"\0" * (-array.nbytes % LINE)]
        size += array.nbytes + -array.nbytes % LINE
    body = b"".join([text, *parts])
    return _HEAD.pack(MAGIC, zlib.crc32(body), len(text), size) + body


def decoded(data: HostArray) -> Graph:
    """The graph that was `encoded`; its arrays lie in `data`, bytes that begin with a cache line and stay as they are.

    Raises Damaged.
    """
    return unframed(data, lambda reader, said: reader.graph(said))


def unframed(data: HostArray, make: Callable[[Reader, Any], T]) -> T:
    """What `make` makes of what was `framed`. Raises Damaged, also where it stumbles."""
    try:
        whole = memoryview(data.data)
        magic, checksum, length, size = _HEAD.unpack_from(whole)
        if magic != MAGIC or data.nbytes != _HEAD.size + length + size or zlib.crc32(whole[_HEAD.size :]) != checksum:
            raise Damaged
        start = _HEAD.size + length
        return make(Reader(data, start + -start % LINE), json.loads(bytes(whole[_HEAD.size : start])))
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise Damaged from error


class Writer:
    """Says graphs in what JSON has. `arrays` are those that it has met, each once however many names it has."""

    def __init__(self) -> None:
        self.arrays: list[HostArray] = []
        self._numbers: dict[int, int] = {}

    def graph(self, graph: Graph) -> dict[str, Any]:
        return {
            "nodes": [self.node(n) for n in graph.nodes],
            **{k: self._specs(getattr(graph, k)) for k in ("inputs", "outputs", "specs", "overridable")},
            "constants": {k: self.array(a) for k, a in graph.constants.items()},
            "opsets": dict(graph.opsets),
            "name": graph.name,
        }

    def node(self, n: Node) -> list[Any]:
        attrs = {k: self.value(v) for k, v in n.attrs.items()}
        return [n.op, n.inputs, n.outputs, attrs, n.domain, n.name, n.overload, n.opset]

    def value(self, value: Any) -> Any:
        """An attribute: what JSON has as it is, all else as an object of one entry."""
        if type(value) in _PLAIN:
            return value
        if type(value) is tuple:
            return [self.value(v) for v in value]
        if isinstance(value, np.ndarray):
            return {"array": self.array(value)}
        if isinstance(value, Graph):
            return {"graph": self.graph(value)}
        raise Unencodable(type(value).__name__)

    def array(self, array: HostArray) -> list[Any]:
        if type(array) is not np.ndarray or array.dtype.kind == "O" or not array.flags.c_contiguous:
            raise Unencodable(f"an array of {array.dtype}")
        number = self._numbers.get(id(array))
        if number is None:
            number = self._numbers[id(array)] = len(self.arrays)
            self.arrays.append(array)
        return [number, code_of(array.dtype), array.shape]

    def _specs(self, specs: Mapping[str, ValueSpec]) -> dict[str, Any]:
        return {k: self.spec(s) for k, s in specs.items()}

    def spec(self, spec: ValueSpec | None) -> Any:
        match spec:
            case None:
                return None
            case TensorSpec():
                return ["tensor", spec.shape, code_of(spec.dtype), spec.ranked]
            case SequenceSpec():
                return ["sequence", self.spec(spec.elem)]
            case OptionalSpec():
                return ["optional", self.spec(spec.elem)]
            case MapSpec():
                return ["map", code_of(spec.key), self.spec(spec.value)]


def code_of(dtype: np.dtype[Any]) -> int:
    try:
        return onnx_of_dtype(dtype)
    except KeyError:
        raise Unencodable(str(dtype)) from None


class Reader:
    """Makes graphs of what a `Writer` said. The arrays lie in `data`, one behind the other from `start` on."""

    def __init__(self, data: HostArray, start: int) -> None:
        self._data, self._next = data, start
        self._arrays: list[HostArray] = []
        self._specs: Mapping[str, Callable[..., ValueSpec]] = {
            "tensor": lambda shape, code, ranked: TensorSpec(tuple(shape), dtype_of_onnx(code), ranked),
            "sequence": lambda elem: SequenceSpec(self.spec(elem)),
            "optional": lambda elem: OptionalSpec(self.spec(elem)),
            "map": lambda key, value: MapSpec(dtype_of_onnx(key), self.spec(value)),
        }

    def graph(self, said: Mapping[str, Any]) -> Graph:
        return Graph(
            nodes=tuple([self.node(*n) for n in said["nodes"]]),
            constants={k: self.array(*a) for k, a in said["constants"].items()},
            opsets=said["opsets"],
            name=said["name"],
            **{k: self._of(said[k]) for k in ("inputs", "outputs", "specs", "overridable")},
        )

    def node(self, op: str, inputs: list[str], outputs: list[str], attrs: dict[str, Any], *rest: Any) -> Node:
        made = {k: v if type(v) in _PLAIN else self.value(v) for k, v in attrs.items()}
        return Node(op, tuple(inputs), tuple(outputs), made or EMPTY, *rest)

    def value(self, said: Any) -> Any:
        if isinstance(said, list):
            return tuple([self.value(v) for v in said])
        if not isinstance(said, dict):
            return said
        ((kind, what),) = said.items()
        return self.array(*what) if kind == "array" else self.graph(what)

    def array(self, number: int, code: int, shape: list[int]) -> HostArray:
        """The array of this number; they are met in the order in which they lie."""
        if number == len(self._arrays):
            dtype = dtype_of_onnx(code)
            if dtype.hasobject:
                raise Damaged
            made: HostArray = np.ndarray(shape, dtype, self._data, self._next)
            made.flags.writeable = False
            self._next += made.nbytes + -made.nbytes % LINE
            self._arrays.append(made)
        return self._arrays[number]

    def spec(self, said: Any) -> Any:
        return None if said is None else self._specs[said[0]](*said[1:])

    def _of(self, said: Mapping[str, Any]) -> dict[str, ValueSpec]:
        return {k: self.spec(s) for k, s in said.items()}
