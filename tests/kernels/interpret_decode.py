"""Steps over few new tokens in Triton's interpreter, against float64 NumPy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infera_gpu.op import Case, Op, f32
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec, spec_of
from infera_kernels.launch import InterpreterLauncher, Launch
from tests.cases import assert_close as assert_like
from tests.cases import compute, run, variants, wrong
from tests.kernels.buffers import LaunchingBuffers
from tests.kernels.references import F32, ids
from tests.kernels.support import BFLOAT16, FLOATS, Array, Guarded, assert_close, execute

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton import decode_attention as a
from infera_kernels.triton import decode_tiles
from tests.kernels.decoding import BATCH, GROUPS, attended, caches_of, step_of

pytestmark = pytest.mark.kernels

ERROR = 2e-6


def unchecked(shape: Any, dtype: Any = np.float32) -> Array:
    """Scratch."""
    return np.empty(shape, dtype)


def made(step: a.Step, outs: list[Guarded], interpreter: InterpreterLauncher, **how: Any) -> Launch:
    """Runs the kernels, holds what they write against the references, and gives the first launch."""
    scratch: list[Guarded] = []

    def given(shape: Any, dtype: Any = np.float32) -> Array:
        scratch.append(Guarded(shape, dtype))
        found: Array = scratch[-1].array
        return found

    interpreter.launches.clear()
    calls = a.decode(step, interpreter, given, **how)
    assert [g.array.shape for g in scratch] == list(a.decode_scratch(step, **how))
    execute(calls)
    launch = interpreter.launches[0]
    split = launch.constexprs["SPLITS"] > 1
    assert [x.kernel for x in interpreter.launches] == ["decode_kernel", *["combine_kernel"] * split]
    keys, values = caches_of(step, np.float64)
    assert_close(outs[1], keys, error=4e-7)
    np.testing.assert_array_equal(outs[2].array.astype(np.float64), values)
    outs[2].check_guards()
    want = attended(step, *step.present)
    assert_close(outs[0], want.transpose(0, 3, 1, 2, 4), error=ERROR)
    for g in scratch:
        g.check_guards()
    return launch


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(
    ("past", "new", "members"), [(0, 1, 4), (1, 1, 1), (17, 1, 8), (64, 3, 4), (130, 1, 4)], ids=str
)
def test_lengths_and_sizes(
    past: int, new: int, members: int, size: int, dtype: Any, interpreter: InterpreterLauncher
) -> None:
    step, outs = step_of(past, dtype, size=size, members=members, new=new, width=size)
    launch = made(step, outs, interpreter)
    assert launch.constexprs["BM"] == (1 if dtype == F32 and members * new == 1 else 16)
    assert launch.constexprs["FROM_END"] is False


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 8, 6])
def test_rotation(width: int, interleaved: bool, dtype: Any, interpreter: InterpreterLauncher) -> None:
    """Of all of a head or of its first elements, at positions that follow, or that are given: one a row, or one for
    all, or beyond the tables."""
    step, outs = step_of(9, dtype, new=3, width=width, interleaved=interleaved)
    assert made(step, outs, interpreter).constexprs["HALF"] == width // 2
    for places in ([[3, 0, 5], [11, 2, 99]], [[4], [-7]], [[1, 2, 3]]):
        step, outs = step_of(9, dtype, new=3, width=width, interleaved=interleaved, places=np.array(places))
        made(step, outs, interpreter)


def test_what_is_not_turned_may_be_no_number(interpreter: InterpreterLauncher) -> None:
    """Beside what turns: nothing of it reaches other elements of a key."""
    for interleaved in (False, True):
        step, outs = step_of(4, width=8, interleaved=interleaved)
        step.k[..., 8] = np.nan
        execute(a.decode(step, interpreter, unchecked))
        assert np.isnan(outs[1].array[:, :, 4]).sum(-1).tolist() == [[1] * GROUPS] * BATCH


@pytest.mark.parametrize("dtype", [F32, BFLOAT16], ids=ids)
@pytest.mark.parametrize("rows", [0, 40, 150])
@pytest.mark.parametrize("new", [1, 3])
def test_lengths_of_their_own(new: int, rows: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    """Of caches with room to spare, too. What lies behind an entry's past is never read; zeros take its place."""
    past, lengths = rows or 33, (33 + new - 1, new - 1, 20)
    step, outs = step_of(
        past, dtype, new=new, lengths=lengths, rows=max(past, 33 + new), keys=33 + new, batch=3, width=16
    )
    for b, last in enumerate(lengths):
        for x in step.past or ():
            x[b, :, last + 1 - new :] = np.nan
    assert made(step, outs, interpreter).constexprs["FROM_END"]


