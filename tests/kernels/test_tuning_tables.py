"""The estimate of tiles: its tables for every listed GPU, and what it takes compiled kernels to be like."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from infera_kernels.launch import CompileLauncher, Target, nominal_target
from infera_kernels.launch.devices import DEVICES, Device
from infera_kernels.tuning import Problem, cost, numbers
from infera_kernels.tuning.choice import EXACT, rounded
from infera_kernels.tuning.cost import Block, product_cycles, resident
from infera_kernels.tuning.store import SHIPPED, class_of
from tests.kernels.support import FakeArray

pytest.importorskip("triton")

from bench import tile_predictions
from bench.tile_predictions import target_for
from infera_kernels.triton import gated, tiles
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
    assert {e["family"] for e in table["entries"]} >= {
        *("matmul", "conv", "attention", "matvec", "matmul_parts", "gated", "gated_row"),
    }
    for entry in table["entries"]:
        family = FAMILIES[entry["family"]]
        problem = Problem(entry["family"], entry["kind"], tuple(entry["sizes"]), entry["layout"])
        choice = family.predict(problem, target)
        assert numbers(choice) == tuple(entry["predicted"]), entry
        assert choice in family.candidates(problem, target)


def test_the_command_explains_itself_and_writes_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tile_predictions, "problems", lambda: iter(()))
    with pytest.raises(SystemExit, match="0"):
        tile_predictions.main(["--help"])
    assert "--output DIR" in capsys.readouterr().out
    tile_predictions.main(["--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"{class_of(target_for(d))}.predicted.json" for d in DEVICES}


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


# ---- sums in parts


def parts(family: str, *sizes: int, kind: str = "half", layout: str = "") -> int:
    """How many are predicted on an H200."""
    return int(FAMILIES[family].predict(Problem(family, kind, sizes, layout), H200).count)


def test_sums_are_cut_where_parts_and_their_join_take_less() -> None:
    assert parts("conv_splits", 32 * 49, 1, 512, 4608, 9) == 2
    assert parts("conv_splits", 49, 1, 512, 4608, 9) == 16
    assert parts("conv_splits", 32 * 49, 1, 512, 2048, 1) == parts("conv_splits", 196, 1, 1024, 256, 1) == 1
    assert parts("matmul_parts", 16, 1, 64, 16384) > 8
    for n, k in ((3072, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (128256, 2048)):
        assert parts("matmul_parts", 1, 1, n, k) == 1, "a step of Llama 3.2 1B, whose one row is read fast enough"
    assert parts("matmul_parts", 4096, 1, 4096, 4096) == parts("matmul_parts", 1, 96, 64, 4096) == 1


def test_sums_stay_whole_where_the_library_may_compute_them() -> None:
    """It cuts them itself."""
    for family, sizes in (("matmul_parts", (16, 1, 64, 16384)), ("conv_splits", (49, 1, 512, 2048, 1))):
        kind = "half" if family == "matmul_parts" else "ieee"
        assert parts(family, *sizes, kind=kind) > parts(family, *sizes, kind=kind, layout=tiles.EITHER) == 1
        problem = Problem(family, kind, sizes, tiles.EITHER)
        assert len(FAMILIES[family].candidates(problem, H200)) > 3


@pytest.mark.parametrize(("seconds", "some"), [(0.0, True), (1.0, False)])
def test_a_second_launch_has_its_price(seconds: float, some: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of problems that are cut at no price, none is at a high one."""
    monkeypatch.setattr(cost, "LAUNCH", seconds)
    for family, sizes in (("matmul_parts", (128, 1, 768, 3072)), ("conv_splits", (196, 1, 256, 2304, 9))):
        FAMILIES[family].predict.cache_clear()  # type: ignore[attr-defined]
        assert (parts(family, *sizes) > 1) == some
        FAMILIES[family].predict.cache_clear()  # type: ignore[attr-defined]


def test_the_part_with_the_least_estimate_is_predicted() -> None:
    for family, kind in product(("matmul_parts", "conv_splits"), ("half", "tf32", "ieee")):
        for m, n, k in product((1, 49, 784), (20, 512), (255, 3000, 16384)):
            problem = Problem(family, kind, (m, 1, n, k, 1)[: len(FAMILIES[family].sizes)])
            estimate, choice = FAMILIES[family].estimate, FAMILIES[family].predict(problem, H200)
            assert estimate is not None
            least = min(estimate(problem, c, H200) for c in FAMILIES[family].candidates(problem, H200))
            assert estimate(problem, choice, H200) == least or choice.count == 1


# ---- strips of one row


def strip(n: int, k: int, layout: str = "n", kind: str = "half") -> Any:
    return FAMILIES["matvec"].predict(Problem("matvec", kind, (1, n, k), layout), H200)


