"""What a tile costs, from what is known of a GPU without one at hand: cycles to compare, no prediction of a time.

A multiprocessor runs the blocks that fit beside each other. Each walks the depth in steps; a step takes as long as the
slowest of tensor cores, shared memory and loads from L2, and no less than the loads in flight let it. Blocks are dealt
out in rounds, and all of it takes no less than memory does for what is read and written once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from infera_kernels.launch import Target
from infera_kernels.launch.devices import (
    DEVICES,
    REGISTER_UNIT,
    RESERVED_SHARED,
    THREAD_REGISTERS,
    Device,
    architecture_of,
    device_called,
    rates_of,
)

ITEMSIZE = {"half": 2, "tf32": 4, "tf32x3": 4, "ieee": 4, "int8": 1}

LATENCY = 700
"""Cycles until a load from memory is there: 466 unloaded on A100, 479 on H100 (arXiv 2402.13499, table 4), and half as
many again where many wait."""

SHARED_BYTES_PER_CYCLE = 128
"""Shared memory to a multiprocessor: 32 banks of 4 bytes (CUDA C++ Programming Guide)."""

WARP_PRODUCTS = 0.63
"""Of the stated peak that products of single warps (`mma.sync`) reach on Hopper (arXiv 2402.13499, section 5.2)."""

STORED_PER_CYCLE = 32
"""Bytes that a multiprocessor writes a cycle."""

STEP_CYCLES = 40
"""Of a step that nothing hides: barriers, and the issue of loads."""

LAUNCH = 2.5e-6
"""Seconds from one kernel of a CUDA graph to the next that waits for it, with the ends of both. Assumed, not measured:
what a second launch costs beside what it reads and writes, and what `bench.gpu_roofline` takes for the least of a
step."""

LINE = 128
"""Bytes that a multiprocessor's loads touch a cycle, in one piece: narrower pieces take as long (assumed)."""

GROUPED = 8
"""Rows of tiles whose blocks run side by side, see `products.GROUP`."""

OTHER_REGISTERS = 48
"""Of a thread, for addresses. What is on its way into products takes more, in proportion to the sums: compiled
kernels lie within a third of that (`tests/kernels/test_tuning_tables.py`)."""


