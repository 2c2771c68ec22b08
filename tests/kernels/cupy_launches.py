"""Launches kernels as production does, by CuPy's own call of the driver, and prints what a fake driver got of them.

Run as a process of its own, with the library of fakecuda.c as the libcuda.so.1 that is found:
`python -m tests.kernels.cupy_launches FOLDER`, where compiled kernels are kept. Prints JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from infera_kernels.calls import Call
from infera_kernels.launch import CudaLauncher, KernelCache, LaunchError, Target, nominal_target
from infera_kernels.launch.abi import ptx_parameter_sizes
from infera_kernels.launch.compile import Binary
from infera_kernels.launch.cuda import CupyDriver
from infera_kernels.triton.matmul import matmul
from infera_kernels.triton.softmax import softmax
from infera_kernels.triton.tiles import Tile

STREAM = 0x5A5A0
BROKEN = 700


class FakeLaunch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("extra", ctypes.c_uint64),
        ("attribute", ctypes.c_int * 2),
        ("parameters", ctypes.c_ubyte * 1024),
    )


class Driver(CupyDriver):
    """CuPy's, but for what asks the CUDA runtime, which takes more of a driver than the fake has."""

    def version(self) -> int:
        return 13000

    def target(self, device_id: int) -> Target:
        return nominal_target(90)


class Module:
    """cupy.cuda.function.Module without the context that it asks the CUDA runtime for first."""

    def load(self, cubin: bytes) -> None:
        from cupy_backends.cuda.api import driver

        self._cubin, self._ptr = cubin, driver.moduleLoadData(cubin)

    def get_function(self, name: str) -> SimpleNamespace:
        from cupy_backends.cuda.api import driver

        return SimpleNamespace(ptr=driver.moduleGetFunction(self._ptr, name))


class Cache(KernelCache):
    """Keeps kernels, and tells the fake what parameters they have: those of the PTX that Triton made."""

    def __init__(self, directory: Path, library: ctypes.CDLL) -> None:
        super().__init__(directory)
        self._library = library
        self.names: list[str] = []
        self.binaries: list[Binary] = []

    def put(self, key: str, binary: Binary) -> None:
        sizes = ptx_parameter_sizes(binary.ptx)
        made = self._library.fakecuda_kernel(binary.spec.name.encode(), len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        assert made == len(self.names)
        self.names.append(binary.spec.name)
        self.binaries.append(binary)
        super().put(key, binary)


def array(shape: tuple[int, ...], dtype: str) -> Any:
    """Of CuPy's, in host memory."""
    import cupy

    from tests.real_cupy import pointer

    return cupy.ndarray(shape, dtype, pointer(cupy, int(np.prod(shape)) * np.dtype(dtype).itemsize))


def refused(calls: list[Call]) -> int:
    """The error that CuPy raises, as the driver numbers it; 0 where it raises none."""
    from cupy_backends.cuda.api import driver

    try:
        make(calls)
    except driver.CUDADriverError as error:
        return int(error.status)
    return 0


def make(calls: list[Call]) -> None:
    for fn, args in calls:
        fn(*args)


def main(folder: str) -> None:
    import cupy

    library = ctypes.CDLL("libcuda.so.1")
    library.fakecuda_launch.restype = ctypes.POINTER(FakeLaunch)
    cupy.cuda.Device = lambda index: nullcontext()  # the runtime's, too
    cupy.cuda.function.Module = Module
    cache = Cache(Path(folder), library)
    launcher = CudaLauncher(0, STREAM, driver=Driver(), cache=cache)

    x, out = array((7, 1000), "float16"), array((7, 1000), "float16")
    a, b, c = array((256, 512), "float16"), array((512, 256), "float16"), array((256, 256), "float16")
    first, second = softmax(x, out, launcher), matmul(a, b, c, launcher, tile=Tile(128, 128, 64, 8, 3))
    make([*first, *second, *first])
    library.fakecuda_fail(BROKEN)
    status = refused(first)
    try:
        launcher._load(replace(cache.binaries[0], cubin=b"not a cubin"))
        unloaded = ""
    except LaunchError as error:
        unloaded = str(error)

    launches = [library.fakecuda_launch(i).contents for i in range(library.fakecuda_launches())]
    made = [
        {
            "kernel": cache.names[launch.kernel],
            "grid": list(launch.grid),
            "block": list(launch.block),
            "shared": launch.shared,
            "stream": launch.stream,
            "extra": launch.extra,
            "attribute": list(launch.attribute),
            "parameters": bytes(launch.parameters[: launch.bytes]).hex(),
        }
        for launch in launches
    ]
    kernels = {
        name: {
            "types": binary.spec.types,
            "threads": binary.spec.threads,
            "shared": binary.spec.shared_bytes,
            "set": [library.fakecuda_attribute(i), library.fakecuda_value(i)],
        }
        for i, (name, binary) in enumerate(zip(cache.names, cache.binaries, strict=True))
    }
    arrays = {name: given.data.ptr for name, given in {"x": x, "out": out, "a": a, "b": b, "c": c}.items()}
    found = {"launches": made, "kernels": kernels, "arrays": arrays, "status": status, "unloaded": unloaded}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
