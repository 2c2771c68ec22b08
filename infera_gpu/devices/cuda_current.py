"""Which GPU is a thread's current one."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any


class Current:
    """A context in which GPU `index` is the thread's current one; then the one before is again.

    Several threads can enter it, and enter it again. cudaSetDevice also tells of faults: of the GPU that was current,
    and of the one that it makes current. Those of another GPU are not raised here, as long as this one works: the
    caller may have lost his, and nothing that runs here has failed. This one's are CUDARuntimeErrors.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        self._runtime, self._index = cupy.cuda.runtime, index
        self._mine = threading.local()

    def __enter__(self) -> None:
        before = self._runtime.getDevice()
        if before != self._index:
            self._use()
        self._stack().append(before)

    def __exit__(self, *_: object) -> None:
        runtime, before = self._runtime, self._stack().pop()
        try:
            runtime.setDevice(before)
        except runtime.CUDARuntimeError:
            if before == self._index:
                raise
            try:
                self._use()
                runtime.memGetInfo()  # fails where it is this one that is lost
            finally:
                with suppress(runtime.CUDARuntimeError):
                    runtime.setDevice(before)

    def _use(self) -> None:
        runtime = self._runtime
        with suppress(runtime.CUDARuntimeError):
            runtime.setDevice(self._index)
            return
        runtime.setDevice(self._index)  # the other one's fault is told once

    def _stack(self) -> list[int]:
        """The GPUs that were current before, in this thread."""
        stack: list[int] = self._mine.__dict__.setdefault("stack", [])
        return stack
