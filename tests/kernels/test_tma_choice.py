"""Tiles for TMA among the choices of products: measured ones are taken, and none where nothing was measured."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

from bench import gpu_ahead
from bench.gpu_absent import AbsentDriver
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_kernels.launch import Call, CudaLauncher, KernelCache, Launch, Target, nominal_target
from infera_kernels.launch.compiling import nothing
from infera_kernels.triton import matmul, tiles
from infera_kernels.tuning import DeviceTiles, Measured, Trial, Tuned, choose, numbers, source_of
from tests.kernels.support import FakeArray
from tests.kernels.test_tensor_maps import DescribingDriver
from tests.kernels.test_tuning import Timer, feeds, model, opened, store, tile
from tests.text import parse

pytestmark = pytest.mark.kernels

WIDE = tiles.TmaTile(128, 256, 64, 8, 3, 2)


def joined_and_wide(launch: Launch) -> float:
    fast = launch.kernel == "tma_kernel" and launch.constexprs["JOINED"] and tile(launch) == (128, 256, 64)
    return (1e-6 if launch.options["num_stages"] == 3 else 2e-6) if fast else 1e-5


def last(session: Session, n: int = 128) -> Launch:
    """What a run launches for its product."""
    launcher = session.device.launcher
    launcher.launches.clear()  # type: ignore[attr-defined]
    session.run(feeds(n))
    launch = launcher.launches[-1]  # type: ignore[attr-defined]
    assert isinstance(launch, Launch)
    return launch


def test_a_measured_one_is_taken_and_kept(tmp_path: Path) -> None:
    session = opened(store(tmp_path))
    assert last(session).kernel == "matmul_kernel"
    want = session.run(feeds())["y"]
    (found,) = session.tune(feeds(), timer=Timer(joined_and_wide))
    assert found.problem.layout == "@kn"
    assert found.choice == numbers(WIDE)
    assert len(found.predicted) == 5
    assert last(session).kernel == last(opened(store(tmp_path))).kernel == "tma_kernel"
    np.testing.assert_array_equal(session.run(feeds())["y"], want)
    assert matmul.MATMUL.described(found.choice) == "m 128 n 256 k 64 warps 8 stages 3 tma 2"
    assert matmul.MATMUL.described(found.predicted).endswith("stages 4")


def test_what_tma_cannot_read_does_not_go_by_it(tmp_path: Path) -> None:
    kept = store(tmp_path)
    opened(kept).tune(feeds(), timer=Timer(joined_and_wide))
    device = RecordingDevice(remembers=True)
    device.tiles = DeviceTiles(nominal_target(90), kept)
    made = parse("g (float16[N, 250] x, float16[250, 512] w) => (float16[N, 512] y) { y = MatMul (x, w) }")
    session = Session(load_graph(made), device)
    session.run({"x": np.ones((128, 250), np.float16), "w": np.ones((250, 512), np.float16)})
    assert device.launcher.launches[-1].kernel == "matmul_kernel"  # type: ignore[attr-defined]


def test_candidates() -> None:
    sizes = {"m": 4096, "batch": 1, "n": 4096, "k": 4096}

    def among(layout: str, target: Target, kind: str = "half") -> set[tiles.TmaTile]:
        problem = matmul.MATMUL.problem(kind, sizes, layout)
        found = matmul.MATMUL.candidates(problem, target)
        assert (tiles.LIBRARY in found) is layout.startswith("=")
        assert set(tiles.fitting(problem, target)) <= set(found)
        return {t for t in found if isinstance(t, tiles.TmaTile)}

    for layout in ("@kn", "=@kn", "=@kk+"):
        assert among(layout, nominal_target(90)) == {t for t in tiles.TMA_TILES if t.tma < 3}
        assert {t.tma for t in among(layout, nominal_target(100))} == {2, 3}
        assert {(t.m, t.n) for t in among(layout, nominal_target(120))} == {(64, 128)}
        assert not among(layout, nominal_target(80))
        assert not among(layout, nominal_target(90), "tf32")
    assert not among("kn", nominal_target(90))


def test_none_is_predicted_and_predictions_are_as_without() -> None:
    for m, n, layout in product((2, 64, 4096), (64, 8192), ("kn", "kk+")):
        for target in (nominal_target(90), nominal_target(100)):
            sizes = {"m": m, "batch": 1, "n": n, "k": 1024}
            with_tma, without = (matmul.MATMUL.problem("half", sizes, mark + layout) for mark in ("@", ""))
            assert choose(matmul.MATMUL, with_tma, target) == choose(matmul.MATMUL, without, target)
            assert choose(matmul.MATMUL, with_tma, target) in tiles.TILES["half"]


def test_every_candidate_has_an_estimate_to_be_ordered_by() -> None:
    problem = matmul.MATMUL.problem("half", {"m": 512, "batch": 1, "n": 512, "k": 512}, "@kn")
    for target in (nominal_target(90), nominal_target(100)):
        times = [tiles.cycles(problem, t, target) for t in matmul.MATMUL.candidates(problem, target)]
        assert all(0 < t < float("inf") for t in times)


def measured(launcher: CudaLauncher, layout: str) -> Tuned:
    """That WIDE is fastest for 256 x 512 x 1024."""
    sizes = {"m": 256, "batch": 1, "n": 512, "k": 1024}
    known = matmul.MATMUL.class_of(matmul.MATMUL.problem("half", sizes, layout))
    found = Measured(known, numbers(WIDE), 1e-6, (128, 64, 64, 4, 4), 2e-6, source_of(matmul.MATMUL))
    return Tuned(launcher.target, {known: found})


def test_what_is_compiled_ahead_is_what_a_card_launches(tmp_path: Path) -> None:
    a, b, out = (FakeArray(shape, "float16") for shape in ((256, 1024), (1024, 512), (256, 512)))
    ahead = CudaLauncher(0, 0, driver=AbsentDriver(nominal_target(90), 13000), cache=KernelCache(tmp_path))
    matmul.matmul(a, b, out, ahead, tuned=measured(ahead, "@kn"))
    assert ahead.compiled == 1
    driver = DescribingDriver()
    card = CudaLauncher(0, 0, driver=driver, cache=KernelCache(tmp_path))
    ((_, args),) = matmul.matmul(a, b, out, card, tuned=measured(card, "@kn"))
    assert (driver.loaded, card.compiled, driver.encoder.calls) == (["tma_kernel"], 0, 2)
    assert args[1] == 4, "a program for each of 2 x 2 tiles"


def test_the_checks_tiles_are_compiled_ahead(tmp_path: Path) -> None:
    ahead = CudaLauncher(0, 0, driver=AbsentDriver(nominal_target(90), 13000), cache=KernelCache(tmp_path))
    gpu_ahead.tma(gpu_ahead.PARTS - 30, ahead)
    assert ahead.compiled == 1
    older = CudaLauncher(0, 0, driver=AbsentDriver(nominal_target(80), 13000), cache=KernelCache(tmp_path))
    gpu_ahead.tma(0, older)
    assert older.compiled == 0


def test_a_library_is_still_predicted_beside_them() -> None:
    class Library:
        def call(self, product: object, workspace: object) -> Call:
            return nothing, ()

    driver = DescribingDriver()
    card = CudaLauncher(0, 0, driver=driver)
    card.library = Library()  # type: ignore[assignment]
    a, b, out = (FakeArray(shape, "float16") for shape in ((256, 1024), (1024, 512), (256, 512)))
    trial = Trial(Tuned(card.target), {})
    (call,) = matmul.matmul(a, b, out, card, workspace=FakeArray((4096,), "uint8"), tuned=trial)
    assert call[0] is nothing
    assert [(p.layout, made == tiles.LIBRARY) for _, p, made in trial.asked.values()] == [
        ("=@kn", True),
    ]


def test_the_whole_model_is_planned_without_them() -> None:
    session = Session(load_graph(model()), RecordingDevice(remembers=True))
    session.run(feeds())
    assert {launch.kernel for launch in session.device.launcher.launches} == {"matmul_kernel"}  # type: ignore[attr-defined]
