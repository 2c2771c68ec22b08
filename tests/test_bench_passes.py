"""Passes of the benchmark, taken together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import environment
from bench.__main__ import finish
from bench.passes import combined, merged


def row(wall: float, *, model: str = "m", threads: int = 1, failure: str = "", error: float = 1e-6) -> dict[str, Any]:
    if failure:
        return {"model": model, "example": "", "threads": threads, "failure": failure, "summaries": {}}
    summary = {"wall_ms": 10 * wall, "n": 3, "disturbed": wall > 2}
    return {
        "model": model,
        "example": "b1",
        "threads": threads,
        "failure": "",
        "error": error,
        "summaries": {"infera": summary, "onnxruntime": {**summary, "wall_ms": 10.0}},
        "ratios": {"wall": wall},
    }


def test_a_row_is_the_median_of_its_passes() -> None:
    (made,) = combined([[row(1.0)], [row(3.0, error=2e-6)], [row(1.5)]])
    assert made["ratios"] == {"wall": 1.5}
    assert made["wall_ratios"] == [1.0, 1.5, 3.0]
    assert made["summaries"]["infera"] == {"wall_ms": 15.0, "n": 9, "disturbed": True}
    assert made["error"] == 2e-6, "the largest"


def test_a_failure_in_any_pass_is_one() -> None:
    made = combined([[row(1.0), row(1.0, model="n")], [row(1.0), row(0, model="n", failure="died")]])
    assert [(r["model"], r["failure"]) for r in made] == [("m", ""), ("n", "died")]
    with pytest.raises(ValueError, match="pass 2 of 2 lacks"):
        combined([[row(1.0), row(1.0, threads=2)], [row(1.0)]])


def test_passes_of_several_commits_are_refused(tmp_path: Path) -> None:
    def written(name: str, commit: str, wall: float) -> Path:
        path = tmp_path / name
        measured = {"commit": commit, "host_class": "h"}
        path.write_text(json.dumps({"environment": measured, "options": {"quick": False}, "rows": [row(wall)]}))
        return path

    one, two, other = written("1", "a", 1.0), written("2", "a+changes", 2.0), written("3", "b", 1.0)
    measured, options, rows = merged([one, two])
    assert (measured["commit"], options, rows[0]["ratios"]) == ("a+changes", {"quick": False}, {"wall": 1.5})
    with pytest.raises(ValueError, match="more than one commit: a, b"):
        merged([one, other])


@pytest.mark.parametrize("quick", [True, False])
def test_quick_results_have_a_file_of_their_own(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    assert finish({}, {"quick": quick}, [], None, Console(quiet=True)) == 0
    (made,) = tmp_path.iterdir()
    assert ("-quick-" in made.name) == quick


def test_results_that_lack_models_do_not_take_the_place_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path)

    def write(*rows: dict[str, str], topic: str = "first") -> Path:
        return environment.write_results({}, {}, rows, topic=topic).relative_to(tmp_path).parent

    both = {"model": "a", "failure": ""}, {"model": "b", "failure": ""}
    assert write(*both) == Path()
    assert write(both[0]) == Path("partial")
    assert write(both[0], {"model": "b", "failure": "no"}) == Path("partial")
    assert write(*both, {"model": "c"}) == Path()
    assert write(*both) == Path("partial")
    assert write({"server": "triton"}, topic="serving") == Path()
    assert environment.write_results({}, {}, both[:1], tmp_path / "own.json").parent == tmp_path
