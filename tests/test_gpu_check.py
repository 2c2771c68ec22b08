"""`bench.gpu_check` without a GPU: its command line, its table and its file. What it checks is in tests/kernels."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from bench import (
    gpu_batches,
    gpu_check,
    gpu_early,
    gpu_first,
    gpu_models,
    gpu_networks,
    gpu_parity,
    gpu_report,
    gpu_selections,
    gpu_speed,
    gpu_tuning,
)
from bench.gpu_report import (
    READINGS,
    CheckFailed,
    Context,
    Outcome,
    Section,
    loses_the_gpu,
    outcome_of,
    reading_of,
    table,
    write,
)
from bench.gpu_workers import END, NO_GPU, Limits
from infera_gpu import tuning
from infera_gpu.catalogue import CATALOGUE
from infera_gpu.telemetry import GpuReading
from infera_kernels.tuning import Measured, Problem, Store
from tests.text import parse

GPU = {"name": "NVIDIA H200", "driver": "580.1"}


def good(context: Context) -> tuple[str, Mapping[str, Any]]:
    assert context.left() > 0
    return "3 cases", {"cases": 3}


def bad(context: Context) -> tuple[str, Mapping[str, Any]]:
    raise CheckFailed("1 of 3 is wrong", {"wrong": ["Relu"]})


def broken(context: Context) -> tuple[str, Mapping[str, Any]]:
    raise ZeroDivisionError("by zero\nat length")


def command(tmp_path: Path, *argv: str, sections: Mapping[str, Section], reason: str | None = None) -> int:
    return gpu_check.main(
        [*argv, "--in-process", "--output", str(tmp_path)],
        sections=sections,
        unavailable=lambda: reason,
        describe=lambda index: GPU,
    )


def test_without_a_gpu_it_says_so_in_a_line_and_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, sections={"good": good}, reason="the driver reports no GPU") == NO_GPU == 3
    assert capsys.readouterr().out == "no GPU, nothing was run and no results were written: the driver reports no GPU\n"
    assert list(tmp_path.iterdir()) == []


def test_a_failing_section_is_recorded_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, sections={"bad": bad, "broken": broken, "good": good}) == 1
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert not record["passed"]
    assert record["gpu"] == GPU
    assert {"commit", "cpu", "packages", "python", "time"} <= record.keys()
    assert record["packages"]["numpy"]
    assert [(s["section"], s["status"]) for s in record["sections"]] == [
        ("bad", "failed"),
        ("broken", "failed"),
        ("good", "ok"),
    ]
    assert record["sections"][0]["facts"] == {"wrong": ["Relu"]}
    assert "ZeroDivisionError" in record["sections"][1]["facts"]["traceback"]
    assert record["sections"][2]["facts"] == {"cases": 3}
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert first == "NVIDIA H200, driver 580.1"
    assert [row.split()[:2] for row in rows] == [["bad", "failed"], ["broken", "failed"], ["good", "ok"]]
    assert rows[1].endswith("ZeroDivisionError: by zero at length")
    assert last == str(path)


def test_all_well_is_zero_and_only_runs_what_is_named(tmp_path: Path) -> None:
    assert command(tmp_path, "--only", "good", sections={"bad": bad, "good": good}) == 0
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["passed"]
    assert len(record["sections"]) == 1


def test_nothing_begins_after_the_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for minutes in ("-3", "nan", "long"):
        with pytest.raises(SystemExit, match="2"):
            command(tmp_path, f"--minutes={minutes}", sections={"good": good})
        assert f"'{minutes}' is no number of minutes, expected 0 or more" in capsys.readouterr().err
    assert command(tmp_path, "--minutes", "0", sections={"good": good}) == 1, "nothing was checked"
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["sections"][0]["status"] == "skipped"
    assert not record["passed"]


def test_sections_get_a_device_of_their_own() -> None:
    opened: list[int] = []

    def opening(context: Context) -> tuple[str, Mapping[str, Any]]:
        context.open()
        return "", {}

    for name in "ab":
        outcome_of(name, opening, Context(lambda: opened.append(1), float("inf")))
    assert opened == [1, 1]


def test_a_table_lines_up() -> None:
    rows = table([Outcome("a", "ok", 1.25, "fine"), Outcome("longer", "failed", 100, "not")]).splitlines()
    assert rows[0].index("fine") == rows[1].index("not")


def test_the_file_is_named_after_gpu_and_time(tmp_path: Path) -> None:
    path = write(tmp_path / "new", GPU, [], [], datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert path == tmp_path / "new" / "nvidia-h200-2026-01-02T030405.json"


def test_results_go_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERA_RESULTS", str(tmp_path / "out"))
    for argv in ((), ("--output", str(tmp_path / "elsewhere"))):
        gpu_check.main(
            ["--in-process", *argv], sections={"good": good}, unavailable=lambda: None, describe=lambda index: GPU
        )
    for folder in ("out", "elsewhere"):
        assert len(list((tmp_path / folder).iterdir())) == 1


def test_readings_are_none_where_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    known = GpuReading(1, power=70_000, sm_clock=1980, throttles=("sw_power_cap",))
    monkeypatch.setattr(gpu_report, "_telemetry", lambda: SimpleNamespace(read=lambda: (known,)))
    assert reading_of(1) == {"sm_clock": 1980, "power": 70_000, "temperature": None, "throttles": ("sw_power_cap",)}
    assert reading_of(0) == dict.fromkeys(READINGS)


@pytest.mark.parametrize(("name", "lost"), [("status", True), ("error_code", True), ("errno", False)])
def test_errors_of_cupy_and_of_pytorch_tell_that_the_gpu_is_lost(name: str, lost: bool) -> None:
    error = RuntimeError("an illegal memory access")
    setattr(error, name, 700)
    assert loses_the_gpu(error) == lost
    setattr(error, name, 2)
    assert not loses_the_gpu(error), "out of memory"


def test_nothing_runs_where_results_cannot_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--output", str(tmp_path / "file" / "out")], unavailable=lambda: None)
    assert f"results cannot go to {tmp_path / 'file' / 'out'}: Not a directory" in capsys.readouterr().err


def test_the_commit_is_named_where_there_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERA_COMMIT", "0123abcd")
    path = write(tmp_path, GPU, [], [], datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert json.loads(path.read_text())["commit"] == tuning._commit() == "0123abcd"


def test_an_unknown_section_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(tmp_path, "--only", "nothing", sections={"good": good})
    assert caught.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--help"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "kernels, models, replays, memory, faults" in " ".join(done.stdout.split())


def test_first_runs_are_of_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "small.onnx"
    onnx.save(parse("g (float[N, 3] image) => (float[N, 3] y) { y = Relu(image) }"), model)
    monkeypatch.setattr(gpu_first, "ON_GPU", "infera")
    monkeypatch.setattr(gpu_first, "path_of", lambda name: model)
    monkeypatch.setattr(gpu_first, "images", lambda batch: {"image": np.ones((batch, 3), np.float32)})
    summary, facts = gpu_first.first_run(Context(lambda: None, float("inf")))
    (row,) = facts["rows"]
    assert row["seconds"] == row["stages"]["load"] + row["stages"]["run"] > 0
    assert facts["before"].keys() == row["stages"].keys()
    assert summary.startswith("load and first run 0.")
    monkeypatch.setattr(gpu_first, "ON_GPU", "nobody")
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        gpu_first.first_run(Context(lambda: None, float("inf")))


def test_every_section_of_both_commands_is_known() -> None:
    assert gpu_check.SECTIONS.keys() >= gpu_selections.SHORT.keys()
    kinds = {f"{what} {kind}s" for what in ("compiling", "tuning") for kind in ("operator", "network")}
    before = {*kinds, "operator candidates", "network candidates", "compiling tuned networks"}
    assert gpu_speed.SECTIONS.keys() == gpu_selections.SETS.keys() | before | {"first run", "torch.compile"}
    assert gpu_speed.SECONDS.keys() == before | {"first run"}
    assert list(gpu_check.SECTIONS)[-1] == list(gpu_speed.SECTIONS)[-1] == "torch.compile"
    order = list(gpu_speed.SECTIONS)
    for sets, tuned in ((gpu_selections.TUNED, "tuning operators"), (gpu_selections.NETWORKS, "tuning networks")):
        assert all(order.index(tuned) < order.index(name) for name in sets), "rows go by what is measured"


def test_the_calls_for_a_borrowed_machine_name_sections_and_end_in_time() -> None:
    text = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()
    calls = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("python3 -m bench.gpu_")]
    timed = {"bench.gpu_check": gpu_check, "bench.gpu_speed": gpu_speed}
    minutes, named = 0.0, list[str]()
    for _, _, module, *options in calls[:4]:
        known = timed[module].SECTIONS
        _, taken, _, *sections = options
        assert set(sections) <= known.keys()
        minutes, named = minutes + float(taken), named + sections
        bounded = sum(gpu_speed.SECONDS.get(name, 0) for name in sections) if module == "bench.gpu_speed" else 0
        assert bounded < 0.7 * 60 * float(taken), "the rest is for rows"
    assert minutes < 27
    assert calls[0][2] == "bench.gpu_check"
    assert sum(gpu_check.CHECKS.values()) <= 60 * float(calls[0][4])
    assert [name for name in calls[0][6:] if name in gpu_check.CHECKS] == list(gpu_check.CHECKS)
    assert set(named) >= gpu_speed.SECTIONS.keys()
    assert {*gpu_check.SECTIONS} - {*named} == {*gpu_selections.SHORT} - {*named}
    assert calls[4][2] == "bench.gpu_tuning"


@pytest.mark.parametrize(("module", "seconds"), [(gpu_check, 480), (gpu_speed, 600)], ids=["check", "speed"])
def test_a_call_of_either_command_ends_in_time(module: Any, seconds: float) -> None:
    """The time, what a section may take beyond it, and what it takes to end its process."""
    assert 60 * module.MINUTES + Limits().grace + END <= seconds


def test_what_says_whether_results_are_right_comes_first_and_has_its_time() -> None:
    """However long it takes, and the first timings have theirs."""
    checks, timings = gpu_check.CHECKS, gpu_check.TIMINGS
    assert list(gpu_check.SECTIONS) == [*checks, *timings]
    assert {"kernels", "models", "replays", "memory", "faults", "precisions", "trained", "batches"} <= checks.keys()
    assert timings.keys() == gpu_selections.SHORT.keys() | {"launches", "latency", "torch.compile"}
    assert sum(checks.values()) + next(iter(timings.values())) <= 60 * gpu_check.MINUTES


def test_a_section_is_given_more_than_it_needs_to_begin() -> None:
    checks = gpu_check.CHECKS
    assert sum(needed for *_, needed in gpu_models.MODELS.values()) < checks["models"]
    assert len(gpu_networks.PRECISE) * gpu_networks.LEAST_SECONDS < checks["precisions"]
    assert len(gpu_parity.TRAINED) * gpu_models.TRAINED_SECONDS < checks["trained"]
    assert checks["batches"] > 2 * gpu_batches.NEEDED
    assert checks["early"] > len(gpu_batches.NETWORKS) * gpu_early.NEEDED
    assert checks["faults"] > gpu_networks.FAULT_SECONDS


def test_rows_have_twice_an_even_share_and_the_last_what_is_left() -> None:
    left, shares = 100.0, list[float]()
    for rows in range(10, 0, -1):
        shares.append(gpu_tuning.share(left, rows))
        left -= shares[-1]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(2 * 100 / 11)
    assert left == pytest.approx(0)
    assert gpu_tuning.share(5.0, 1) == 5.0


def kept(folder: Path, *names: str) -> str:
    """What a store holds, of products that a name each stands for."""
    store = Store("h200", "3.6.0", shipped=None, own=folder)
    tiles = (64, 64, 64, 4, 4), 1e-6, (32, 64, 64, 4, 4), 2e-6
    store.add([Measured(Problem("matmul", name, (128, 1, 512, 256)), *tiles, "source") for name in names], {"card": ""})
    return store.content().decode()


def test_what_files_hold_of_the_store_is_shipped(tmp_path: Path) -> None:
    """All of what all sections hold, into what is there already; those that failed too."""
    one, two = kept(tmp_path / "a", "half"), kept(tmp_path / "b", "tf32", "ieee")
    sections = [
        {"section": "products", "facts": {"rows": []}},
        {"section": "tuning operators", "facts": {"tuned": [], "file": one}},
        {"section": "tuning networks", "status": "failed", "facts": {"file": two}},
        {"section": "tuning", "facts": {"file": ""}},
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"sections": sections}))
    kept(tmp_path / "shipped", "int8")
    (path,) = gpu_tuning.ship(results, tmp_path / "shipped")
    assert sorted(p.name for p in path.parent.iterdir()) == ["h200-triton-3.6.0.json"]
    content = json.loads(path.read_text())
    assert [e["kind"] for e in content["entries"]] == ["half", "ieee", "int8", "tf32"]
    assert content["measured"] is True
    assert len(content["runs"]) == 3
    results.write_text(json.dumps({"sections": sections[:1]}))
    assert gpu_tuning.ship(results, tmp_path / "shipped") == []


def test_files_that_are_no_results_are_named_and_the_others_shipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other, missing = tmp_path / "good.json", tmp_path / "other.json", tmp_path / "missing.json"
    good.write_text(json.dumps({"sections": [{"facts": {"file": kept(tmp_path / "a", "half")}}]}))
    other.write_text("[]")
    assert gpu_tuning.main([str(missing), str(other), str(good)], tmp_path / "shipped") == 1
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert first == f"{missing}: No such file or directory"
    assert second.startswith(f"{other} holds no results: ")
    assert said.out == f"{good}: {tmp_path / 'shipped' / 'h200-triton-3.6.0.json'}\n"
    assert gpu_tuning.main([str(good)], tmp_path / "shipped") == 0


def test_checks_go_by_predicted_tiles() -> None:
    assert gpu_check.main.keywords["measured"] is False
    assert "measured" not in gpu_speed.main.keywords


def test_torch_compile_begins_with_what_targets_ask_for() -> None:
    rows = [*gpu_selections.NETWORKS["networks"](), *gpu_selections.NETWORKS["decoder"]()]
    ordered = gpu_selections.in_order(rows)
    names = [f"{row.name} {row.precision}" for row in ordered]
    assert tuple(names[: len(gpu_selections.FIRST)]) == gpu_selections.FIRST
    assert sorted(names) == sorted(f"{row.name} {row.precision}" for row in rows)
    precisions = [row.precision for row in ordered]
    assert precisions == sorted(precisions, key="fp16 fp32".index)


def test_without_pytorch_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "torch_on_gpu", lambda: None)
    for section in (gpu_speed.all_compiled, gpu_speed.short_compiled):
        assert section(Context(lambda: None, 0)) == ("PyTorch is not installed here", {"rows": []})


def test_without_onnxruntime_models_are_compared_with_our_cpu_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into a last Softmax is compared, too."""
    x = {"x": np.linspace(-9, 9, 12, dtype=np.float32).reshape(3, 4)}

    def model() -> onnx.ModelProto:
        return parse("g (float[N, 4] x) => (float[N, 4] y) { z = Neg(x) y = Softmax(z) }")

    right = gpu_parity.expected(model(), x)
    assert right.alone == ""
    assert right.wanted.keys() == {gpu_parity.OURS, gpu_parity.PEER}
    assert all(want.keys() == {"y", "z"} for want in right.wanted.values())
    off = {**right.wanted[gpu_parity.OURS], "z": x["x"]}
    found = gpu_parity.wrong(right.differences(off), 1e-4)
    assert [(line.partition(":")[0], line.rpartition(" from ")[2]) for line in found] == [
        ("z", gpu_parity.OURS),
        ("z", gpu_parity.PEER),
    ]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    alone = gpu_parity.expected(model(), x)
    assert alone.wanted.keys() == {gpu_parity.OURS}
    assert alone.alone == gpu_parity.ABSENT == "onnxruntime is not installed: compared with infera's CPU alone"
    assert gpu_parity.told({"a": alone.alone, "b": alone.alone}) == f"; {gpu_parity.ABSENT}"
    assert gpu_parity.told({"a": ""}) == ""


def test_trained_models_are_those_that_are_kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched, and without one it is said."""
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("infera_gpu.fetch._ensure", None)
    summary, facts = gpu_models.trained(Context(lambda: None, float("inf")))
    assert (
        summary == "none of magika, mobilenetv2-zoo, paraphrase-minilm-l3 is in "
        f"{tmp_path}: no trained weights were compared"
    )
    assert facts == {}
    model = parse("g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")
    entry = CATALOGUE["magika"]
    path = tmp_path / "pypi" / entry.requirement.replace("==", "-") / entry.model.member
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    ((name, (build, feeds)),) = gpu_parity.trained().items()
    assert (name, build(), {*feeds}) == ("magika", model, {"bytes"})


@pytest.mark.kernels
def test_the_short_selection_names_rows_that_there_are() -> None:
    """Convolutions are named as a plan of ResNet-50 has them."""
    for name, wanted in gpu_selections.SHORT.items():
        assert {row.name for row in gpu_selections.selected(name)} == wanted
