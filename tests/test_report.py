"""docs/performance.md: what bench/results gives, measurements and predictions apart. No GPU."""

from __future__ import annotations

import copy
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import report, report_cpu, report_gpu, report_readme
from bench.gpu_targets import TARGETS
from bench.report import DOCS, DOCUMENT, PREDICTED_CHART, README, read, render

TIMES = {"resnet50 b1": 1.0e-3, "resnet50 b32": 4.0e-3, "resnet50 b128": 16.0e-3}
COMPILED = "torch.compile max-autotune"


def measured_row(set_: str, name: str, precision: str, seconds: float, **more: Any) -> dict[str, Any]:
    row = {
        "set": set_,
        "name": name,
        "precision": precision,
        "operations": 10**9,
        "bytes": 10**7,
        "operations_per_s": 10**9 / seconds,
        "bytes_per_s": 10**7 / seconds,
        "seconds": seconds,
        "fraction": 0.5,
        "host_seconds": 1.2e-5,
        "peers": {},
    }
    return {**row, **more}


COMMIT = "0123456789abcdef"


def measured(*rows: dict[str, Any], time: str = "2030-01-01T00:00:00", commit: str = COMMIT) -> dict[str, Any]:
    """A results file as `bench.gpu_speed` writes it."""
    return {
        "time": time,
        "commit": commit,
        "gpu": {"name": "NVIDIA H200", "driver": "580.1"},
        "packages": {"torch": "2.11", "triton": "3.9.0"},
        "sections": [{"section": "networks", "facts": {"rows": list(rows)}}, {"section": "kernels", "facts": {}}],
    }


ROWS = (
    measured_row("bandwidth", "copy of 512 MiB", "", 1e-5, operations=0),
    measured_row("bandwidth", "softmax 3x4", "fp16", 2e-5, operations=0),
    *(
        measured_row("networks", name, "fp16", seconds, peers={COMPILED: 1.2 * seconds})
        for name, seconds in TIMES.items()
    ),
    measured_row("int8", "resnet50 int8 b32", "fp16", 2.0e-3, error_against_float32=0.0123),
    measured_row(
        *("products", "1x8192x2048", "fp16", 1e-5),
        peers={"torch": 1.2e-5},
        spread={"infera": [0.9e-5, 1.5e-5]},
        cold={"infera": 2e-5, "torch": 1.8e-5},
    ),
    {"set": "first run", "name": "resnet50", "precision": "fp32", "seconds": 3.0, "peers": {}},
)


def test_the_document_is_what_the_results_give() -> None:
    files = render(read())
    for name, text in files.items():
        assert (DOCS / name).read_text() == text, f"{name} is not what bench/results gives: run `make report`"
    assert {path.name for path in DOCS.glob("performance*")} == files.keys()


def test_the_tables_of_the_readme_are_what_the_results_give() -> None:
    text, newest = README.read_text(), report.on_cpus(read())
    assert report_readme.filled(text, newest) == text, "run `make report`"
    for line in text.splitlines():
        if line.startswith("<!-- ") and line != report_readme.END:
            with pytest.raises(ValueError, match="no place for the table"):
                report_readme.filled(text.replace(line, ""), newest)


def test_charts_are_svg_and_are_shown() -> None:
    files = render({**read(), "nvidia-h200": measured(*ROWS)})
    charts = {name for name in files if name.endswith(".svg")}
    hosts = {host for host, topic in report.on_cpus(read()) if topic == report_cpu.CHARTED}
    assert len(hosts) > 1
    assert len(charts) == len(hosts) + 3
    for name in charts:
        assert ElementTree.fromstring(files[name]).tag == "{http://www.w3.org/2000/svg}svg"
    assert set(re.findall(r"\]\(([\w-]+\.svg)\)", files[DOCUMENT])) == charts


def test_without_measurements_the_first_lines_say_so() -> None:
    results = {name: result for name, result in read().items() if "gpu" not in result}
    text = render(results)[DOCUMENT]
    assert "**No GPU measurement exists yet.**" in text.splitlines()[2]
    assert text.count("not measured |") == len(TARGETS)


def test_measurements_and_predictions_are_apart() -> None:
    files = render({**read(), "nvidia-h200": measured(*ROWS)})
    text = files[DOCUMENT]
    assert "No GPU measurement" not in text
    before, _, after = text.partition("## Predicted for GPUs, not measured")
    assert "predict" not in before.partition("## Measured on GPUs")[2].lower()
    assert "1.20x torch.compile" in before
    assert "1.20x torch.compile" not in after
    assert "PREDICTED, not measured" in files[PREDICTED_CHART]


