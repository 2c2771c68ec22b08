"""Places to run. A device is chosen by name and opened when a session asks for it, never at import.

Only the CPU's module is imported with the package: it imports no device library, and is what there is without a GPU.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from infera_gpu.budget import VramBudget
from infera_gpu.devices.base import Device
from infera_gpu.devices.cpu import CpuDevice
from infera_gpu.errors import DeviceError
from infera_kernels.jit import installed

if TYPE_CHECKING:
    from infera_kernels.tuning import DeviceTiles


NAMES = "auto, cpu, cuda, cuda:N or recording"
ALL = "cuda:all"
"""To a server every GPU that CUDA shows; no device."""

_NAME = re.compile("auto|cpu|recording|cuda(:[0-9]{1,9})?")


def open_device(
    name: str = "auto",
    *,
    threads: int | None = None,
    strict: bool = False,
    jit: bool | None = None,
    captures: bool = True,
    tf32: bool = False,
    batch_invariant: bool = False,
    budget: VramBudget | None = None,
) -> Device:
    """The device called `name`: "cpu", "cuda", "cuda:1", "recording", or "auto" (the first GPU, else the CPU).

    `threads` is for the CPU, see `CpuDevice`, and so is `jit`: whether to run what numba compiles, None where it is
    installed and nothing is `strict`. `budget` is for GPUs: what memory there is to take, None for all of it. `strict`,
    `tf32`, `captures` and `batch_invariant`: see `Device`. Raises DeviceError where the device is unknown or absent, or
    cannot be batch invariant, or where numba is absent or would add in another order than `strict` allows.
    """
    check_name(name)
    if name == "auto":
        from infera_gpu.devices.cuda import why_unavailable

        name = "cpu" if why_unavailable() else "cuda"
    if batch_invariant:
        _require_invariant(name)
    if name == "cpu":
        return CpuDevice(threads, strict, _compiles(jit, strict))
    if name == "recording":
        from infera_gpu.devices.recording import RecordingDevice

        return RecordingDevice(strict, captures=captures, tf32=tf32, batch_invariant=batch_invariant, budget=budget)
    from infera_gpu.devices.cuda import CudaDevice

    index = int(name.partition(":")[2] or 0)
    return CudaDevice(index, strict, captures=captures, tf32=tf32, batch_invariant=batch_invariant, budget=budget)


def check_name(name: object) -> None:
    """Raises DeviceError for what names no device, whether or not it would be here."""
    if not isinstance(name, str):
        raise DeviceError(f"device is {name!r}, expected a name: {NAMES}")
    if name == ALL:
        raise DeviceError(f"'{ALL}' is for `infera serve --device`, which spreads models; expected one of {NAMES}")
    if not _NAME.fullmatch(name):
        raise DeviceError(f"unknown device '{name}'; expected {NAMES}")


def tiles_of(device: Device) -> DeviceTiles:
    """What is measured on a device. Raises DeviceError where no kernel of it has tiles."""
    if device.tiles is not None:
        return device.tiles
    if "cupy" in device.kinds:
        raise DeviceError(
            "tiles are those of Triton's kernels, and Triton is not installed: pip install 'infera-gpu[cuda12]' or "
            "'infera-gpu[cuda13]', or 'infera-gpu[kernels]' where there is no GPU"
        )
    raise DeviceError(f"{device.name} runs no kernels that have tiles: there is nothing to tune")


def _require_invariant(name: str) -> None:
    if name == "cpu":
        raise DeviceError(
            "batch_invariant=True is for GPUs: products on the CPU are BLAS's, which adds in an order that depends on "
            "how many rows there are"
        )
    if find_spec("triton") is None:
        raise DeviceError(
            "batch_invariant=True needs Triton's kernels, since cuBLAS adds in an order that depends on how many rows "
            "there are: pip install 'infera-gpu[cuda12]' or 'infera-gpu[cuda13]'"
        )


def _compiles(jit: bool | None, strict: bool) -> bool:
    if jit and strict:
        raise DeviceError("jit=True is not for accuracy='strict': what numba compiles adds in orders of its own")
    if jit and not installed():
        raise DeviceError("jit=True needs numba: pip install 'infera-gpu[jit]'")
    return installed() and not strict if jit is None else jit


__all__ = ["ALL", "Device", "check_name", "open_device", "tiles_of"]
