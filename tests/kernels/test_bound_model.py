"""What a whole model asks of the CUDA driver: every launch's parameters, stream and order. The driver is a fake."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bench.build import bert
from infera_gpu.devices import cuda
from infera_gpu.loader import load_graph
from infera_gpu.passes import Precision
from infera_gpu.plan import Step
from infera_gpu.session import Session
from infera_kernels.launch import CudaLauncher, KernelCache, Target, nominal_target
from infera_kernels.launch.abi import Address
from tests import fake_cupy
from tests.text import parse

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

SCRATCH = ("*i8", "*i8")


@dataclass(frozen=True)
class Launch:
    """cuLaunchKernel as the driver sees it: parameters read through the pointers."""

    kernel: str
    grid: tuple[int, ...]
    threads: tuple[int, ...]
    shared: int
    stream: int
    parameters: tuple[tuple[str, int], ...]


class Driver:
    """Puts launches on the stand-in's streams, where they do nothing but leave a note."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.streams: dict[int, fake_cupy.Stream] = {}
        self.launcher: CudaLauncher | None = None
        self._names: list[str] = []

    def version(self) -> int:
        return 13000

    def target(self, device_id: int) -> Target:
        return nominal_target(90)

    def load(self, device_id: int, cubin: bytes, name: str) -> Address:
        self._names.append(name)
        return Address.of(len(self._names), cubin)

    launch_early = None

    def allow_shared(self, function: int, nbytes: int) -> None: ...

    def encode(self, *_: object) -> int:
        return 0

    @property
    def launch(self) -> Callable[..., object]:
        return self._launch

    def _launch(self, function: int, *config: int) -> None:
        *sizes, shared, stream, parameters, extra = config
        assert extra == 0
        assert self.launcher is not None
        (spec,) = {f.binary.spec for f in self.launcher._loaded.values() if f.function == function}
        types = (*spec.types, *SCRATCH)
        pointers = (ctypes.c_void_p * len(types)).from_address(parameters)
        values = tuple(
            (t, int.from_bytes(ctypes.string_at(p or 0, 8), "little")) for t, p in zip(types, pointers, strict=True)
        )
        made = Launch(spec.name, tuple(sizes[:3]), tuple(sizes[3:]), shared, stream, values)
        self.streams[stream].put("launch", lambda: self.launches.append(made))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = fake_cupy.install(monkeypatch)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    return fake


def opened(
    kernels: Path, model: onnx.ModelProto | None = None, precision: Precision = "fp32", **options: Any
) -> tuple[Session, Driver]:
    """A session for a model, a small BERT where none is given."""
    device, driver = cuda.CudaDevice(0, **options), Driver()
    driver.streams[device._stream.ptr] = device._stream
    device._launcher = driver.launcher = CudaLauncher(0, device._stream, driver=driver, cache=KernelCache(kernels))
    graph = load_graph(model or bert(layers=2, hidden=32, heads=2, inner=64, vocabulary=50))
    return Session(graph, device, precision=precision), driver


def feeds(batch: int = 2) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(batch).integers(0, 50, (batch, 7))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def pictures(batch: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)}


def network() -> onnx.ModelProto:
    """Convolutions of three sizes and of groups, a sum, a pool and a classifier."""
    rng = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> str:
        values = ", ".join(f"{v:.3f}" for v in rng.standard_normal(shape).ravel() / 4)
        return f"float[{', '.join(map(str, shape))}] {name} = {{{values}}}"

    given = (("stem", 32, 3, 7, 7), ("a", 32, 32, 3, 3), ("d", 32, 1, 3, 3), ("b", 32, 32, 1, 1), ("w", 32, 10))
    made = ", ".join(weights(name, *shape) for name, *shape in given)
    return parse(
        f"""
        g (float[N, 3, 16, 16] x) => (float[N, 10] y) <{made}, int64[2] flat = {{0, 32}}> {{
            s = Conv <kernel_shape = [7, 7], strides = [2, 2], pads = [3, 3, 3, 3]> (x, stem)
            r = Relu(s)
            c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, a)
            cr = Relu(c)
            dw = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 32> (cr, d)
            p = Conv <kernel_shape = [1, 1]> (dw, b)
            e = Add(p, r)
            er = Relu(e)
            m = GlobalAveragePool(er)
            f = Reshape(m, flat)
            y = MatMul(f, w)
        }}"""
    )


def launching(steps: Sequence[Step]) -> int:
    return sum(s.kind == "kernel" and s.via == "triton" for s in steps)


