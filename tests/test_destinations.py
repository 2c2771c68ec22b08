"""Results in arrays of the caller's on the device: written there by the steps, where nothing speaks against it. Nothing
here runs on a GPU; a decoder's caches are in tests/kernels/interpret_networks.py."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from infera_gpu.destinations import destinations
from infera_gpu.devices import cuda
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.errors import InputError
from infera_gpu.loader import load_graph
from infera_gpu.op import Kernel
from infera_gpu.plan import Plan
from infera_gpu.session import Session
from tests import fake_cupy
from tests.text import parse

TURNED = """
g (float[N, 4] x, float[N, 4] z) => (float[4, N] y, float[4, N] w) {
    y = Transpose <perm = [1, 0]>(x)
    w = Transpose <perm = [1, 0]>(z)
}"""


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_cupy.install(monkeypatch)


class Runs:
    """A session on the stand-in, and what is copied from the arena when one of its runs is done."""

    def __init__(self, cupy: Any) -> None:
        self.device = cuda.CudaDevice(0)
        self.session, self.xp = Session(load_graph(parse(TURNED)), self.device), cupy

    def array(self, *shape: int) -> Any:
        return self.xp.asarray(np.zeros(shape, np.float32))

    def copies(self, feeds: dict[str, Any], out: dict[str, Any]) -> int:
        """Runs with new numbers in the inputs; the results must be theirs, wherever they lie. What is copied behind the
        graph, once there is one."""
        wanted = {}
        for seed, array in enumerate(feeds.values()):
            np.copyto(array, np.random.default_rng(seed + array.size).standard_normal(array.shape))
        for name, source in (("y", "x"), ("w", "z")):
            wanted[name] = np.asarray(feeds[source]).T.copy()
        self.device._stream.log.clear()
        got = self.session.run(feeds, out)
        for name, array in wanted.items():
            assert name not in out or got[name] is out[name]
            np.testing.assert_array_equal(np.asarray(got[name]), array)
        replayed = [i for i, line in enumerate(self.device._stream.log) if line.startswith("replay")]
        return sum(line.startswith("copy") for line in self.device._stream.log[replayed[-1] if replayed else 0 :])


@pytest.fixture
def runs(cupy: Any) -> Runs:
    return Runs(cupy)


def test_results_are_written_where_they_are_wanted_again(runs: Runs) -> None:
    feeds, out = {n: runs.array(4, 4) for n in "xz"}, {n: runs.array(4, 4) for n in "yw"}
    assert [runs.copies(feeds, out) for _ in range(6)][2:] == [0] * 4


def test_results_that_are_wanted_elsewhere_every_time_are_copied(runs: Runs) -> None:
    """Inputs are read where they lie all the same; and again in one place, they are written there."""
    feeds = {n: runs.array(4, 4) for n in "xz"}
    for _ in range(4):
        assert runs.copies(feeds, {n: runs.array(4, 4) for n in "yw"})
    (lease,) = runs.session._leases.values()
    ((bound, arrays),) = lease._direct.values()
    assert (bound.written, arrays.given.keys()) == (frozenset(), feeds.keys())
    out = {n: runs.array(4, 4) for n in "yw"}
    assert [runs.copies(feeds, out) for _ in range(4)][-1] == 0


def test_some_results_here_and_some_on_the_host(runs: Runs) -> None:
    feeds = {n: runs.array(4, 4) for n in "xz"}
    out = {"w": runs.array(4, 4)}
    for _ in range(4):
        runs.copies(feeds, out)
    (lease,) = runs.session._leases.values()
    assert [bound.written for bound, _ in lease._direct.values()] == [{"w"}]
    more = {**out, "y": np.zeros((4, 4), np.float32)}
    for _ in range(3):
        runs.copies(feeds, more)


def test_a_result_in_the_place_of_an_input_is_copied_there_in_the_end(runs: Runs) -> None:
    """The input is read after the step that makes the result."""
    feeds = {n: runs.array(4, 4) for n in "xz"}
    for out in ({"y": feeds["z"], "w": runs.array(4, 4)}, {"y": feeds["x"]}, {"w": feeds["z"]}):
        assert all(runs.copies(feeds, out) for _ in range(4))


def test_results_that_overlap_are_written_one_after_the_other(runs: Runs) -> None:
    feeds, wide = {n: runs.array(4, 4) for n in "xz"}, runs.array(6, 4)
    out = {"y": wide[:4], "w": wide[2:]}
    for _ in range(4):
        runs.session.run(feeds, out)
        np.testing.assert_array_equal(np.asarray(out["w"]), np.asarray(feeds["z"]).T)


def test_results_that_lie_apart_are_copied(runs: Runs) -> None:
    feeds, wide = {n: runs.array(4, 4) for n in "xz"}, runs.array(4, 8)
    out = {"y": wide[:, ::2], "w": runs.array(4, 4)}
    assert all(runs.copies(feeds, out) for _ in range(4))


@pytest.mark.parametrize("wrong", ["shape", "type"])
def test_what_does_not_fit_is_refused_as_ever(wrong: str, runs: Runs) -> None:
    feeds, out = {n: runs.array(4, 4) for n in "xz"}, {n: runs.array(4, 4) for n in "yw"}
    for _ in range(3):
        runs.copies(feeds, out)
    bad = runs.array(4, 3) if wrong == "shape" else runs.xp.asarray(np.zeros((4, 4), np.float64))
    for _ in range(3):
        with pytest.raises(InputError, match=r"out\['y'\] is float.*, the output is float32\[4, 4\]"):
            runs.session.run(feeds, {**out, "y": bad})
    runs.copies(feeds, out)


def test_the_same_array_for_one_result_and_then_another(runs: Runs) -> None:
    """And as one input, then the other: what a plan is bound to has a name."""
    feeds, one = {n: runs.array(4, 4) for n in "xz"}, runs.array(4, 4)
    for out in ({"y": one}, {"w": one}, {"y": one}):
        for _ in range(4):
            runs.copies(feeds, out)
    for here, elsewhere in ("xz", "zx", "xz"):
        mixed = {here: one, elsewhere: np.zeros((4, 4), np.float32)}
        for _ in range(3):
            runs.copies(dict(sorted(mixed.items())), {})


def test_an_input_that_is_a_result_is_read_before_another_takes_its_place(runs: Runs) -> None:
    session = Session(
        load_graph(
            parse(
                "g (float[N, N] x, float[N, N] z) => (float[N, N] y, float[N, N] w) "
                "{ y = Transpose <perm = [1, 0]>(z) w = Identity(x) }"
            )
        ),
        runs.device,
    )
    x, z, w = (runs.array(4, 4) for _ in range(3))
    for out in ({"y": x, "w": w}, {"y": x}):
        for _ in range(4):
            np.copyto(x, np.arange(16.0).reshape(4, 4))
            got = session.run({"x": x, "z": z}, out)
            np.testing.assert_array_equal(np.asarray(got["w"]), np.arange(16.0).reshape(4, 4))
            np.testing.assert_array_equal(np.asarray(x), np.asarray(z).T)


def test_arrays_and_plans_are_let_go(runs: Runs) -> None:
    """Arrays where memory is given back, plans where the session lets go of them."""
    feeds, out = {n: runs.array(4, 4) for n in "xz"}, {n: runs.array(4, 4) for n in "yw"}
    for _ in range(4):
        runs.copies(feeds, out)
    (lease,) = runs.session._leases.values()
    assert len(lease._lying) == 1
    lease._memory.unbind()
    seen = [weakref.ref(array) for array in (*feeds.values(), *out.values())]
    del feeds, out
    gc.collect()
    assert not any(ref() is not None for ref in seen)
    runs.session._stages.clear()
    gc.collect()
    assert not lease._lying


def test_arrays_go_with_the_session(runs: Runs) -> None:
    feeds, out = {n: runs.array(4, 4) for n in "xz"}, {n: runs.array(4, 4) for n in "yw"}
    for _ in range(3):
        runs.copies(feeds, out)
    runs.session.close()
    assert not runs.session._leases


# Plans


def plan_of(text: str, shapes: dict[str, tuple[int, ...]]) -> Plan:
    with Session(load_graph(parse(text)), RecordingDevice()) as session:
        return session.plan_for(shapes)


def test_what_is_an_input_or_another_output_too_is_copied() -> None:
    text = """
    g (float[N, 4] x) => (float[N, 4] same, float[M, 2] y, float[N, 4] z) {
        same = Identity(x)
        z = Softmax(x)
        shape = Constant <value = int64[2] {-1, 2}> ()
        y = Reshape(z, shape)
    }"""
    assert not destinations(plan_of(text, {"x": (3, 4)}))


SHARED = """
g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y%s) {
    a = Softmax(x)
    y = Softmax(z)
    b = Add(a, y)
    w = Softmax(%s)
}"""


@pytest.mark.parametrize(
    "how", [{"shares": lambda site: ((0, 0),)}, {"inplace": (0,)}, {}], ids=["shares", "in place", "neither"]
)
@pytest.mark.parametrize(
    ("outputs", "read", "wanted"),
    [(", float[N, 4] w", "b", {"z"}), (", float[N, 4] w", "z", set()), (", float[N, 4] w, float[N, 4] z", "b", set())],
    ids=["read once", "read again", "goes out too"],
)
def test_an_input_is_overwritten_by_its_only_reader_alone(
    outputs: str, read: str, wanted: set[str], how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that says that it can."""
    plan = plan_of(SHARED % (outputs, read), {"x": (3, 4), "z": (3, 4)})
    kernel = Kernel(lambda site, io: [], **how)
    steps = tuple(step._replace(kernel=kernel) for step in plan.steps)
    monkeypatch.setattr(Plan, "steps", property(lambda self: steps))
    assert destinations(plan)["y"] == (wanted if how else set())


def test_an_input_is_not_overwritten_by_who_reads_it_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program would write what another still reads."""
    plan = plan_of("g (float[N, 4] x) => (float[N, 4] y) { y = Softmax(x) }", {"x": (4, 4)})
    (step,) = plan.steps
    (x,) = step.ins
    assert x is not None
    turned = x._replace(strides=x.strides[::-1])
    for given, wanted in ((x, {"x"}), (turned, set())):
        steps = (step._replace(kernel=Kernel(lambda site, io: [], inplace=(0,)), ins=(given,)),)
        monkeypatch.setattr(Plan, "steps", steps)
        assert destinations(plan)["y"] == wanted
