"""Protobuf's wire format, as far as it takes to find the large initialisers of a model.

They are most of a file, and a parser copies them twice. What is cut out here is read once, to where it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import NamedTuple

LARGE = 1 << 12
"""Bytes of an initialiser from which on it is cut out."""

_GRAPH = 7
"""ModelProto.graph; the numbers and wire types of fields are those of onnx.proto."""
_INITIALIZER = 5
"""GraphProto.initializer"""
_RAW_DATA = 9
"""TensorProto.raw_data"""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Skimmed:
    """A model without the raw data of its large initialisers, which is empty there; `spans` says by the initialiser's
    number where it begins and ends."""

    skeleton: bytes
    spans: Mapping[int, tuple[int, int]]


class _Field(NamedTuple):
    number: int
    kind: int
    begin: int
    """Where its tag is."""
    body: int
    end: int


def skim(data: bytes | mmap) -> Skimmed | None:
    """None where nothing can be cut out, or the bytes are not as serialisers write them: leave those to the parser."""
    try:
        graphs = [f for f in _fields(data, 0, len(data)) if f.number == _GRAPH]
        if len(graphs) != 1 or graphs[0].kind != _LENGTH:
            return None
        (graph,) = graphs
        pieces: list[bytes] = []
        spans: dict[int, tuple[int, int]] = {}
        done, number = graph.body, -1
        for field in _fields(data, graph.body, graph.end):
            if field.number != _INITIALIZER:
                continue
            number += 1
            raw = _raw_data(data, field)
            if raw is None:
                continue
            spans[number] = raw.body, raw.end
            around = data[field.body : raw.begin] + _tag(_RAW_DATA) + b"\0" + data[raw.end : field.end]
            pieces += [data[done : field.begin], _tag(_INITIALIZER), _varint(len(around)), around]
            done = field.end
        if not spans:
            return None
        pieces.append(data[done : graph.end])
        size = _varint(sum(map(len, pieces)))
        skeleton = b"".join([data[: graph.begin], _tag(_GRAPH), size, *pieces, data[graph.end :]])
        return Skimmed(skeleton, spans)
    except (ValueError, IndexError):
        return None


def _raw_data(data: bytes | mmap, tensor: _Field) -> _Field | None:
    """The raw data of an initialiser, where it is large."""
    if tensor.kind != _LENGTH or tensor.end - tensor.body < LARGE:
        return None
    found = [f for f in _fields(data, tensor.body, tensor.end) if f.number == _RAW_DATA]
    if len(found) != 1 or found[0].kind != _LENGTH or found[0].end - found[0].body < LARGE:
        return None
    return found[0]


def _fields(data: bytes | mmap, at: int, end: int) -> Iterator[_Field]:
    """The fields of a message. Raises ValueError or IndexError where they are damaged."""
    while at < end:
        begin = at
        tag, at = _number(data, at)
        kind = tag & 7
        if kind == _LENGTH:
            size, body = _number(data, at)
            at = body + size
        elif kind == _VARINT:
            body, at = at, _number(data, at)[1]
        elif kind in (_FIXED64, _FIXED32):
            body, at = at, at + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError("a field ends outside of its message")
        yield _Field(tag >> 3, kind, begin, body, at)


def _number(data: bytes | mmap, at: int) -> tuple[int, int]:
    """The number written at `at`, and where it ends."""
    value = data[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise ValueError("a number of more than ten bytes")


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH)
