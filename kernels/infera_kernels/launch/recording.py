"""A launcher that executes nothing and remembers everything: plans on a machine with neither GPU nor compiler."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infera_kernels.calls import Call
from infera_kernels.launch.descriptors import FIRST_ARCH
from infera_kernels.launch.signature import bind, kernel_name
from infera_kernels.launch.types import Target, grid_of, nominal_target


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch as it was asked for."""

    kernel: str
    grid: tuple[int, int, int]
    args: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]


def launch_of(
    kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], constexprs: Mapping[str, Any], options: dict[str, Any]
) -> Launch:
    name = kernel_name(kernel)
    return Launch(name, grid_of(grid, name), dict(args), dict(constexprs), options)


class RecordingLauncher:
    """Every Call, when executed, appends its Launch to `launches`, which holds the arrays that it was given; where it
    `forgets`, to nothing. Arguments are checked against the kernel."""

    def __init__(self, target: Target | None = None, forgets: bool = False) -> None:
        self.target = target or nominal_target(90)
        self.launches: list[Launch] = []
        self._append = deque[Launch](maxlen=0).append if forgets else self.launches.append

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
        bind(kernel, args, constexprs)
        return self._append, (launch_of(kernel, grid, args, constexprs, options),)
