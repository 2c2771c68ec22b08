"""A stand-in for the driver's cuTensorMapEncodeTiled: called as C is, it checks what cuda.h demands and writes maps
that can be read again, by which boxes are copied as the TMA unit copies them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import POINTER, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from infera_kernels.launch.descriptors import BYTES, Encode
from tests.kernels.support import BFLOAT16, Array

INVALID_VALUE = 1
ALIGNMENT = 128
"""Of a map, in cuda.h of CUDA 13."""

_DTYPES = {6: np.dtype(np.float16), 7: np.dtype(np.float32), 9: BFLOAT16}
_SWIZZLED = {0: 2**31, 1: 32, 2: 64, 3: 128}
"""Swizzles, and the most bytes of a box's last axis with each."""

_LAYOUT = "<IIIIQ5Q5Q5I"
_MARK = 1 << 21
"""What drivers set in the third word, bit 85 of a map, and must not for small arrays on Blackwell."""

_PROTOTYPE = ctypes.CFUNCTYPE(
    *(c_int, c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32)),
    *(POINTER(c_uint32), c_int, c_int, c_int, c_int),
)


@dataclass(frozen=True)
class Map:
    """What a CUtensorMap says, sizes in the order of the array's axes; strides are bytes, without the last."""

    dtype: np.dtype[Any]
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    promotion: int
    marked: bool
    """Whether bit 85 is as the driver has set it."""

    def load(self, at: Sequence[int]) -> Array:
        """The box that begins at some coordinates, zeros where it is outside. Reads the memory that is described."""
        found = np.zeros(self.box, self.dtype)
        for index in np.ndindex(self.box[:-1]):
            place = [start + i for start, i in zip(at, index, strict=False)]
            if all(0 <= p < size for p, size in zip(place, self.shape, strict=False)):
                row = self.address + sum(p * step for p, step in zip(place, self.strides, strict=True))
                count = min(self.box[-1], max(self.shape[-1] - at[-1], 0))
                data = ctypes.string_at(row + at[-1] * self.dtype.itemsize, count * self.dtype.itemsize)
                found[index][:count] = np.frombuffer(data, self.dtype)
        return found


def decoded(raw: bytes) -> Map:
    assert len(raw) == BYTES
    kind, rank, swizzle, promotion, address, *rest = struct.unpack_from(_LAYOUT, raw)
    shape, strides, box = rest[:rank], rest[5 : 5 + rank - 1], rest[10 : 10 + rank]
    turned = tuple(shape[::-1]), tuple(strides[::-1]), tuple(box[::-1])
    return Map(_DTYPES[kind], address, *turned, swizzle & ~_MARK, promotion, bool(swizzle & _MARK))


class Encoder:
    """`function` is the stand-in, by its address, as ctypes loads one; `refused` says why the last call failed."""

    def __init__(self) -> None:
        self.refused = ""
        self.calls = 0
        self._kept = _PROTOTYPE(self._encode)
        self.function: Encode = ctypes.cast(self._kept, ctypes.CFUNCTYPE(c_int))

    def _encode(
        self,
        into: int,
        kind: int,
        rank: int,
        address: int,
        sizes: Any,
        strides: Any,
        box: Any,
        steps: Any,
        interleave: int,
        swizzle: int,
        promotion: int,
        fill: int,
    ) -> int:
        self.calls += 1
        dims, lines = list(sizes[:rank]), list(strides[: rank - 1])
        room, moved = list(box[:rank]), list(steps[:rank])
        item = _DTYPES[kind].itemsize
        rules = {
            "map": into % ALIGNMENT == 0,
            "rank": 1 <= rank <= 5,
            "address": address % 16 == 0,
            "sizes": all(0 < d <= 2**32 for d in dims),
            "strides": all(s % 16 == 0 and 0 < s < 2**40 for s in lines),
            "rows": not lines or lines[0] >= dims[0] * item,
            "overlap": all(b % a == 0 and b >= a * d for a, b, d in zip(lines, lines[1:], dims[1:], strict=False)),
            "box": all(0 < b <= 256 for b in room) and room[0] * item % 16 == 0,
            "swizzle": swizzle in _SWIZZLED and room[0] * item <= _SWIZZLED[swizzle],
            "steps": moved == [1] * rank,
            "interleave": interleave == 0,
            "fill": fill == 0,
        }
        self.refused = " ".join(name for name, holds in rules.items() if not holds)
        if self.refused:
            return INVALID_VALUE
        padded = (*dims, *[0] * (5 - rank), *lines, *[0] * (6 - rank), *room, *[0] * (5 - rank))
        words = kind, rank, swizzle | _MARK, promotion, address, *padded
        ctypes.memmove(into, struct.pack(_LAYOUT, *words).ljust(BYTES), BYTES)
        return 0
