"""When convolutions are cuDNN's: only where that was measured to be faster. Nothing here runs on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from infera_kernels.launch import nominal_target
from infera_kernels.launch.cudnn import WORKSPACE
from infera_kernels.triton import dnn_attention
from infera_kernels.triton.conv import geometry
from infera_kernels.triton.dnn import WAY, WAYS, Way, way_of
from infera_kernels.tuning import Family, Measured, Store, Trial, Tuned, source_of
from tests.cudnn_support import HALF, Timer, model, opened
from tests.cudnn_support import library as library
from tests.fake_cudnn import FakeCudnn

pytestmark = pytest.mark.kernels


def measured(way: int, family: Family[Any] = WAY, release: str = "9.28.1") -> Tuned:
    """That a way is fastest for the convolution of `model`."""
    target = replace(nominal_target(90), cudnn=release)
    sizes = {"m": 2 * 5 * 6, "batch": 1, "n": 16, "k": 72}
    known = family.class_of(family.problem("half", sizes, "9.28.1 3x3 1x1 1x1 bias relu"))
    return Tuned(target, {known: Measured(known, (way,), 1e-6, (0,), 2e-6, source_of(family))})


WINDOW = {"kernel": (3, 3), "strides": (1, 1), "dilations": (1, 1)}


def ask(tuned: Tuned | None, dtype: Any = HALF, activation: str | None = "relu", **options: Any) -> int:
    kernel, strides, dilations = (options.get(name, usual) for name, usual in WINDOW.items())
    w, out = np.empty((16, *kernel, 8), dtype), np.empty((options.get("images", 2), 5, 6, 16), dtype)
    where = geometry(kernel, strides, dilations, ((1, 1), (1, 1)))
    terms, parameters = options.get("terms", ["bias"]), options.get("parameters", ())
    return way_of(w, out, where, 1, terms=terms, activation=activation, parameters=parameters, tuned=tuned)


def test_only_what_was_measured_is_its() -> None:
    assert ask(measured(3)) == 3
    assert ask(measured(0)) == 0
    assert ask(None) == ask(Tuned(replace(nominal_target(90), cudnn="9.28.1"))) == 0
    assert ask(measured(3, release="9.19.0")) == 0, "plans of another release are others"
    assert ask(measured(3, release="")) == 0
    assert ask(measured(WAYS + 1)) == 0, "no way of the family's"
    assert ask(measured(3), terms=["residual", "bias"]) == 0, "what follows sums matters"
    for name, changed in (("kernel", (1, 9)), ("kernel", (9, 1)), ("strides", (1, 2)), ("dilations", (2, 2))):
        options: dict[str, Any] = {name: changed}
        assert ask(measured(3), **options) == 0, "plans are others for another window"


def test_what_it_cannot_compute_is_never_asked_for() -> None:
    for given in ({"dtype": np.float32}, {"activation": "leaky_relu"}, {"activation": "silu", "parameters": (1.5,)}):
        trial = Trial(measured(3), {})
        assert ask(trial, **given) == 0
        assert not trial.asked
    trial = Trial(measured(3), {})
    assert ask(trial, activation="silu", parameters=(1.0,)) == 0
    assert trial.asked, "its own SiLU has that factor"


def test_ways_are_called_by_their_numbers() -> None:
    assert [WAY.described((way,)) for way in (0, 2)] == ["ours", "plan 2"]
    assert WAY.candidates(WAY.problem("half", dict.fromkeys(WAY.sizes, 1)), nominal_target(90))[0] == Way(0)


def feeds(n: int = 2, channels: int = 8) -> dict[str, Any]:
    return {"x": np.random.default_rng(n).standard_normal((n, 5, 6, channels)).astype(np.float16)}


def test_tuning_finds_it_last_and_the_next_plan_goes_by_it(library: FakeCudnn, tmp_path: Path) -> None:
    store = Store("h200", "3.9.0", shipped=None, own=tmp_path)
    session = opened(library, store)
    before = session.run(feeds())["y"]
    assert not library.asked
    found = session.tune(feeds(), timer=Timer(way1=1e-6))
    assert found[-1].problem.family == "conv_way", "between the best of others"
    assert found[-1].choice == (1,)
    assert [m.problem.family for m in found[:-1]].count("conv") == 1
    for other in (session, opened(library, store)):
        (step,) = (s for s in other.plan_for({"x": (2, 5, 6, 8)}).steps if s.workspace)
        assert step.workspace is not None
        assert step.workspace.nbytes >= WORKSPACE
        del library.asked[:]
        np.testing.assert_array_equal(other.run(feeds())["y"], before)
        assert len(library.asked) == 1


def test_tuning_leaves_what_is_slower(library: FakeCudnn) -> None:
    session = opened(library)
    found = session.tune(feeds(), timer=Timer(way1=1e-4))
    assert found[-1].choice == found[-1].predicted == (0,)
    del library.asked[:]
    session.run(feeds())
    assert not library.asked


def test_a_plan_that_is_not_there_is_not_measured(library: FakeCudnn) -> None:
    """Kernels of ours would be in its name, which may seem faster than they are in their own."""
    library.notes = ((0,),)
    times = (1e-5 * 0.9**i for i in range(10_000))
    found = opened(library).tune(feeds(), timer=lambda calls: next(times))
    assert (found[-1].problem.family, found[-1].choice) == ("conv_way", (1,))
    library.notes = ()
    found = opened(library).tune(feeds(), timer=lambda calls: next(times))
    assert [m.choice for m in found if m.problem.family == "conv_way"] == [(0,)]


def test_a_plan_that_is_no_longer_there_is_no_failure(library: FakeCudnn, tmp_path: Path) -> None:
    store = Store("h200", "3.9.0", shipped=None, own=tmp_path)
    before = opened(library, store).run(feeds())["y"]
    opened(library, store).tune(feeds(), timer=Timer(way1=1e-6))
    library.notes = ()
    session = opened(library, store)
    np.testing.assert_array_equal(session.run(feeds())["y"], before)
    assert session.tune(feeds(), timer=Timer(), again=True)


def test_a_plan_that_does_not_depend_on_the_batch_is_never_its(library: FakeCudnn, tmp_path: Path) -> None:
    store = Store("h200", "3.9.0", shipped=None, own=tmp_path)
    opened(library, store).tune(feeds(), timer=Timer(way1=1e-6))
    del library.asked[:]
    session = opened(library, store, batch_invariant=True)
    session.run(feeds())
    assert not library.asked


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("window", [1, 3])
def test_models_go_by_it(library: FakeCudnn, channels: int, window: int) -> None:
    """Channels that are padded for kernels of ours are so for it; a window of one pixel is no other case."""
    session = opened(library, made=model(channels, window))
    session.tune(feeds(channels=channels), timer=Timer(way1=1e-6))
    del library.asked[:]
    session.run(feeds(channels=channels))
    (graph,) = library.asked
    assert graph.attributes[801][0].one(704).attributes[902] == [
        2,
        4 if (channels, window) == (3, 3) else channels,
        5,
        6,
    ]


@pytest.mark.parametrize("window", [1, 3])
def test_what_it_computes_reaches_the_output(library: FakeCudnn, window: int) -> None:
    session = opened(library, made=model(8, window))
    before = session.run(feeds())["y"]
    session.tune(feeds(), timer=Timer(way1=1e-6))
    session.device.wrap = lambda step, calls, ins, outs: calls  # type: ignore[method-assign]
    np.testing.assert_allclose(session.run(feeds())["y"], before, rtol=2e-3, atol=2e-3)


def test_what_has_to_be_compiled_is_for_the_sizes_that_were_measured() -> None:
    lengths = [dnn_attention.WAY.problem("half", dict.fromkeys(dnn_attention.WAY.sizes, n)) for n in (200, 201)]
    assert len(set(map(dnn_attention.WAY.class_of, lengths))) == 2
    trial = Trial(measured(3), {})
    for activation in (None, "relu", "silu"):
        for images in (100, 101):
            ask(trial, activation=activation, images=images)
    assert len(trial.asked) == 1 + 1 + 2
