"""How a process ends that has compiled kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.kernels


def test_a_server_ends_without_a_word_of_triton() -> None:
    """What a server looks at no more it frees all the same: nanobind tells of every object of Triton's that is left."""
    code = "import triton.runtime; from infera_server.models.loader import settle; settle()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
