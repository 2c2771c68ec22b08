"""A run that repeats the last one does little, and is as right as any. Nothing here runs on a GPU."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from infera_gpu.compat.binding import IOBinding
from infera_gpu.compat.ortvalue import OrtValue
from infera_gpu.devices import cuda
from infera_gpu.devices.cpu import CpuDevice
from infera_gpu.errors import DeviceError, DeviceLostError, InputError, OutOfMemoryError, PlanError
from infera_gpu.lease import SHRINK_ABOVE, SHRINK_AFTER, Arena
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from tests import fake_cupy
from tests.text import parse

COPIES = parse(
    """
    g (float[N, 4] x, float[N, 4] z) => (float[4, N] y, float[4, N] w) {
        y = Transpose <perm = [1, 0]>(x)
        w = Transpose <perm = [1, 0]>(z)
    }"""
)
"""Two steps that only launch, without a Triton kernel."""

PYTHON_CALLS = {"cpu": 28, "cuda": 34, "binding": 35}
"""Functions of Python that one run calls, a tenth of a microsecond and more each. Raise a number for what every run
must do anew alone, not for what is known from the run before."""

COUNTED = "infera_", "contextlib"
"""How the names of modules begin whose functions are counted: not the stand-in's, nor NumPy's."""


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_cupy.install(monkeypatch, fake_cupy.module(gpus=2))


class Repeating:
    """A session on the stand-in with arrays there, which has run until its graph was recorded."""

    def __init__(self, cupy: Any, rows: int = 3) -> None:
        self.device = cuda.CudaDevice(0)
        self.session, self._cupy = Session(load_graph(COPIES), self.device), cupy
        self.feeds = {name: self.there((rows, 4)) for name in "xz"}
        self.out = {name: self.there((4, rows)) for name in "yw"}
        for seed in range(4):
            self.run(seed)
        assert self.log()[1:] == ["replay 2", "sync event"]

    def there(self, shape: tuple[int, ...]) -> Any:
        return self._cupy.asarray(np.zeros(shape, np.float32))

    def log(self) -> list[str]:
        """What the stream is asked in a run."""
        log: list[str] = self.device._stream.log
        log.clear()
        self.session.run(self.feeds, self.out)
        return log.copy()

    def run(self, seed: int = 0) -> None:
        """With other numbers in the same arrays; the answers must be theirs."""
        rng = np.random.default_rng(seed)
        for array in self.feeds.values():
            np.copyto(array, rng.standard_normal(array.shape))
        for array in self.out.values():
            np.copyto(array, np.nan)
        got = self.session.run(self.feeds, self.out)
        assert list(got) == ["y", "w"]
        for name, source in (("y", "x"), ("w", "z")):
            assert got[name] is self.out[name]
            np.testing.assert_array_equal(got[name], np.asarray(self.feeds[source]).T)


@pytest.fixture
def repeating(cupy: Any) -> Repeating:
    return Repeating(cupy)


def called(run: Callable[[], object]) -> list[str]:
    """The functions of Python that are called, of modules that are counted."""
    names: list[str] = []

    def look(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_globals["__name__"].startswith(COUNTED):
            names.append(frame.f_code.co_qualname)

    gc.disable()  # finalisers are called too
    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return names


def check_calls(kind: str, run: Callable[[], object]) -> None:
    names = called(run)
    most = PYTHON_CALLS[kind]
    assert len(names) <= most, (
        f"{len(names)} calls, expected {most} at most, see PYTHON_CALLS; in their order: {', '.join(names)}"
    )


def test_a_run_on_the_cpu_calls_few_functions() -> None:
    model = parse("g (float[N] x) => (float[N] y) <float[4] c = {1, 2, 3, 4}> { y = Add(x, c) }")
    with Session(load_graph(model), CpuDevice()) as session:
        feeds = {"x": np.arange(4, dtype=np.float32)}
        for _ in range(3):
            session.run(feeds)
        check_calls("cpu", lambda: session.run(feeds))


def test_a_run_that_repeats_the_last_on_a_gpu_calls_few_functions(repeating: Repeating) -> None:
    check_calls("cuda", lambda: repeating.session.run(repeating.feeds, repeating.out))


def bound_to(repeating: Repeating) -> IOBinding:
    owner: Any = type("Owner", (), {"session": repeating.session})
    binding = IOBinding(owner)
    for name, array in repeating.feeds.items():
        binding.bind_ortvalue_input(name, OrtValue(array, repeating.device))
    for name, array in repeating.out.items():
        binding.bind_ortvalue_output(name, OrtValue(array, repeating.device))
    return binding


def test_a_binding_that_repeats_its_last_run_calls_few_functions(repeating: Repeating) -> None:
    binding = bound_to(repeating)
    for _ in range(2):
        binding.execute()
    check_calls("binding", binding.execute)


def test_a_binding_runs_with_what_is_bound_last(repeating: Repeating) -> None:
    binding, one = bound_to(repeating), repeating.there((3, 4))
    for _ in range(3):
        binding.execute()
    np.copyto(one, 1.0)
    binding.bind_ortvalue_input("x", OrtValue(one, repeating.device))
    other = repeating.there((4, 3))
    binding.bind_ortvalue_output("w", OrtValue(other, repeating.device))
    for n in range(4):
        np.copyto(repeating.feeds["z"], n)
        binding.execute()
        (y, w) = binding.get_outputs()
        assert (y.array is repeating.out["y"], w.array is other) == (True, True)
        np.testing.assert_array_equal(y.array, np.ones((4, 3)))
        np.testing.assert_array_equal(w.array, np.full((4, 3), n))
    binding.bind_output("w", "cpu")
    made = []
    for _ in range(3):
        binding.execute()
        made.append(binding.get_outputs()[1].array)
    assert made[0] is not made[1], "an output that is bound to a device is new memory in every run"
    binding.clear_binding_outputs()
    assert not binding.get_outputs()
    with pytest.raises(InputError, match="no output is bound"):
        binding.execute()


# ---- as right as any


def test_arrays_that_take_turns_are_repeated_too(repeating: Repeating, monkeypatch: pytest.MonkeyPatch) -> None:
    """As caches of keys and values do, one read and one written."""
    launch, launched = repeating.device.launch, list[int]()

    def counted(run: Any, *given: Any) -> None:
        launched.append(1)
        launch(run, *given)

    sets = [repeating.feeds, *({name: repeating.there((3, 4)) for name in "xz"} for _ in range(2))]
    for repeating.feeds in sets[1:]:
        for _ in range(2):
            repeating.run()
    monkeypatch.setattr(repeating.device, "launch", counted)
    for n in range(9):
        repeating.feeds = sets[n % 3]
        repeating.run(n)
    assert len(launched) == 9


def test_other_arrays_and_other_shapes_between(repeating: Repeating) -> None:
    first = repeating.feeds, repeating.out
    second = (
        {name: repeating.there((3, 4)) for name in "xz"},
        {name: repeating.there((4, 3)) for name in "yw"},
    )
    third = {name: repeating.there((5, 4)) for name in "xz"}, {name: repeating.there((4, 5)) for name in "yw"}
    for seed, (feeds, out) in enumerate([first, second, second, second, first, third, third, third, first, first]):
        repeating.feeds, repeating.out = feeds, out
        repeating.run(seed)


def test_threads_that_repeat_runs_of_their_own(repeating: Repeating) -> None:
    session = Session(load_graph(COPIES), repeating.device, arena=Arena(2))

    def answers(seed: int) -> None:
        feeds = {name: repeating.there((3, 4)) for name in "xz"}
        out = {name: repeating.there((4, 3)) for name in "yw"}
        for n in range(30):
            for i, array in enumerate(feeds.values()):
                np.copyto(array, 100 * seed + 2 * n + i)
            session.run(feeds, out)
            assert [np.unique(array).tolist() for array in out.values()] == [[100 * seed + 2 * n + i] for i in (0, 1)]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(answers, range(1, 4)))


def test_results_in_other_arrays_and_in_none(repeating: Repeating) -> None:
    for n in range(3):
        for array in repeating.feeds.values():
            np.copyto(array, n)
        gaps = np.zeros((4, 6), np.float32)[:, ::2]
        strided = repeating.there((4, 6))[:, ::2]
        got = repeating.session.run(repeating.feeds, {"y": gaps})
        assert got["y"] is gaps
        assert type(got["w"]) is np.ndarray
        also = repeating.session.run(repeating.feeds, {"y": strided})
        for array in (*got.values(), also["y"]):
            np.testing.assert_array_equal(array, np.full((4, 3), n))


def test_what_does_not_fit_is_refused_as_in_any_run(repeating: Repeating) -> None:
    session, feeds, out = repeating.session, repeating.feeds, repeating.out
    for wrong, text in (
        (repeating.there((3, 4)), r"out\['y'\] is float32\[3, 4\], the output is float32\[4, 3\]"),
        (np.zeros((4, 3), np.int32), r"out\['y'\] is int32\[4, 3\]"),
        (np.broadcast_to(np.float32(0), (4, 3)), r"out\['y'\] is read-only"),
    ):
        with pytest.raises(InputError, match=text):
            session.run(feeds, {**out, "y": wrong})
        repeating.run()
    with pytest.raises(InputError, match="input 'z' is missing"):
        session.run({"x": feeds["x"]}, out)
    with pytest.raises(InputError, match=r"out\['q'\] is not an output"):
        session.run(feeds, {**out, "q": out["y"]})
    session.close()
    with pytest.raises(DeviceError, match="is closed"):
        session.run(feeds, out)


def test_an_array_whose_shape_was_changed_is_planned_for(repeating: Repeating) -> None:
    session = repeating.session
    for array in repeating.feeds.values():
        np.copyto(array, np.arange(12, dtype=np.float32).reshape(3, 4))
    views = {name: array.reshape(3, 4) for name, array in repeating.feeds.items()}
    for _ in range(3):
        session.run(views, repeating.out)
    for array in views.values():
        array.resize((1, 12), refcheck=False)
    with pytest.raises(InputError, match="x"):
        session.run(views, repeating.out)


def test_memory_that_is_reserved_holds_for_repeated_runs_too(repeating: Repeating) -> None:
    repeating.session.reserve({"x": (1, 4), "z": (1, 4)}, final=True)
    with pytest.raises(OutOfMemoryError, match="larger than the shapes that it was loaded for"):
        repeating.session.run(repeating.feeds, repeating.out)
    repeating.session.reserve({"x": (3, 4), "z": (3, 4)}, final=True)
    for seed in range(4):
        repeating.run(seed)


def test_an_arena_that_is_far_too_large_is_given_back(repeating: Repeating) -> None:
    """And what was bound to it with it."""
    rows = 3 * SHRINK_ABOVE // 32
    repeating.session.reserve(dict.fromkeys("xz", (rows, 4)))
    (lease,) = repeating.session._leases.values()
    lease._memory.reserved = {}
    assert lease.nbytes > SHRINK_ABOVE
    for seed in range(2 * SHRINK_AFTER + 2):
        repeating.run(seed)
    assert lease.nbytes < SHRINK_ABOVE


def test_a_kept_plan_that_turns_out_wrong_is_made_anew(repeating: Repeating, monkeypatch: pytest.MonkeyPatch) -> None:
    session = repeating.session
    (stage,) = session._stages._first.values()
    stage.taken = True
    failures = 2

    def broken(run: Any, *given: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise PlanError("a plan that was kept does not suit")
        launch(run, *given)

    launch = repeating.device.launch
    monkeypatch.setattr(repeating.device, "launch", broken)
    repeating.run(1)
    assert failures == 1, "what has been run anew was right"
    stage.taken = False
    with pytest.raises(PlanError, match="does not suit"):
        session.run(repeating.feeds, repeating.out)
    repeating.run(2)


def test_a_fault_in_a_repeated_run_loses_the_gpu(repeating: Repeating) -> None:
    fake_cupy.Device.faults[0] = 700
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="cuda:0 is lost"):
            repeating.session.run(repeating.feeds, repeating.out)


def test_host_memory_that_is_not_there_is_told_as_in_any_run(
    repeating: Repeating, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("infera_gpu.running.RESULTS.empty", none)
        with pytest.raises(OutOfMemoryError, match="an array on the host"):
            repeating.session.run(repeating.feeds)
    repeating.run()


def test_the_stream_waits_for_what_the_caller_has_queued(repeating: Repeating) -> None:
    with fake_cupy.Stream(name="the caller's"):
        assert repeating.log()[0] == "wait for the caller's"
    assert repeating.log()[0] == "wait for the null stream"


def test_a_device_goes_with_its_last_session(cupy: Any) -> None:
    """At once, without the garbage collector, which does not know that memory of a GPU is short. After a fault, too."""
    gc.collect()
    gc.disable()
    try:
        device = cuda.CudaDevice(0)
        gone = weakref.ref(device)
        with pytest.raises(DeviceError, match="cudaError 1"), device.running():
            raise fake_cupy.CUDARuntimeError(1)
        del device
        assert gone() is None
    finally:
        gc.enable()


def test_a_gpu_that_cannot_be_made_current_leaves_the_other_current(cupy: Any) -> None:
    """A finaliser of its device may come in the middle of a run on the other."""
    lost = cuda.CudaDevice(1)
    fake_cupy.Device.faults[1] = 700
    with pytest.raises(fake_cupy.CUDARuntimeError), lost._device:
        pass
    assert fake_cupy.CURRENT.device == 0
