"""Tiles measured on a device and with a timer that only pretend: who wins, who is out, what stays."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.agreement import agree
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.errors import DeviceError
from infera_gpu.loader import load_graph
from infera_gpu.op import Call
from infera_gpu.session import Session
from infera_kernels.launch import Launch, nominal_target
from infera_kernels.tuning import DeviceTiles, Measured, Problem, Store, Tuned
from tests.text import parse

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

PRODUCT = """
    g (float16[N, 256] x) => (float16[N, 512] y) {
        y = MatMul (x, w)
    }"""


def model(n: int = 512) -> Any:
    import onnx

    made = parse(PRODUCT)
    w = np.random.default_rng(0).standard_normal((256, n)).astype(np.float16)
    made.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return made


def opened(store: Store | None = None, **options: Any) -> Session:
    device = RecordingDevice(remembers=True, **options)
    device.tiles = DeviceTiles(nominal_target(90), store)
    return Session(load_graph(model()), device)


def feeds(n: int = 128) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.random.default_rng(n).standard_normal((n, 256)).astype(np.float16)}


def launches(calls: Sequence[Call]) -> list[Launch]:
    return [args[0] for _, args in calls if args and isinstance(args[0], Launch)]


class Timer:
    """Makes the calls, and says of them what `seconds` says of their first launch; counts what it was asked."""

    def __init__(self, seconds: Callable[[Launch], float]) -> None:
        self.seconds, self.asked = seconds, 0

    def __call__(self, calls: Sequence[Call]) -> float:
        self.asked += 1
        for fn, args in calls:
            fn(*args)
        return sum(map(self.seconds, launches(calls)))


def tile(launch: Launch) -> tuple[int, int, int]:
    known = launch.constexprs
    return known["BM"], known["BN"], known["BK"]


def fastest(*wanted: int) -> Timer:
    return Timer(lambda launch: 1e-6 if tile(launch) == wanted else 1e-5)


def used(session: Session, n: int = 128) -> tuple[int, int, int]:
    """The tile of the product that a run launches."""
    launcher: Any = session.device.launcher
    launcher.launches.clear()
    session.run(feeds(n))
    return tile(launcher.launches[-1])


def test_the_next_plan_goes_by_the_fastest_and_so_do_sizes_near_by() -> None:
    session = opened()
    before = used(session)
    assert before != (128, 64, 64)
    want = session.run(feeds())["y"]
    (found,) = session.tune(feeds(), timer=fastest(128, 64, 64))
    assert found.choice[:3] == (128, 64, 64)
    assert found.predicted[:3] == before
    assert found.seconds < found.predicted_seconds
    assert used(session) == (128, 64, 64)
    assert used(session, 125) == (128, 64, 64)
    assert used(session, 400) != (128, 64, 64)
    np.testing.assert_array_equal(session.run(feeds())["y"], want)


def test_what_is_measured_is_not_measured_again_unless_asked() -> None:
    session = opened()
    session.tune(feeds(), timer=fastest(128, 64, 64))
    timer = fastest(64, 64, 64)
    assert session.tune(feeds(), timer=timer) == ()
    assert timer.asked == 0
    session.tune(feeds(), timer=timer, again=True)
    assert used(session) == (64, 64, 64)


def test_candidates_whose_results_are_wrong_never_win(caplog: pytest.LogCaptureFixture) -> None:
    session = opened()
    before = used(session)
    usual = type(session.device).wrap

    def spoiled(device: Any, step: Any, calls: list[Call], ins: Any, outs: Any) -> list[Call]:
        made = usual(device, step, calls, ins, outs)
        wrong = any(tile(launch) == (128, 64, 64) for launch in launches(calls))
        return [*made, (outs[0].fill, (1.0,))] if wrong else made

    session.device.wrap = spoiled.__get__(session.device)  # type: ignore[method-assign]
    told: list[tuple[Problem, tuple[int, ...]]] = []
    with caplog.at_level(logging.WARNING):
        (found,) = session.tune(feeds(), timer=fastest(128, 64, 64), rejected=lambda *known: told.append(known))
    assert found.choice == found.predicted
    assert used(session) == before
    assert "gives other results" in caplog.text
    assert [(known, choice[:3]) for known, choice in told] == [(found.problem, (128, 64, 64))]


def test_what_a_candidate_does_not_write_shows() -> None:
    session = opened()
    before = used(session)
    usual = type(session.device).wrap

    def idle(device: Any, step: Any, calls: list[Call], ins: Any, outs: Any) -> list[Call]:
        made = usual(device, step, calls, ins, outs)
        return calls if any(tile(launch) == (128, 64, 64) for launch in launches(calls)) else made

    session.device.wrap = idle.__get__(session.device)  # type: ignore[method-assign]
    session.tune(feeds(), timer=fastest(128, 64, 64))
    assert used(session) == before


def test_differences_of_rounding_are_none() -> None:
    want = np.array([1.0, -2.0, np.inf, np.nan], np.float16)
    assert agree([want * np.float16(1.001)], [want])
    assert not agree([want * np.float16(1.01)], [want])
    assert not agree([np.array([1.0, -2.0, np.inf, 0.0], np.float16)], [want])
    assert not agree([np.array([1.0, -2.0, 3.0, np.nan], np.float16)], [want])
    assert agree([np.array(2.0, np.float32)], [np.array(2.0, np.float32)])
    assert agree([np.empty((0, 3), np.float32)], [np.empty((0, 3), np.float32)])
    wide = np.ones((5, 2_000_000), np.float16)
    other = wide.copy()
    other[-1, -1] = 1.5
    assert agree([wide], [wide])
    assert not agree([other], [wide])
    assert agree([np.array([3, 4], np.int8)], [np.array([3, 5], np.int8)])
    assert not agree([np.array([3, 4], np.int8)], [np.array([3, 6], np.int8)])


def test_no_candidate_is_begun_after_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement takes a second; the survey, and what has begun, is finished."""
    now = [0.0]
    monkeypatch.setattr("infera_gpu.tuning.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(launch: Launch) -> float:
        now[0] += 1.0
        return 1e-5

    session = opened()
    used(session)
    timer = Timer(slow)
    assert session.tune(feeds(), timer=timer, seconds=8.0) == ()
    asked = timer.asked
    session = opened()
    timer = Timer(slow)
    assert len(session.tune(feeds(), timer=timer, seconds=1000.0)) == 1
    assert asked < timer.asked / 2


def test_gains_within_noise_are_none() -> None:
    session = opened()
    before = used(session)
    session.tune(feeds(), timer=Timer(lambda launch: 0.99e-5 if tile(launch) == (128, 64, 64) else 1e-5))
    assert used(session) == before


def test_nothing_is_measured_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(RecordingDevice, "timer", refused)
    with infera_gpu.load(model(), device="recording") as session:
        session.run(feeds())
        session.reserve({"x": (64, 256)})


def test_a_session_loaded_to_be_tuned_measures_in_runs_with_new_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = fastest(128, 64, 64)
    monkeypatch.setattr(RecordingDevice, "timer", lambda device: timer)
    monkeypatch.setattr(RecordingDevice, "__init__", partialmethod(RecordingDevice.__init__, remembers=True))
    with infera_gpu.load(model(), device="recording", tune=True) as session:
        session.run(feeds())
        asked = timer.asked
        assert asked > 0
        assert used(session) == (128, 64, 64)
        session.run(feeds())
        assert timer.asked == asked
        assert 0 < session.tuning_left < 60
        session.run(feeds(700))
        assert timer.asked > asked


def test_tiles_of_batch_invariant_sessions_are_fixed() -> None:
    free, fixed = opened(), opened(batch_invariant=True)
    before = used(fixed), used(fixed, 700)
    assert before[0] == before[1]
    measured = free.tune(feeds(256), timer=fastest(128, 64, 64))
    fixed.device.tiles.learn(measured, {})  # type: ignore[union-attr]
    fixed._stages = fixed._planning()
    assert (used(fixed), used(fixed, 700)) == before
    with pytest.raises(DeviceError, match="fixes tiles"):
        fixed.tune(feeds(), timer=fastest(128, 64, 64))
    with pytest.raises(DeviceError, match="fixes tiles"):
        infera_gpu.load(model(), device="recording", batch_invariant=True, tune=True)


def test_a_device_without_kernels_and_one_without_time_say_so() -> None:
    with pytest.raises(DeviceError, match="nothing to tune"):
        infera_gpu.load(model(), device="cpu", tune=10)
    with pytest.raises(DeviceError, match="only pretends"):
        opened().tune(feeds())
    with pytest.raises(DeviceError, match="only pretends to launch: there is nothing to measure"):
        infera_gpu.load(model(), device="recording", tune=True)


def test_sums_are_cut_into_as_many_parts_as_is_fastest() -> None:
    """Two choices of one step: parts first, then the tile of such parts."""
    import onnx

    made = parse("g (float16[N, 4096] x) => (float16[N, 64] y) { y = MatMul (x, w) }")
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4096, 64), np.float16), "w"))
    device = RecordingDevice(remembers=True)
    session = Session(load_graph(made), device)
    x = {"x": np.ones((32, 4096), np.float16)}
    session.run(x)
    parts = int(np.prod(device.launcher.launches[0].grid[1:]))  # type: ignore[attr-defined]
    assert parts > 4

    def seconds(launch: Launch) -> float:
        if launch.kernel != "matmul_kernel":
            return 0.0
        return (1e-6 if launch.grid[1] == 4 else 2e-6) + (0.0 if tile(launch) == (32, 64, 64) else 5e-7)

    found = session.tune(x, timer=Timer(seconds))
    assert {m.problem.family for m in found} == {"matmul_parts", "matmul"}
    device.launcher.launches.clear()  # type: ignore[attr-defined]
    session.run(x)
    product, added = device.launcher.launches  # type: ignore[attr-defined]
    assert (product.grid[1], tile(product)) == (4, (32, 64, 64))
    assert added.constexprs["PARTS"] == 4


