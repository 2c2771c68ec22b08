"""Triton kernels on an NVIDIA GPU: compiled once, kept on disk, launched by the driver with arguments packed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from infera_kernels.calls import Call
from infera_kernels.launch import cublaslt, cudnn, dependent
from infera_kernels.launch.abi import Address, pack
from infera_kernels.launch.assembler import suit
from infera_kernels.launch.cache import KernelCache, PlanCache
from infera_kernels.launch.compile import Binary, KernelSpec, cache_key, compile_kernel, compiler_options, installed
from infera_kernels.launch.compiling import nothing
from infera_kernels.launch.cublaslt import CublasLt
from infera_kernels.launch.cudnn import Cudnn
from infera_kernels.launch.descriptors import FIRST_ARCH, Descriptor, Encode, driver_encode, encoded
from infera_kernels.launch.signature import Leaf, bind, kernel_name
from infera_kernels.launch.types import LaunchError, Target, address_of, grid_of

_DEFAULT_SHARED = 48 * 1024
"""Dynamic shared memory that a block may use without opting in."""

_UNSUITABLE = frozenset({200, 209, 218, 222, 500})
"""The errors, as the CUDA driver numbers them, of a cubin that it cannot use: no image, or none for this card, from a
newer assembler, without the function. Others are not the cubin's."""


WORKSPACES = (1 << 22, 1 << 25)
"""Bytes of cuBLASLt's workspace, as NVIDIA sizes it: before Hopper and from it on."""


class Driver(Protocol):
    """The part of the CUDA driver that launching needs."""

    @property
    def launch(self) -> Callable[..., object]:
        """cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared bytes, stream, parameters, extra)"""
        ...

    def version(self) -> int:
        """The CUDA release that the driver supports: 12080 is 12.8."""
        ...

    def target(self, device_id: int) -> Target: ...

    def load(self, device_id: int, cubin: bytes, name: str) -> Address:
        """The function `name` of a cubin; the address keeps its module loaded. Raises LaunchError for a cubin that the
        driver cannot use; its other errors pass."""
        ...

    def allow_shared(self, function: int, nbytes: int) -> None:
        """Lets a function use more than 48 KiB of dynamic shared memory."""
        ...

    @property
    def encode(self) -> Encode | None:
        """cuTensorMapEncodeTiled, where the driver has it."""
        ...

    @property
    def launch_early(self) -> Callable[..., object] | None:
        """cuLaunchKernelEx, see `dependent`, where the driver has it and it is wanted."""
        ...


class CupyDriver:
    """The driver by way of CuPy, which a process with CUDA arrays has loaded anyway."""

    def __init__(self) -> None:
        from cupy_backends.cuda.api import driver, runtime

        self._driver, self._driver_version = driver, runtime.driverGetVersion
        self.launch: Callable[..., object] = driver.launchKernel
        self.launch_early = dependent.driver_launch(driver.check_status)

    def version(self) -> int:
        return int(self._driver_version())

    def target(self, device_id: int) -> Target:
        import cupy

        runtime = cupy.cuda.runtime
        return Target(
            int(cupy.cuda.Device(device_id).compute_capability),
            runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device_id),
            runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device_id),
            runtime.getDeviceProperties(device_id)["name"].decode(),
        )

    def load(self, device_id: int, cubin: bytes, name: str) -> Address:
        import cupy

        module = cupy.cuda.function.Module()
        try:
            with cupy.cuda.Device(device_id):
                module.load(cubin)
                function = module.get_function(name)
        except self._driver.CUDADriverError as e:
            if e.status not in _UNSUITABLE:
                raise
            version = self.version()
            raise LaunchError(
                f"{name}: the driver (CUDA {version // 1000}.{version % 1000 // 10}) does not load it: {e}. Where it "
                "is older than Triton's assemblers, set TRITON_PTXAS_BLACKWELL_PATH to the ptxas of its own release"
            ) from e
        return Address.of(function.ptr, (function, module))

    def allow_shared(self, function: int, nbytes: int) -> None:
        attribute = self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._driver.funcSetAttribute(function, attribute, nbytes)

    @property
    def encode(self) -> Encode | None:
        return driver_encode()


@dataclass(frozen=True, slots=True)
class _Loaded:
    binary: Binary
    function: Address


