"""Rows tuned and timed over a stand-in for CuPy, kernels interpreted, times made up: what is measured and kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gpu_rows, gpu_sets, gpu_tuning
from bench.build import bert
from bench.gpu_bound import run_without
from bench.gpu_models import bert_feeds
from bench.gpu_report import CheckFailed, Context, OwnCases, Tried
from bench.gpu_roofline import card_named
from bench.gpu_rows import PREDICTED, Row, measure
from infera_gpu import tuning
from infera_gpu.devices import cuda
from infera_gpu.op import Call
from infera_kernels.tuning import DeviceTiles
from tests import fake_torch
from tests.kernels.watching import WatchingLauncher
from tests.text import parse

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("small", "times")]
pytest_plugins = ("tests.kernels.interpret_gpu_rows",)


class Timer:
    """Makes nothing: every third that it is asked for takes 2 µs, all else 4."""

    def __init__(self) -> None:
        self.known: list[Sequence[Call]] = []

    def __call__(self, calls: Sequence[Call]) -> float:
        if not any(calls is known for known in self.known):
            self.known.append(calls)
        at = next(i for i, known in enumerate(self.known) if known is calls)
        return 2e-6 if at % 3 == 2 else 4e-6


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a machine on which nothing has been measured."""
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda.CudaDevice, "timer", lambda device: Timer())


@pytest.fixture
def context(opener: Callable[[Any], Context]) -> Context:
    return replace(opener(WatchingLauncher), card=card_named("H200"))


def product() -> Row:
    """In float32, of which there are few tiles."""
    made = gpu_sets.products()
    return next(row for row in made if row.precision == "fp32")


