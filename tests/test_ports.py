"""How arrays travel to a GPU and back, over a stand-in whose streams are as late as they may be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from infera_gpu.devices import cuda
from infera_gpu.devices.ports import TOGETHER
from infera_gpu.errors import InputError
from infera_gpu.lease import Arena
from infera_gpu.loader import load_graph
from infera_gpu.op import Call
from infera_gpu.plan import Step
from infera_gpu.session import Session
from tests import fake_cupy
from tests.text import parse

MODEL = parse(
    """
    g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y, float[N, 4] twice) {
        a = Exp(x)
        y = Add(a, z)
        twice = Add(z, z)
    }"""
)
LARGE = TOGETHER // 16 + 1
"""Rows whose bytes do not travel among the kernels."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> cuda.CudaDevice:
    fake_cupy.install(monkeypatch)
    return cuda.CudaDevice(0)


def feeds(rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((rows, 4)).astype(np.float32) for name in "xz"}


def check(got: dict[str, Any], given: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(got["y"], np.exp(given["x"]) + given["z"], rtol=1e-6)
    np.testing.assert_array_equal(got["twice"], 2 * given["z"])


def test_large_arrays_travel_on_streams_of_their_own(device: cuda.CudaDevice) -> None:
    session, streams = Session(load_graph(MODEL), device), device._streams
    for seed in range(3):
        for stream in (streams.entry, streams.compute, streams.exit):
            stream.log.clear()
        given = feeds(LARGE, seed)
        check(session.run(given), given)
        nbytes = given["x"].nbytes
        assert streams.entry.log == [f"h2d {nbytes}"] * 2
        assert streams.compute.log[:2] == ["wait for the null stream", "wait for a stream"]
        assert not [e for e in streams.compute.log if "h2d" in e or "d2h" in e]
        assert streams.exit.log == ["wait for a stream", *[f"d2h {nbytes}"] * 2, *["sync event"] * 2]


@pytest.mark.parametrize("rows", [2, LARGE])
def test_runs_of_several_threads_get_their_own_answers(rows: int, device: cuda.CudaDevice) -> None:
    session = Session(load_graph(MODEL), device, arena=Arena(3))

    def answer(seed: int) -> None:
        for i in range(6):
            given = feeds(rows + i % 2, 10 * seed + i)
            want = {name: array.copy() for name, array in given.items()}
            got = session.run(given)
            for array in given.values():  # they are the caller's again
                array[...] = np.nan
            check(got, want)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(answer, range(4)))


def test_a_run_that_fails_leaves_nothing_on_its_way(device: cuda.CudaDevice) -> None:
    session = Session(load_graph(MODEL), device)
    check(session.run(first := feeds(LARGE, 0)), first)
    with pytest.raises(InputError, match="the output is float32"):
        session.run(feeds(LARGE, 1), out={"y": np.zeros((1, 4), np.float32)})
    streams = device._streams
    assert [s.log[-1] for s in (streams.entry, streams.compute, streams.exit)] == ["sync"] * 3
    check(session.run(last := feeds(LARGE, 2)), last)


def test_empty_arrays_and_gaps_and_targets_on_the_gpu(device: cuda.CudaDevice) -> None:
    session = Session(load_graph(MODEL), device)
    check(session.run(none := feeds(0, 0)), none)
    given = feeds(LARGE, 1)
    gaps = {"x": np.repeat(given["x"], 2, axis=1)[:, ::2], "z": given["z"]}
    out = {"y": device.xp.empty((LARGE, 4), np.float32), "twice": np.zeros((LARGE, 8), np.float32)[:, ::2]}
    check(session.run(gaps, out=out), given)


def test_staging_is_page_locked_and_shared_by_all_shapes(device: cuda.CudaDevice) -> None:
    session = Session(load_graph(MODEL), device)
    for rows in (3, LARGE, 5):
        session.run(feeds(rows, rows))
    plan = session.plan_for({"x": (LARGE, 4), "z": (LARGE, 4)})
    assert plan.staging >= 4 * 16 * LARGE
    (lease,) = session._leases.values()
    assert lease._memory.sizes["staging"] == plan.staging
    assert isinstance(lease._memory.arenas["staging"].base, memoryview | fake_cupy.PinnedMemoryPointer)


def test_values_that_decide_what_follows_are_read_before_their_memory_is_used_again(device: cuda.CudaDevice) -> None:
    model = parse(
        """
        g (float[N, 4] x) => (float[K, 4] y) <int64[1] zero = {0}, int64[1] flat = {-1}> {
            a = Exp(x)
            at = NonZero(x)
            first = Gather <axis = 0> (at, zero)
            rows = Reshape(first, flat)
            y = Gather <axis = 0> (a, rows)
        }"""
    )
    session = Session(load_graph(model), device)
    for seed in range(3):
        x = np.random.default_rng(seed).integers(0, 2, (LARGE, 4)).astype(np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], np.exp(x)[np.nonzero(x)[0]], rtol=1e-6)


class Late(cuda.CudaDevice):
    """A GPU that is late with everything: steps are calls of its stream, which waits to be waited for."""

    def __init__(self) -> None:
        super().__init__(0)
        self._stream.prompt = False

    def compute(self, step: Step, ins: Any, outs: Any) -> Call:
        fn, args = super().compute(step, ins, outs)
        return self._stream.put, (step.label, partial(fn, *args))


@pytest.mark.parametrize("rows", [2, LARGE])
def test_what_a_segment_brings_waits_for_the_steps_of_the_one_before(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value of the first is read, so that nothing else waits: the item of a sequence goes to memory of its steps."""
    fake_cupy.install(monkeypatch)
    model = parse(
        """
        g (float[N, 4] x, seq(float[N, 4]) items) => (float[N, 4] y) <int64 zero = {0}> {
            a = Exp(x)
            b = Mul(a, x)
            c = Add(a, b)
            item = SequenceAt(items, zero)
            y = Add(c, item)
        }"""
    )
    session = Session(load_graph(model), Late())
    for seed in range(3):
        given = feeds(rows, seed)
        a = np.exp(given["x"])
        got = session.run({"x": given["x"], "items": [given["z"]]})
        np.testing.assert_allclose(got["y"], a + a * given["x"] + given["z"], rtol=1e-6)