def test_a_past_that_is_too_short_goes_on_with_zeros(interpreter: InterpreterLauncher) -> None:
    """Which are keys like others."""
    step, outs = step_of(5, lengths=(11, 6), rows=12, keys=12)
    made(step, outs, interpreter)


def test_lengths_beyond_the_cache_write_nothing_outside(interpreter: InterpreterLauncher) -> None:
    step, outs = step_of(20, lengths=(500, -9), new=3)
    execute(a.decode(step, interpreter, unchecked))
    for out in outs:
        out.check_guards()


@pytest.mark.parametrize("lengths", [None, (2, 0)])
def test_the_first_tokens(lengths: tuple[int, ...] | None, interpreter: InterpreterLauncher) -> None:
    """Rows begin with new ones; what is seen may end before them."""
    step, outs = step_of(0, new=3, width=16, lengths=lengths)
    made(replace(step, before=0), outs, interpreter)


@pytest.mark.parametrize("lengths", [None, (12, 7)])
def test_everything_seen(lengths: tuple[int, ...] | None, interpreter: InterpreterLauncher) -> None:
    step, outs = step_of(10, new=3, causal=False, lengths=lengths)
    assert not made(step, outs, interpreter).constexprs["CAUSAL"]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts are joined in next to no time, so that few keys have some."""
    decode_tiles.predicted.cache_clear()
    monkeypatch.setattr(decode_tiles, "joining_cycles", lambda parts, elements, target: 2000.0 if parts > 1 else 0.0)
    yield
    decode_tiles.predicted.cache_clear()


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(("lengths", "past"), [(None, 1000), ((1002, 40), 1000), ((999, 2), 1020)], ids=str)
def test_parts_of_the_keys(lengths: Any, past: int, dtype: Any, interpreter: InterpreterLauncher) -> None:
    """Some of them are empty."""
    step, outs = step_of(past, dtype, size=40, values=24, new=3, lengths=lengths, width=40)
    assert made(step, outs, interpreter).constexprs["SPLITS"] == (16 if dtype == F32 else 8)


@pytest.mark.usefixtures("joined")
def test_one_row_in_parts(interpreter: InterpreterLauncher) -> None:
    step, outs = step_of(700, size=64, members=1, batch=1)
    launch = made(step, outs, interpreter)
    assert launch.constexprs["BM"] == 1
    assert launch.constexprs["SPLITS"] == 8


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize(
    ("past", "lengths", "new"), [(40, (35, 20), 1), (40, (35, 2), 3), (9, (0, 8), 1), (700, (630, 40), 2)], ids=str
)
def test_caches_in_place(
    past: int, lengths: tuple[int, ...], new: int, dtype: Any, interpreter: InterpreterLauncher
) -> None:
    """The new keys and values are written where they belong, and nothing else; what lies there is not read. Either may
    be in its place alone."""
    step, outs = step_of(past, dtype, new=new, lengths=lengths, rows=past, keys=max(lengths) + 1, width=16)
    execute(a.decode(step, interpreter, unchecked))
    want = [out.array.copy() for out in outs]
    assert step.past is not None
    for shared in ((True, True), (True, False), (False, True)):
        pasts = [q if there else p for p, q, there in zip(step.past, step.present, shared, strict=True)]
        for cache, old in zip(step.present, step.past, strict=True):
            cache[...] = old
            for b, last in enumerate(lengths):
                cache[b, :, last + 1 - new :] = np.nan
        interpreter.launches.clear()
        calls = a.decode(replace(step, past=(pasts[0], pasts[1])), interpreter, unchecked)
        execute(calls)
        known = interpreter.launches[0].constexprs
        assert (known["KEYS_IN_PLACE"], known["VALUES_IN_PLACE"]) == shared
        assert len(calls) == 1 + (past == 700)
        np.testing.assert_array_equal(outs[0].array, want[0])
        for out, whole, there in zip(outs[1:], want[1:], shared, strict=True):
            out.check_guards()
            for b, last in enumerate(lengths):
                np.testing.assert_array_equal(out.array[b, :, : last + 1], whole[b, :, : last + 1])
                behind = out.array[b, :, last + 1 :].astype(np.float32)
                assert np.isnan(behind).all() if there else not behind.any()


def test_presents_with_gaps(interpreter: InterpreterLauncher) -> None:
    step, outs = step_of(20, new=2)
    outs = [Guarded(out.array.shape, F32, step=2) for out in outs]
    step = replace(step, out=outs[0].array.transpose(0, 2, 3, 1, 4), present=(outs[1].array, outs[2].array))
    made(step, outs, interpreter)


@pytest.mark.usefixtures("joined")
def test_alone_and_among_others_the_same_bits(interpreter: InterpreterLauncher) -> None:
    """`invariant`: as many parts whatever the batch."""
    whole, outs = step_of(300, BFLOAT16, batch=9, size=256)
    among, first = made(whole, outs, interpreter, invariant=True), outs[0].array[:1].tobytes()
    step, outs = step_of(300, BFLOAT16, batch=1, size=256)
    assert step.past is not None
    assert whole.past is not None
    for x, y in zip((step.q, step.k, step.v, *step.past), (whole.q, whole.k, whole.v, *whole.past), strict=True):
        x[...] = y[:1]
    alone = made(step, outs, interpreter, invariant=True)
    assert outs[0].array.tobytes() == first
    assert alone.constexprs == among.constexprs
    assert alone.constexprs["SPLITS"] > 1
    many_more = replace(whole, q=np.broadcast_to(whole.q[:1], (200, *whole.q.shape[1:])))
    assert a.decode_scratch(many_more, invariant=True)
    assert not a.decode_scratch(many_more)


def test_what_is_not_covered() -> None:
    step, _ = step_of(10, members=6, new=3)
    assert not a.supports_decode(step)
    step, _ = step_of(10, size=288)
    assert not a.supports_decode(step)
    step, _ = step_of(10)
    assert a.supports_decode(step)
    wrong_ones: dict[str, dict[str, Any]] = {
        "no past": {"past": None},
        "no lengths": {"before": None},
        "half a past": {"past": (step.past[0], step.past[1][:, :, 1:])},  # type: ignore[index]
        "another type": {"k": step.k.astype(np.float16)},
        "wide tables": {"cos": np.zeros((11, 9), F32), "sin": np.zeros((11, 9), F32)},
        "lengths of floats": {"lengths": np.zeros(BATCH, F32)},
        "other places": {"cos": np.zeros((11, 4), F32), "sin": np.zeros((11, 4), F32), "places": np.zeros((2, 2), int)},
    }
    for name, change in wrong_ones.items():
        assert not a.supports_decode(replace(step, **change)), name
    with pytest.raises(ValueError, match="no kernel for"):
        a.decode(replace(step, past=None), InterpreterLauncher(), unchecked)


ONE, APPENDED, WHOLE = ("decode_kernel",), ("append_kernel", "append_kernel", "attention_kernel"), ("attention_kernel",)
KERNELS = {
    **dict.fromkeys(("prompt", "step", "uneven", "buffer", "packed", "chunk", "rotary", "interleaved"), ONE),
    "everything_seen": ONE,
    "scaled": APPENDED,
    "window": APPENDED,
    **dict.fromkeys(("bias", "capped_bias", "sink"), WHOLE),
}
"""Of the operator's cases."""


