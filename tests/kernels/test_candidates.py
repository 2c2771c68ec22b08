"""What is bound ahead of tuning is what tuning launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("triton")

from infera_gpu.bind import Bound
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.loader import load_graph
from infera_gpu.op import Call
from infera_gpu.session import Session
from infera_gpu.tuning import bind_candidates
from infera_kernels.launch import Launch, LaunchError
from infera_kernels.tuning import Tuned
from tests.kernels.test_tuning import Timer, launches, tile
from tests.text import parse

pytestmark = pytest.mark.kernels

DEEP = {"x": np.ones((32, 4096), np.float16)}


def deep() -> Session:
    """Of a product whose sums are cut into parts, each number of which asks for tiles of its own."""
    made = parse("g (float16[N, 4096] x) => (float16[N, 64] y) { y = MatMul (x, w) }")
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4096, 64), np.float16), "w"))
    return Session(load_graph(made), RecordingDevice())


def bound_of(session: Session) -> Bound:
    session.reserve(DEEP)
    (lease,) = session._leases.values()
    (bound,) = lease._bound.values()
    return bound


def tuned_of(session: Session) -> Tuned:
    assert session.device.tuned is not None
    return session.device.tuned


def ways(found: list[Launch]) -> set[tuple[Any, ...]]:
    return {(a.kernel, a.grid, tuple(sorted((k, str(v)) for k, v in a.constexprs.items()))) for a in found}


def ahead(session: Session) -> set[tuple[Any, ...]]:
    """What is bound for candidates, by kernel, grid and constants."""
    bound, found = bound_of(session), list[Call]()

    def launch(*args: Any, **options: Any) -> Call:
        found.append(usual(*args, **options))
        return found[-1]

    usual = session.device.launcher.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.device.launcher, "launch", launch)
        made = bind_candidates(bound, tuned_of(session))
    bindings = ways(launches(found))
    assert made >= sum(kernel == "matmul_kernel" for kernel, *_ in bindings) - 1
    return bindings


def quickest(parts: int, *wanted: int) -> Callable[[Launch], float]:
    def seconds(launch: Launch) -> float:
        if launch.kernel != "matmul_kernel":
            return 0.0
        return (1e-6 if launch.grid[1] == parts else 2e-6) + (0.0 if tile(launch) == wanted else 5e-7)

    return seconds


@pytest.mark.parametrize("parts", [1, 4, 16])
def test_whatever_is_fastest_all_that_a_tuner_tries_is_bound(parts: int) -> None:
    session, timed = deep(), list[Launch]()
    found = ahead(session)
    usual = Timer(quickest(parts, 32, 64, 64))

    def timer(calls: Any) -> float:
        timed.extend(launches(calls))
        return usual(calls)

    session.tune(DEEP, timer=timer)
    assert len(ways(timed)) > 10
    assert ways(timed) <= found


def test_what_is_measured_is_not_tried() -> None:
    session = deep()
    before = ahead(session)
    session.tune(DEEP, timer=Timer(quickest(4, 32, 64, 64)))
    after = ahead(session)
    assert after < before
    assert {grid[1] for kernel, grid, _ in after if kernel == "matmul_kernel"} == {4}
    assert bind_candidates(bound_of(session), tuned_of(session)) == 0


def test_candidates_that_cannot_be_bound_are_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    session = deep()
    bound, usual, refused = bound_of(session), session.device.launcher.launch, list[int]()

    def launch(kernel: Any, grid: Any, args: Any, constexprs: Any, **options: Any) -> Any:
        if constexprs.get("BM") == 64:
            refused.append(1)
            raise LaunchError("too large")
        return usual(kernel, grid, args, constexprs, **options)

    monkeypatch.setattr(session.device.launcher, "launch", launch)
    assert bind_candidates(bound, tuned_of(session)) > len(refused) > 0
