"""What an operator's Triton kernel is bound to in tests: guarded arrays and a launcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from infera_gpu.graph import HostArray
from infera_gpu.memory import aligned
from infera_gpu.op import Kernel, Launcher, Site
from infera_gpu.spec import TensorSpec
from tests.buffers import GuardedBuffers


class LaunchingBuffers(GuardedBuffers):
    """Guarded arrays for a kernel that launches."""

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

    def check_workspace(self, kernel: Kernel, site: Site) -> None:
        """After binding: the scratch asked for is what the declaration announces. On a GPU nothing can be measured."""
        assert kernel.workspace is not None
        asked = sum(aligned(g.array.nbytes) for g in self._scratch)
        assert asked == kernel.workspace(site), f"{asked} bytes of scratch, not as `workspace` announces"


def bindings(kernel: Kernel, site: Site) -> Iterator[dict[str, Any]]:
    """The ways in which a planner may bind it: contiguous, strided, into a window, and over the memory of an input."""
    yield {}
    if kernel.strided:
        yield {"strided": True}
    if kernel.strided_out:
        yield {"strided": kernel.strided, "strided_out": True}
    for i in kernel.inplace:
        if site.has(i) and site.value(i) is None and site.ins[i] == site.outs[0]:
            yield {"inplace": i}
            if kernel.strided_out:
                yield {"inplace": i, "strided_out": True}