def _cast(spec: TensorSpec | None, dtype: Any) -> TensorSpec | None:
    return spec if spec is None or spec.dtype != F32 else replace(spec, dtype=np.dtype(dtype))


def kernels_of(op: Op, case: Case, dtype: Any, interpreter: InterpreterLauncher) -> list[tuple[str, ...]]:
    """Which kernels a case is in a type, at each of its sites; what comes of them is held against the plain definition
    in float32."""
    found: list[tuple[str, ...]] = []
    for site, ins in variants(op, case, "triton"):
        plain = compute(op, site, ins)[: case.n_outs]
        given = [x.astype(dtype) if x is not None and x.dtype == F32 else x for x in ins]
        specs, outs = (tuple(_cast(x, dtype) for x in some) for some in (site.ins, site.outs))
        site = replace(site, ins=specs, outs=tuple(x for x in outs if x is not None))
        kernel = op.kernels["triton"]
        assert kernel.supports(site)
        interpreter.launches.clear()
        buffers = LaunchingBuffers(
            interpreter, given, [replace(spec_of(w), dtype=np.dtype(dtype)) for w in plain], site.values
        )
        calls = list(kernel.bind(site, buffers))
        buffers.check_workspace(kernel, site)
        buffers.prepare([wrong(w.astype(dtype)) for w in plain])
        run(calls)
        buffers.check()
        found.append(tuple(launch.kernel for launch in interpreter.launches))
        for got, want in zip(buffers.outs, plain, strict=True):
            tol = {"float32": case.tol, "float16": 4e-3, "bfloat16": 3e-2}[np.dtype(dtype).name]
            assert_like(np.asarray(got).astype(np.float32), want, tol, case.id)
    return found


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_cases_of_the_operator(name: str, dtype: Any, interpreter: InterpreterLauncher) -> None:
    op = registry().find("com.microsoft", "GroupQueryAttention", 1)
    assert op is not None
    case = next(c for c in op.cases if c.id == name)
    assert kernels_of(op, case, dtype, interpreter) == [KERNELS[name]] * len(variants(op, case, "triton"))


