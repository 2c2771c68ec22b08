"""What makes room under a `vram_limit`, and what is left as it was where there is none."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

import infera_gpu
from infera_gpu import lease
from infera_gpu.bind import bind
from infera_gpu.budget import VramBudget
from infera_gpu.devices import cuda
from infera_gpu.errors import OutOfMemoryError
from tests import fake_cupy
from tests.text import parse

SIZE = 1 << 14
UNIT = 4 * SIZE
"""Bytes of one value of SIZE."""

COUNTED = parse(
    """
    g (float[N, S] x) => (float[N, S] y) <int64 one = {1}, int64 zero = {0}> {
        s = Shape(x)
        n = Gather <axis = 0> (s, one)
        r = Range(zero, n, one)
        f = Cast <to = 1> (r)
        y = Mul(x, f)
    }"""
)
"""Each size of its own has a constant of its own, as large as the input, which is uploaded with what is bound to it."""

KEPT = parse(
    """
    g (float[N] x, bool[M] c) => (float[K] y) {
        e = Exp(x)
        k = Compress(e, c)
        kk = Concat <axis = 0> (k, k)
        y = Neg(kk)
    }"""
)
"""Two segments: how much Compress keeps is known when it has run."""


def row(n: int = SIZE) -> dict[str, np.ndarray]:
    return {"x": np.ones((1, n), np.float32)}


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_cupy.install(monkeypatch)


@pytest.fixture
def kernels(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA device with kernels that do nothing."""
    from infera_kernels.launch import RecordingLauncher

    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    monkeypatch.setattr(cuda.CudaDevice, "launcher", property(lambda _: RecordingLauncher(forgets=True)))
    return cupy


@pytest.mark.parametrize("second", [SIZE - 64, SIZE + SIZE // 8])
@pytest.mark.parametrize("device", ["recording", pytest.param("cuda", marks=pytest.mark.kernels)])
def test_what_one_shape_is_bound_with_makes_room_for_another(device: str, second: int, kernels: Any) -> None:
    budget = VramBudget(7 * UNIT // 2)
    with infera_gpu.load(COUNTED, device=device, vram_limit=budget) as session:
        assert [a.nbytes for a in session.plan_for({"x": (1, SIZE)}).constants.values()] == [UNIT]
        for n in (SIZE, second, SIZE, second):
            assert session.run(row(n))["y"].shape == (1, n)
        assert budget.used <= budget.limit
    del session
    gc.collect()
    assert budget.used == 0


@pytest.mark.parametrize("device", ["recording", pytest.param("cuda", marks=pytest.mark.kernels)])
def test_what_is_reserved_already_takes_nothing_again(device: str, kernels: Any) -> None:
    budget = VramBudget(7 * UNIT // 2)
    with infera_gpu.load(COUNTED, device=device, vram_limit=budget) as session:
        first = session.reserve({"x": (1, SIZE)})
        used = budget.used
        assert session.reserve({"x": (1, SIZE)}) == first
        assert budget.used == used


@pytest.mark.kernels
def test_arrays_on_the_gpu_are_copied_where_there_is_no_room_to_bind_to_them(kernels: Any) -> None:
    for units, more in ((20, 1), (3.5, 0)):
        budget = VramBudget(int(units * UNIT))
        with infera_gpu.load(COUNTED, device="cuda", vram_limit=budget) as session:
            memory = kernels.cuda.MemoryPointer(kernels.cuda.Memory(UNIT), 0)
            x = kernels.ndarray((1, SIZE), np.dtype(np.float32), memory)
            session.run({"x": x})
            once = budget.used
            for _ in range(3):
                session.run({"x": x})
            assert budget.used == once + more * UNIT
        del session
        gc.collect()


def test_the_arena_of_one_segment_goes_before_the_next_one_takes_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    most = [0]
    take = VramBudget.take

    def noted(budget: VramBudget, what: str, nbytes: int) -> None:
        take(budget, what, nbytes)
        most[0] = max(most[0], budget.used)

    monkeypatch.setattr(VramBudget, "take", noted)
    feeds = {"x": np.zeros(SIZE, np.float32), "c": np.ones(SIZE, bool)}
    with infera_gpu.load(KEPT, device="recording", vram_limit=20 * UNIT) as session:
        session.run(feeds)
        arena = session._arena.nbytes
        assert most[0] < arena + UNIT
    with infera_gpu.load(KEPT, device="recording", vram_limit=arena + UNIT // 8) as session:
        for _ in range(2):
            assert session.run(feeds)["y"].shape == (2 * SIZE,)


def test_weights_are_there_once_after_reserving_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.ones((64, 64), np.float32)
    product = parse("g (float[N, 64] x, float[64, 64] w) => (float[N, 64] y) { y = MatMul(x, w) }")
    del product.graph.input[1]
    product.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    large = parse("g (float[N, 64] x) => (float[64, N] y) { e = Exp(x) y = Transpose(e) }")
    budget, arena = VramBudget("64MiB"), infera_gpu.Arena()
    other = infera_gpu.load(large, device="recording", arena=arena, vram_limit=budget)
    other.run({"x": np.zeros((512, 64), np.float32)})  # the arena that both have is large enough from now on
    before = budget.used
    session = infera_gpu.load(product, device="recording", arena=arena, vram_limit=budget)
    calls = [0]

    def failing(*given: Any, **how: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise OutOfMemoryError("another process took it", needed=1, available=0)
        return bind(*given, **how)

    monkeypatch.setattr(lease, "bind", failing)
    with pytest.raises(OutOfMemoryError, match="another process took it"):
        session.reserve({"x": (1, 64)}, {"x": (2, 64)})
    gc.collect()
    assert budget.used == before
    for n in (1, 3):
        session.run({"x": np.ones((n, 64), np.float32)})
    assert budget.used - before == weight.nbytes
