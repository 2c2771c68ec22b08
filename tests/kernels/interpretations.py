"""The files interpret_*.py, each run where kernels are imported to be interpreted: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.kernels.support import SHARD

HERE = Path(__file__).parent
SUITES: Mapping[str, int] = {
    "attention": 105,
    "batch": 220,
    "cache": 5,
    "conv": 75,
    "copies": 110,
    "decode": 164,
    "destinations": 126,
    "elementwise": 340,
    "gated": 97,
    "gpu_check": 15,
    "gpu_rows": 13,
    "gpu_tuning": 10,
    "matmul": 97,
    "moves": 58,
    "nbits": 34,
    "networks": 3,
    "normalize": 75,
    "operators": 1400,
    "pool": 37,
    "quant": 43,
    "races": 18,
    "recurrent": 17,
    "reduce": 210,
    "rotary": 40,
    "rows": 95,
    "scan": 80,
    "tma": 51,
    "top_k": 20,
}
"""interpret_<name>.py -> tests that it holds; fewer would mean that some were not collected."""

SHARDS = {"batch": 2, "operators": 8}
"""Suites that take longest, in so many parts; see `tests.kernels.support.shard`."""

TIMEOUT = 1200
"""Seconds; a suite waits for a processor behind those that started before it."""

RUNS = tuple((suite, part) for suite in SUITES for part in range(SHARDS.get(suite, 1)))


def place_of(suite: str, part: int) -> str:
    """The name of the test that waits for a part of a suite."""
    return f"test_kernels_in_the_interpreter[{suite}-{part}]"


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
"""Of a test: its report, once its process has ended."""


@contextmanager
def interpreting(wanted: Container[str], folder: Path) -> Iterator[Reports]:
    """Runs the suites of the tests that are wanted, as many at a time as there are processors, meanwhile."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        started = {}
        for suite, part in sorted(RUNS, key=lambda run: -SUITES[run[0]]):
            if (test := place_of(suite, part)) in wanted:
                report = folder / f"{suite}-{part}.xml"
                started[test] = report, pool.submit(interpret, suite, part, report)
        yield started
        pool.shutdown(cancel_futures=True)
