"""GPUs as numbers, as their vendor states them: what tiles are chosen by, and rooflines drawn from.

Rates are dense, in floating-point (or integer) operations a cycle and multiprocessor; a multiply-add is two. `half` is
float16 or bfloat16 summed in float32, `tf32` float32 rounded on tensor cores, `ieee` float32 without tensor cores,
`int8` summed in int32. What NVIDIA states for the whole card is `multiprocessors * clock * rate`, which the tests hold
against the TFLOP/s of the source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

GUIDE = "CUDA C++ Programming Guide, table 'Technical Specifications per Compute Capability'"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What one multiprocessor of a compute capability has: 90 is sm_90."""

    arch: int
    shared_bytes: int
    """Shared memory of a multiprocessor; each block that runs there takes RESERVED_SHARED more than it asks for."""
    block_shared_bytes: int
    """The most dynamic shared memory that one block may opt in to."""
    warps: int
    """The most that are resident."""
    blocks: int
    """The most that are resident."""
    l2_bytes_per_cycle: float
    """From L2 to a multiprocessor where all of them load. The A100's whitepaper states 5120 a cycle for 108 of them;
    of others nothing is stated: Hopper and Blackwell are taken to be like it, cards with GDDR to have two thirds."""
    l2_bytes: int
    """Of the usual card."""
    registers: int = 65536
    """Of 32 bits. A warp takes them in units of REGISTER_UNIT."""
    source: str = GUIDE


RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes of every block since sm_80 (the guides to tuning for Ampere, Ada,
Hopper)."""

REGISTER_UNIT = 256
"""Registers a warp are allocated in units of this many (CUDA occupancy calculator)."""

THREAD_REGISTERS = 255
"""The most of one thread."""

_MIB = 2**20

ARCHITECTURES: Mapping[int, Architecture] = MappingProxyType(
    {
        a.arch: a
        for a in (
            Architecture(80, 164 * 1024, 163 * 1024, 64, 32, l2_bytes_per_cycle=47, l2_bytes=40 * _MIB),
            Architecture(86, 100 * 1024, 99 * 1024, 48, 16, l2_bytes_per_cycle=32, l2_bytes=6 * _MIB),
            Architecture(87, 164 * 1024, 163 * 1024, 48, 16, l2_bytes_per_cycle=32, l2_bytes=4 * _MIB),
            Architecture(89, 100 * 1024, 99 * 1024, 48, 24, l2_bytes_per_cycle=32, l2_bytes=48 * _MIB),
            Architecture(90, 228 * 1024, 227 * 1024, 64, 32, l2_bytes_per_cycle=47, l2_bytes=50 * _MIB),
            Architecture(100, 228 * 1024, 227 * 1024, 64, 32, l2_bytes_per_cycle=47, l2_bytes=126 * _MIB),
            Architecture(103, 228 * 1024, 227 * 1024, 64, 32, l2_bytes_per_cycle=47, l2_bytes=126 * _MIB),
            Architecture(120, 100 * 1024, 99 * 1024, 48, 24, l2_bytes_per_cycle=32, l2_bytes=96 * _MIB),
        )
    }
)

MULTIPROCESSORS: Mapping[int, int] = MappingProxyType(
    {80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}
)
"""Of the usual card of each."""

LEAST = Architecture(80, 100 * 1024, 99 * 1024, 48, 16, l2_bytes_per_cycle=32, l2_bytes=4 * _MIB)
"""What every GPU since sm_80 has."""


def architecture_of(arch: int) -> Architecture:
    """The numbers of a compute capability; those that all have where it is not known."""
    return ARCHITECTURES.get(arch, LEAST)


_AMPERE = {"half": 2048, "tf32": 1024, "ieee": 128, "int8": 4096}
_AMPERE_GEFORCE = {"half": 512, "tf32": 256, "ieee": 256, "int8": 2048}
_ADA = {"half": 1024, "tf32": 512, "ieee": 256, "int8": 2048}
_ADA_GEFORCE = {"half": 512, "tf32": 256, "ieee": 256, "int8": 2048}
_HOPPER = {"half": 4096, "tf32": 2048, "ieee": 256, "int8": 8192}
_BLACKWELL = {"half": 8192, "tf32": 4096, "ieee": 256, "int8": 16384}

RATES: Mapping[int, Mapping[str, int]] = MappingProxyType(
    {80: _AMPERE, 86: _AMPERE_GEFORCE, 89: _ADA, 90: _HOPPER, 100: _BLACKWELL, 120: _ADA_GEFORCE}
)
"""Compute capability -> kind of products -> operations a cycle and multiprocessor, where the card is not known (sm_100:
2.25 PFLOP/s of the HGX B200 datasheet over 148 multiprocessors).

