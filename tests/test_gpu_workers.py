"""Sections that take their process down: what is told of them, and that everything else is run all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_journal import Journal, State
from bench.gpu_report import OUT_OF_TIME
from bench.gpu_workers import Limits, Supervisor, Worker
from infera_gpu.ops import registry
from tests import gpu_sections


def outcomes(tmp_path: Path, *names: str, minutes: str = "1") -> dict[str, dict[str, Any]]:
    """By section, as the file has them."""
    code = gpu_sections.main(["--output", str(tmp_path), f"--minutes={minutes}", "--only", *names])
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert code == int(not record["passed"])
    return {o["section"]: o for o in record["sections"]}


def test_sections_share_a_process_while_it_is_well(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "good", "last")
    assert {o["status"] for o in found.values()} == {"ok"}
    assert found["good"]["facts"]["process"] == found["last"]["facts"]["process"]
    facts = found["good"]["facts"]
    assert facts["steps"] == {"a": 2, "b": 1, "c": 1}
    assert facts["tiles"] == {"(64, 64)": 0.5}


def test_a_process_that_dies_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = outcomes(tmp_path, "good", "crash", "last")
    assert [o["status"] for o in found.values()] == ["ok", "failed", "ok"]
    assert found["crash"]["summary"] == "signal SIGABRT"
    assert "about to die" in found["crash"]["facts"]["said"]
    assert "in crash" in found["crash"]["facts"]["said"], "where it died"
    assert found["good"]["facts"]["process"] != found["last"]["facts"]["process"]
    assert "last" in capsys.readouterr().out


def test_a_lost_gpu_is_a_new_process(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "good", "losing", "last")
    assert [o["status"] for o in found.values()] == ["ok", "failed", "ok"]
    assert found["losing"]["summary"] == "a fault that a section took for a wrong result"
    assert found["good"]["facts"]["process"] != found["last"]["facts"]["process"]


def test_a_section_that_does_not_end_is_ended(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "hanging", "last")
    assert found["hanging"]["summary"] == "no end after 3 s"
    assert 3 <= found["hanging"]["seconds"] < 10
    assert found["last"]["status"] == "ok"


def test_every_bad_case_is_named_and_none_stops_the_others(tmp_path: Path) -> None:
    facts = outcomes(tmp_path, "cases", "last")["cases"]["facts"]
    assert {name: problem.partition(" (")[0] for name, problem in facts["problems"].items()} == {
        "first": "",
        "dies": "signal SIGABRT",
        "second": "",
        "faults": "Fault: cudaErrorIllegalAddress",
        "wrong": "AssertionError: not equal",
        "hangs": "no answer in time",
        "last": "",
    }
    assert "(gpu_sections.py:" in facts["problems"]["wrong"], "where it was raised"
    assert facts["here"] == ["last"], "those before it ran in the processes before"


def test_a_gpu_that_every_case_loses_is_given_up(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "always", "last")
    assert found["always"]["summary"] == "it lost the GPU again and again"
    assert len(found["always"]["facts"]["failed"]) == gpu_sections.REPLACED + 1
    assert found["last"]["status"] == "ok"


def test_a_section_that_goes_on_has_no_time_of_its_own_again(tmp_path: Path) -> None:
    """Three seconds in all, of which a process takes more than one: not three in each. Where processes are slow to
    start, the section is ended from outside."""
    found = outcomes(tmp_path, "dragging", "last")
    facts = found["dragging"]["facts"]
    assert 1 <= len(facts.get("tried") or facts["failed"]) <= 3 < gpu_sections.REPLACED
    assert found["last"]["status"] == "ok"


def test_an_operator_that_loses_the_gpu_twice_is_given_up(tmp_path: Path) -> None:
    facts = outcomes(tmp_path, "swept")["swept"]["facts"]
    assert {name.split("-")[0] for name in facts["failed"]} == {"Abs"}
    assert len(facts["failed"]) == 2
    versions = sum(op.name == "Abs" for op in registry())
    assert facts["given_up"] == 3 * versions - 2
    assert facts["cases"] == facts["done"] == 3 * sum(op.name == "Exp" for op in registry())


def test_no_process_is_started_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: Any, log: Path) -> Worker:
        started.append(command)
        return begin(command, log)

    begin = Worker.start
    monkeypatch.setattr(Worker, "start", start)
    found = outcomes(tmp_path, "overtime", "last", minutes="0.1")
    assert [(o["status"], o["summary"]) for o in found.values()] == [
        ("failed", "a fault that a section took for a wrong result"),
        ("skipped", OUT_OF_TIME),
    ]
    assert len(started) == 1
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert outcomes(tmp_path, "good", minutes="0")["good"]["summary"] == OUT_OF_TIME
    assert len(started) == 1


@pytest.mark.parametrize(("over", "left", "ended"), [(-10, 30, False), (1, 30, False), (3, 30, True), (-10, -3, True)])
def test_no_section_goes_on_when_the_time_of_all_is_over(tmp_path: Path, over: float, left: float, ended: bool) -> None:
    """Whatever it has been given: a worker's clock starts later than the command's."""
    supervisor = Supervisor(["good"], Journal(tmp_path), None, time.monotonic() - over, Limits(grace=2))  # type: ignore[arg-type]
    state = State(section="good", since=time.time() - 2.5, left=left)
    assert supervisor._hung(state, 0.0).startswith("no end") is ended


def test_readings_are_of_before_and_after(tmp_path: Path) -> None:
    assert outcomes(tmp_path, "good")["good"]["readings"] == [{"sm_clock": 1980}] * 2


def test_a_gpu_that_is_gone_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command still sees it, its worker does not."""
    sign = tmp_path / "gone"
    monkeypatch.setenv("GPU_GONE_AFTER", str(sign))
    sections = {name: gpu_sections.SECTIONS[name] for name in ("good", "last")}
    begun = Journal.state

    def going(journal: Journal) -> Any:
        sign.touch()
        return begun(journal)

    monkeypatch.setattr(Journal, "state", going)
    found = outcomes(tmp_path, *sections)
    assert [(o["status"], o["summary"]) for o in found.values()] == [
        ("failed", "the GPU is gone"),
        ("skipped", "the GPU is gone"),
    ]
    assert "it fell off the bus" in found["good"]["facts"]["said"]


