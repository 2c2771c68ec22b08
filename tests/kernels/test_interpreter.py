"""Every kernel in the interpreter: the files interpret_*.py, whose processes run beside the tests before these."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.kernels.interpretations import HERE, RUNS, SHARDS, SUITES, TIMEOUT, Reports, place_of

pytestmark = pytest.mark.kernels


def test_every_suite_is_run() -> None:
    assert {path.stem.removeprefix("interpret_") for path in HERE.glob("interpret_*.py")} == SUITES.keys()


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize(("suite", "part"), RUNS, ids=[f"{suite}-{part}" for suite, part in RUNS])
def test_kernels_in_the_interpreter(suite: str, part: int, reports: Reports) -> None:
    pytest.importorskip("triton")
    report, running = reports[place_of(suite, part)]
    done = running.result()
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, output
    found = ElementTree.parse(report).getroot().find("testsuite")
    assert found is not None
    counts = {name: int(found.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert counts["tests"] >= SUITES[suite] // SHARDS.get(suite, 1), output
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0, output
