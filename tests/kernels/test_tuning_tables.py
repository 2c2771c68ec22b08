"""The estimate of tiles: its tables for every listed GPU, and what it takes compiled kernels to be like."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest

from infera_kernels.launch import CompileLauncher, Target, nominal_target
from infera_kernels.launch.devices import DEVICES, Device
from infera_kernels.tuning import Problem, numbers
from infera_kernels.tuning.choice import EXACT, rounded
from infera_kernels.tuning.cost import Block, product_cycles, resident
from infera_kernels.tuning.store import SHIPPED, class_of
from tests.kernels.support import FakeArray

pytest.importorskip("triton")

from bench.tile_predictions import target_for
from infera_kernels.triton import tiles
from infera_kernels.triton.families import FAMILIES
from infera_kernels.triton.matmul import matmul

pytestmark = pytest.mark.kernels

H200 = target_for(DEVICES[0])


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_tables_are_what_is_predicted(device: Device) -> None:
    """`python -m bench.tile_predictions` writes them: whoever changes the estimate looks at what that changes."""

    target = target_for(device)
    table = json.loads((SHIPPED / f"{class_of(target)}.predicted.json").read_text())
    assert table["measured"] is False
    assert {e["family"] for e in table["entries"]} >= {"matmul", "conv", "attention", "matvec", "matmul_parts"}
    for entry in table["entries"]:
        family = FAMILIES[entry["family"]]
        problem = Problem(entry["family"], entry["kind"], tuple(entry["sizes"]), entry["layout"])
        choice = family.predict(problem, target)
        assert numbers(choice) == tuple(entry["predicted"]), entry
        assert choice in family.candidates(problem, target)


def test_every_measured_table_is_of_a_listed_gpu() -> None:
    known = {class_of(target_for(d)) for d in DEVICES}
    for path in SHIPPED.glob("*.json"):
        assert path.name.split(".predicted")[0].split("-triton-")[0] in known


def test_sizes_near_each_other_are_one_class() -> None:
    for n in [*range(1, 300), 1000, 4095, 4096, 50257, 2**31 - 1]:
        near = rounded(n)
        assert n <= near <= n * 1.125
        assert rounded(near) == near
        assert near == n or n > EXACT
    assert rounded(125) == rounded(128) != rounded(129)


def test_what_is_predicted_is_a_candidate_and_fits_whatever_the_sizes() -> None:
    least = Target(86, 1, 99 * 1024)
    for family, target in product(FAMILIES.values(), (H200, least)):
        kinds = ("int8",) if family.name.startswith("integer") else ("half", "ieee")
        for sizes in product((1, 17, 640), repeat=len(family.sizes)):
            for kind in kinds:
                problem = Problem(family.name, kind, tuple(min(s, 512) for s in sizes))
                assert family.predict(problem, target) in family.candidates(problem, target), problem


def cycles(block: Block, m: int, n: int, k: int, target: Target = H200) -> float:
    return product_cycles(block, m, n, k, 1, target)


def test_an_estimate_takes_no_less_than_tensor_cores_and_memory() -> None:
    block = Block(128, 256, 64, 8, 3, "half")
    device = DEVICES[0]
    work = cycles(block, 8192, 8192, 8192)
    peak = 2 * 8192**3 / device.multiprocessors / device.flops_per_cycle["half"]
    assert peak < work < 1.3 * peak
    narrow = cycles(Block(16, 32, 128, 4, 4, "half"), 16, 8192, 8192)
    assert narrow > 2 * 8192**2 / (device.dram_bytes_per_s / device.clock_hz)


def test_an_estimate_sees_waves_stages_and_what_does_not_fit() -> None:
    block = Block(128, 128, 64, 8, 4, "half")
    one, two = (cycles(block, 128 * rows, 128 * 132, 4096) for rows in (1, 2))
    assert two < 1.9 * one  # two blocks of a multiprocessor hide each other's waiting
    assert cycles(block, 128 * 132, 128, 4096) < cycles(block, 128 * 133, 128, 4096)
    assert cycles(Block(16, 32, 128, 4, 2, "half"), 16, 32, 8192) > cycles(
        Block(16, 32, 128, 4, 4, "half"), 16, 32, 8192
    )
    assert math.isinf(cycles(Block(256, 256, 128, 8, 4, "half"), 512, 512, 512))


def test_resident_blocks() -> None:
    """CUDA's occupancy calculator for sm_90: 64 warps, 65536 registers, 228 KiB."""
    assert resident(8, 128, 100 * 1024, H200) == 2
    assert resident(8, 255, 0, H200) == 1
    assert resident(4, 128, 0, H200) == 4
    assert resident(1, 16, 0, H200) == 32
    assert resident(4, 40, 300 * 1024, H200) == 0
    assert resident(4, 256, 0, H200) == 0
    assert resident(8, 168, 98304, nominal_target(80)) == 1


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("index", [0, 3, 6], ids=lambda i: str(tiles.TILES["half"][i]))
def test_shared_memory_and_registers_are_what_kernels_have(index: int, arch: int) -> None:
    launcher = CompileLauncher(arch)
    tile = tiles.TILES["half"][index]
    a, b, out = (FakeArray((4096, 4096), "float16") for _ in range(3))
    matmul(a, b, out, launcher, bias=FakeArray((4096,), "float16"), tile=tile)
    (made,) = launcher.compiled
    block = tile.block("half")
    assert made.binary.spec.shared_bytes == block.held_bytes(launcher.target)
    assert block.registers(launcher.target) == pytest.approx(made.registers, rel=1 / 3)
    assert not made.spilled_bytes