def plain() -> Row:
    x = {"x": np.ones((3, 4), np.float32)}
    return Row("products", "relu", lambda: (parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"), x))


def broken() -> Row:
    def make() -> Any:
        raise ValueError("no such model")

    return replace(plain(), name="broken", make=make)


def tuned(context: Context, *rows: Row) -> tuple[str, Any]:
    return gpu_tuning.section(lambda: rows, 1)(context)


def test_what_is_measured_is_kept_and_rows_go_by_it_beside_what_is_predicted(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = product()
    before = measure(context, row)
    assert before["choices"] > 0
    assert (before["tuned"], before["changed"]) == (0, 0)
    assert PREDICTED not in before["peers"]

    line, facts = tuned(context, row, plain())
    first, nothing = facts["tuned"]
    assert first["row"] == row.label
    assert first["choices"] == before["choices"]
    assert 1 == first["better_than_predicted"] <= first["measured"]
    assert first["mean_gain"] > 1
    assert (nothing["choices"], nothing["measured"], nothing["mean_gain"], nothing["rejected"]) == (0, 0, 1.0, [])
    assert line.startswith(f"2 of 2 rows: {first['measured']} choices measured, 1 better than predicted, mean gain ")
    content = json.loads(facts["file"])
    assert len(content["entries"]) == first["measured"]
    json.dumps(facts)

    monkeypatch.setattr(gpu_rows, "torch_on_gpu", fake_torch.module)
    after = measure(context, row)
    assert after["choices"] >= after["tuned"] >= after["changed"] == 1
    assert after["peers"].keys() == {"torch", PREDICTED}
    assert after["spread"].keys() == {"infera", "torch", PREDICTED}
    assert after["cold"].keys() == {"infera", "torch", PREDICTED}
    assert 0 <= after["error_against_predicted"] < 1e-4
    compiled = measure(context, row, "max-autotune")
    assert PREDICTED not in compiled["peers"], "there is time for torch.compile's alone"
    assert compiled["tuned"] == after["tuned"]


def test_a_network_is_timed_as_tuned_and_as_predicted(context: Context) -> None:
    """Replayed both from graphs of their own."""
    feeds = bert_feeds(2, 5, 50)
    row = Row(
        "networks",
        "bert b2",
        lambda: (bert(layers=1, hidden=16, heads=2, inner=16, vocabulary=50), feeds),
        network=True,
    )
    (found,) = tuned(context, row)[1]["tuned"]
    assert found["choices"] > 2
    assert found["better_than_predicted"] > 0
    made = measure(context, row)
    assert made["tuned"] >= found["measured"]
    assert made["changed"] > 0
    assert made["peers"].keys() == {PREDICTED}
    assert "cold" not in made
    assert made["error_against_predicted"] < 1e-5


def test_what_is_measured_is_not_measured_again(context: Context) -> None:
    (first,) = tuned(context, product())[1]["tuned"]
    line, facts = tuned(context, product())
    (again,) = facts["tuned"]
    assert again["measured"] == 0
    assert again["measured_before"] > 0
    assert len(json.loads(facts["file"])["entries"]) == first["measured"]
    assert line == "1 of 1 rows: 0 choices measured, 0 better than predicted, mean gain 1.00x"


def test_a_row_that_fails_loses_itself_alone(context: Context) -> None:
    with pytest.raises(CheckFailed, match="products: broken fp32: ValueError: no such model") as caught:
        tuned(context, broken(), product())
    facts = caught.value.facts
    assert [row["row"] for row in facts["tuned"]] == [product().label]
    assert len(facts["failed"]) == 1
    assert json.loads(facts["file"])["entries"], "what was measured is not lost"


def test_rows_that_an_earlier_process_has_tuned_are_told_of_and_not_tuned_again(context: Context) -> None:
    """One of them took that process with it."""
    found = {"row": "a", "measured": 2, "better_than_predicted": 1, "mean_gain": 1.5, "rejected": []}
    known = {product().label: Tried("", found), plain().label: Tried("signal SIGABRT", lost=True)}

    class Earlier(OwnCases):
        def known(self, name: str) -> Tried | None:
            return known.get(name)

    with pytest.raises(CheckFailed, match=r"1 of 2 rows: 2 choices .*; products: relu fp32: signal SIGABRT") as caught:
        tuned(replace(context, cases=Earlier()), product(), plain())
    assert caught.value.facts["tuned"] == [found]


def test_no_row_is_begun_without_time(context: Context) -> None:
    late = replace(context, deadline=time.monotonic() + 0.5)
    with pytest.raises(CheckFailed, match="no row was tuned") as caught:
        tuned(late, product())
    assert caught.value.facts == {"tuned": [], "failed": [], "file": ""}


def test_no_candidate_is_begun_when_the_time_of_the_section_is_over(context: Context) -> None:
    late = replace(context, deadline=time.monotonic() + gpu_tuning.SPARE)
    found = gpu_tuning.tuned(late, product(), 100.0)
    assert found["allowed_seconds"] == 0
    assert found["choices"] > 0
    assert found["measured"] == 0
    assert gpu_tuning.tuned(context, product(), 0.0)["measured"] == 0, "or the row's"


def test_candidates_with_other_results_are_told(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "agree", lambda got, want: False)
    line, facts = tuned(context, product())
    (found,) = facts["tuned"]
    assert found["better_than_predicted"] == 0
    assert len(found["rejected"]) >= found["measured"]
    assert "matmul" in found["rejected"][0]
    assert line.endswith(f"{len(found['rejected'])} candidates rejected")


def test_tuned_tiles_that_answer_otherwise_make_a_row_wrong(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(context, product())

    def other(*given: Any, **more: Any) -> Any:
        run = run_without(*given, **more)
        return run._replace(answers={name: a + 1 for name, a in run.answers.items()})

    monkeypatch.setattr(gpu_rows, "run_without", other)
    with pytest.raises(CheckFailed, match="differs from infera, predicted tiles") as caught:
        measure(context, product())
    assert caught.value.facts["wrong"]
    assert caught.value.facts["peers"].keys() == {PREDICTED}


def test_a_device_goes_by_predicted_tiles_where_that_is_asked_for(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import gpu_command

    tuned(context, product())
    monkeypatch.setattr(
        gpu_command, "open_device", lambda name, batch_invariant: context.open(batch_invariant=batch_invariant)
    )
    for measured in (True, False):
        tiles = gpu_command.opened("cuda:0", measured=measured).tiles
        assert isinstance(tiles, DeviceTiles)
        assert bool(tiles.tuned.measured) == measured
