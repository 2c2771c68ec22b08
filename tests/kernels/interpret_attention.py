"""Attention in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from infera_kernels.launch import InterpreterLauncher
from tests.kernels.references import F32, ids
from tests.kernels.support import BFLOAT16, FLOATS, Array, Guarded, assert_close, execute, random

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import attention as a
from infera_kernels.triton.attention_kernels import attention_kernel, combine_kernel

pytestmark = pytest.mark.kernels

ERROR = 2e-6


def reference(
    q: Array,
    k: Array,
    v: Array,
    options: a.Options,
    masks: tuple[Array, ...] = (),
    condition: Array | None = None,
    lengths: Array | None = None,
    sink: Array | None = None,
) -> Array:
    """The definition, in float64, one full matrix of scores at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    s = options.scale * (q @ k.swapaxes(-1, -2))
    if options.cap:
        s = options.cap * np.tanh(s / options.cap)
    if condition is not None:
        holds = (condition == 0) if options.hidden else (condition != 0)
        s = np.where(holds, s, s + options.fill if options.added else options.fill)
    for mask in masks:
        s = s + mask.astype(np.float64)
    m, n = s.shape[-2:]
    at, before = np.arange(n), np.asarray(options.before)
    if lengths is not None:
        counts = lengths.astype(np.int64) + options.more
        s = np.where(at < counts, s, -np.inf)
        before = np.maximum(counts - m, before) if options.from_end else before
    place = np.arange(m)[:, None] + before
    if options.right is not None:
        later = at > place + options.right
        s = np.where(later, -np.inf if options.ahead is None else s + options.ahead, s)
    if options.left is not None:
        s = np.where(at < place - options.left, -np.inf, s)
    top = s.max(-1, keepdims=True)
    if sink is not None:
        top = np.maximum(top, sink.astype(np.float64))
    unseen = np.isneginf(top)
    with np.errstate(all="ignore"):
        w = np.exp(s - top)
        total = w.sum(-1, keepdims=True) + (0 if sink is None else np.exp(sink.astype(np.float64) - top))
        y = (w / total) @ v
    if options.zero == "unseen":
        y = np.where(unseen, 0, y)
    if options.zero == "nan":
        y = np.where(np.isnan(total), 0, y)
    return np.asarray(y)


class Scratch:
    """Temporaries full of NaN, which nobody may read before they are written."""

    def __init__(self) -> None:
        self.given: list[Guarded] = []

    def __call__(self, shape: Any, dtype: Any = np.float32) -> Array:
        self.given.append(Guarded(shape, dtype))
        made: Array = self.given[-1].array
        return made


def attend(
    interpreter: InterpreterLauncher,
    q: Array,
    k: Array,
    v: Array,
    options: a.Options,
    *,
    out: Guarded | None = None,
    **operands: Any,
) -> Any:
    """Runs the kernel, holds it against the reference, and gives what the first launch was."""
    shape = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    out = out or Guarded((*shape, q.shape[-2], v.shape[-1]), q.dtype)
    scratch = Scratch()
    given = {**operands, "masks": list(operands.get("masks", ()))}
    execute(a.attention(q, k, v, out.array, interpreter, scratch, options, **given))
    assert_close(out, reference(q, k, v, options, **operands), error=ERROR)
    assert [g.array.shape for g in scratch.given] == list(a.attention_scratch(q, k, v, out.array))
    for g in scratch.given:
        g.check_guards()
    first, *rest = interpreter.launches
    assert first.kernel == attention_kernel.__name__
    assert [x.kernel for x in rest] == [combine_kernel.__name__] * (first.constexprs["SPLITS"] > 1)
    return first


def heads(
    m: int, n: int, d: int, dtype: Any, e: int | None = None, lead: tuple[int, ...] = (2,)
) -> tuple[Array, Array, Array]:
    """q, k and v"""
    q, k, v = (*lead, m, d), (*lead, n, d), (*lead, n, e or d)
    return random(q, dtype), random(k, dtype, seed=1), random(v, dtype, seed=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("size", [8, 40, 64, 80, 128, 256])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 65), (65, 17)], ids=str)
