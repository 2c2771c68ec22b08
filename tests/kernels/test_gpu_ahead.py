"""Kernels compiled ahead for a card are those that its device then looks for, of operators' cases and of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from bench import gpu_ahead, gpu_selections
from bench.build import bert
from bench.gpu_absent import AbsentDriver, AheadDevice, SharingLauncher
from bench.gpu_models import bert_feeds
from bench.gpu_operators import bound
from bench.gpu_report import CheckFailed, Context
from bench.gpu_rows import Row
from bench.gpu_selections import NETWORKS, OPERATORS
from infera_gpu.devices import cuda
from infera_gpu.loader import load_graph
from infera_gpu.op import Op
from infera_gpu.passes import Precision
from infera_gpu.session import Session
from infera_kernels.launch import CudaLauncher, Target, nominal_target
from infera_kernels.tuning import DeviceTiles, Measured, numbers, source_of
from tests import fake_cupy
from tests.cases import covered
from tests.kernels.test_bound_model import Driver
from tests.text import parse

pytestmark = pytest.mark.kernels

VERSION = 13000
ROW = "bandwidth: softmax 16384x4096 fp16"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Callable[..., cuda.CudaDevice]:
    fake_cupy.install(monkeypatch)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())

    def opened(**options: Any) -> cuda.CudaDevice:
        device, driver = cuda.CudaDevice(0, **options), Driver()
        driver.streams[device._stream.ptr] = device._stream
        device._launcher = driver.launcher = CudaLauncher(0, device._stream, driver=driver)
        return device

    return opened


def ahead() -> CudaLauncher:
    return CudaLauncher(0, 0, driver=AbsentDriver(nominal_target(90), VERSION))


@pytest.mark.parametrize("invariant", [False, True])
def test_a_model(invariant: bool, opener: Callable[..., cuda.CudaDevice]) -> None:
    def build() -> Any:
        return bert(layers=1, hidden=32, heads=2, inner=64, vocabulary=50)

    feeds = bert_feeds(2, 7, 50)
    launcher = ahead()
    gpu_ahead.planned("small", build, feeds, precision="fp16", batch_invariant=invariant).run(launcher)
    assert launcher.compiled > 5
    device = opener(batch_invariant=invariant)
    with Session(load_graph(build()), device, precision="fp16") as session:
        for _ in range(3):
            session.run(feeds)
        assert isinstance(device.launcher, CudaLauncher)
        assert len(device.launcher._loaded) > 5
        assert device.launcher.compiled == 0


def test_operators(opener: Callable[..., cuda.CudaDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(op: Op) -> bool:
        return op.name in ("Where", "CumSum")

    monkeypatch.setattr(gpu_ahead, "PARTS", 2)
    launcher = ahead()
    for part in range(2):
        gpu_ahead.cases(part, launcher, wanted)
    device = opener()
    with device.running():
        for op, case, variants in covered("triton"):
            for site, ins in variants if wanted(op) else ():
                for _ in bound(device, op, site, ins, site.outs[: case.n_outs]):
                    pass
    assert isinstance(device.launcher, CudaLauncher)
    assert len(device.launcher._loaded) >= launcher.compiled > 5
    assert device.launcher.compiled == 0


def small() -> gpu_ahead.Job:
    model = parse("g (float[N, 8] x) => (float[N, 8] y) { y = Relu(x) }")
    return gpu_ahead.planned("small", lambda: model, {"x": np.zeros((2, 8), np.float32)})


def test_jobs_that_fail_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(launcher: CudaLauncher) -> None:
        raise ValueError("no such model")

    monkeypatch.setattr(gpu_ahead, "jobs", lambda name: [small(), gpu_ahead.Job("broken", broken)])
    target = nominal_target(90)
    assert gpu_ahead._run(target, VERSION, cache, "check", 0) == ("small fp32", 1, "")
    assert gpu_ahead._run(target, VERSION, cache, "check", 1) == ("broken", 0, "ValueError: no such model")


def test_what_a_library_computes_is_not_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the section that runs every kernel."""
    model = parse("g (float[N, 8] x, float[8, 4] w) => (float[N, 4] y) { y = MatMul(x, w) }")
    feeds = {"x": np.zeros((2, 8), np.float32), "w": np.zeros((8, 4), np.float32)}
    job = gpu_ahead.planned("small", lambda: model, feeds)
    monkeypatch.setattr(gpu_ahead, "jobs", lambda name: [job, replace(job, shared=False)])
    target = replace(nominal_target(90), library_bytes=1 << 12)
    assert [gpu_ahead._run(target, VERSION, cache, "check", i)[1:] for i in range(2)] == [(0, ""), (1, "")]


def test_every_section_that_launches_has_jobs() -> None:
    names = " ".join(job.name for job in gpu_ahead.jobs("check"))
    for part in (
        "resnet50",
        "bert-base",
        "gpt2-step",
        "products",
        "convolutions",
        "cases 1 of",
        "batch invariant",
        "replays",
        "memory",
    ):
        assert part in names
    assert len({job.name for job in gpu_ahead.jobs("check")}) > 60
    for part, sets in (("operators", OPERATORS), ("networks", NETWORKS)):
        labels = [row.label for rows in sets.values() for row in rows()]
        assert [job.name for job in gpu_ahead.jobs(part)] == labels
        assert len(set(labels)) == len(labels)