def test_attention_and_convolutions_are_tuned() -> None:
    import onnx

    made = parse("""
        g (float16[N, 16, 14, 14] x) => (float16[N, 64, 14, 14] y) {
            y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
        }""")
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((64, 16, 3, 3), np.float16), "w"))
    session = Session(load_graph(made), RecordingDevice(remembers=True))
    found = session.tune({"x": np.ones((32, 16, 14, 14), np.float16)}, timer=fastest(64, 64, 64))
    assert [m.problem.family for m in found] == ["conv"]
    assert found[0].choice[:3] == (64, 64, 64)

    made = parse("""
        g (float16[B, 4, S, 64] q, float16[B, 4, S, 64] k, float16[B, 4, S, 64] v) => (float16[B, 4, S, 64] y) {
            y = Attention (q, k, v)
        }""")
    made.opset_import[0].version = 23
    session = Session(load_graph(made), RecordingDevice(remembers=True))
    given = {name: np.ones((2, 4, 256, 64), np.float16) for name in "qkv"}
    timer = Timer(lambda launch: 1e-6 if launch.constexprs.get("BM") == 128 else 1e-5)
    (attention,) = session.tune(given, timer=timer)
    assert (attention.problem.family, attention.choice[0]) == ("attention", 128)


@pytest.mark.parametrize(("rows", "family", "choice"), [(64, "gated", (64, 64, 64)), (1, "gated_row", (64, 64, 5))])
def test_gated_products_are_tuned(rows: int, family: str, choice: tuple[int, ...]) -> None:
    """Half of a tile's columns are of one matrix."""
    made = parse("""
        g (float16[N, 256] x, float16[256, 512] v, float16[256, 512] w) => (float16[N, 512] y) {
            y = infera.GatedMatMul (x, v, w)
        }""")
    names = ("BM", "BN", "BK") if rows > 1 else ("BN", "BK", "STAGES")
    wanted = {name: size // 2 if name == "BN" else size for name, size in zip(names, choice, strict=True)}

    def seconds(launch: Launch) -> float:
        return 1e-6 if {name: launch.constexprs.get(name) for name in wanted} == wanted else 1e-5

    session = Session(load_graph(made), RecordingDevice(remembers=True))
    given = {"x": np.ones((rows, 256), np.float16)} | dict.fromkeys("vw", np.ones((256, 512), np.float16))
    (found,) = session.tune(given, timer=Timer(seconds))
    assert (found.problem.family, found.problem.sizes[-2:]) == (family, (1024, 256))
    assert found.choice[:3] == choice


# ---- files

PROBLEM = Problem("matmul", "half", (128, 1, 512, 256), "kn")
ENTRY = Measured(PROBLEM, (64, 64, 64, 4, 4), 1e-6, (32, 64, 64, 4, 4), 2e-6, "source")


def store(folder: Path, device: str = "h200", triton: str = "3.6.0", shipped: Path | None = None) -> Store:
    return Store(device, triton, shipped=shipped, own=folder)


def test_another_process_goes_by_what_is_kept(tmp_path: Path) -> None:
    opened(store(tmp_path)).tune(feeds(), timer=fastest(128, 64, 64))
    assert used(opened(store(tmp_path))) == (128, 64, 64)
    assert used(opened(store(tmp_path, device="a100"))) != (128, 64, 64)
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_bytes())
    assert content["measured"] is True
    assert content["runs"][0]["method"].startswith("CUDA events")


