"""Runs the files interpret_*.py where kernels are imported to be interpreted: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.kernels.support import SHARD

pytestmark = pytest.mark.kernels

HERE = Path(__file__).parent
SUITES: Mapping[str, int] = {
    "attention": 105,
    "batch": 220,
    "cache": 5,
    "conv": 75,
    "copies": 110,
    "elementwise": 340,
    "gpu_check": 9,
    "gpu_rows": 11,
    "matmul": 75,
    "moves": 58,
    "nbits": 27,
    "networks": 1,
    "normalize": 75,
    "operators": 1400,
    "pool": 37,
    "quant": 43,
    "recurrent": 17,
    "reduce": 210,
    "rotary": 40,
    "rows": 95,
    "scan": 80,
    "top_k": 20,
}
"""interpret_<name>.py -> tests that it holds; fewer would mean that some were not collected."""

SHARDS = {"batch": 2, "operators": 8}
"""Suites that take longest, in so many parts; see `tests.kernels.support.shard`."""

TIMEOUT = 1200
"""Seconds; a suite waits for a processor behind those that started before it."""

RUNS = tuple((suite, part) for suite in SUITES for part in range(SHARDS.get(suite, 1)))


def test_every_suite_is_run() -> None:
    assert {path.stem.removeprefix("interpret_") for path in HERE.glob("interpret_*.py")} == SUITES.keys()


def interpret(suite: str, part: int, report: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
            str(HERE / f"interpret_{suite}.py"),
        ],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", SHARD: f"{part}/{SHARDS.get(suite, 1)}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


Reports = Mapping[str, tuple[Path, Future[subprocess.CompletedProcess[str]]]]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reports]:
    """Runs of the suites that are asked for, as many at a time as there are processors."""
    folder = tmp_path_factory.mktemp("reports")
    wanted = {item.name for item in request.session.items}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        started = {}
        for suite, part in sorted(RUNS, key=lambda run: -SUITES[run[0]]):
            name = f"{suite}-{part}"
            if f"test_kernels_in_the_interpreter[{name}]" in wanted:
                report = folder / f"{name}.xml"
                started[name] = report, pool.submit(interpret, suite, part, report)
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize(("suite", "part"), RUNS, ids=[f"{suite}-{part}" for suite, part in RUNS])
def test_kernels_in_the_interpreter(suite: str, part: int, reports: Reports) -> None:
    pytest.importorskip("triton")
    report, running = reports[f"{suite}-{part}"]
    done = running.result()
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, output
    found = ElementTree.parse(report).getroot().find("testsuite")
    assert found is not None
    counts = {name: int(found.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert counts["tests"] >= SUITES[suite] // SHARDS.get(suite, 1), output
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0, output