def test_rows_say_what_they_were_measured_with() -> None:
    text = render({"nvidia-h200": measured(*ROWS)})[DOCUMENT]
    for fact in ("NVIDIA H200", "driver 580.1", "commit 0123456789", "torch 2.11", "triton 3.9.0"):
        assert fact in text
    assert "| resnet50 int8 b32 fp16 | 2 |  | 0.5 | 5 | 50% |  | error 1.2e-02 against float32 |" in text
    assert "| resnet50 b1 fp16 | 1 |  | 1.0 | 10 | 50% |  | 1.20x torch.compile max-autotune |" in text
    assert "| 1x8192x2048 fp16 | 0.01, 0.02 cold | 0.009 to 0.015 |" in text
    assert "| 1.20x torch (0.90x cold) |" in text


@pytest.mark.parametrize(
    ("work", "shown"),
    [
        ("ResNet-50, against torch.compile", "| at least 1.15x | 1.2x | met |"),
        ("softmax, norms, chains, transposes, share of a copy", "| at least 0.85 | 0.5 | missed |"),
        ("products, against cuBLAS", "| at least 0.95x | 0.9x | missed |"),
        ("the host's time for a replayed run", "| at most 1.5e-05 s | 1.2e-05 s | 3 of 10 rows |"),
        ("load and first run, kernels on disk", "| at most 2 s | 3 s | missed |"),
        ("int8 ResNet-50 and BERT-base, batch 32, against float16", "| at least 1.3x | 2x | 1 of 2 rows |"),
        ("attention, against the faster of flash and cuDNN attention", "| at least 0.9x | not measured |  |"),
    ],
)
def test_targets_are_held_against_measured_rows(work: str, shown: str) -> None:
    text = render({"nvidia-h200": measured(*ROWS)})[DOCUMENT]
    assert f"| {work} {shown}" in text


def test_the_newest_row_counts() -> None:
    later = measured(measured_row("networks", "resnet50 b1", "fp16", 5e-4), time="2031-01-01T00:00:00")
    text = render({"a": later, "b": measured(*ROWS)})[DOCUMENT]
    assert "| resnet50 b1 fp16 | 0.5 |  | 2.0 |" in text
    assert "| resnet50 b32 fp16 | 4 |" in text


def test_peers_are_those_of_all_files_of_a_commit() -> None:
    """torch.compile's are in a section of its own, or in an earlier file."""
    beside_others = measured_row("networks", "resnet50 b1", "fp16", 5e-4, peers={"torch eager": 1e-3})
    for commit, peers in ((COMMIT, {COMPILED: 1.2e-3, "torch eager": 1e-3}), ("fedcba", {"torch eager": 1e-3})):
        later = measured(beside_others, time="2031-01-01T00:00:00", commit=commit)
        (row,) = [r for r in report_gpu.rows_of([later, measured(*ROWS)]) if r["name"] == "resnet50 b1"]
        assert (row["seconds"], row["peers"]) == (5e-4, peers)
    for commit in ("unknown", f"{COMMIT}+changes"):
        files = [measured(*ROWS, commit=commit), measured(beside_others, time="2031-01-01T00:00:00", commit=commit)]
        (row,) = [r for r in report_gpu.rows_of(files) if r["name"] == "resnet50 b1"]
        assert row["peers"] == {"torch eager": 1e-3}


TUNED = {"choices": 4, "tuned": 3, "changed": 2}


def test_what_tuning_gains_shows_and_targets_say_of_what_they_are() -> None:
    peers = {COMPILED: 1.2e-3, "infera, predicted tiles": 1.1e-3}
    rows = [{**row, **TUNED, "peers": peers} if row["name"] == "resnet50 b1" else row for row in ROWS]
    files = render({"nvidia-h200": measured(*rows)})
    text = files[DOCUMENT]
    shown = "1.20x torch.compile max-autotune, 1.10x infera, predicted tiles"
    assert f"| resnet50 b1 fp16 | 1 |  | 1.0 | 10 | 50% | 3 of 4 | {shown} |" in text
    assert "| ResNet-50, against torch.compile | at least 1.15x | 1.2x | met | 1 of 3 |" in text
    assert "| products, against cuBLAS | at least 0.95x | 0.9x | missed |  |" in text
    assert "Targets go by infera as it is" in text
    assert not any("predicted tiles" in content for name, content in files.items() if name.endswith("networks.svg"))
    text = render({"nvidia-h200": measured(*ROWS)})[DOCUMENT]
    assert "Targets go by infera as it is" not in text
    assert "rows tuned" not in text