def test_measurements_of_other_kernels_are_passed_by(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = store(tmp_path)
    session = opened(kept)
    before = used(session)
    (found,) = session.tune(feeds(), timer=fastest(128, 64, 64))
    kept.add([replace(found, source="0123")], {})
    with caplog.at_level(logging.INFO):
        assert used(opened(store(tmp_path))) == before
    assert caplog.text.count("measured with other kernels") == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: text[:-40],
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"device": "h200"', '"device": "l4"'),
        lambda text: text.replace('"triton": "3.6.0"', '"triton": "3.7.0"'),
        lambda text: text.replace('"measured": true', '"measured": false'),
        lambda text: text.replace('"choice": [64', '"choice": ["wide"'),
        lambda text: text.replace('"sizes"', '"shape"'),
    ],
    ids=["empty", "other", "cut", "format", "device", "triton", "predicted", "number", "field"],
)
def test_files_that_are_damaged_or_foreign_are_passed_by(
    tmp_path: Path, damage: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path)
    kept.add([ENTRY], {"card": "NVIDIA H200"})
    assert kept.load() == {PROBLEM: ENTRY}
    text = kept.path.read_text()
    assert damage(text) != text
    kept.path.write_text(damage(text))
    with caplog.at_level(logging.WARNING):
        assert kept.load() == {}
    assert "passed by" in caplog.text
    kept.add([ENTRY], {})
    assert kept.load() == {PROBLEM: ENTRY}


