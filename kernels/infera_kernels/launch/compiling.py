"""A launcher for a machine without a GPU: it compiles for one and keeps the result for inspection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from infera_kernels.calls import Call
from infera_kernels.launch import dependent
from infera_kernels.launch.binary import Inspection
from infera_kernels.launch.compile import compile_kernel, compiler_options, installed
from infera_kernels.launch.descriptors import FIRST_ARCH
from infera_kernels.launch.recording import Launch, launch_of
from infera_kernels.launch.signature import bind
from infera_kernels.launch.types import nominal_target


def nothing(*_: Any) -> None:
    """The launch of an empty grid."""


class CompileLauncher:
    """Compiles every kernel for sm_<arch>; `compiled[i]` is what `launches[i]` became. Its Calls do nothing."""

    def __init__(self, arch: int) -> None:
        self.target = replace(nominal_target(arch), triton=installed(), pdl=arch >= dependent.FIRST_ARCH)
        self.launches: list[Launch] = []
        self.compiled: list[Inspection] = []

    @property
    def describes(self) -> bool:
        return self.target.arch >= FIRST_ARCH

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call:
        settings = compiler_options(options, self.target)
        launch = launch_of(kernel, grid, args, constexprs, options)
        binary = compile_kernel(kernel, bind(kernel, args, constexprs), settings, self.target.arch)
        self.launches.append(launch)
        self.compiled.append(Inspection(binary))
        return nothing, ()
