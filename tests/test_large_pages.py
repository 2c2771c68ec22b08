"""Memory that processes share lies on large pages, where the system can, and nothing else changes where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from infera_gpu.devices import processes
from infera_gpu.devices.processes import Processes
from infera_gpu.devices.shared import SharedMemory, SharedSlabs
from infera_kernels.calls import Array
from infera_kernels.cpu import process
from infera_kernels.cpu.aligned import LARGE_PAGE, LINE, SLAB_BYTES, SLAB_LEAST, SLAB_MOST, address, aligned, within
from infera_kernels.cpu.process import Mapping

pytestmark = pytest.mark.skipif(bool(processes.unavailable()), reason=processes.unavailable())


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    own = Processes()
    assert own.memory is not None
    yield own.memory
    own.end()


def on_large_pages(array: Array) -> int:
    """Bytes of the array's mapping that the processor finds by large pages."""
    at, within_it = address(array), False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if addresses := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = (int(n, 16) for n in addresses.groups())
            within_it = start <= at < stop
        elif within_it and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the array is not mapped")


@pytest.fixture
def large(memory: SharedMemory) -> None:
    if not on_large_pages(memory.block(LARGE_PAGE)):
        pytest.skip("the system makes no large pages of shared memory (Linux 6.1 does)")


@pytest.mark.usefixtures("large")
def test_a_block_lies_on_as_many_large_pages_as_it_fills(memory: SharedMemory) -> None:
    memory.block(5)
    block = memory.block(2 * LARGE_PAGE + 7)
    assert address(block) % LARGE_PAGE == 0
    assert on_large_pages(block) == 2 * LARGE_PAGE
    block[...] = 3
    assert on_large_pages(block) == 2 * LARGE_PAGE
    assert on_large_pages(memory.block(LARGE_PAGE - 1)) == 0


@pytest.mark.usefixtures("large")
def test_another_process_finds_large_pages(memory: SharedMemory) -> None:
    block = memory.block(2 * LARGE_PAGE)
    block[...] = 3
    place = memory.place_of(block)
    assert place is not None
    begin, nbytes, start = place
    other = np.asarray(Mapping(memory.file, nbytes, begin))[start : start + block.nbytes]
    assert address(other) % LARGE_PAGE == 0
    assert other.min() == other.max() == 3
    assert on_large_pages(other) == 2 * LARGE_PAGE


def test_what_lies_on_small_pages_moves_with_what_it_holds(memory: SharedMemory) -> None:
    mapping, array = memory.slab()
    array[: 2 * LARGE_PAGE] = np.resize(np.arange(251, dtype=np.uint8), 2 * LARGE_PAGE)
    want = array[: 2 * LARGE_PAGE].copy()
    mapping.enlarge(0, 2 * LARGE_PAGE)
    assert np.array_equal(array[: 2 * LARGE_PAGE], want)


def test_a_block_has_small_pages_where_there_are_no_others(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MADV_COLLAPSE", -1)
    block = memory.block(2 * LARGE_PAGE)
    block[...] = 3
    assert on_large_pages(block) == 0
    assert block.min() == block.max() == 3


def held(memory: SharedMemory) -> int:
    """Bytes of memory that the file has."""
    return os.fstat(memory.file).st_blocks * 512


def test_arrays_of_a_slab_are_shared_and_its_memory_comes_as_they_do(memory: SharedMemory) -> None:
    before, slabs = held(memory), SharedSlabs(lambda: memory)
    with within(slabs):
        made = [aligned((SLAB_LEAST // 4 + i,), np.float32, slack=5) for i in range(12)]
    places = [memory.place_of(array) for array in made]
    assert len({place[:2] for place in places if place is not None}) == 1
    assert None not in places
    for i, (one, after) in enumerate(pairwise(made)):
        assert 0 <= address(after) - (address(one) + one.nbytes + 5) < LINE
        one[...] = i
    assert held(memory) - before <= -(-sum(a.nbytes + LINE + 5 for a in made) // LARGE_PAGE) * LARGE_PAGE
    assert [float(a.min()) for a in made[:-1]] == [float(a.max()) for a in made[:-1]] == list(range(11))
    del slabs, one, after
    made.clear()
    assert held(memory) == before


def test_what_is_copied_lies_in_a_slab_too(memory: SharedMemory) -> None:
    slabs = SharedSlabs(lambda: memory)
    first, some, large = (np.arange(n, dtype=np.uint8) for n in (SLAB_LEAST - 1, 1 << 16, SLAB_MOST + 1))
    places = [memory.place_of(memory.copy(array, slabs)) for array in (first, some, some, large)]
    blocks = [place[1] for place in places if place is not None]
    assert [nbytes >= SLAB_BYTES for nbytes in blocks] == [False, True, True, False]
    copy = memory.copy(some, slabs)
    assert np.array_equal(copy, some)
    assert memory.copy(copy, slabs) is copy


def test_there_are_no_slabs_without_memory(memory: SharedMemory) -> None:
    slabs = SharedSlabs(lambda: None)
    with within(slabs):
        array = aligned((SLAB_LEAST,), np.uint8)
    array[-1] = 1
    assert array[-1] == 1
    copy = memory.copy(array, slabs)
    assert memory.place_of(copy) is not None
    assert copy[-1] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Python 3.12's, of any such fork
def test_a_forked_process_packs_where_its_parent_does_not() -> None:
    pool = Processes()
    assert pool.memory is not None
    slabs = SharedSlabs(lambda: pool.memory)
    kept = slabs.take(LINE)
    kept[...] = 1
    if not (child := os.fork()):
        try:
            mine = slabs.take(LINE)
            mine[...] = 2
            os._exit(0 if kept.max() == 1 and pool.memory.place_of(mine) is not None else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert kept.min() == kept.max() == 1
    before = held(pool.memory)
    later = slabs.take(SLAB_MOST)  # which the child has never seen
    later[...] = 3
    assert held(pool.memory) >= before + SLAB_MOST
    del later, slabs
    assert held(pool.memory) == before


def addresses() -> list[str]:
    """Of blocks, and of what nobody may use."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "memfd:infera" in line or " ---p " in line]


def test_a_block_takes_no_more_addresses_than_it_has_bytes(memory: SharedMemory) -> None:
    memory.block(LARGE_PAGE)
    before = len(addresses())
    blocks = [memory.block(LARGE_PAGE) for _ in range(20)]
    assert len(addresses()) <= before + len(blocks)
    del blocks
    assert len(addresses()) <= before + 1


SCARCE = """
import resource
from pathlib import Path
import numpy as np
from infera_gpu.devices.processes import Processes
from infera_kernels.cpu.process import Mapping
memory, nbytes = Processes().memory, 64 << 20
memory.block(5 << 20)[...] = 1
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + nbytes + (1 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
block = memory.block(nbytes)
block[::4096] = 1
assert block[::4096].sum() == nbytes // 4096
try:
    Mapping(memory.file, nbytes, 0)
except MemoryError as error:
    assert "cannot be mapped" in str(error)
    print("fine")
"""


def test_where_addresses_are_scarce_a_block_begins_anywhere() -> None:
    done = subprocess.run([sys.executable, "-c", SCARCE], check=True, capture_output=True, text=True)
    assert done.stdout == "fine\n"
