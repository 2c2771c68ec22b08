"""Results that the caller has let go of lend their memory to later ones; inputs that are only copied have no place."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu import results
from infera_gpu.results import LARGE, Results
from tests.text import parse

F32 = np.dtype(np.float32)
APPEND = """
    g (float[B, P, 64] past, float[B, N, 64] x) => (float[B, T, 64] present, float[B, N, 64] y) {
        y = Exp(x)
        present = Concat <axis = 1> (past, y)
    }"""


def made(pool: Results, count: int, dtype: Any = F32) -> Any:
    dtype = np.dtype(dtype)
    return pool.empty((count,), dtype, count * dtype.itemsize)


def address(a: Any) -> int:
    return int(a.__array_interface__["data"][0])


def test_memory_is_used_again_once_nobody_sees_it() -> None:
    pool = Results()
    first = made(pool, LARGE)
    at, view = address(first), first[5:7].reshape(2, 1)
    del first
    assert address(made(pool, LARGE)) != at  # a view of the first one lives
    view[...] = 3
    del view
    assert pool.nbytes >= 4 * LARGE
    again = made(pool, LARGE - 3)
    assert address(again) == at
    assert again.flags.writeable
    assert type(again) is np.ndarray


def test_small_results_and_objects_are_numpys_own() -> None:
    pool = Results()
    for array in (made(pool, 8), made(pool, LARGE, object)):
        assert array.flags.owndata
    assert not pool.nbytes


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "KEPT", 10 * LARGE)
    pool = Results()
    for n in range(4):
        kept = [made(pool, LARGE + n * 1000) for _ in range(3)]
        del kept
        assert pool.nbytes <= 10 * LARGE
    pool.clear()
    assert not pool.nbytes


def test_closing_a_session_frees_what_waits() -> None:
    session = infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"), device="cpu")
    session.run({"x": np.ones(LARGE, np.float32)})
    assert results.RESULTS.nbytes
    session.close()
    assert not results.RESULTS.nbytes


def test_threads_never_share_a_result() -> None:
    pool, failures = Results(), list[BaseException]()

    def run(n: int) -> None:
        try:
            for _ in range(300):
                mine = made(pool, LARGE)
                mine[...] = n
                assert (mine == n).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_results_that_are_kept_keep_their_values() -> None:
    session = infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"), device="cpu")
    kept = [session.run({"x": np.full(LARGE, n, np.float32)})["y"] for n in range(5)]
    assert [float(y[7]) for y in kept] == [0, -1, -2, -3, -4]


def test_inputs_that_are_only_copied_have_no_place() -> None:
    session = infera_gpu.load(parse(APPEND), device="cpu")
    rng = np.random.default_rng(0)
    for past in (rng.normal(size=(2, 7, 64)), rng.normal(size=(7, 2, 64)).transpose(1, 0, 2)):  # dense, and not
        feeds = {"past": past.astype(np.float32, order="K"), "x": rng.normal(size=(2, 1, 64)).astype(np.float32)}
        plan = session.plan_for(feeds)
        assert plan.direct == {"past"}
        assert plan.arena_bytes < 2 * feeds["past"].nbytes
        for _ in range(2):
            got = session.run(feeds)
            np.testing.assert_allclose(got["present"], np.concatenate([feeds["past"], np.exp(feeds["x"])], 1))
            feeds["past"] = feeds["past"] + 1
        alive = weakref.ref(feeds["past"])
        session.run(feeds)
        del feeds
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize("use", ["z = Identity(past)", "z = Neg(past)", "t = Shape(past) z = ConstantOfShape(t)"])
def test_inputs_that_are_read_otherwise_are_copied_in(use: str) -> None:
    text = APPEND.replace("present, float[B, N, 64] y)", "present, float[B, N, 64] y, float[B, P, 64] z)")
    model = parse(text.replace("y = Exp(x)", f"y = Exp(x) {use}"))
    feeds = {"past": np.ones((2, 3, 64), np.float32), "x": np.ones((2, 1, 64), np.float32)}
    session, plain = (infera_gpu.load(model, device="cpu", fuse=fuse) for fuse in (True, False))
    assert bool(session.plan_for(feeds).direct) == ("Shape" in use)
    for a, b in zip(session.run(feeds).values(), plain.run(feeds).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