HEADS, PAST = f32(2, 2, 1, 8), f32(2, 2, 7, 8)
OTHERS = (
    ("", "Attention", Case("step", (f32(2, 4, 1, 8), HEADS, HEADS, None, PAST, PAST), {"is_causal": 1}, n_outs=3), ONE),
    ("", "Attention", Case("seen", (*(f32(2, 2, 3, 8),) * 3, None, PAST, PAST), n_outs=3), ONE),
    ("", "Attention", Case("mask", (HEADS, HEADS, HEADS, f32(1, 8), PAST, PAST), n_outs=3), APPENDED),
    ("", "Attention", Case("fewer", (HEADS, *(f32(2, 2, 3, 8),) * 2, None, PAST, PAST), n_outs=3), APPENDED),
    (
        *("com.microsoft", "MultiHeadAttention"),
        Case("step", (*(f32(2, 1, 16),) * 3, None, None, None, *(f32(2, 2, 7, 8),) * 2), {"num_heads": 2}, n_outs=3),
        ONE,
    ),
)


@pytest.mark.parametrize(("domain", "name", "case", "wanted"), OTHERS, ids=lambda x: getattr(x, "id", None))
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_steps_of_other_operators(
    domain: str, name: str, case: Case, wanted: tuple[str, ...], dtype: Any, interpreter: InterpreterLauncher
) -> None:
    op = registry().find(domain, name, 23)
    assert op is not None
    assert set(kernels_of(op, case, dtype, interpreter)) == {wanted}
