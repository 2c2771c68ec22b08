"""What a launch is made of: arrays, scalars, constants and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from infera_kernels.calls import Call
from infera_kernels.launch.devices import MULTIPROCESSORS, architecture_of


class LaunchError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched as asked."""


@dataclass(frozen=True, slots=True)
class Const:
    """An argument, or one element of a tuple argument, whose value is compiled into the kernel.

    Strides of 0 and 1 are passed so: a compiler that knows a stride is 1 can use wide loads.
    """

    value: Any


@dataclass(frozen=True, slots=True)
class Unhinted:
    """An integer argument, or one element of a tuple argument, of whose alignment the compiler is told nothing.

    Launches that differ in it alone then share a binary.
    """

    value: int


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU as kernels see it: what a tile may use."""

    arch: int
    """Compute capability: 80 for sm_80, 90 for sm_90."""
    multiprocessors: int
    shared_bytes: int
    """The most dynamic shared memory that one block may opt in to."""
    name: str = ""
    """What CUDA calls the card; empty for none in particular."""
    library_bytes: int = 0
    """Scratch for a product by cuBLASLt; 0 where that is not used."""
    cudnn: str = ""
    """The release of cuDNN, which may compute convolutions; empty where that is not used."""
    triton: str = ""
    """The release of Triton that compiles kernels; empty for the newest that is tested."""
    pdl: bool = False
    """Whether kernels are launched before the one in front of them is done, see `dependent`."""


def nominal_target(arch: int) -> Target:
    """The usual GPU of an architecture; where it is not known, with what every one since sm_80 has."""
    return Target(arch, MULTIPROCESSORS.get(arch, 64), architecture_of(arch).block_shared_bytes)


class Typed(Protocol):
    """Anything with a shape and a dtype: an array or a tensor spec."""

    @property
    def shape(self) -> tuple[Any, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...


class Launcher(Protocol):
    """Turns a Triton kernel and its arguments into a Call.

    `args` maps the kernel's run-time parameters to arrays, ints, floats, None (compiled in) or tuples of ints; an
    array's address and a number's value are fixed in the Call. `constexprs` maps the others. `options` are the
    compiler's: num_warps, num_stages, maxnreg, enable_fp_fusion. Raises LaunchError or TypeError.
    """

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call: ...


def target_of(launcher: Launcher) -> Target:
    """The launcher's target; the least of the supported ones where it names none."""
    target = getattr(launcher, "target", None)
    return target if isinstance(target, Target) else Target(80, 64, 99 * 1024)


def library_of(launcher: Launcher) -> Any | None:
    """The `cublaslt.CublasLt` for the launcher's GPU and stream; None where it has none."""
    return getattr(launcher, "library", None)


def cudnn_of(launcher: Launcher) -> Any | None:
    """The `cudnn.Cudnn` for the launcher's GPU and stream; None where it has none."""
    return getattr(launcher, "cudnn", None)


def describes(launcher: Launcher) -> bool:
    """Whether a launcher's kernels may take descriptors."""
    return bool(getattr(launcher, "describes", False))


def address_of(array: Any) -> int:
    """The address of an array's first element. Works for numpy, cupy and the CUDA array interface."""
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    pointer = getattr(getattr(array, "data", None), "ptr", None)
    if pointer is None:
        pointer = array.__cuda_array_interface__["data"][0]
    return int(pointer)


MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
"""Blocks of a launch in each dimension, of every GPU."""


def grid_of(grid: Sequence[int], kernel: str) -> tuple[int, int, int]:
    """The grid in three dimensions. Raises LaunchError where a dimension is beyond CUDA's limit."""
    x, y, z = (*grid, 1, 1, 1)[:3] if len(grid) <= 3 else (-1, -1, -1)
    if not all(0 <= n <= most for n, most in zip((x, y, z), MAX_GRID, strict=True)):
        raise LaunchError(f"{kernel}: grid {tuple(grid)} is outside CUDA's limits {MAX_GRID}")
    return x, y, z
