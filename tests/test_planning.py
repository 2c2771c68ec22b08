"""What planning a shape may take for granted, and what it does only once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infera_gpu.alike import SMALL_FLOATS, AlikeNodes
from infera_gpu.constants import Constants
from infera_gpu.devices.cpu import CpuDevice
from infera_gpu.errors import OutOfMemoryError
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.layout import Operand, dense
from infera_gpu.measure import Measurer, Room
from infera_gpu.op import Buffers, Call, Kernel, Op, Site
from infera_gpu.ops import registry
from infera_gpu.spec import spec_of
from infera_gpu.specialize import Known, specialize
from tests.buffers import GuardedBuffers
from tests.cases import covered


def scratch_bytes(kernel: Kernel, site: Site, ins: Sequence[HostArray | None]) -> int:
    buffers = GuardedBuffers(ins, site.outs, site.values)
    kernel.bind(site, buffers)
    return buffers.scratch_bytes


@pytest.mark.parametrize("filling", [0.0, 1.0, -1000.0])
def test_scratch_does_not_depend_on_what_large_constants_hold(filling: float) -> None:
    """What Kernel promises of floating-point constants, and planning relies on."""
    compared = 0
    for op, case, variants in covered("cpu"):
        kernel = op.kernels["cpu"]
        for site, ins in variants:
            large = [v is not None and v.dtype.kind == "f" and v.size > SMALL_FLOATS for v in site.values]
            filled = tuple(
                np.full_like(v, filling) if is_large and v is not None else v
                for v, is_large in zip(site.values, large, strict=True)
            )
            changed = replace(site, values=filled)
            if any(large) and kernel.supports(changed):
                assert scratch_bytes(kernel, changed, ins) == scratch_bytes(kernel, site, ins), f"{op.name} {case.id}"
                compared += 1
    assert compared > 50


class Counting:
    """A kernel that asks for scratch, and says how often it was bound."""

    def __init__(self) -> None:
        self.bound = 0
        self.kernel = Kernel(self.bind)
        self.measure = Measurer(CpuDevice(), Constants(CpuDevice(), Graph((), {}, {})))
        self.alike = AlikeNodes(registry(), {"": 17})

    def bind(self, site: Site, io: Buffers) -> list[Call]:
        self.bound += 1
        io.scratch((self.bound, 1000))
        return []

    def ask(self, op: Op, *ins: HostArray, known: Sequence[int] = (1,), **attrs: Any) -> int:
        """Bytes for a node over these inputs, of which some are constants."""
        node = Node(op.name, tuple(f"in{i}" for i in range(len(ins))), ("y",), attrs)
        specs = {f"in{i}": spec_of(x) for i, x in enumerate(ins)}
        values = Known.of({f"in{i}": x for i, x in enumerate(ins) if i in known})
        segment = specialize([node], specs=specs, known=values, outputs=("y",), alike=self.alike)
        given: tuple[Operand, ...] = tuple(dense(v, "host", s) for v, s in specs.items())
        (placed,) = segment.nodes
        return self.measure(self.kernel, placed, given, (dense("y", "host", placed.site.outs[0]),))[0]


def test_nodes_that_are_alike_are_measured_once() -> None:
    op = registry().find("", "Gemm", 17)
    assert op is not None
    x, w = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    counting = Counting()
    first = counting.ask(op, x, w)
    assert counting.ask(op, x + 1, w + 1) == first  # other values
    assert counting.bound == 1
    row, one = x[:, :1], w[:1, :4]
    different: tuple[tuple[HostArray, HostArray, dict[str, Any]], ...] = (
        (x, w, {"alpha": 2.0}),
        (x, w, {"known": ()}),
        (x[:4], w, {}),
        (x.astype(np.float64), w.astype(np.float64), {}),
        (row, one, {}),
        (row, one + 1, {}),  # a small constant
        (x, w.astype(np.int64), {}),
        (x, w.astype(np.int64), {}),  # a large one of integers
    )
    for a, b, options in different:
        before = counting.bound
        counting.ask(op, a, b, **options)
        assert counting.bound == before + 1


def pages() -> int:
    """Of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1])


asks_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory there is")


@asks_linux
def test_what_kernels_are_measured_on_takes_no_memory() -> None:
    room, before, blocks = Room(), pages(), []
    for _ in range(8):
        blocks.append(room.take(1 << 26))
        blocks.append(room.take(1000))
    assert len({(block.ctypes.data, at) for block, at in blocks}) == len(blocks)
    assert pages() - before < 256
    room.close()
    block, at = room.take(1000)
    assert (at, block.nbytes >= 1000) == (0, True)


def test_more_than_there_are_addresses_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infera_gpu.measure.require_host_memory", lambda what, nbytes: None)
    for nbytes in (1 << 60, 1 << 64):
        with pytest.raises(OutOfMemoryError, match=f"the arena needs {nbytes:,} bytes"):
            Room().take(nbytes)


@asks_linux
def test_a_small_plan_is_made_where_there_are_few_addresses_left() -> None:
    script = (
        "import resource, numpy as np; from pathlib import Path; from infera_gpu.measure import Room\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + Room.AHEAD // 2,) * 2); room = Room()\n"
        "block, at = room.take(1000); assert block.nbytes == 1024\n"
        "try: room.take(Room.AHEAD)\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "are available but not to this process" in done.stdout, done.stderr
