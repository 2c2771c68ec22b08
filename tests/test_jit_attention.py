"""Attention that numba compiles, on plain arrays against the definition in float64: awkward shapes, poisoned scratch,
parts in any order.

The operator runs it on its own cases in tests/test_ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from infera_gpu.devices import processes
from infera_gpu.devices.processes import Processes
from infera_gpu.devices.sending import Region
from infera_gpu.op import Case
from infera_gpu.ops.fused_attention import OPS
from infera_kernels import jit
from tests.cases import site_of
from tests.test_processes import array, in_turn, made, pool, ready, until

if not jit.installed():
    pytest.skip("needs numba: pip install 'infera-gpu[jit]'", allow_module_level=True)

from infera_kernels.jit.attention import attention
from tests.test_jit import backwards, normal, poisoned, run

__all__ = ["pool"]

Array = np.ndarray[Any, np.dtype[Any]]

SIZES = (1, 11, 12, 13, 100)
INFINITY = np.float32(np.inf)


def reference(q: Array, kt: Array, v: Array, masks: Any = (), scale: float = 0.3) -> Array:
    scores = scale * (q.astype(np.float64) @ kt)
    for mask in masks:
        scores = scores + mask
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        made: Array = (weights / weights.sum(-1, keepdims=True)) @ v
    return made


def attend(q: Array, kt: Array, v: Array, out: Array, **options: Any) -> Array:
    """`out`, after its parts ran the last first."""
    first, parts = attention(q, kt, v, out, poisoned, **{"scale": 0.3, **options})
    run([*first, *backwards(parts)])
    return out


def close(got: Array, want: Array) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (4, 33), (33, 4), (64, 64), (1, 64)])
def test_sizes(m: int, n: int, d: int, e: int) -> None:
    """Keys lie query by query or, swapped, as the product reads them, results with their heads last."""
    q, k, v = normal(2, 3, m, d), normal(2, 3, n, d, seed=1), normal(2, 3, n, e, seed=2)
    kt, mask = k.swapaxes(-1, -2), normal(2, 1, 1, n, seed=3)
    want = reference(q, kt, v, [mask])
    for keys in (kt, np.ascontiguousarray(kt)):
        for parts in (1, 4):
            wide = poisoned((2, m, 3, e + 5))
            close(attend(q, keys, v, wide[..., 2:-3].swapaxes(1, 2), masks=[mask], parts=parts), want)
            assert np.isnan(np.delete(wide, range(2, e + 2), axis=-1)).all(), "written beside the result"


@pytest.mark.parametrize("shapes", [(), ((),), ((1,),), ((13, 1),), ((2, 1, 1, 37),), ((3, 13, 37),), ((13, 37),)])
@pytest.mark.parametrize("more", [(), ((1, 3, 1, 37),), ((2, 1, 13, 1),)])
def test_masks(shapes: tuple[tuple[int, ...], ...], more: tuple[tuple[int, ...], ...]) -> None:
    q, k, v = normal(2, 3, 13, 8), normal(2, 3, 37, 8, seed=1), normal(2, 3, 37, 9, seed=2)
    masks = [np.asarray(normal(*shape, seed=3 + i)) for i, shape in enumerate((*shapes, *more))]
    got = attend(q, k.swapaxes(-1, -2), v, poisoned((2, 3, 13, 9)), masks=masks, parts=2)
    close(got, reference(q, k.swapaxes(-1, -2), v, masks))


def test_masks_of_any_strides() -> None:
    q, k, v = normal(2, 3, 13, 8), normal(2, 3, 37, 8, seed=1), normal(2, 3, 37, 9, seed=2)
    turned, wide = normal(37, 13, seed=3).T, normal(2, 3, 13, 80, seed=4)[..., 2:76:2]
    for mask in (turned, wide, np.broadcast_to(normal(3, 1, 1, seed=5), (3, 13, 37))):
        got = attend(q, k.swapaxes(-1, -2), v, poisoned((2, 3, 13, 9)), masks=[mask])
        close(got, reference(q, k.swapaxes(-1, -2), v, [mask]))


def test_operands_of_any_strides() -> None:
    """Steps along every axis, or backwards."""
    q, k, v = normal(2, 3, 26, 16)[:, ::-1, ::2, ::2], normal(2, 3, 74, 16)[..., ::2, ::-2], normal(2, 3, 37, 18)
    for values in (v[..., ::2], v[..., ::-1, 9:], np.asfortranarray(v[..., 9:])):
        got = attend(q, k.swapaxes(-1, -2), values, poisoned((2, 3, 13, 9)))
        close(got, reference(q, k.swapaxes(-1, -2), values))


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_leading_axes_broadcast(parts: int) -> None:
    """Keys for several heads of queries, values for all, a batch of one: as axes of one and of strides of 0."""
    q, k, v = normal(2, 2, 3, 13, 8), normal(2, 2, 1, 37, 8, seed=1), normal(1, 2, 1, 37, 9, seed=2)
    kt = k.swapaxes(-1, -2)
    want, shape = reference(q, kt, v), (2, 2, 3, 13, 9)
    close(attend(q, kt, v, poisoned(shape), parts=parts), want)
    keys, values = (np.broadcast_to(x, (2, 2, 3, *x.shape[-2:])) for x in (kt, v))
    close(attend(q, keys, values, poisoned(shape), parts=parts), want)
    close(attend(q[0, 0, 0], kt[0, 0, 0], v[0, 0, 0], poisoned((13, 9)), parts=parts), want[0, 0, 0])
    mask = normal(2, 2, 1, 13, 37, seed=3)
    one = q[:, :, :1]
    close(attend(one, kt, v, poisoned((2, 2, 1, 13, 9)), masks=[mask], parts=parts), reference(one, kt, v, [mask]))


@pytest.mark.parametrize("zero", ["", "nan", "unseen"])
def test_rows_without_weights(zero: str) -> None:
    """Query 0 sees no key, 1 some, 2 has scores that are NaN beside unseen keys, 3 one that is infinite."""
    q, k, v = normal(1, 1, 20, 8), normal(1, 1, 37, 8, seed=1), normal(1, 1, 37, 9, seed=2)
    mask = np.zeros((20, 37), np.float32)
    mask[0] = mask[1, 5:] = mask[2, 1:] = -INFINITY
    mask[2, 0], mask[3, 7] = np.nan, INFINITY
    kt = k.swapaxes(-1, -2)
    with np.errstate(invalid="ignore"):
        want = reference(q, kt, v, [mask])
    lost = {"": [], "nan": [0, 2, 3], "unseen": [0]}[zero]
    want[..., lost, :] = 0
    v[..., 0, 0] = np.nan  # times a weight of 0, but for the rows that are 0
    want[..., 0] = np.nan
    want[..., lost, 0] = 0
    close(attend(q, kt, v, poisoned((1, 1, 20, 9)), masks=[mask], zero=zero), want)


def test_a_nan_stays_in_its_row() -> None:
    q, k, v = normal(1, 2, 20, 8), normal(1, 2, 37, 8, seed=1), normal(1, 2, 37, 9, seed=2)
    q[0, 1, 7, 3] = np.nan
    got = attend(q, k.swapaxes(-1, -2), v, poisoned((1, 2, 20, 9)))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(q).any(-1, keepdims=True).repeat(9, -1))


def test_scores_far_apart_and_far_out() -> None:
    """Weights that vanish, and scores that would overflow as powers."""
    q, k, v = 40 * normal(1, 1, 20, 8), 40 * normal(1, 1, 37, 8, seed=1), normal(1, 1, 37, 9, seed=2)
    got = attend(q, k.swapaxes(-1, -2), v, poisoned((1, 1, 20, 9)))
    np.testing.assert_allclose(got, reference(q, k.swapaxes(-1, -2), v), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("m", "n"), [(700, 70), (70, 700), (300, 500)])
def test_several_blocks_of_queries(m: int, n: int) -> None:
    q, k, v = normal(1, 1, m, 16), normal(1, 1, n, 16, seed=1), normal(1, 1, n, 40, seed=2)
    mask = normal(m, n, seed=3)
    for parts in (1, 2, 5):
        first, made = attention(
            q, k.swapaxes(-1, -2), v, out := poisoned((1, 1, m, 40)), poisoned, scale=0.3, masks=[mask], parts=parts
        )
        assert len(made) == parts
        run([*first, *backwards(made)])
        close(out, reference(q, k.swapaxes(-1, -2), v, [mask]))


@pytest.mark.parametrize(
    ("queries", "keys", "attrs", "chosen"),
    [
        (128, 128, {}, "jit"),
        (16, 4000, {}, "jit"),
        (8, 190, {}, "jit"),
        (8, 255, {}, "cpu"),
        (1, 20, {}, "cpu"),
        (128, 128, {"cap": 2.0}, "cpu"),
    ],
)
def test_where_packing_keys_pays(queries: int, keys: int, attrs: dict[str, Any], chosen: str) -> None:
    operands = normal(1, 2, queries, 4), normal(1, 2, 4, keys), normal(1, 2, keys, 6)
    site = site_of(OPS[0], Case("", (), attrs), operands)
    kernels = {kind: OPS[0].kernels[kind] for kind in ("jit", "cpu")}
    assert next(kind for kind, kernel in kernels.items() if kernel.supports(site) and kernel.pays(site)) == chosen


@pytest.mark.parametrize(("columns", "chosen"), [(37, "jit"), (1, "cpu")])
def test_masks_of_one_column_are_not_copied_to_the_size_of_the_scores(columns: int, chosen: str) -> None:
    operands = normal(1, 2, 20, 4), normal(1, 2, 4, 37), normal(1, 2, 37, 6), normal(1, 2, 20, columns)
    site = site_of(OPS[0], Case("", ()), operands)
    kernels = {kind: OPS[0].kernels[kind] for kind in ("jit", "cpu")}
    assert next(kind for kind, kernel in kernels.items() if kernel.supports(site)) == chosen


def test_two_masks_are_not_added_up_beforehand() -> None:
    """Their sum has the size of all scores."""
    taken: list[int] = []

    def scratch(shape: Sequence[int], dtype: Any = np.float32) -> Array:
        taken.append(math.prod(shape))
        return poisoned(shape, dtype)

    q, k, v = normal(4, 6, 50, 8), normal(4, 6, 40, 8, seed=1), normal(4, 6, 40, 9, seed=2)
    masks = [normal(1, 6, 50, 40, seed=3), normal(4, 1, 1, 40, seed=4)]
    first, made = attention(
        q, k.swapaxes(-1, -2), v, out := poisoned((4, 6, 50, 9)), scratch, scale=0.3, masks=masks, parts=1
    )
    assert not first
    assert max(taken) < 50 * 100
    run(backwards(made))
    close(out, reference(q, k.swapaxes(-1, -2), v, masks))


@pytest.mark.skipif(bool(processes.unavailable()), reason=processes.unavailable())
def test_worker_processes_are_told(pool: Processes) -> None:
    """A mask that is a small constant goes along, without its strides."""
    ready(pool)
    q, k, v, out = (array(pool, (2, 3, rows, 8), np.float32) for rows in (13, 37, 37, 13))
    for i, x in enumerate((q, k, v)):
        x[...] = normal(*x.shape, seed=i)
    mask = normal(13, 40, seed=3)[:, 3:]
    scratch = partial(array, pool)
    first, parts = attention(q, k.swapaxes(-1, -2), v, out, scratch, scale=0.3, masks=[mask], parts=2)
    assert not first
    region = Region(parts, 2, in_turn)
    until(lambda: bool(made(pool, region).sent) and all(w.ready for w in pool.workers))
    out[...] = 0
    pool.run(region)
    close(out, reference(q, k.swapaxes(-1, -2), v, [mask]))