GeForce cards sum float16 in float32 at half the rate of the others of their architecture."""


@dataclass(frozen=True, slots=True)
class Device:
    """A card. `clock_hz` is that at which NVIDIA states the rates of tensor cores, `boost_hz` that of all else."""

    name: str
    pattern: str
    """Matches the name that CUDA reports."""
    arch: int
    multiprocessors: int
    clock_hz: float
    boost_hz: float
    dram_bytes_per_s: float
    l2_bytes: int
    flops_per_cycle: Mapping[str, int]
    source: str

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.arch)

    @property
    def shared_bytes(self) -> int:
        """The most dynamic shared memory that one block may opt in to."""
        return self.architecture.block_shared_bytes

    @property
    def registers(self) -> int:
        """Of one multiprocessor."""
        return self.architecture.registers

    def flops_per_s(self, kind: str) -> float:
        """The stated peak for a kind of products: "half", "tf32", "ieee" or "int8"."""
        clock = self.boost_hz if kind == "ieee" else self.clock_hz
        return self.multiprocessors * clock * self.flops_per_cycle[kind]


_HOPPER_PAPER = "NVIDIA H100 Tensor Core GPU Architecture, v1.04, table 2"
_AMPERE_PAPER = "NVIDIA A100 Tensor Core GPU Architecture, v1.0, tables 1 and 4"

DEVICES: tuple[Device, ...] = (
    Device(
        *("H200", r"\bH200\b", 90, 132, 1.83e9, 1.98e9, 4.8e12, 50 * _MIB, _HOPPER),
        f"{_HOPPER_PAPER}, H100 SXM5; memory: NVIDIA H200 datasheet",
    ),
    Device(
        *("H100 SXM", r"\bH100 80GB HBM3|\bH100 SXM", 90, 132, 1.83e9, 1.98e9, 3.35e12, 50 * _MIB, _HOPPER),
        f"{_HOPPER_PAPER}; memory: NVIDIA H100 datasheet",
    ),
    Device(
        *("H100 PCIe", r"\bH100 PCIe", 90, 114, 1.62e9, 1.755e9, 2.0e12, 50 * _MIB, _HOPPER),
        _HOPPER_PAPER,
    ),
    Device(
        *("A100 80GB", r"\bA100.*80GB", 80, 108, 1.41e9, 1.41e9, 2.039e12, 40 * _MIB, _AMPERE),
        f"{_AMPERE_PAPER}; memory: NVIDIA A100 datasheet, SXM",
    ),
    Device(
        *("A100 40GB", r"\bA100.*40GB", 80, 108, 1.41e9, 1.41e9, 1.555e12, 40 * _MIB, _AMPERE),
        _AMPERE_PAPER,
    ),
    Device(
        *("L4", r"\bL4\b", 89, 58, 2.04e9, 2.04e9, 3.0e11, 48 * _MIB, _ADA),
        "NVIDIA Ada GPU Architecture, v2.01, L4; NVIDIA L4 datasheet",
    ),
    Device(
        *("RTX 3090", r"\bRTX 3090$", 86, 82, 1.695e9, 1.695e9, 9.36e11, 6 * _MIB, _AMPERE_GEFORCE),
        "NVIDIA Ampere GA102 GPU Architecture, v2.1, appendix A",
    ),
    Device(
        *("RTX 4090", r"\bRTX 4090$", 89, 128, 2.52e9, 2.52e9, 1.008e12, 72 * _MIB, _ADA_GEFORCE),
        "NVIDIA Ada GPU Architecture, v2.01, appendix A",
    ),
)


def rates_of(arch: int) -> Mapping[str, int]:
    """The rates of a compute capability; of the nearest earlier one where it is not listed."""
    return RATES[max((a for a in RATES if a <= arch), default=min(RATES))]


@cache
def device_called(name: str) -> Device | None:
    """The card of which CUDA reports this name ("NVIDIA H100 80GB HBM3"), where it is listed."""
    return next((d for d in DEVICES if re.search(d.pattern, name)), None)
