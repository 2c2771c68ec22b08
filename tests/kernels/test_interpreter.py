"""Runs the files interpret_*.py where kernels are imported to be interpreted: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.kernels

HERE = Path(__file__).parent
SUITES = {
    "attention": 105,
    "cache": 5,
    "conv": 75,
    "copies": 110,
    "elementwise": 340,
    "gpu_check": 8,
    "matmul": 75,
    "moves": 44,
    "nbits": 27,
    "networks": 1,
    "normalize": 75,
    "operators": 900,
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


def test_every_suite_is_run() -> None:
    assert {path.stem.removeprefix("interpret_") for path in HERE.glob("interpret_*.py")} == SUITES.keys()


@pytest.mark.parametrize("suite", SUITES)
def test_kernels_in_the_interpreter(suite: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = tmp_path / "report.xml"
    path = HERE / f"interpret_{suite}.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(path)],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, output
    found = ElementTree.parse(report).getroot().find("testsuite")
    assert found is not None
    counts = {name: int(found.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert counts["tests"] >= SUITES[suite], output
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0, output
