"""GPU memory of one device, counted against a budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infera_gpu.budget import VramBudget
from infera_gpu.errors import OutOfMemoryError
from infera_gpu.memory import aligned


class _Charged:
    """Memory that counts against a budget until it is freed."""

    def __init__(self, memory: Any, nbytes: int, budget: VramBudget) -> None:
        self.memory, self._nbytes, self._budget = memory, nbytes, budget

    def __del__(self) -> None:
        self.memory = None  # freed first: who is told that there is room must find it
        self._budget.give_back(self._nbytes)


class Vram:
    """Takes memory from the driver. A `budget` of None is everything that the GPU has."""

    def __init__(self, cupy: Any, budget: VramBudget | None) -> None:
        self._cupy, self.budget = cupy, budget
        self.pool = cupy.cuda.MemoryPool() if budget is None else cupy.cuda.MemoryPool(self._temporary)
        self._lock = threading.Lock()
        self._weights: Any = None
        self._at = self._end = 0

    def available(self) -> int:
        """Bytes that could be had now. Of the current GPU."""
        free = int(self._cupy.cuda.runtime.memGetInfo()[0])
        return free if self.budget is None else min(free, self.budget.available)

    def take(self, what: str, nbytes: int) -> Any:
        """A pointer to memory of the current GPU, which is freed with the last array in it. CuPy's errors pass."""
        cuda, budget = self._cupy.cuda, self.budget
        if budget is None:
            return cuda.MemoryPointer(cuda.Memory(nbytes), 0)
        budget.take(what, nbytes)
        try:
            memory = cuda.Memory(nbytes)
        except BaseException:
            budget.give_back(nbytes)
            raise
        owner = _Charged(memory, nbytes, budget)
        return cuda.MemoryPointer(cuda.UnownedMemory(memory.ptr, nbytes, owner, memory.device_id), 0)

    @contextmanager
    def weights(self, what: str, nbytes: int) -> Iterator[None]:
        """What `weight` takes meanwhile lies side by side in one block of so many bytes, as far as that reaches."""
        block = self.take(what, nbytes) if nbytes else None
        with self._lock:
            self._weights, self._at, self._end = block, 0, nbytes
        try:
            yield
        finally:
            with self._lock:
                self._weights = None

    def weight(self, what: str, nbytes: int) -> Any:
        """A pointer to memory for a weight; see `take`."""
        with self._lock:
            at = self._at
            if self._weights is not None and at + nbytes <= self._end:
                self._at += aligned(nbytes)
                return self._weights + at
        return self.take(what, nbytes)

    def _temporary(self, nbytes: int) -> Any:
        """Memory for the pool, which lets go of what it keeps where the driver has no more, but not for a budget."""
        try:
            return self.take("a temporary array", nbytes)
        except OutOfMemoryError:
            self.pool.free_all_blocks()
            return self.take("a temporary array", nbytes)
