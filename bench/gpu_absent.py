"""A card that is elsewhere: kernels are compiled for it here, and none is launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infera_gpu.devices.base import host_block
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.graph import HostArray
from infera_gpu.layout import Space
from infera_kernels.launch import Call, CudaLauncher, LaunchError, Target
from infera_kernels.launch.abi import Address
from infera_kernels.launch.compile import cache_key, compiler_options
from infera_kernels.launch.compiling import nothing
from infera_kernels.launch.cublaslt import Product
from infera_kernels.launch.signature import bind
from infera_kernels.tuning import DeviceTiles


class AbsentDriver:
    """Says of a card what the one that has it said; loads nothing, launches nothing."""

    def __init__(self, target: Target, version: int) -> None:
        self._target, self._version = target, version

    def version(self) -> int:
        return self._version

    def target(self, device_id: int) -> Target:
        return self._target

    def load(self, device_id: int, cubin: bytes, name: str) -> Address:
        return Address.of(0, None)

    def allow_shared(self, function: int, nbytes: int) -> None: ...

    def encode(self, *_: object) -> int:
        """Describes nothing: what is compiled here is not launched."""
        return 0

    @property
    def launch(self) -> Callable[..., object]:
        return _refuse

    @property
    def launch_early(self) -> Callable[..., object] | None:
        return _refuse if self._target.pdl else None


def _refuse(*_: int) -> None:
    raise LaunchError("kernels are compiled ahead here, not launched")


class AheadDevice(RecordingDevice):
    """Plans and binds like the CUDA device of a card that is elsewhere; arrays lie as they do there, on whole words.
    Tiles are the predicted ones unless others are given."""

    def __init__(
        self,
        launcher: CudaLauncher,
        *,
        tf32: bool = False,
        batch_invariant: bool = False,
        tiles: DeviceTiles | None = None,
    ) -> None:
        super().__init__(tf32=tf32, batch_invariant=batch_invariant)
        self._launcher = launcher
        self.tiles = tiles or DeviceTiles(launcher.target)

    def constant(self, host: HostArray, space: Space, *, lasting: bool = False, packed: bool = False) -> HostArray:
        if space == "host":
            return host
        return np.ndarray(host.shape, host.dtype, host_block(host.nbytes))


class SharingLauncher(CudaLauncher):
    """Leaves alone what another process has begun to compile: whose it is, files in a folder `claims` say, empty ones
    called as the kernels are."""

    def __init__(self, driver: AbsentDriver, claims: Path) -> None:
        super().__init__(0, 0, driver=driver)
        self._claims = claims

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call:
        key = cache_key(
            kernel, bind(kernel, args, constexprs), compiler_options(options, self.target), self.target.arch
        )
        if key not in self._loaded and not self._claimed(key):
            return nothing, ()
        return super().launch(kernel, grid, args, constexprs, **options)

    def _claimed(self, key: str) -> bool:
        """Whether a kernel is this process's to compile; one that could not be compiled is nobody's."""
        try:
            (self._claims / key).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class TakingLibrary:
    """Takes every product, as the library of a card that is elsewhere would take nearly all."""

    def call(self, product: Product, workspace: Any) -> Call:
        return nothing, ()