def test_a_choice_that_is_none_of_the_candidates_is_not_made() -> None:
    from infera_kernels.triton.matmul import MATMUL
    from infera_kernels.triton.tiles import predicted
    from infera_kernels.tuning import choose, source_of

    problem = MATMUL.problem("half", {"m": 128, "batch": 1, "n": 512, "k": 256}, "kn")
    target = nominal_target(90)
    odd = replace(ENTRY, problem=MATMUL.class_of(problem), choice=(48, 48, 64, 4, 4), source=source_of(MATMUL))
    assert choose(MATMUL, problem, target, Tuned(target, {odd.problem: odd})) == predicted(problem, target)


def test_writers_at_one_time_lose_nothing(tmp_path: Path) -> None:
    def write(i: int) -> None:
        for j in range(5):
            entry = replace(ENTRY, problem=replace(PROBLEM, sizes=(i, j, 1, 1)))
            store(tmp_path).add([entry], {"card": str(i)})

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(store(tmp_path).load()) == 30
    assert not list(tmp_path.glob(".*.tmp"))


def test_this_machines_measurements_go_before_those_of_the_package(tmp_path: Path) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    store(shipped).add([ENTRY], {})
    both = store(own, shipped=shipped)
    assert both.load() == {PROBLEM: ENTRY}
    both.add([replace(ENTRY, choice=(16, 32, 128, 4, 4))], {})
    assert both.load()[PROBLEM].choice == (16, 32, 128, 4, 4)


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        store(tmp_path / "file" / "below").add([ENTRY], {})
    assert "not kept" in caplog.text