def small_product(precision: Precision = "fp32") -> Row:
    """Of float32, which has few tiles."""
    model = parse("g (float[N, 64] x, float[64, 32] w) => (float[N, 32] y) { y = MatMul(x, w) }")
    x = {"x": np.ones((40, 64), np.float32), "w": np.ones((64, 32), np.float32)}
    return Row("products", "small", lambda: (model, x), precision)


def test_candidates_are_those_that_tuning_launches(opener: Callable[..., cuda.CudaDevice], cache: Path) -> None:
    """Every one of every choice; helpers compile what others have not begun, and what is measured is not tried."""
    row, target = small_product(), nominal_target(90)
    first, second = (SharingLauncher(AbsentDriver(target, VERSION), cache / "claims") for _ in range(2))
    (cache / "claims").mkdir()
    jobs = gpu_ahead.candidates_of([row], 2)
    assert [job.name for job in jobs] == [f"candidates of products: small fp32, {i} of 2" for i in (1, 2)]
    for job, launcher in zip(jobs, (first, second), strict=True):
        job.run(launcher)
    assert first.compiled == len(list((cache / "kernels").glob("*.kernel"))) > 2
    assert second.compiled == 0
    device = opener()
    source, feeds = row.make()
    with Session(load_graph(source), device) as session:
        before = {c.problem for c in session.choices(feeds)}
        asked: list[Any] = []

        def timer(calls: Any) -> float:
            asked.append(calls)
            return 1e-5

        session.tune(feeds, timer=timer)
        assert before
        assert len(asked) > 2
        assert isinstance(device.launcher, CudaLauncher)
        assert device.launcher.compiled == 0
    third = SharingLauncher(AbsentDriver(target, VERSION), cache)
    gpu_ahead._candidates(row, third)
    assert len(third._loaded) == 1, "the way that was found best"


def test_rows_are_compiled_by_predicted_tiles_and_by_measured_ones(cache: Path) -> None:
    row, tiles = small_product("tf32"), DeviceTiles.of(ahead())
    launcher = ahead()
    gpu_ahead._row(row, launcher)
    assert len(launcher._loaded) == 1
    source, feeds = row.make()
    with gpu_ahead._bound(source, [feeds], "tf32", launcher) as session:
        (choice,) = [c for c in session.choices(feeds) if c.family.name == "matmul"]
    other = next(v for v in map(numbers, choice.family.candidates(choice.problem, tiles.target)) if v != choice.numbers)
    tiles.learn([Measured(choice.problem, other, 1e-6, choice.predicted, 2e-6, source_of(choice.family))], {})
    gpu_ahead._row(row, launcher)
    assert len(launcher._loaded) == 2
    device = AheadDevice(launcher)
    assert device.tuned is not None
    assert not device.tuned.measured, "checks go by predicted tiles"


def test_candidates_of_what_targets_ask_for_come_first() -> None:
    networks, operators = (gpu_ahead.jobs(f"{kind} candidates") for kind in ("network", "operator"))
    assert "resnet50 b32 fp16" in networks[0].name
    assert len({job.name for job in (*networks, *operators)}) == len(networks) + len(operators)
    assert len(networks) == gpu_ahead.NETWORK_HELPERS * sum(len(rows()) for rows in NETWORKS.values())
    sets = [job.name.split(":")[0].removeprefix("candidates of ") for job in operators[:: gpu_ahead.OPERATOR_HELPERS]]
    assert sets[:6] == ["convolutions", "products", "attention"] * 2
    assert len(sets) == sum(len(OPERATORS[name]()) for name in gpu_selections.TUNED)


def test_a_decoder_is_compiled_by_its_outline() -> None:
    """Its weights, gigabytes, are not made for that."""

    def never() -> Any:
        raise AssertionError("the model is made")

    made = parse("g (float[N, 8] x) => (float[N, 8] y) { y = Relu(x) }")
    row = Row("decoder", "small", never, outline=lambda: (made, {"x": np.zeros((2, 8), np.float32)}))
    launcher = ahead()
    (job,) = gpu_ahead.of_rows([row])
    job.run(launcher)
    assert len(launcher._loaded) == 1


@pytest.mark.parametrize(("allowed", "count"), [(1, 1), (2, 4), (4, 4)])
def test_hardware_threads_count_unless_less_than_the_cores_is_allowed(
    allowed: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_ahead, "default_threads", lambda: (allowed, ""))
    monkeypatch.setattr(gpu_ahead, "usable_cores", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    assert gpu_ahead.processes() == count


def test_processes_share_the_jobs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as on a GPU: a row of the short selection, and the same on a card that can hold none."""
    monkeypatch.setattr(gpu_ahead, "processes", lambda: 1)
    (index,) = (i for i, job in enumerate(gpu_ahead.jobs("check")) if job.name == ROW)

    def compiled(target: Target, deadline: float) -> tuple[str, Any]:
        launcher = CudaLauncher(0, 0, driver=AbsentDriver(target, VERSION))
        context = Context(lambda: SimpleNamespace(launcher=launcher), deadline)
        return gpu_ahead.ahead("check", context, [index])

    _, facts = compiled(nominal_target(90), float("inf"))
    assert facts["processes"] == 1
    assert facts["compiled"] == {ROW: 1}
    assert len(list(cache.rglob("*.kernel"))) == 1
    summary, facts = compiled(nominal_target(90), 0.0)
    assert facts["no_time_for"] == 1
    assert summary.endswith("no time for 1 of 1 jobs")
    with pytest.raises(CheckFailed, match=f"1 jobs fail: {ROW}: .* bytes of shared memory"):
        compiled(Target(90, 132, -1), float("inf"))
