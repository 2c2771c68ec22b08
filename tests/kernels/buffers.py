"""What an operator's Triton kernel is bound to in tests: guarded arrays and a launcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Kernel, Launcher, Site
from infera_gpu.spec import TensorSpec
from tests.buffers import GuardedBuffers


class LaunchingBuffers(GuardedBuffers):
    """Guarded arrays for a kernel that launches; it takes no scratch, as its declaration says."""

    def __init__(
        self,
        launcher: Launcher,
        ins: Sequence[HostArray | None],
        specs: Sequence[TensorSpec],
        values: Sequence[HostArray | None],
        **options: Any,
    ) -> None:
        super().__init__(ins, specs, values, **options)
        self._launcher = launcher

    @property
    def launcher(self) -> Launcher:
        return self._launcher

    def scratch(self, shape: Sequence[int], dtype: Any = np.float32) -> HostArray:
        raise AssertionError("a Triton kernel asked for scratch that its `workspace` does not announce")


def bindings(kernel: Kernel, site: Site) -> Iterator[dict[str, Any]]:
    """The ways in which a planner may bind it: contiguous, strided, and over the memory of an input."""
    yield {}
    if kernel.strided:
        yield {"strided": True}
    for i in kernel.inplace:
        if site.has(i) and site.value(i) is None and site.ins[i] == site.outs[0]:
            yield {"inplace": i}
