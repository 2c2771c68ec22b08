"""Attention by cuDNN: when it is asked for, and what its descriptors say, computed by a stand-in without a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from infera_kernels.launch import nominal_target
from infera_kernels.triton import dnn_attention
from infera_kernels.triton.attention import Options
from infera_kernels.triton.dnn_attention import attention_by_cudnn, attention_of, attention_way
from infera_kernels.tuning import Measured, Trial, Tuned, source_of
from tests.cudnn_support import BFLOAT, HALF, Timer, opened, run, workspace
from tests.cudnn_support import launcher as launcher
from tests.cudnn_support import library as library
from tests.fake_cudnn import FakeCudnn
from tests.kernels.attending import attended
from tests.text import parse

pytestmark = pytest.mark.kernels


def lying(rng: np.random.Generator, shape: Sequence[int], how: str, dtype: Any) -> Any:
    """Random numbers (..., heads, rows, size): heads first, or rows first with others between them."""
    if how == "heads":
        return rng.standard_normal(shape).astype(dtype)
    *lead, heads, rows, size = shape
    made = rng.standard_normal((*lead, rows, 3, heads, size)).astype(dtype)[..., 1, :, :]
    return made.swapaxes(-2, -3)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("how", ["heads", "rows"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    ("lead", "groups", "m", "n", "sizes"),
    [
        ((2, 3), (2, 3), 5, 5, (8, 8)),
        ((2, 3), (2, 1), 4, 7, (16, 8)),
        ((2, 2, 3), (2, 2, 1), 5, 6, (8, 16)),
        ((1, 2, 2), (1, 2, 1), 1, 9, (8, 8)),
        ((2, 1), (2, 1), 3, 3, (24, 8)),
    ],
)
def test_attention(
    library: FakeCudnn,
    launcher: Any,
    lead: Any,
    groups: Any,
    m: int,
    n: int,
    sizes: Any,
    causal: bool,
    how: str,
    dtype: Any,
) -> None:
    rng = np.random.default_rng(m + n)
    q, k = lying(rng, (*lead, m, sizes[0]), how, dtype), lying(rng, (*groups, n, sizes[0]), how, dtype)
    v, out = lying(rng, (*groups, n, sizes[1]), how, dtype), lying(rng, (*lead, m, sizes[1]), how, dtype)
    options = Options(0.3, right=0 if causal else None, before=n - m)
    call = attention_by_cudnn(q, k, v, out, launcher, options, 1, workspace())
    if how == "rows" and len(lead) == 3 and lead[1] > 1:  # heads that are not evenly spaced
        assert call is None
        return
    assert call is not None
    gc.collect()
    run([call])
    tolerance = {HALF: 2e-3, BFLOAT: 2e-2}[dtype]
    wanted = attended(q, k, v, 0.3, n - m if causal else None)
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=tolerance, atol=tolerance)
    assert len(library.asked) == 1


def ask_attention(tuned: Tuned | None, options: Options | None = None, **changed: Any) -> int:
    shapes = {"q": (2, 3, 4, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 8), "out": (2, 3, 4, 8), **changed}
    dtype, others = shapes.pop("dtype", HALF), shapes.pop("others", False)
    q, k, v, out = (np.empty(shapes[name], dtype) for name in ("q", "k", "v", "out"))
    return attention_way(q, k, v, out, options or Options(), others=others, tuned=tuned)


def attention_measured(way: int, layout: str = "9.28.1") -> Tuned:
    sizes = {"queries": 4, "matrices": 6, "keys": 6, "size": 8, "repeats": 1}
    family = dnn_attention.WAY
    known = family.class_of(family.problem("half", sizes, layout))
    found = Measured(known, (way,), 1e-6, (0,), 2e-6, source_of(family))
    return Tuned(replace(nominal_target(90), cudnn="9.28.1"), {known: found})


def test_only_attention_that_was_measured_is_its() -> None:
    assert ask_attention(attention_measured(2)) == 2
    assert ask_attention(None) == 0
    assert ask_attention(attention_measured(2), Options(right=0, before=2)) == 0
    assert ask_attention(attention_measured(2, "9.28.1 causal"), Options(right=0, before=2)) == 2


def test_attention_is_asked_of_releases_that_have_it_right() -> None:
    for release, way in (("9.8.0", 0), ("9.10.1", 0), ("9.10.2", 2), ("9.19.0", 2), ("10.0.0", 2)):
        tuned = attention_measured(2, release)
        assert ask_attention(Tuned(replace(tuned.target, cudnn=release), tuned.measured)) == way


@pytest.mark.parametrize(
    "options",
    [
        {"cap": 5.0},
        {"left": 3},
        {"right": 1},
        {"ahead": 1.0},
        {"right": 0, "before": 1},
        {"right": 0, "before": 2, "from_end": True},
        {"more": 1},
    ],
    ids=str,
)
def test_attention_that_it_may_take_otherwise_is_never_asked_for(options: dict[str, Any]) -> None:
    trial = Trial(attention_measured(2), {})
    assert ask_attention(trial, Options(**options)) == 0
    assert not trial.asked


@pytest.mark.parametrize(
    "changed",
    [
        {"others": True},
        {"dtype": np.float32},
        {"q": (2, 3, 4, 6), "k": (2, 3, 6, 6)},
        {"v": (2, 3, 6, 264), "out": (2, 3, 4, 264)},
        {"q": (3, 4, 8), "k": (3, 6, 8), "v": (3, 6, 8), "out": (3, 4, 8)},
        {"out": (0, 3, 4, 8)},
    ],
    ids=str,
)
def test_attention_that_it_has_not_is_never_asked_for(changed: dict[str, Any]) -> None:
    trial = Trial(attention_measured(2), {})
    assert ask_attention(trial, **changed) == 0
    assert not trial.asked


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("how", ["every second element", "backwards", "one for all", "a head for all"])
def test_attention_that_lies_otherwise_is_left_to_kernels_of_ours(name: str, how: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((2, 3, 4, 8)).astype(HALF) for name in ("q", "k", "v", "out")}
    changed: Mapping[str, Callable[[], Any]] = {
        "every second element": lambda: rng.standard_normal((2, 3, 4, 16)).astype(HALF)[..., ::2],
        "backwards": lambda: arrays[name][:, ::-1],
        "one for all": lambda: np.broadcast_to(arrays[name][:1], (2, 3, 4, 8)),
        "a head for all": lambda: np.broadcast_to(arrays[name][:, :1], (2, 3, 4, 8)),
    }
    assert attention_of(**arrays, options=Options()) is not None
    arrays[name] = changed[how]()
    assert attention_of(**arrays, options=Options()) is None


ATTENTION = """
    g (float16[N, 2, 6, 8] q, float16[N, 2, 6, 8] k, float16[N, 2, 6, 8] v) => (float16[N, 2, 6, 8] y) {
        y = Attention <is_causal = 1> (q, k, v)
    }"""


def test_tuning_finds_attention_too(library: FakeCudnn) -> None:
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((3, 2, 6, 8)).astype(HALF) for name in "qkv"}
    session = opened(library, made=parse(ATTENTION, 23))
    before = session.run(given)["y"]
    found = session.tune(given, timer=Timer(way1=1e-6))
    assert (found[-1].problem.family, found[-1].choice) == ("attention_way", (1,))
    del library.asked[:]
    session.device.wrap = lambda step, calls, ins, outs: calls  # type: ignore[method-assign]
    np.testing.assert_allclose(session.run(given)["y"], before, rtol=2e-3, atol=2e-3)
    assert len(library.asked) == 1


def test_tiles_are_measured_without_it(library: FakeCudnn) -> None:
    """Where a way is known, but the kernels that it was compared with are others now."""
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((3, 2, 6, 8)).astype(HALF) for name in "qkv"}
    tile, way = opened(library, made=parse(ATTENTION, 23)).tune(given, timer=Timer(way1=1e-6))
    session = opened(library, made=parse(ATTENTION, 23))
    session.device.tiles.learn([way], {})  # type: ignore[union-attr]
    assert [m.problem for m in session.tune(given, timer=Timer())] == [tile.problem]
    del library.asked[:]
    session.run(given)
    assert len(library.asked) == 1