def test_a_worker_that_never_begins_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a fault has wedged the driver: it hangs before the first section."""
    monkeypatch.setenv("GPU_WEDGED", "1")
    found = outcomes(tmp_path, "good", "last")
    assert [(o["status"], o["summary"]) for o in found.values()] == [("failed", "no section begun after 1 s")] * 2


# ---- the command itself is ended


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def ended(process: int) -> bool:
    """Gone, or waiting for somebody who asks what became of it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(number: signal.Signals, tmp_path: Path) -> None:
    processes, temporary = tmp_path / "processes", tmp_path / "temporary"
    temporary.mkdir()
    command = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu_sections", "--output", str(tmp_path), "--only", "lasting"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "GPU_PROCESSES": str(processes), "TMPDIR": str(temporary)},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(processes.exists)
        started = [int(word) for word in processes.read_text().split()]
        assert len(started) == 2
        assert not any(map(ended, started))
    finally:
        command.send_signal(number)
        code = command.wait(60)
    wait_for(lambda: all(map(ended, started)))
    if number in (signal.SIGTERM, signal.SIGHUP):
        assert code == 128 + number
    if number != signal.SIGKILL:
        assert list(temporary.iterdir()) == [], "it clears its files away"


# ---- the journal


def test_a_line_that_was_cut_short_counts_as_not_written(tmp_path: Path) -> None:
    """As where the worker was killed while it wrote."""
    journal = Journal(tmp_path / "journal")
    journal.write("section", section="one", left=5.0)
    whole = journal.path.read_bytes()
    journal.write("case", case="\N{GREEK SMALL LETTER ALPHA}", seconds=2.0)
    line = journal.path.read_bytes()[len(whole) :]
    for length in range(1, len(line) - 1):
        journal.path.write_bytes(whole + line[:length])
        assert [found["kind"] for found in journal.lines()] == ["section"]
        journal.write("tried", case="b", problem="", found=None, lost=False)
        assert [found["kind"] for found in journal.lines()] == ["section", "tried"]
        assert journal.state().section == "one"
        assert list(journal.state().tried) == ["b"]