@pytest.mark.parametrize("layout", ["n", "k"])
@pytest.mark.parametrize(("n", "k"), [(3072, 2048), (2048, 2048), (2048, 8192), (8192, 2048), (768, 3072)])
def test_one_row_has_enough_bytes_on_their_way(n: int, k: int, layout: str) -> None:
    """As many as a memory of that bandwidth and latency wants, or as much as its blocks may hold."""
    made = strip(n, k, layout)
    blocks, each = -(-n // made.n), 2 * made.n * made.k
    wanted = cost.LATENCY * cost.memory_bytes_per_cycle(H200)
    assert made.stages > 1 or made.k >= k
    assert blocks * each * max(made.stages - 1, 1) >= wanted or (made.n, made.stages) == (16, 5)


def test_an_estimate_of_one_row_sees_memory_buffers_and_columns_side_by_side() -> None:
    def cycles_of(strip: cost.Strip, n: int = 2048, k: int = 8192, **how: Any) -> float:
        return cost.row_cycles(n, k, how.pop("bits", 16), strip, along_k=how.pop("along_k", False), target=H200, **how)

    wide, narrow = cost.Strip(64, 64, 3), cost.Strip(16, 256, 3)
    assert cycles_of(narrow) < cycles_of(wide)
    assert cycles_of(wide, n=128256) < cycles_of(narrow, n=128256)
    assert cycles_of(cost.Strip(16, 256, 5)) < cycles_of(narrow) < cycles_of(cost.Strip(16, 256, 1))
    assert cycles_of(wide, n=128256) > 128256 * 8192 * 2 / cost.memory_bytes_per_cycle(H200)
    assert cycles_of(narrow, bits=32) > cycles_of(narrow) > cycles_of(narrow, bits=8, along_k=True)
    assert math.isinf(cycles_of(cost.Strip(64, 1024, 5)))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("made", [cost.Strip(16, 256, 3), cost.Strip(32, 128, 5), cost.Strip(64, 64, 1)], ids=str)
def test_registers_and_shared_memory_of_one_row(made: cost.Strip, dtype: str, arch: int) -> None:
    launcher = CompileLauncher(arch)
    a, b, out = FakeArray((1, 4096), dtype), FakeArray((4096, 4096), dtype), FakeArray((1, 4096), dtype)
    with mock.patch("infera_kernels.triton.matmul.choose", return_value=made):
        matmul(a, b, out, launcher)
    (found,) = launcher.compiled
    item = 2 if dtype == "float16" else 4
    held = made.held_bytes(8 * item)
    assert held <= found.binary.spec.shared_bytes <= max(1.1 * held, 2048)
    assert found.registers == pytest.approx(made.registers(8 * item), rel=0.5)
    assert not found.spilled_bytes


# ---- gated products


def test_a_gated_product_is_tiled_as_one_of_twice_the_columns() -> None:
    """But for what shared memory has to give of rows for each matrix."""
    for sizes in product((2, 16, 64, 512, 4096), (1,), (2 * 8192, 2 * 768), (2048,)):
        problem = Problem("gated", "half", sizes)
        estimates = {t: gated.gated_cycles(problem, t, H200) for t in gated.GATED.candidates(problem, H200)}
        assert all(tiles.cycles(problem, t, H200) <= cycles for t, cycles in estimates.items())
        assert estimates[gated.GATED.predict(problem, H200)] == min(estimates.values())
    wide = Block(128, 128, 64, 8, 3, "half")
    assert cost.shared_traffic(replace(wide, matrices=2), H200) > cost.shared_traffic(wide, H200)


@pytest.mark.parametrize("layout", ["n", "k"])
def test_a_gated_row_has_enough_bytes_on_their_way(layout: str) -> None:
    n, k = 2 * 8192, 2048
    made = gated.GATED_ROW.predict(Problem("gated_row", "half", (1, n, k), layout), H200)
    assert made.stages > 1
    wanted = cost.LATENCY * cost.memory_bytes_per_cycle(H200)
    assert -(-n // made.n) * 2 * made.n * made.k * (made.stages - 1) >= wanted


def test_a_strip_of_two_matrices_reads_lines_of_each() -> None:
    how: dict[str, Any] = {"along_k": False, "target": H200}
    one, two = (cost.row_cycles(2048, 8192, 16, cost.Strip(64, 64, 5), matrices=m, **how) for m in (1, 4))
    assert one < two


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("made", [cost.Strip(32, 128, 3), cost.Strip(64, 64, 5)], ids=str)
def test_registers_and_shared_memory_of_a_gated_row(made: cost.Strip, arch: int) -> None:
    launcher = CompileLauncher(arch)
    a, gate, up, out = (FakeArray((rows, 4096), "float16") for rows in (1, 4096, 4096, 1))
    with mock.patch.object(gated, "choose", return_value=made):
        gated.gated(a, gate, up, out, launcher, activation="silu")
    (found,) = launcher.compiled
    assert made.held_bytes(16) <= found.binary.spec.shared_bytes <= max(1.1 * made.held_bytes(16), 2048)
    assert found.registers == pytest.approx(made.registers(16), rel=0.5)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("index", [0, 1, 2, 5])
def test_shared_memory_and_registers_of_gated_tiles(index: int, arch: int) -> None:
    launcher = CompileLauncher(arch)
    tile = gated.GATED_TILES["half"][index]
    a, gate, up, out = (FakeArray((4096, 4096), "float16") for _ in range(4))
    gated.gated(a, gate, up, out, launcher, activation="silu", tile=tile)
    (made,) = launcher.compiled
    block = tile.block("half")
    assert made.binary.spec.shared_bytes == block.held_bytes(launcher.target)
    assert made.registers <= 4 / 3 * block.registers(launcher.target)


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