@dataclass(frozen=True, slots=True)
class Block:
    """What one block computes at a time: m x n outputs, k deep; `stages` buffers for what is loaded. Its columns are of
    so many `matrices`, each multiplied by itself."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    kind: str
    matrices: int = 1

    @property
    def shared_bytes(self) -> int:
        """Room for all stages."""
        return (self.m + self.n) * self.k * self.stages * ITEMSIZE[self.kind]

    def grouped(self, target: Target) -> bool:
        """Whether four warps multiply together, which read from shared memory: wgmma and tcgen05."""
        return target.arch >= 90 and self.m >= 64 and self.warps >= 4 and self.kind != "ieee"

    def held_bytes(self, target: Target) -> int:
        """What Triton makes of `shared_bytes`: where warps read into registers, a buffer less."""
        stages = self.stages if self.grouped(target) else max(self.stages - 1, 1)
        return self.shared_bytes // self.stages * stages

    def registers(self, target: Target) -> int:
        """Of one thread, about."""
        sums = self.m * self.n // (32 * self.warps)
        return min(OTHER_REGISTERS + round(sums * (1.2 if self.grouped(target) else 2.2)), THREAD_REGISTERS)


ROW_WARPS = 4
"""Of a block of `row_cycles`."""


@dataclass(frozen=True, slots=True)
class Strip:
    """What a block of a product of one row reads of its matrix at a time: n columns, k deep. The next `stages` - 1 are
    on their way to shared memory; with one stage it is loaded into registers when it is due."""

    n: int
    k: int
    stages: int

    def held_bytes(self, bits: int) -> int:
        """Of shared memory, with elements of so many bits."""
        return self.n * self.k * bits // 8 * (self.stages - 1)

    def registers(self, bits: int) -> int:
        """Of one thread, about."""
        each = self.n * self.k // (32 * ROW_WARPS)
        return OTHER_REGISTERS + each + (each * bits // 32 if self.stages == 1 else 0)


def resident(warps: int, registers: int, shared_bytes: int, target: Target) -> int:
    """Blocks that fit on a multiprocessor beside each other; 0 where not even one does."""
    about = architecture_of(target.arch)
    if registers > THREAD_REGISTERS or shared_bytes > target.shared_bytes:
        return 0
    each = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT * warps
    return min(
        about.registers // each,
        about.warps // warps,
        about.blocks,
        about.shared_bytes // (shared_bytes + RESERVED_SHARED),
    )


def products_per_cycle(kind: str, target: Target, rows: int = 64, warps: int = 4) -> float:
    """Multiply-adds a cycle and multiprocessor of blocks with so many rows and warps."""
    device = device_called(target.name)
    rates = device.flops_per_cycle if device else rates_of(target.arch)
    if kind == "tf32x3":
        rate = rates["tf32"] / 6
    else:
        rate = rates[kind] / 2
    grouped = rows >= 64 and warps >= 4  # wgmma and tcgen05 are instructions of four warps and 64 rows at least
    return rate if kind == "ieee" or target.arch < 90 or grouped else rate * WARP_PRODUCTS


def _like(target: Target) -> Device:
    """The card, or one that is listed and most like it."""
    device = device_called(target.name)
    return device or next((d for d in DEVICES if d.arch == target.arch), DEVICES[-1])


def memory_bytes_per_cycle(target: Target) -> float:
    """From the card's memory to all multiprocessors together."""
    like = _like(target)
    share = 1.0 if device_called(target.name) else target.multiprocessors / like.multiprocessors
    return like.dram_bytes_per_s / like.clock_hz * share


def cache_bytes(target: Target) -> int:
    """Of L2."""
    device = device_called(target.name)
    return device.l2_bytes if device else architecture_of(target.arch).l2_bytes


