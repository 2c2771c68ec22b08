"""Places to run. A device is chosen by name and opened when a session asks for it, never at import."""

from __future__ import annotations

from infera_gpu.budget import VramBudget
from infera_gpu.devices.base import Device
from infera_gpu.errors import DeviceError
from infera_kernels.jit import installed


def open_device(
    name: str = "auto",
    *,
    threads: int | None = None,
    strict: bool = False,
    jit: bool | None = None,
    captures: bool = True,
    tf32: bool = False,
    budget: VramBudget | None = None,
) -> Device:
    """The device called `name`: "cpu", "cuda", "cuda:1", "recording", or "auto" (the first GPU, else the CPU).

    `threads` is for the CPU, see `CpuDevice`, and so is `jit`: whether to run what numba compiles, None where it is
    installed. `budget` is for GPUs: what memory there is to take, None for all of it. `strict`, `tf32` and
    `captures`: see `Device`. Raises DeviceError where the device is unknown or absent, or numba is.
    """
    if name == "auto":
        from infera_gpu.devices.cuda import why_unavailable

        name = "cpu" if why_unavailable() else "cuda"
    if name == "cpu":
        from infera_gpu.devices.cpu import CpuDevice

        return CpuDevice(threads, strict, _compiles(jit))
    if name == "recording":
        from infera_gpu.devices.recording import RecordingDevice

        return RecordingDevice(strict, captures=captures, tf32=tf32, budget=budget)
    kind, _, index = name.partition(":")
    if kind == "cuda" and (index.isdigit() or not index):
        from infera_gpu.devices.cuda import CudaDevice

        return CudaDevice(int(index or 0), strict, captures=captures, tf32=tf32, budget=budget)
    raise DeviceError(f"unknown device '{name}'; expected auto, cpu, cuda, cuda:N or recording")


def _compiles(jit: bool | None) -> bool:
    if jit and not installed():
        raise DeviceError("jit=True needs numba: pip install 'infera-gpu[jit]'")
    return installed() if jit is None else jit


__all__ = ["Device", "open_device"]
