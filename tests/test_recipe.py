"""Bound plans told without addresses: what they tell does the same elsewhere, and reaches nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from infera_gpu.graph import HostArray
from infera_gpu.op import Call, Case, Op
from infera_gpu.ops import registry
from infera_gpu.recipe import Recipe, Surroundings, Written, followed, tell
from infera_kernels.calls import one_after_the_other
from infera_kernels.cpu.aligned import LINE, address, aligned, root_of
from infera_kernels.cpu.packed import SLACK, _elsewhere, copied, depths, inner, room
from tests.buffers import GuardedBuffers
from tests.cases import capped, run, variants, wrong

ARENA_BYTES = 1 << 24
BY_CLOSURES = {"TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "QAttention"}
"""Operators whose kernels make calls of functions that they define when they are bound."""


class Room:
    """Memory from one block, piece by piece."""

    def __init__(self, nbytes: int = ARENA_BYTES) -> None:
        self.block: HostArray = aligned((nbytes,), np.uint8)
        self._at = 0

    def take(self, nbytes: int) -> HostArray:
        start, self._at = self._at, self._at + -(-nbytes // 64) * 64
        if self._at > len(self.block):
            pytest.skip("takes more memory than the test has")
        return self.block[start : start + nbytes]

    def used(self) -> HostArray:
        return self.block[: self._at]


def nothing_together(call: Call) -> None:
    return None


def never(*args: Any) -> HostArray:
    raise AssertionError("there are no constants")


def around(arena: HostArray, direct: Mapping[str, Any] = {}) -> Surroundings:
    return Surroundings(arena, never, never, direct, one_after_the_other)


def written(recipe: Recipe) -> Recipe:
    """As it is read."""
    return Written.of(recipe).recipe()


def cases() -> list[Any]:
    return [
        pytest.param(op, case, id=f"{op.qualified}-{op.since}-{case.id}")
        for op in registry()
        for case in op.cases
        if "cpu" in op.kernels
    ]


@pytest.mark.parametrize(("op", "case"), cases())
def test_what_a_kernel_was_bound_to_is_done_elsewhere(op: Op, case: Case) -> None:
    case = capped(case, 4096)
    for site, ins in variants(op, case, "cpu"):
        memory = Room()
        io = GuardedBuffers(ins, site.outs, site.values, memory=memory.take)
        calls = list(op.kernels["cpu"].bind(site, io))
        io.prepare([wrong(out) for out in io.outs])
        recipe = tell(calls, (0, len(calls)), memory.block, (), {}, nothing_together)
        if op.name in BY_CLOSURES:
            assert recipe == Recipe([], [], [], [], [], [None])
            continue
        assert recipe.steps[0] is not None, "it makes calls that cannot be told"
        other = memory.used().copy()
        (same,) = followed(written(recipe), around(other))
        assert same is not None
        run(calls)
        run(same)
        assert np.array_equal(memory.used(), other)


def made(*calls: Call, arena: HostArray, direct: Mapping[str, Any] = {}) -> Recipe:
    return tell(calls, (0, len(calls)), arena, (), direct, nothing_together)


def test_equal_arrays_are_told_once_and_shared_memory_stays_shared() -> None:
    arena, own = np.zeros(256, np.uint8), np.zeros(8, np.float32)
    x = arena[64:96].view(np.float32)
    recipe = made(
        (np.copyto, (own[2:6], np.float32(3))),
        (np.add, (own[2:6], own[1:5], own[2:6])),
        (np.copyto, (x[:4], own[2:6])),
        arena=arena,
    )
    assert len(recipe.views) == 3
    other = np.zeros(256, np.uint8)
    (calls,) = followed(written(recipe), around(other))
    assert calls is not None
    run(calls)
    run(calls)
    assert other[64:80].view(np.float32).tolist() == [3, 6, 6, 6]
    assert not arena.any()
    assert not own.any()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::-1],
        lambda x: x.T,
        lambda x: x[1:, ::2],
        lambda x: x[:0],
        lambda x: np.broadcast_to(x[0], (3, 8)),
        lambda x: x.view((np.void, 16)),
        lambda x: x.view(np.uint8),
        lambda x: x[2, 3, ...],
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_views_of_any_form_are_told(view: Callable[[HostArray], Any], inside: bool) -> None:
    block: HostArray = np.arange(1024, dtype=np.uint8)
    source, target = block[128:256].view(np.float32).reshape(4, 8), np.zeros(1024, np.uint8)
    seen = np.asarray(view(source if inside else source.copy()))
    arena = block if inside else target
    other = arena.copy()
    ((call,),) = followed(written(made((np.ndarray.take, (seen, 0)), arena=arena)), around(other))  # type: ignore[misc]
    (again, at) = call[1]
    assert at == 0
    assert (again.shape, again.dtype, again.strides) == (seen.shape, seen.dtype, seen.strides)
    assert again.tobytes() == seen.tobytes()
    assert np.shares_memory(again, other) is (inside and seen.size > 0)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -0.0, float("nan"), float("inf"), "wrap", (1, (2, "a")), [1, 2], slice(None, 3), np.float32(0.1),
     np.int64(1 << 60), np.bool_(True), np.dtype(np.float16), np.ones((), np.float64)],
)  # fmt: skip
def test_values_are_what_they_were(value: object) -> None:
    arena = np.zeros(64, np.uint8)
    ((call,),) = followed(written(made((np.copyto, (value,)), arena=arena)), around(arena))  # type: ignore[misc]
    (again,) = call[1]
    assert type(again) is type(value)
    assert repr(again) == repr(value)


@pytest.mark.parametrize(
    "fn",
    [print, np.save, np.ndarray.tofile, np.load, lambda: None, partial(np.save, "x"), np.zeros(3).dump, open, run,
     np.frompyfunc(abs, 1, 1), np.random.default_rng(0).random, object(), {}],
)  # fmt: skip
def test_other_functions_are_not_told(fn: Any) -> None:
    arena = np.zeros(64, np.uint8)
    assert made((np.copyto, (arena, arena)), (fn, ()), arena=arena) == Recipe([], [], [], [], [], [None])
    with_it = made((np.copyto, (arena, fn)), arena=arena)
    assert with_it.steps == [None]


@pytest.mark.parametrize(
    "said",
    [
        ["numpy", "save"],
        ["numpy", "copyto\0"],
        ["ufunc", "save"],
        ["ufunc", "ndarray"],
        ["ndarray", "tofile"],
        ["method", 0, "tofile"],
        ["kernel", "os", "system"],
        ["kernel", "infera_kernels.cpu.process", "ufunc"],
        ["kernel", "infera_kernels.none", "at_all"],
        ["made", "subprocess", "run", []],
        ["made", "infera_kernels.cpu.packed", "_elsewhere", []],
        ["direct", "x"],
        ["partial", -2, [], {}],
        ["unknown"],
    ],
)
def test_other_functions_are_not_followed(said: list[Any]) -> None:
    arena = np.zeros(64, np.uint8)
    recipe = made((np.copyto, (arena, arena)), arena=arena)
    with pytest.raises((LookupError, TypeError, AttributeError, ImportError, ValueError)):
        followed(recipe._replace(values=[said]), around(arena))


@pytest.mark.parametrize(
    "view", [[0, 1, 0, 1, 0], [0, -1, 0, 1, 0], [0, 0, 2, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 9, 1, 0]]
)
def test_no_array_reaches_beyond_its_block(view: list[int]) -> None:
    arena = np.zeros(64, np.uint8)
    recipe = Recipe([["arena"]], [2], [[64], [1], [65]], [view], [["numpy", "copyto"]], [[[-1, [0, 0]]]])
    followed(recipe._replace(views=[[0, 0, 0, 1, 0]]), around(arena))
    with pytest.raises((LookupError, TypeError, ValueError)):
        followed(recipe, around(arena))


@pytest.mark.parametrize("dtype", ["O", "T", "f4,O", "V8O", "V", "V-1", 8, 99])
def test_no_array_is_of_objects(dtype: str | int) -> None:
    arena = np.zeros(64, np.uint8)
    recipe = Recipe([["arena"]], [dtype], [[1], [8]], [[0, 0, 0, 1, 0]], [["ufunc", "negative"]], [[[-1, [0, 0]]]])
    with pytest.raises((LookupError, TypeError, ValueError)):
        followed(recipe, around(arena))


def test_what_lies_within_another_is_told_as_what_holds_all_of_it() -> None:
    whole = np.arange(64, dtype=np.uint8)
    held = [("outer", "", whole), ("inner", "", whole[8:16])]
    calls = [(np.copyto, (whole[12:40], whole[9:11]))]
    recipe = tell(calls, (0, 1), np.zeros(64, np.uint8), held, {}, nothing_together)
    assert recipe.blocks == [["constant", "outer"], ["constant", "inner"]]
    assert [view[:2] for view in recipe.views] == [[0, 12], [1, 1]]


def test_steps_are_told_after_one_that_cannot_be() -> None:
    arena, own = np.zeros(64, np.uint8), np.full(4, 7, np.float32)
    x = arena[:16].view(np.float32)
    calls: list[Call] = [(np.copyto, (x, own)), (print, ()), (np.add, (x, own, x)), (np.copyto, (x[:1], own[1:2]))]
    recipe = tell(calls, (0, 2, 3, 4), arena, (), {}, nothing_together)
    assert recipe.steps[0] is None
    other = np.zeros(64, np.uint8)
    _, second, third = followed(written(recipe), around(other))
    assert second is not None
    assert third is not None
    run([*second, *third])
    assert other[:16].view(np.float32).tolist() == [7, 7, 7, 7]


def test_windows_of_a_buffer_share_it() -> None:
    arena = np.zeros(64, np.uint8)
    room, y = np.zeros(8, np.float32), arena[:32].view(np.float32)
    windows = as_strided(room, (6, 3), (4, 4))
    calls: list[Call] = [(np.copyto, (room[1:7], np.float32(1))), (np.add.reduce, (windows, 1, None, y[:6]))]
    recipe = tell(calls, (0, 2), arena, (), {}, nothing_together)
    assert [block[0] for block in recipe.blocks] == ["own", "arena"]
    other = np.zeros(64, np.uint8)
    (made,) = followed(written(recipe), around(other))
    run(calls)
    run(made or ())
    assert arena.any()
    assert np.array_equal(arena, other)


def test_what_kernels_made_has_the_room_behind_it_that_loops_look_into() -> None:
    arena, own = np.zeros(64, np.uint8), aligned((3, 5))
    own[...] = 1
    ((call,),) = followed(written(made((np.copyto, (own, own)), arena=arena)), around(arena))  # type: ignore[misc]
    (again, _) = call[1]
    for array in (again, copied(own)):
        root = root_of(array)
        assert address(array) % LINE == 0
        assert address(root) + root.nbytes - address(array) >= own.nbytes + 4 * SLACK


def product() -> tuple[Any, ...]:
    """What a product by address is bound to: ranges, weights, sums, room, a factor, the first column."""
    m, k, n = 9, 300, 40
    x, w, y = np.ones((m, k), np.float32), aligned((k, n), slack=4 * SLACK), np.zeros((m, n), np.float32)
    w[...] = 0
    ranges = tuple([(x[:, start:stop],) for start, stop in pairwise(depths(k))])
    return ranges, w, y, room(m, k, aligned), 1.0, 0


def other_array(i: int, change: Callable[[HostArray], HostArray]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda given: (*given[:i], change(given[i]), *given[i + 1 :])


@pytest.mark.parametrize(
    "change",
    [
        lambda given: ((), *given[1:]),
        lambda given: (given[0] * 2, *given[1:]),
        lambda given: (((given[0][0][0][:5],), *given[0][1:]), *given[1:]),
        lambda given: ((((*given[0][0], *given[0][0])), *given[0][1:]), *given[1:]),
        lambda given: (((given[0][0][0].astype(np.float64),), *given[0][1:]), *given[1:]),
        lambda given: (((given[0][0][0][:, ::2],), *given[0][1:]), *given[1:]),
        lambda given: (*given[:5], 1),
        lambda given: (*given[:5], -1),
        other_array(1, lambda w: w[:100]),
        other_array(1, lambda w: w[:, :20]),
        other_array(1, lambda w: np.broadcast_to(w[0], w.shape)),
        other_array(1, lambda w: w.reshape(-1)),
        other_array(1, lambda w: w.view(np.int32)),
        other_array(2, lambda y: y.T),
        other_array(2, lambda y: np.repeat(y, 2, 1)),
        other_array(2, lambda y: np.repeat(y, 2, 0)),
        other_array(2, lambda y: y[:, ::2]),
        other_array(3, lambda r: r[:SLACK]),
        other_array(3, lambda r: r[:4]),
        other_array(3, lambda r: np.broadcast_to(r[:1], r.shape)),
    ],
)
def test_a_product_by_address_is_refused_arrays_that_do_not_suit(
    change: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> None:
    if inner() is None:
        pytest.skip("there are no loops that are known")
    _elsewhere(*product())()
    with pytest.raises(ValueError, match=r"suit|write"):
        _elsewhere(*change(product()))