def test_lengths_and_sizes(m: int, n: int, size: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    launch = attend(interpreter, *heads(m, n, size, dtype, lead=(1,)), a.Options(scale=size**-0.5))
    assert launch.constexprs["EXP2"]
    assert launch.constexprs["CHECKED"]
    assert launch.constexprs["FREE"] == (n >= launch.constexprs["BN"])
    depth = launch.constexprs["DEPTH"]
    assert launch.constexprs["D_PADDED"] == -(-size // depth) * depth
    assert depth in ((16, 32) if dtype == F32 and m > 1 else (max(16, 1 << (size - 1).bit_length()),))
    assert launch.constexprs["BM"] == (1 if dtype == F32 and m == 1 else 16)


@pytest.mark.parametrize(("m", "dtype"), [(1, F32), (5, F32), (5, BFLOAT16)], ids=str)
def test_the_widest_heads(m: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    launch = attend(interpreter, *heads(m, 20, 300, dtype, e=500, lead=()), a.Options(scale=0.05))
    assert launch.constexprs["E_PADDED"] == 512


def test_whole_blocks_are_not_checked(interpreter: InterpreterLauncher) -> None:
    launch = attend(interpreter, *heads(33, 128, 16, F32, e=24), a.Options(scale=0.3))
    assert launch.constexprs["FREE"]
    assert not launch.constexprs["CHECKED"]


@pytest.mark.parametrize("before", [0, 7, 64])
@pytest.mark.parametrize("n", [33, 129])
def test_causal_with_past(n: int, before: int, interpreter: InterpreterLauncher) -> None:
    launch = attend(interpreter, *heads(65, n, 16, F32), a.Options(right=0, before=before, zero="unseen"))
    assert launch.args["right"] == 0
    assert launch.constexprs["FREE"] == (n >= launch.constexprs["BN"])


@pytest.mark.parametrize(("left", "right"), [(3, None), (0, 0), (5, 2), (None, 40), (200, 1)], ids=str)
def test_windows(left: int | None, right: int | None, interpreter: InterpreterLauncher) -> None:
    attend(interpreter, *heads(65, 90, 16, F32), a.Options(left=left, right=right, before=4, zero="unseen"))


def test_queries_before_the_first_key_see_nothing(interpreter: InterpreterLauncher) -> None:
    attend(interpreter, *heads(20, 9, 8, F32), a.Options(right=0, before=-5, zero="unseen"))
    interpreter.launches.clear()
    attend(interpreter, *heads(20, 9, 8, F32), a.Options(right=0, before=-5))


@pytest.mark.parametrize("zero", ["", "nan", "unseen"])
@pytest.mark.parametrize("shape", [(17, 33), (1, 33), (2, 1, 1, 33), (1, 3, 17, 1), (2, 3, 17, 33), (33,)], ids=str)
def test_masks_of_any_shape(shape: tuple[int, ...], zero: Any, interpreter: InterpreterLauncher) -> None:
    q, k, v = heads(17, 33, 8, F32, lead=(2, 3))
    mask = random(shape, F32, seed=7)
    mask[random(shape, F32, seed=8) < -0.5] = -np.inf
    if mask.ndim > 1:
        mask[..., :1, :] = -np.inf
    launch = attend(interpreter, q, k, v, a.Options(scale=0.5, zero=zero), masks=(mask,))
    assert not launch.constexprs["EXP2"]


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_everything_at_once(dtype: Any, interpreter: InterpreterLauncher) -> None:
    q, k, v = heads(19, 70, 24, dtype, e=40, lead=(2, 3))
    options = a.Options(scale=0.4, cap=1.5, fill=-3.0, hidden=True, right=0, before=51, ahead=-2.0)
    first, second = random((2, 1, 19, 70), F32, seed=4), random((3, 1, 70), dtype, seed=5)
    condition = random((1, 3, 1, 70), F32, seed=6) < 0
    launch = attend(interpreter, q, k, v, options, masks=(first, second), condition=condition)
    assert not launch.constexprs["FREE"]


def test_the_lowest_finite_masks_leave_even_weights(interpreter: InterpreterLauncher) -> None:
    lowest = np.finfo(np.float32).min
    q, k, v = heads(5, 40, 8, F32)
    attend(interpreter, q, k, v, a.Options(), masks=(np.full((5, 40), lowest, np.float32),))
    interpreter.launches.clear()
    attend(interpreter, q, k, v, a.Options(fill=float(lowest)), condition=np.zeros((5, 40), np.bool_))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.bool_])
def test_padding_that_is_added(dtype: Any, interpreter: InterpreterLauncher) -> None:
    seen = (np.arange(50) < np.array([30, 50])[:, None])[:, None, None].astype(dtype)
    attend(interpreter, *heads(9, 50, 8, F32, lead=(2, 3)), a.Options(fill=-1e4, added=True), condition=seen)


@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BFLOAT16], ids=ids)
def test_heads_that_share_keys_are_rows(m: int, n: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    q, mask = random((2, 2, 4, m, 16), dtype), random((2, 1, 4, m, n), dtype, seed=3)
    k, v = (random((2, 2, 1, n, 16), dtype, seed=i) for i in (1, 2))
    launch = attend(interpreter, q, k, v, a.Options(right=0, before=n - m), masks=(mask,))
    assert launch.constexprs["PACKED"]
    assert launch.args["rows"] == 4 * m
    assert launch.constexprs["SPLITS"] == (3 if n == 600 else 1)


def test_many_queries_of_shared_heads_are_not_packed(interpreter: InterpreterLauncher) -> None:
    q, k, v = random((2, 4, 40, 8), F32), random((2, 1, 9, 8), F32, seed=1), random((2, 1, 9, 8), F32, seed=2)
    assert not attend(interpreter, q, k, v, a.Options()).constexprs["PACKED"]


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize("n", [30, 700])
def test_lengths_of_their_own(n: int, from_end: bool, interpreter: InterpreterLauncher) -> None:
    lengths = np.array([n - 1, 3, n // 2], np.int32).reshape(-1, 1, 1, 1)
    options = a.Options(right=0, before=-99, more=1, from_end=from_end, zero="unseen")
    options = options if from_end else a.Options(more=1)
    q, k, v = heads(5, n, 16, F32, lead=(3, 2))
    k[1, :, 4:], v[1, :, 4:] = np.nan, np.nan  # never read
    out = Guarded((3, 2, 5, 16), F32)
    execute(a.attention(q, k, v, out.array, interpreter, Scratch(), options, lengths=lengths))
    k[1, :, 4:], v[1, :, 4:] = 0, 0
    assert_close(out, reference(q, k, v, options, lengths=lengths), error=ERROR)
    assert interpreter.launches[0].constexprs["SPLITS"] == (3 if n == 700 else 1)


@pytest.mark.parametrize("n", [30, 300])
def test_sinks(n: int, interpreter: InterpreterLauncher) -> None:
    q, k, v = heads(3, n, 16, F32, lead=(2, 3))
    sink = random((3, 1, 1), F32, seed=5)
    attend(interpreter, q, k, v, a.Options(zero="unseen"), sink=sink)


def test_splits_of_rows_that_see_little(interpreter: InterpreterLauncher) -> None:
    """Most parts are empty; a row that sees nothing is 0."""
    q, k, v = heads(4, 1030, 8, F32, lead=(1,))
    launch = attend(interpreter, q, k, v, a.Options(right=0, before=-1, zero="unseen"))
    assert launch.constexprs["SPLITS"] == 5


def test_windows_into_one_projection(interpreter: InterpreterLauncher) -> None:
    """q, k and v are columns of one matrix, and the result goes straight to (batch, sequence, heads x size)."""
    merged = random((2, 21, 3 * 4 * 8), F32)
    q, k, v = (merged[..., i * 32 : (i + 1) * 32].reshape(2, 21, 4, 8).swapaxes(1, 2) for i in range(3))
    out = Guarded((2, 21, 32), F32)
    y = out.array.reshape(2, 21, 4, 8).swapaxes(1, 2)
    execute(a.attention(q, k, v, y, interpreter, Scratch(), a.Options(scale=0.3)))
    want = reference(q, k, v, a.Options(scale=0.3)).swapaxes(1, 2).reshape(2, 21, 32)
    assert_close(out, want, error=ERROR)
    (launch,) = interpreter.launches
    assert launch.constexprs["Q_UNITS"] == (8, 16, 16, 1)


def test_keys_the_other_way_round(interpreter: InterpreterLauncher) -> None:
    q, kt, v = random((2, 9, 16), F32), random((2, 16, 40), F32, seed=1), random((2, 40, 8), F32, seed=2)
    attend(interpreter, q, kt.swapaxes(1, 2), v, a.Options())


def test_no_keys_is_refused() -> None:
    q, k, v = heads(3, 0, 8, F32)
    assert not a.supports_attention(q, k, v, q)
    q, k, v = heads(3, 4, 513, F32)
    assert not a.supports_attention(q, k, v, q)
    with pytest.raises(ValueError, match="no kernel for"):
        a.attention(q, k, v, q, InterpreterLauncher(), Scratch(), a.Options())