def shared_traffic(block: Block, target: Target) -> int:
    """Bytes of shared memory that a step writes and reads.

    Where four warps multiply together (sm_90 and later, from 64 rows on), every 64 rows read all columns, and are read
    once for each matrix; else warps stand in a grid, and each reads its rows and columns.
    """
    item = ITEMSIZE[block.kind]
    written = (block.m + block.n) * block.k * item
    if block.kind == "ieee":  # a thread reads its rows and columns into registers, as square a part as may be
        threads = 32 * block.warps
        return written + round(2 * math.sqrt(block.m * block.n / threads) * threads * block.k * item)
    if block.grouped(target):
        return written + block.m // 64 * (64 * block.matrices + block.n) * block.k * item
    if block.matrices > 1:  # that share rows: all warps stand along the longer side (Triton's chained products)
        down = block.warps if block.m >= block.n // block.matrices else 1
    else:
        down = max(1, min(block.warps, 1 << round(math.log2(math.sqrt(block.warps * block.m / block.n)))))
    across = max(1, block.warps // down)
    return written + (across * block.m + down * block.n) * block.k * item


@dataclass(frozen=True, slots=True)
class Walk:
    """What one block does along the depth: `steps`, each of so many cycles of a multiprocessor, in no less than
    `waiting` after the first loads; `ending` cycles after the last. So many blocks run `beside` each other."""

    beside: int
    steps: int
    step: float
    waiting: float
    ending: float

    def cycles(self, blocks: int, moved: float, target: Target) -> float:
        """Of so many blocks, which read and write `moved` bytes of memory. Infinity where not one of them fits."""
        if not self.beside:
            return math.inf
        full, rest = divmod(-(-blocks // target.multiprocessors), self.beside)
        computed = full * self._round(self.beside) + (self._round(rest) if rest else 0.0)
        moving = moved / memory_bytes_per_cycle(target)
        return max(computed, moving) + min(computed, moving) / 8

    def _round(self, blocks: int) -> float:
        busy = self.steps * (blocks * self.step + STEP_CYCLES)
        return LATENCY + max(busy, self.waiting) + blocks * self.ending


def product_cycles(block: Block, m: int, n: int, k: int, batch: int, target: Target, parts: int = 1) -> float:
    """Of `batch` products (m, k) @ (k, n), each cut into `parts` along k. Infinity where a block does not fit."""
    side_by_side = resident(block.warps, block.registers(target), block.held_bytes(target), target)
    if not side_by_side:
        return math.inf
    item = ITEMSIZE[block.kind]
    computing = block.m * block.n * block.k / products_per_cycle(block.kind, target, block.m, block.warps)
    sharing = shared_traffic(block, target) / SHARED_BYTES_PER_CYCLE
    loading = (block.m + block.n) * block.k * item / architecture_of(target.arch).l2_bytes_per_cycle
    steps = -(-max(k // parts, 1) // block.k)
    walk = Walk(
        side_by_side,
        steps,
        step=max(computing, sharing, loading),
        waiting=(steps - 1) * LATENCY / max(block.stages - 1, 1),
        ending=block.m * block.n * item / STORED_PER_CYCLE,
    )
    blocks = batch * parts * -(-m // block.m) * -(-n // block.n)
    read = item * batch * (m * k + k * n)
    if read > cache_bytes(target) // 2:  # what blocks of one round do not share is read again by the next
        at_once = target.multiprocessors * side_by_side
        rows, columns = min(GROUPED * block.m, m), min(-(-at_once // GROUPED) * block.n, n)
        read = max(read, -(-blocks // at_once) * (rows + columns) * (k // parts) * item)
    return walk.cycles(blocks, read + item * batch * m * n, target)


def row_cycles(
    n: int, k: int, bits: int, strip: Strip, *, along_k: bool, target: Target, batch: int = 1, matrices: int = 1
) -> float:
    """Of `batch` products of one row with matrices (k, n) of elements of so many bits, contiguous `along_k` or along n.

    Columns are of so many `matrices` side by side, of which a strip has as many each. A block of ROW_WARPS warps reads
    a strip at a time and adds its products in registers: so many instructions an element, with which it is widened and
    added. Without buffers one step waits for its loads before it adds them. Infinity where a block does not fit.
    """
    instructions = 1 if bits == 32 else 2 if bits == 16 else 5  # shifted, masked, widened, moved and added
    elements = strip.n * strip.k
    nbytes, held = elements * bits // 8, strip.held_bytes(bits)
    pieces, wide = (strip.n, strip.k) if along_k else (matrices * strip.k, strip.n // matrices)
    lines = pieces * -(-wide * bits // (8 * LINE))
    computing = instructions * elements / (rates_of(target.arch)["ieee"] / 2)
    sharing = 2 * nbytes / SHARED_BYTES_PER_CYCLE if held else 0.0
    step = max(computing, sharing, lines, nbytes / architecture_of(target.arch).l2_bytes_per_cycle)
    steps = -(-k // strip.k)
    waiting = (steps - 1) * LATENCY / (strip.stages - 1) if held else (steps - 1) * LATENCY + steps * step
    beside = resident(ROW_WARPS, strip.registers(bits), held, target)
    walk = Walk(beside, steps, step, waiting, ending=STEP_CYCLES)
    return walk.cycles(batch * -(-n // strip.n), batch * n * k * bits / 8, target)


def joining_cycles(parts: int, elements: int, target: Target) -> float:
    """Of writing so many parts of so many sums in float32, and of a second launch that adds them; none for one part."""
    if parts == 1:
        return 0.0
    nbytes = 4 * parts * elements
    cached = target.multiprocessors * architecture_of(target.arch).l2_bytes_per_cycle
    rate = cached if nbytes <= cache_bytes(target) // 2 else memory_bytes_per_cycle(target)
    return LAUNCH * _like(target).clock_hz + 2 * nbytes / rate