def asks_for_nothing_again(
    cupy: Any, session: Session, driver: Driver, inputs: dict[str, np.ndarray], *, least: int
) -> None:
    """Two runs: launches point into live memory, and the second makes the same ones, takes no memory, and waits for
    outputs alone."""
    session.run(inputs)
    plan = session.plan_for(inputs)
    first = list(driver.launches)
    assert len(first) >= launching(plan.steps) > least

    blocks = [(m.ptr, m.ptr + m.nbytes) for m in cupy.vram.blocks]
    for launch in first:
        assert launch.stream == session.device._stream.ptr  # type: ignore[attr-defined]
        assert all(launch.grid)
        assert launch.threads[0] in (32, 64, 128, 256, 512)
        *given, one, two = launch.parameters
        assert (one[1], two[1]) == (0, 0)
        pointers = [value for type, value in given if type.startswith("*")]
        assert pointers
        for pointer in pointers:
            assert any(low <= pointer < high for low, high in blocks), f"{launch.kernel}: it points outside of memory"

    taken = cupy.vram.taken
    streams = session.device._streams  # type: ignore[attr-defined]
    for stream in (streams.entry, streams.compute, streams.exit):
        stream.log.clear()
    driver.launches.clear()
    session.run(inputs)
    assert driver.launches == first
    portable = sum(s.kind == "compute" for s in plan.steps)
    assert cupy.vram.taken - taken <= portable  # operators that run as CuPy's functions allocate, no kernel does
    log = streams.compute.log
    assert log[0] == "wait for the null stream"
    assert [e for e in log if "sync" in e] == ["sync event"] * len(session.outputs)
    assert max(i for i, e in enumerate(log) if e == "launch") < min(i for i, e in enumerate(log) if e.startswith("d2h"))
    assert max(i for i, e in enumerate(log) if e.startswith("h2d")) < log.index("launch")
    assert streams.entry.log == streams.exit.log == []  # little enough to travel among the kernels


def test_launches_point_into_live_memory_and_a_second_run_asks_for_nothing(cupy: Any, kernels: Path) -> None:
    session, driver = opened(kernels, captures=False)
    asks_for_nothing_again(cupy, session, driver, feeds(), least=10)


def test_a_second_run_of_convolutions_in_half_precision_asks_for_nothing(cupy: Any, kernels: Path) -> None:
    session, driver = opened(kernels, network(), "fp16", captures=False)
    asks_for_nothing_again(cupy, session, driver, pictures(), least=5)
    names = {launch.kernel for launch in driver.launches}
    assert {"conv_kernel", "depthwise_kernel"} <= names
    assert not [s for s in session.plan_for(pictures()).steps if s.kind == "compute"]
    # Weights and what lies between are in half precision, which the launches' types say; what comes in is not.
    pointers = [type for launch in driver.launches for type, _ in launch.parameters[:-2] if type.startswith("*")]
    assert pointers.count("*fp16") > len(pointers) / 2


def test_convolutions_in_half_precision_are_replayed_without_memory(cupy: Any, kernels: Path) -> None:
    session, driver = opened(kernels, network(), "fp16")
    log = session.device._stream.log  # type: ignore[attr-defined]
    first: list[Launch] = []
    for turn in range(4):
        taken = cupy.vram.taken
        log.clear()
        driver.launches.clear()
        session.run(pictures())
        first = first or list(driver.launches)
        assert driver.launches == first
        assert not turn or cupy.vram.taken == taken
        waits = [e for e in log if "sync" in e]
        assert waits[-1:] == ["sync event"]
        assert set(waits[:-1]) == (set() if turn else {"sync"}), "the first run uploads packed weights"
        graphs = session.plan_for(pictures()).graphs
        assert graphs
        assert sum(e.startswith("replay") for e in log) == (len(graphs) if turn else 0)
    assert first


def test_captured_steps_are_launched_once_more_and_then_replayed_with_the_same_parameters(
    cupy: Any, kernels: Path
) -> None:
    session, driver = opened(kernels)
    runs = []
    for _ in range(4):
        session.device._stream.log.clear()  # type: ignore[attr-defined]
        driver.launches.clear()
        session.run(feeds())
        log = session.device._stream.log  # type: ignore[attr-defined]
        runs.append((list(driver.launches), log.count("launch"), sum(e.startswith("replay") for e in log)))
    plan = session.plan_for(feeds())
    assert plan.graphs
    held = sum(launching(plan.steps[r.start : r.stop]) for r in plan.graphs)
    assert held >= launching(plan.steps) - 2
    first, *later = runs
    assert first[2] == 0
    for launches, direct, replays in later:
        assert launches == first[0]
        assert replays == len(plan.graphs)
        assert direct == launching(plan.steps) - held


def test_shapes_that_alternate_keep_their_graphs(cupy: Any, kernels: Path) -> None:
    session, driver = opened(kernels)
    session.reserve(feeds(2), feeds(3))
    seen: dict[int, list[Launch]] = {}
    for batch in (2, 3, 2, 3, 2, 3):
        driver.launches.clear()
        session.run(feeds(batch))
        assert seen.setdefault(batch, list(driver.launches)) == driver.launches
    assert seen[2] != seen[3]


def test_weights_that_kernels_pack_are_on_the_gpu_once(cupy: Any, kernels: Path) -> None:
    weights = ", ".join(["0.1"] * (64 * 32 * 9))
    text = f"""
        g (float[N, 32, 8, 8] x) => (float[N, 64, 8, 8] y) <float[64, 32, 3, 3] w = {{{weights}}}> {{
            y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
        }}"""
    device, driver = cuda.CudaDevice(0), Driver()
    driver.streams[device._stream.ptr] = device._stream
    device._launcher = driver.launcher = CudaLauncher(0, device._stream, driver=driver, cache=KernelCache(kernels))
    session = Session(load_graph(parse(text)), device)
    arena = session.reserve({"x": (2, 32, 8, 8)})
    nbytes = 64 * 32 * 9 * 4
    assert nbytes <= cupy.vram.used < nbytes + arena + 4096
