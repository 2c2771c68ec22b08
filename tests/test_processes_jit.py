"""Parts in worker processes that are calls of compiled functions."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from infera_gpu.devices import processes
from infera_gpu.devices.processes import Processes
from infera_gpu.devices.sending import Region
from infera_gpu.graph import HostArray
from infera_kernels import jit
from tests.test_processes import array, in_turn, made, pool, ready, shared, until
from tests.test_threads import _python

if not jit.installed():
    pytest.skip("needs numba: pip install 'infera-gpu[jit]'", allow_module_level=True)
pytestmark = pytest.mark.skipif(bool(processes.unavailable()), reason=processes.unavailable())

from infera_kernels.jit import epilogue, gemm  # noqa: E402

__all__ = ["pool"]


def has_numba(process: int) -> bool:
    return "llvmlite" in Path(f"/proc/{process}/maps").read_text()


def _is_told(pool: Processes, region: Region) -> bool:
    """Runs it; whether the worker has it and its functions."""
    return bool(made(pool, region).sent) and all(w.ready for w in pool.workers)


def additions(pool: Processes) -> tuple[Region, HostArray, HostArray]:
    """A region of two parts that add numbers to rows and note their process when both have begun; the rows, which are
    zeros, and what is noted."""
    region, who = shared(pool)
    y = array(pool, (2, 3, 8), np.float32)
    for i, part in enumerate(region.parts):
        part += epilogue.finish(y[i], bias=np.arange(8, dtype=np.float32))  # type: ignore[operator]
    return region, y, who


def test_a_worker_makes_them_and_imports_numba_for_nothing_else(pool: Processes) -> None:
    (worker,) = ready(pool)
    assert not has_numba(worker)
    region, y, who = additions(pool)
    region.otherwise = lambda parts, threads: None  # here nobody would come to the other part
    region.few = True
    until(lambda: made(pool, region) and who.all())
    assert who.tolist() == [os.getpid(), worker]
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(8, dtype=np.float32), y.shape) * y[0, 0, 1])
    assert has_numba(worker)


def test_another_form_of_a_function_is_another(pool: Processes) -> None:
    """Of float32 and of int8 weights, of arrays of other kinds."""
    ready(pool)
    x, y = array(pool, (2, 4, 8), np.float32), array(pool, (2, 4, 32), np.float32)
    x[...] = np.arange(x.size).reshape(x.shape) % 7
    for dtype in (np.float32, np.int8):
        w = (np.arange(8 * 32).reshape(8, 32) % 5).astype(dtype)
        packed = gemm.pack(w)
        packed.flags.writeable = dtype == np.int8
        parts = [gemm.product(x[i], packed, None, y[i])[0] for i in range(2)]
        region = Region(parts, 2, in_turn)
        until(partial(_is_told, pool, region))
        y[...] = 0
        pool.run(region)
        np.testing.assert_array_equal(y, x @ w.astype(np.float32))


def test_a_worker_that_dies_while_it_loads_them_costs_nothing(pool: Processes) -> None:
    (worker,) = ready(pool)
    os.kill(worker, signal.SIGSTOP)
    y = array(pool, (2, 3, 8), np.float32)
    region = Region([epilogue.finish(y[i], bias=np.ones(8, np.float32)) for i in range(2)], 2, in_turn)
    region.runs = 1
    pool.enter()
    pool.run(region)
    assert region.sent is pool.workers
    os.kill(worker, signal.SIGKILL)
    os.kill(worker, signal.SIGCONT)
    until(lambda: not pool.workers[0].alive)
    pool.run(region)
    pool.leave()
    pool.enter()
    pool.run(region)
    pool.leave()
    np.testing.assert_array_equal(y, 3)
    assert ready(pool) != [worker]


UNKEPT = """
import numba
import numpy as np
njit = numba.njit
def refusing(*args, cache=False, **options):
    if cache:
        raise RuntimeError("no directory that may be written to")
    return njit(*args, **options)
numba.njit = refusing
from infera_gpu.devices.processes import Processes
from infera_gpu.devices.sending import Region
from infera_kernels.jit import epilogue
from tests.test_processes import array, in_turn, ready
pool = Processes()
ready(pool)
y = array(pool, (2, 3, 8), np.float32)
region = Region([epilogue.finish(y[i], bias=np.ones(8, np.float32)) for i in range(2)], 2, in_turn)
for _ in range(3):
    pool.run(region)
assert (y == 3).all()
pool.end()
print(region.sent)
"""


def test_what_is_not_kept_on_disk_is_made_on_threads() -> None:
    """A worker would compile it anew."""
    assert _python(UNKEPT) == "False"
