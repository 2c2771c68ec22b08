"""The parameters of a compiled Triton kernel, packed once for cuLaunchKernel.

Since Triton 3.6 a kernel takes its non-constexpr arguments in order, then the addresses of two scratch areas
(`global_scratch`, `profile_scratch`), which are there also when their size is 0
(triton/backends/nvidia/driver.py, make_launcher). A tensor descriptor is three of them: a CUtensorMap by value, its
sizes and its strides. `check_abi` holds that against every kernel compiled.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Sequence
from typing import Any

from infera_kernels.launch.descriptors import ALIGNED, BYTES, rank_of
from infera_kernels.launch.types import LaunchError

_CODES = {"i1": "B", "i32": "i", "i64": "q", "fp32": "f"}
_MAP = f"{BYTES}s"
_SLOT = 8
_SCRATCH = ("*i8", "*i8")


def _codes(types: Sequence[str]) -> list[str]:
    """Of parameters of these types and the scratch areas, as `struct` has them."""
    found: list[str] = []
    for type in (*types, *_SCRATCH):
        rank = rank_of(type)
        found += [_MAP, *"i" * rank, *"q" * rank] if rank else ["Q" if type.startswith("*") else _CODES[type]]
    return found


def _room(code: str) -> int:
    """The most bytes that a value takes, with what is left free before it."""
    return BYTES + ALIGNED if code == _MAP else _SLOT


class Address(int):
    """An address that keeps alive what it points to (`owner`)."""

    owner: Any

    @classmethod
    def of(cls, value: int, owner: Any) -> Address:
        address = cls(value)
        address.owner = owner
        return address


def pack(types: Sequence[str], values: Sequence[Any], keep: Any = None) -> Address:
    """The address of a `void *params[]` for cuLaunchKernel. It owns the block, and `keep`.

    `types` are Triton's ("*fp16", "i32", "fp32", ...), one for each value; both scratch areas are passed as null. The
    value of a tensor descriptor is a tuple: the bytes of its map, then its sizes, then its strides.
    """
    codes = _codes(types)
    single = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    block = ctypes.create_string_buffer(sum(_room(code) for code in codes) + ALIGNED)
    pointers = (ctypes.c_void_p * len(codes))()
    base, at = ctypes.addressof(block), 0
    for i, (code, value) in enumerate(zip(codes, (*single, 0, 0), strict=True)):
        at += -(base + at) % (ALIGNED if code == _MAP else _SLOT)
        struct.pack_into("<" + code, block, at, value)
        pointers[i] = base + at
        at += struct.calcsize("<" + code)
    return Address.of(ctypes.addressof(pointers), (pointers, block, keep))


def ptx_parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the PTX module's entry."""
    header = re.search(r"\.visible \.entry [^(]*\(([^)]*)\)", ptx)
    if header is None:
        raise LaunchError("no .visible .entry in the PTX")
    sizes = []
    for line in header[1].split(","):
        if ".param" in line:
            array = re.search(r"\[(\d+)\]", line)
            bits = re.search(r"\.param\s+\.[busf](\d+)", line)
            if array is None and bits is None:
                raise LaunchError(f"cannot read the PTX parameter '{line.strip()}'")
            sizes.append(int(array[1]) if array else int(bits[1]) // 8)  # type: ignore[index]
    return sizes


def check_abi(name: str, types: Sequence[str], threads: int, ptx: str) -> None:
    """Raises LaunchError where the compiled kernel's parameters or block are not what will be passed."""
    expected = [struct.calcsize("<" + code) for code in _codes(types)]
    found = ptx_parameter_sizes(ptx)
    if expected != found:
        raise LaunchError(f"{name}: parameter sizes {expected} expected, the PTX has {found}: another Triton ABI?")
    block = re.search(r"\.reqntid\s+(\d+)", ptx)
    if block is not None and int(block[1]) != threads:
        raise LaunchError(f"{name}: {threads} threads a block expected, the PTX requires {block[1]}")
