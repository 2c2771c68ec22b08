"""Runs the files interpret_*.py where kernels are imported to be interpreted: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.kernels

SUITES = sorted(Path(__file__).parent.glob("interpret_*.py"))
LEAST = 450
"""Tests that the suites hold; fewer would mean that some were not collected."""


def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *map(str, SUITES)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, output
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert counts["tests"] >= LEAST, output
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0, output
