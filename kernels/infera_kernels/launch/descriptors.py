"""Arrays as the TMA unit of sm_90 and later reads them: described to it by the driver, block by block.

Rules and numbers are those of cuTensorMapEncodeTiled (cuda.h of CUDA 12 and 13); how Triton has it called stands in its
triton/backends/nvidia/driver.py (make_tensordesc_arg) and driver.c, in 3.6 as in 3.9 but for what `_mended` does.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from infera_kernels.launch.types import LaunchError

FIRST_ARCH = 90
"""The first architecture that has TMA."""

BYTES = 128
"""Of a CUtensorMap, ..."""

ALIGNED = 128
"""... and what its address is a multiple of: cuda.h of CUDA 12 asks for 64, that of CUDA 13 for 128."""

TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}
"""CUtensorMapDataType of the elements that are described here."""

_RANKS = range(1, 6)
_STEP, _MOST_STEP = 16, 2**40
_NOT_INTERLEAVED, _L2_128_BYTES, _ZEROS_OUTSIDE = 0, 2, 0

_BLACKWELL = range(100, 130)
_SMALL, _MARK = 1 << 17, 85
"""Bytes below which Blackwell's maps must not have a bit that the driver sets, and which bit that is: see `_mended`."""

Encode = Callable[..., int]
"""cuTensorMapEncodeTiled(map, type, rank, address, sizes, strides, box, element strides, interleave, swizzle, L2
promotion, fill): 0, or an error's number."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An argument of which a kernel loads or stores blocks. `shape` and `strides`, in elements, are those of `array` as
    the kernel sees it, the last stride 1; what a block has outside of it is read as 0 and not stored."""

    array: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a compiled kernel takes a descriptor: the box of one transfer, and how that lies in shared memory."""

    box: tuple[int, ...]
    swizzle: int

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Encoding:
        """From an entry of Triton's `tensordesc_meta`. Raises LaunchError for a form that is not passed on."""
        if meta.get("fp4_padded") or meta.get("is_im2col"):
            raise LaunchError(f"a tensor descriptor of another form: {dict(meta)}")
        return cls(tuple(map(int, meta["block_size"])), int(meta["swizzle"]))


def described(address: int, itemsize: int, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether TMA reads an array: it begins on 16 bytes, its last axis lies in one piece, and each other one is as long
    as all of the next, in steps of 16 bytes, or longer by whole steps."""
    inner = list(zip(shape, strides, strict=True))[1:]
    return (
        len(shape) in _RANKS
        and address % _STEP == 0
        and all(0 < size < 2**31 for size in shape)
        and strides[-1] == 1
        and all(step * itemsize % _STEP == 0 and step * itemsize < _MOST_STEP for step in strides[:-1])
        and all(step % below == 0 and step >= size * below for step, (size, below) in zip(strides, inner, strict=False))
    )


def rank_of(type: str) -> int:
    """The number of dimensions of a descriptor, by its type in Triton's signature; 0 for all other types."""
    found = re.fullmatch(r"tensordesc<\w+\[([\d, ]+)\]>", type)
    return found[1].count(",") + 1 if found else 0


def encoded(encode: Encode, given: Descriptor, address: int, how: Encoding, arch: int) -> bytes:
    """The CUtensorMap of an array, for the GPU that is current, of sm_<arch>. Raises LaunchError where the driver
    refuses."""
    rank = len(given.shape)
    itemsize = given.array.dtype.itemsize
    room = ctypes.create_string_buffer(BYTES + ALIGNED)
    at = -ctypes.addressof(room) % ALIGNED
    status = encode(
        ctypes.c_void_p(ctypes.addressof(room) + at),
        ctypes.c_int(TYPES[given.array.dtype.name]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*given.shape[::-1]),
        (ctypes.c_uint64 * max(rank - 1, 1))(*(step * itemsize for step in given.strides[-2::-1])),
        (ctypes.c_uint32 * rank)(*how.box[::-1]),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(_NOT_INTERLEAVED),
        ctypes.c_int(how.swizzle),
        ctypes.c_int(_L2_128_BYTES),
        ctypes.c_int(_ZEROS_OUTSIDE),
    )
    if status:
        raise LaunchError(
            f"cuTensorMapEncodeTiled failed with error {status} for {given.array.dtype.name}{list(given.shape)}, "
            f"strides {list(given.strides)}, at {address:#x}, in boxes of {list(how.box)}, swizzle {how.swizzle}"
        )
    made = room.raw[at : at + BYTES]
    reach = itemsize * (1 + sum((size - 1) * step for size, step in zip(given.shape, given.strides, strict=True)))
    return _mended(made) if arch in _BLACKWELL and reach < _SMALL else made


def _mended(made: bytes) -> bytes:
    """A map of a small array as it should be. On Blackwell the driver sets a bit with which TMA may read what is not
    mapped (an illegal access, now and then) where an array reaches over less than 128 KiB and has gaps.

    What is done here is what NVIDIA says to do (known issues of driver 595.71.05). Triton 3.9 and CUTLASS do it up to
    CUDA 13.1; NVIDIA names 13.2 too, and no release that is mended. The bit is the hardware's, not the driver's.
    """
    bits = int.from_bytes(made, "little") & ~(1 << _MARK)
    return bits.to_bytes(BYTES, "little")


@cache
def driver_encode() -> Encode | None:
    """The driver's function; None where there is no driver, or one older than CUDA 12."""
    try:
        found: Encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError):
        return None
    return found
