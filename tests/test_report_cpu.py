"""What is said of results on a CPU: targets, and why what is missed is; tables of memory and of overload. No GPU."""

from __future__ import annotations

from typing import Any

import pytest

from bench import report, report_cpu
from bench.cpu_targets import OLDER, TARGETS
from bench.report import read


def test_targets_on_cpus_are_held_against_the_newest_files() -> None:
    times = {"infera": {"wall_ms": 2.0}, "infera[jit]": {"wall_ms": 1.0}, "onnxruntime": {"wall_ms": 2.0}}
    row = {"model": "vgg19", "example": "b1", "threads": 1, "failure": "", "summaries": times}
    slow = {"rows": [{**row, "ratios": {"wall": 0.7}}, {**row, "example": "b1 dark", "ratios": {"wall": 0.6}}]}
    text = report_cpu.targets({"": slow})
    assert "| VGG-19, 1 thread | at most 0.65 | 0.7 | **missed** |" in text
    assert "- VGG-19, 1 thread: Nearly all of it are products" in text
    fast = {"rows": [{**row, "ratios": {"wall": 0.5}}]}
    text = report_cpu.targets({"": fast, "overload": {"rows": [{"engine": "the server's process", "goodput": 0.96}]}})
    assert "| VGG-19, 1 thread | at most 0.65 | 0.5 | met |" in text
    assert "| answered at ten times the load, of the peak, in one process | at least 0.95 | 0.96 | met |" in text
    assert "missed" not in text
    assert "The largest" not in text


def test_every_target_can_be_measured() -> None:
    newest: dict[str, list[dict[str, Any]]] = {}
    for (_, topic), (_, result) in report.on_cpus(read()).items():
        newest.setdefault(topic, []).append(dict(result))
    for target in TARGETS:
        found = [result for topic in target.topics for result in newest[topic]]
        assert any(target.judge(result["rows"]) is not None for result in found), target.work


def served_row(server: str, body: str, rps: float) -> dict[str, Any]:
    return {"server": server, "body": body, "connections": 64, "rps": rps, "p50_ms": 1.0, "cpu_us": 50.0}


def test_a_topic_without_the_rows_leaves_it_to_another() -> None:
    line = "| requests/s, JSON, 64 connections, over MLServer's | at least 8 | "
    ours, theirs = served_row("infera", "json", 900.0), served_row("mlserver", "json", 100.0)
    both, alone = {"rows": [ours, theirs]}, {"rows": [ours]}
    apart = {"rows": [ours, served_row("mlserver", "json", 90.0)]}
    assert f"{line}9 | met |" in report_cpu.targets({"serving": both})
    assert f"{line}9 | met |" in report_cpu.targets({"serving": both, "serving-peers": alone})
    assert f"{line}10 | met |" in report_cpu.targets({"serving": both, "serving-peers": apart})
    assert line not in report_cpu.targets({"serving": alone, "serving-peers": alone})


def test_what_is_missed_by_older_results_says_so() -> None:
    commit = next(iter(OLDER))
    rows = [{"engine": "a process of its own", "goodput": 0.96, "memory_end_mb": 120.0, "memory_after_1s_mb": 100.0}]
    result = {"rows": rows, "environment": {"commit": f"{commit}0000+changes"}}
    said = report_cpu.targets({"overload": result})
    assert "| at most 1.1 | 1.2 | **missed** |" in said
    assert f"- All that is missed of *Overload*: measured at {commit}, before {OLDER[commit]};" in said
    rows[0]["memory_end_mb"] = 110.0
    assert commit not in report_cpu.targets({"overload": result})
    rows[0]["memory_after_1s_mb"] = 0.0
    assert "over that after its first second" not in report_cpu.targets({"overload": result})


def test_nothing_is_missed_without_a_reason() -> None:
    for (host, topic), (_, result) in report.on_cpus(read()).items():
        for target in TARGETS:
            value = target.judge(result["rows"]) if topic in target.topics else None
            if value is not None and not target.met(value):
                assert target.why or result["environment"]["commit"][:10] in OLDER, f"{target.work} on {host}"


def test_overload_says_how_long_it_lasted() -> None:
    row = {"engine": "a process of its own", "goodput": 0.96, "recovery_s": 0.0}
    assert "| seconds of overload | 20 |" in report_cpu.overload({"options": {"seconds": 20.0}, "rows": [row]})


@pytest.mark.parametrize("runtimes", [("infera", "onnxruntime"), ("infera", "infera[jit]", "onnxruntime")])
def test_memory_is_that_of_every_runtime_measured(runtimes: tuple[str, ...]) -> None:
    sizes = {"imported": 1e6, "loaded": 2e6, "peak": 3e6}
    rows = [{"runtime": r, "model": "m", "threads": 1, **sizes, "peak": (3 + i) * 1e6} for i, r in enumerate(runtimes)]
    header, _, cells = report_cpu.resident({"rows": rows}).splitlines()[:3]
    assert [cell.strip() for cell in header.split("|")[3:-1]] == [
        *(f"{name}, loaded MB" for name in runtimes),
        *(f"{name}, peak MB" for name in runtimes),
    ]
    assert [cell.strip() for cell in cells.split("|")[3:-1]] == [*("2" for _ in runtimes), *("345"[: len(runtimes)])]
