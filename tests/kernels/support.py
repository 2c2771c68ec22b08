"""Arrays that show what a kernel did to them, and how close it must come."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import pytest

from infera_kernels.calls import Call
from infera_kernels.launch import Inspection, Launcher
from infera_kernels.launch.signature import bind

Array = np.ndarray[Any, np.dtype[Any]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place, relative: what one rounding to the type may cost."""

ARCHITECTURES = (80, 86, 90, 100)
"""What kernels are compiled for: A100, RTX 30, H100 and B200."""

EVERY_ARCH: tuple[Any, ...] = tuple(pytest.param(arch, id=f"sm_{arch}") for arch in ARCHITECTURES)

TENSOR_CORES = tuple(f"{name}MMA" for name in ("H", "HG", "UTCH", "I", "IG", "UTCI"))
"""Instructions of tensor cores: of floats and of integers."""


def multiplication(arch: int, rows: int, *, integers: bool = False) -> str:
    """The instruction that multiplies tiles with so many rows: of a warp; from 64 rows on of four of them on sm_90, and
    of the block, whose sums lie in tensor memory, on sm_100."""
    form = {90: "{}GMMA", 100: "UTC{}MMA"}.get(arch, "{}MMA") if rows >= 64 else "{}MMA"
    return form.format("I" if integers else "H")


def tensor_cores(result: Inspection) -> dict[str, int]:
    """How often each instruction of tensor cores is there, those that are."""
    return {name: count for name in TENSOR_CORES if (count := result.count(name))}


WIDE = ("LDG.E.128", *(f"LDGSTS.E.{how}128" for how in ("", "LTC128B.", "BYPASS.", "BYPASS.LTC128B.")))
"""Loads of 16 bytes."""


def wide_loads(result: Inspection) -> int:
    """Instructions that load 16 bytes."""
    return sum(map(result.count, WIDE))


SHARD = "INFERA_TEST_SHARD"
"""Environment: i/n runs the i-th of n parts of a suite."""

T = TypeVar("T")


def shard(items: Sequence[T]) -> list[T]:
    """The part of a suite that this process runs: all of it unless the environment says otherwise."""
    part, _, parts = os.environ.get(SHARD, "0/1").partition("/")
    return list(items[int(part) :: int(parts)])


Family = tuple[str, frozenset[str]]
"""A kernel's name, and the types of the elements that a launch of it reads and writes."""


def family_of(kernel: Any, args: Mapping[str, Any], constexprs: Mapping[str, Any]) -> Family:
    """The family of a launch."""
    leaves = bind(kernel, args, constexprs).flat()
    return kernel.__name__, frozenset(leaf.type for leaf in leaves if leaf.array is not None)


Facts = tuple[str, dict[str, Any], dict[Any, Any], list[Any], dict[str, Any]]
"""What a launch is compiled for: the kernel, types, constants, integers known to be aligned, options."""