class CudaLauncher:
    """Launches on one device and one stream.

    `stream` is a cupy stream, or its address. `launch` compiles or loads what is not there yet, so it must run
    outside a graph capture; the Calls it returns may be captured. It may be called from several threads. `library` is
    cuBLASLt and `cudnn` cuDNN, where they are installed and `libraries` asks for them. Kernels come early, see
    `dependent`, where the GPU and its driver have that, unless `pdl` is false.
    """

    def __init__(
        self,
        device_id: int,
        stream: Any,
        *,
        driver: Driver | None = None,
        cache: KernelCache | None = None,
        libraries: bool = False,
        pdl: bool = True,
    ) -> None:
        self.device_id = device_id
        self._stream = Address.of(int(getattr(stream, "ptr", stream)), stream)
        self._driver = driver or CupyDriver()
        self._cache = cache or KernelCache()
        self.driver_version = self._driver.version()
        suit(self.driver_version)
        self.target = self._driver.target(device_id)
        early = self.target.arch >= dependent.FIRST_ARCH and self.driver_version >= dependent.FIRST_DRIVER
        self.launch_early = self._driver.launch_early if pdl and early else None
        """By which kernels come early; without it they are launched as ever, the same ones too."""
        self.target = replace(self.target, triton=installed(), pdl=self.launch_early is not None)
        self.library: CublasLt | None = None
        self.cudnn: Cudnn | None = None
        if libraries and (found := cublaslt.library()) is not None:
            self.library = CublasLt(found, device_id, self._stream)
            self.target = replace(self.target, library_bytes=WORKSPACES[self.target.arch >= 90])
        if libraries and (found := cudnn.library()) is not None:
            self.target = replace(self.target, cudnn=cudnn.installed())
            where = f"cuDNN {self.target.cudnn}, driver {self.driver_version}, {self.target}"
            self.cudnn = Cudnn(found, device_id, self._stream, kept=PlanCache(self._cache.directory), where=where)
        self.compiled = 0
        """Kernels that were not in the cache and were compiled here."""
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call:
        x, y, z = grid_of(grid, kernel_name(kernel))
        binding = bind(kernel, args, constexprs)
        settings = compiler_options(options, self.target)
        if x * y * z == 0:
            return nothing, ()
        key = cache_key(kernel, binding, settings, self.target.arch)
        with self._lock:
            loaded = self._loaded.get(key)
            if loaded is None:
                binary = self._cache.get(key)
                if binary is None:
                    binary = compile_kernel(kernel, binding, settings, self.target.arch)
                    self._cache.put(key, binary)
                    self.compiled += 1
                loaded = self._loaded[key] = self._load(binary)
        runtime = binding.runtime()
        spec = loaded.binary.spec
        parameters = pack(spec.types, self._values(runtime, spec), keep=[leaf.array for leaf in runtime])
        if spec.pdl and self.launch_early is not None:
            config = dependent.configured((x, y, z), spec.threads, spec.shared_bytes, self._stream)
            return self.launch_early, (config, loaded.function, parameters, 0)
        return self._driver.launch, (
            *(loaded.function, x, y, z, spec.threads, 1, 1, spec.shared_bytes),
            *(self._stream, parameters, 0),
        )

    @property
    def describes(self) -> bool:
        """Whether kernels may take descriptors: TMA is there, and who describes memory to it."""
        return self.target.arch >= FIRST_ARCH and self._driver.encode is not None

    def _values(self, runtime: Sequence[Leaf], spec: KernelSpec) -> list[Any]:
        """What `pack` takes. Maps are made here, once: addresses do not change."""
        encodings, values = iter(spec.encodings), []
        for leaf in runtime:
            value = leaf.value
            if isinstance(value, Descriptor):
                encode = self._driver.encode
                if encode is None:
                    raise LaunchError(f"{spec.name}: the driver has no cuTensorMapEncodeTiled: CUDA 12 is needed")
                made = encoded(encode, value, address_of(value.array), next(encodings), self.target.arch)
                value = (made, *value.shape, *value.strides)
            values.append(value)
        return values

    def _load(self, binary: Binary) -> _Loaded:
        spec = binary.spec
        if spec.shared_bytes > self.target.shared_bytes:
            raise LaunchError(
                f"{spec.name}: needs {spec.shared_bytes:,} bytes of shared memory a block, device {self.device_id} "
                f"(sm_{self.target.arch}) has {self.target.shared_bytes:,}: choose a smaller tile or fewer stages"
            )
        function = self._driver.load(self.device_id, binary.cubin, spec.name)
        if spec.shared_bytes > _DEFAULT_SHARED:
            self._driver.allow_shared(function, spec.shared_bytes)
        return _Loaded(binary, function)
