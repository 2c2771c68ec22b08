"""Reads GGUF, the file format of ggml: metadata, and tensors as float32.

After https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the blocks of quantised tensors are those of
ggml-quants.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Gguf:
    """What a file says of its model, and its tensors."""

    about: Mapping[str, Any]
    tensors: Mapping[str, Array]


def read(path: Path) -> Gguf:
    """All of a file. Raises ValueError where it is no GGUF or has blocks of a kind that is not known."""
    reader = _Reader(path.read_bytes())
    if reader.take(4) != b"GGUF":
        raise ValueError(f"{path} is no GGUF file")
    reader.number("I")
    tensors, entries = reader.number("Q"), reader.number("Q")
    about = {reader.string(): reader.value(reader.number("I")) for _ in range(entries)}
    infos = []
    for _ in range(tensors):
        name = reader.string()
        dims = [reader.number("Q") for _ in range(reader.number("I"))]
        infos.append((name, dims[::-1], reader.number("I"), reader.number("Q")))
    align = about.get("general.alignment", 32)
    start = -(-reader.at // align) * align
    return Gguf(about, {name: _tensor(reader.data, start + at, shape, kind) for name, shape, kind, at in infos})


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            of, count = self.number("I"), self.number("Q")
            return [self.value(of) for _ in range(count)]
        return self.number(_NUMBERS[kind])


def _nibbles(packed: Array) -> Array:
    """Sixteen bytes of a block as 32 numbers: the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


_Q4_1 = np.dtype([("scale", "<f2"), ("least", "<f2"), ("packed", "u1", 16)])
_Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])


def _column(x: Array) -> Array:
    return x.astype(np.float32)[:, None]


_KINDS: Mapping[int, tuple[np.dtype[Any], int, Callable[[Array], Array]]] = {
    0: (np.dtype("<f4"), 1, lambda b: b),
    3: (_Q4_1, 32, lambda b: _nibbles(b["packed"]) * _column(b["scale"]) + _column(b["least"])),
    8: (_Q8_0, 32, lambda b: b["values"] * _column(b["scale"])),
}
"""By ggml_type: a block, the elements it has, and their values."""


def _tensor(data: bytes, at: int, shape: list[int], kind: int) -> Array:
    if kind not in _KINDS:
        raise ValueError(f"blocks of ggml_type {kind}, expected one of {', '.join(map(str, _KINDS))}")
    block, elements, values = _KINDS[kind]
    blocks = np.frombuffer(data, block, int(np.prod(shape)) // elements, at)
    return np.ascontiguousarray(values(blocks).reshape(shape), np.float32)