class Noting:
    """A launcher that notes what the launches of another are compiled for: equal facts are one binary.

    Addresses are left out, which on a GPU are aligned. So are kernels that are ALONE.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.noted: list[Facts] = []

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call:
        if kernel.__name__ not in ALONE:
            binding = bind(kernel, args, constexprs)
            constants = {path: getattr(v, "__name__", v) for path, v in binding.constants().items()}
            aligned = [leaf.path for leaf in binding.flat() if leaf.aligned and leaf.array is None]
            self.noted.append((kernel.__name__, binding.types(), constants, aligned, options))
        return self._launcher.launch(kernel, grid, args, constexprs, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)


ALONE = {"pointwise_kernel", "depthwise_kernel", "pool_kernel", "permute_kernel", "gather_kernel", "mapped_kernel"}
"""Kernels in which one thread makes an element, in one order: their tiles may follow from the batch."""

_GUARD = 64
_UNTOUCHED = 0xA5


class Guarded:
    """An output: NaN (or 0x5A bytes) where the kernel must write, a known pattern everywhere else around it.

    `step` leaves gaps of step - 1 elements along the last axis.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, *, step: int = 1) -> None:
        dtype = np.dtype(dtype)
        *outer, last = shape if shape else (1,)
        wide = (*outer, last * step)
        nbytes = int(np.prod(wide)) * dtype.itemsize
        self._memory = np.full(nbytes + 2 * _GUARD, _UNTOUCHED, np.uint8)
        self._written = np.zeros(nbytes + 2 * _GUARD, np.bool_)
        self.array = self._view(self._memory, nbytes).view(dtype).reshape(wide)[..., ::step].reshape(shape, copy=False)
        if dtype.kind in "iub":
            self.array[...] = np.frombuffer(bytes([0x5A] * dtype.itemsize), dtype)[0]
        else:
            self.array[...] = np.nan
        marks = self._view(self._written, nbytes).reshape(*wide, dtype.itemsize)
        marks[..., ::step, :] = True

    @staticmethod
    def _view(memory: Array, nbytes: int) -> Array:
        return memory[_GUARD : _GUARD + nbytes]

    def check_guards(self) -> None:
        """Raises AssertionError where a byte outside of the array has changed."""
        outside = self._memory[~self._written]
        assert (outside == _UNTOUCHED).all(), f"{(outside != _UNTOUCHED).sum()} bytes written outside of the output"


def execute(calls: Sequence[Call]) -> None:
    for fn, args in calls:
        fn(*args)


def assert_close(out: Guarded, want: Array, *, error: float = 0.0) -> None:
    """Holds `out` against a float64 reference: guards whole, the same NaN and infinities, and elsewhere within one
    rounding to the type of out plus `error` times the largest |want|."""
    out.check_guards()
    got = out.array.astype(np.float64)
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), "NaN in other places")
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite & ~np.isnan(want)], want[~finite & ~np.isnan(want)])
    if finite.any():
        largest = float(np.abs(want[finite]).max())
        bound = ROUNDING[out.array.dtype.name] * np.abs(want[finite]) + error * largest + 1e-30
        if out.array.dtype == np.float16:
            bound = bound + 2.0**-25  # half of the smallest subnormal
        excess = np.abs(got[finite] - want[finite]) / bound
        assert excess.max() <= 1.0, f"off by {excess.max():.2f} times the bound, largest |want| {largest:.3g}"


def fenced(values: Array) -> Array:
    """A copy that ends where memory becomes inaccessible: to read past it ends the process. (On Linux; else a copy.)"""
    if not sys.platform.startswith("linux"):
        return values.copy()
    room = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), np.uint8)
    fence = ctypes.c_void_p(memory.ctypes.data + room)
    if ctypes.CDLL(None, use_errno=True).mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = memory[room - values.nbytes : room].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def random(shape: Sequence[int], dtype: Any, *, low: float = -2.0, high: float = 2.0, seed: int = 0) -> Array:
    """Uniform values between the bounds, rounded to the type; integers and bools likewise. The array is fenced."""
    return fenced(np.random.default_rng([seed, *shape]).uniform(low, high, tuple(shape)).astype(dtype))


@dataclass(frozen=True)
class Pointer:
    ptr: int


class FakeArray:
    """A device array with nothing behind its address."""

    def __init__(
        self, shape: Sequence[int], dtype: Any, *, address: int = 0x7F0000000000, transposed: bool = False
    ) -> None:
        layout = np.empty(0, dtype)
        strides, step = [], layout.itemsize
        for size in reversed(shape):
            strides.append(step)
            step *= size
        self.shape, self.dtype, self.size = tuple(shape), layout.dtype, step // layout.itemsize
        self.strides = tuple(strides) if transposed else tuple(reversed(strides))
        self.data = Pointer(address)

    def reshape(self, shape: Sequence[int]) -> FakeArray:
        """Of a contiguous array: the same address."""
        return FakeArray(shape, self.dtype, address=self.data.ptr)
