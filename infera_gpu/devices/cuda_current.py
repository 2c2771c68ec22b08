"""Which GPU is a thread's current one."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any


class _Mine(threading.local):
    """The GPUs that were current before, in this thread."""

    def __init__(self) -> None:
        self.before: list[int] = []


class Current:
    """A context in which GPU `index` is the thread's current one; then the one before is again.

    Several threads can enter it, and enter it again. cudaSetDevice also tells of faults: of the GPU that was current,
    and of the one that it makes current. Those of another GPU are not raised here, as long as this one works: the
    caller may have lost his, and nothing that runs here has failed. This one's are CUDARuntimeErrors.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        self._runtime, self._index = cupy.cuda.runtime, index
        self._mine = _Mine()

    def __enter__(self) -> None:
        before = self._runtime.getDevice()
        if before != self._index:
            try:
                self._use()
            except self._runtime.CUDARuntimeError:
                self._go_back(before)  # a finaliser may ask, in the middle of what runs on another GPU
                raise
        self._mine.before.append(before)

    def __exit__(self, *_: object) -> None:
        runtime, before = self._runtime, self._mine.before.pop()
        try:
            runtime.setDevice(before)
        except runtime.CUDARuntimeError:
            if before == self._index:
                raise
            try:
                self._use()
                runtime.memGetInfo()  # fails where it is this one that is lost
            finally:
                self._go_back(before)

    def _go_back(self, before: int) -> None:
        with suppress(self._runtime.CUDARuntimeError):
            self._runtime.setDevice(before)

    def _use(self) -> None:
        runtime = self._runtime
        with suppress(runtime.CUDARuntimeError):
            runtime.setDevice(self._index)
            return
        runtime.setDevice(self._index)  # the other one's fault is told once
