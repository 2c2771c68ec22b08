"""Whether kernels that come early wait for each other on a GPU, as `infera_kernels.launch.dependent` says: tried."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from infera_gpu.errors import OutOfMemoryError
from infera_kernels.launch import CudaLauncher

ELEMENTS, LAUNCHES, REPLAYS = 1 << 14, 64, 3
"""Of an array that is added to by so many kernels in a row, launched one by one and then replayed so often."""

COPIED = 8
"""Of so many in a row the last one adds to a copy that stands before it."""

_works: dict[int, bool] = {}
"""By GPU."""

_log = logging.getLogger(__name__)


def works(cupy: Any, index: int, malloc: Callable[[int], Any]) -> bool:
    """Whether kernels in a row wait for each other, and for copies between them, on GPU `index`, the current one,
    launched and as a CUDA graph: each adds to what is before it. Tried once a process, and again where memory was
    short; what fails is told in the log, and nothing else."""
    if index not in _works:
        try:
            found = _sums(cupy, index, malloc)
        except Exception as error:
            _log.warning("cuda:%d: no programmatic dependent launch, trying it failed: %s", index, error)
            if isinstance(error, OutOfMemoryError | cupy.cuda.memory.OutOfMemoryError):
                return False
            found = set()
        _works[index] = found == {LAUNCHES * (1 + REPLAYS)}
        if found and not _works[index]:
            _log.warning("cuda:%d: no programmatic dependent launch, kernels did not wait: %s", index, sorted(found))
    return _works[index]


def _sums(cupy: Any, index: int, malloc: Callable[[int], Any]) -> set[int]:
    """What the elements are in the end; nothing where there is nothing to try."""
    from infera_kernels.triton.elementwise import binary

    stream = cupy.cuda.Stream(non_blocking=True)
    launcher = CudaLauncher(index, stream)
    if not launcher.target.pdl:
        return set()
    with stream:
        sums, copy, one = (cupy.ndarray((ELEMENTS,), np.float32, malloc(4 * ELEMENTS)) for _ in range(3))
        sums.set(np.zeros(ELEMENTS, np.float32), stream)
        one.set(np.ones(ELEMENTS, np.float32), stream)
        copied = copy.data.copy_from_device_async, (sums.data, sums.nbytes, stream)
        added = binary("add", sums, one, sums, launcher) * (COPIED - 1)
        calls = [*added, copied, *binary("add", copy, one, sums, launcher)]

        def launched() -> None:
            for _ in range(LAUNCHES // COPIED):
                for fn, args in calls:
                    fn(*args)

        launched()
        stream.begin_capture()
        try:
            launched()
        finally:
            graph = stream.end_capture()
        for _ in range(REPLAYS):
            graph.launch(stream)
        made: set[int] = set(sums.get(stream).astype(int).tolist())
        stream.synchronize()
    return made
