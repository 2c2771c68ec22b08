"""Programmatic dependent launch: a kernel's blocks take their places while the last ones of the kernel before it run.

A kernel so launched says at its very beginning that the next one may come, and then waits until all of the one before
it is done and its results are there: nothing that a kernel reads or writes comes before that. What is saved is the time
between two kernels, of which a network of small ones has as much as of work ("Programmatic Dependent Launch and
Synchronization" in the CUDA Programming Guide; `griddepcontrol` in the PTX ISA; sm_90 and later).

Every kernel that is launched so waits, so that what is done when it goes on is all that came before, not its neighbour
alone. A kernel or a copy that is launched in another way waits for everything, as ever.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from infera_kernels.launch.abi import Address
from infera_kernels.launch.types import LaunchError

OFF = "INFERA_PDL"
"""What is 0 in the environment where kernels are not to be launched so."""

FIRST_ARCH = 90
"""The first architecture that has it."""

FIRST_DRIVER = 12030
"""The first driver, as cuDriverGetVersion says it, that records such launches in CUDA graphs ("Edge Data" in the CUDA
Programming Guide)."""

_BEGINNING = "\tgriddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;\n"
"""What a kernel does first. The next one may come, and waits itself: to say so early promises it nothing."""

_ENTRY = re.compile(r"^\.visible \.entry [^{]*^\{\n", re.MULTILINE)
_DECLARATION = re.compile(r"\s*(//|\.|\$L__func_begin|$)")
"""What stands before a function's first instruction: comments, directives, the label of its beginning, nothing."""

_STREAM_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h."""

_stages = threading.Lock()


def waits(ptx: str) -> bool:
    """Whether there is a kernel in it that waits for the one in front of it."""
    return re.search(r"griddepcontrol\.wait\s*;", ptx) is not None


def waiting(ptx: str) -> str:
    """The PTX of a module with one kernel, which begins as said above, unless it waits where it wants to. Raises
    LaunchError where there is no one kernel."""
    if waits(ptx):
        return ptx
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise LaunchError(f"{len(entries)} kernels in the PTX, expected one: another Triton?")
    at = entries[0].end()
    while _DECLARATION.match(line := ptx[at : ptx.index("\n", at) + 1]):
        at += len(line)
    return ptx[:at] + _BEGINNING + ptx[at:]


@contextmanager
def compiled_waiting() -> Iterator[None]:
    """What this thread has Triton compile meanwhile begins so. One thread at a time: there is one place where Triton
    lets its stages be changed, which is left as it was found."""
    from triton import knobs

    runtime: Any = knobs.runtime
    thread = threading.get_ident()
    with _stages:
        others = runtime.add_stages_inspection_hook

        def changed(*given: Any) -> Any:
            """With stages among what is given, or nothing, for the key of a cache."""
            found = ("", "") if others is None else others(*given)
            if given and threading.get_ident() == thread:
                stages = given[1]
                made = stages["ptx"]
                stages["ptx"] = lambda *inputs: waiting(made(*inputs))
            return found

        runtime.add_stages_inspection_hook = changed
        try:
            yield
        finally:
            runtime.add_stages_inspection_hook = others


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_byte * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


def configured(grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: Address) -> Address:
    """The address of a CUlaunchConfig, which it owns, of a kernel that may come early; blocks are of one dimension."""
    attribute = _Attribute(_STREAM_SERIALIZATION, 0, 1)
    config = _Config(grid, (threads, 1, 1), shared_bytes, int(stream), ctypes.pointer(attribute), 1)
    return Address.of(ctypes.addressof(config), (config, attribute, stream))


def driver_launch(check: Callable[[int], object]) -> Callable[..., object] | None:
    """cuLaunchKernelEx(config, function, parameters, extra), all of them addresses, whose status is given to `check`;
    None where the driver does not have it, or the environment says 0."""
    if os.environ.get(OFF) == "0":
        return None
    try:
        found = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p,) * 4

    def checked(status: Any, *_: Any) -> Any:
        check(status)
        return status

    found.errcheck = checked
    launch: Callable[..., object] = found
    return launch