@pytest.mark.parametrize("first", [True, False])
def test_of_one_commit_rows_that_were_tuned_count(first: bool) -> None:
    """gpu-check goes by predicted tiles, also where it is run after rows were tuned."""
    tuned = measured_row("networks", "resnet50 b1", "fp16", 8e-4, peers={"torch eager": 2e-3}, **TUNED)
    plain = measured_row("networks", "resnet50 b1", "fp16", 1e-3, choices=4, tuned=0, peers={COMPILED: 1.2e-3})
    times = ("2030-01-01T00:00:00", "2031-01-01T00:00:00")
    for commit, seconds in ((COMMIT, 8e-4), ("unknown", 1e-3 if first else 8e-4)):
        files = [
            measured(row, time=time, commit=commit)
            for row, time in zip((tuned, plain), times if first else times[::-1], strict=True)
        ]
        (row,) = report_gpu.rows_of(files)
        assert row["seconds"] == seconds
        assert row["peers"].keys() >= ({COMPILED, "torch eager"} if commit == COMMIT else set())


def test_what_tuning_has_found_is_told_by_set() -> None:
    found = {"set": "products", "choices": 3, "measured": 3, "better_than_predicted": 2, "mean_gain": 1.21}
    first, second = (
        measured(measured_row("products", "a", "fp16", 1e-5), time=f"203{i}-01-01T00:00:00") for i in range(2)
    )
    first["sections"].append(
        {
            "section": "tuning operators",
            "facts": {
                "tuned": [
                    {**found, "row": "products: a fp16", "rejected": ["one"]},
                    {**found, "row": "products: b fp16", "measured": 1, "mean_gain": 1.0, "rejected": []},
                ]
            },
        }
    )
    again = {**found, "row": "products: a fp16", "measured": 0, "mean_gain": 1.0, "rejected": []}
    second["sections"].append({"section": "tuning operators", "facts": {"tuned": [again]}})
    text = render({"a": second, "b": first})[DOCUMENT]
    assert "| products | 2 | 4 | 4 | 1.15x | 1 |" in text
    assert report_gpu.tuning([second]) == ""


def test_what_is_told_of_tuning_is_no_row() -> None:
    """A section that was ended says in `rows` what its cases found."""
    (row,) = report_gpu.rows_of([measured(measured_row("networks", "a", "fp16", 1.0), {"row": "a", "choices": 3})])
    assert row["name"] == "a"


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, "| 1.2x | met |"),
        ({"wrong": "differs from PyTorch"}, "| 1.2x | 2 of 3 rows |"),
        ({"peers": {}}, "| 1.2x | 2 of 3 rows |"),
        ({"cold": {"infera": 1e-3}}, "| 1.2x | 2 of 3 rows |"),
        ({"cold": {"infera": 1e-3, COMPILED: 1.1e-3}}, "| 1.1x | missed |"),
        ({"peers": {COMPILED: 1e-3}}, "| 1x | missed |"),
    ],
)
def test_no_target_is_met_by_rows_that_are_wrong_or_missing(changed: dict[str, Any], shown: str) -> None:
    rows = [{**row, **changed} if row["name"] == "resnet50 b1" else row for row in ROWS]
    text = render({"nvidia-h200": measured(*rows)})[DOCUMENT]
    assert f"| ResNet-50, against torch.compile | at least 1.15x {shown}" in text
    if "wrong" in changed:
        assert "| resnet50 b1 fp16 |  |  |  |  |  |  | wrong: differs from PyTorch |" in text


def test_a_mean_is_missed_by_all_rows_or_not_at_all() -> None:
    slow = measured_row("convolutions", "3x3", "fp16", 1e-3, peers={"torch": 1e-4})
    (target,) = [t for t in TARGETS if t.set == "convolutions"]
    assert target.verdict(target.reached([slow])) == "1 of 24 rows"
    assert target.verdict(target.reached([slow] * 24)) == "missed"
    assert target.verdict(target.reached([])) == ""


def test_attention_is_held_against_the_faster_backend_of_both() -> None:
    (target,) = [t for t in TARGETS if t.set == "attention"]
    both = measured_row("attention", "d64", "fp16", 1e-3, peers={"torch flash": 2e-3, "torch cuDNN": 1.5e-3})
    assert target.reached([both]).value == pytest.approx(1.5)
    alone = {**both, "peers": {"torch flash": 2e-3}}
    assert target.reached([alone]).rows == 0


def test_the_newest_file_of_a_topic_counts() -> None:
    results = dict(read())
    name = next(n for n in results if "-dispatch-" in n)
    newer = copy.deepcopy(dict(results[name]))
    newer["environment"]["time"] = "2031-01-01T00:00:00+00:00"
    newer["rows"][0]["micros_a_node"] = {"somebody": 0.125}
    results[f"{name[:-10]}2031-01-01"] = newer
    assert "| somebody | 0.125 |" in render(results)[DOCUMENT]
    assert "NumPy by hand" not in render(results)[DOCUMENT]


def test_every_target_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were planned for the predictions are those that are measured."""
    (planned,) = (r["rows"] for r in report.predicted(read()) if r["card"]["name"] == report.SHOWN)
    elsewhere = {"first run": 1}
    for target in TARGETS:
        assert target.count == elsewhere.get(target.set, len(target.rows(planned))), target.work
