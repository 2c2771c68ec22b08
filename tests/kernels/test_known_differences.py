"""The table of what Triton 3.6 makes otherwise: its entries are of tests that there are, and hide nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import MappingProxyType

import pytest

from infera_kernels.launch import Inspection, nominal_target
from infera_kernels.launch.compile import Binary, KernelSpec
from tests.kernels.interpretations import HERE
from tests.kernels.known_differences import KNOWN, NONE, Difference, allowed, of

pytestmark = pytest.mark.kernels


def inspection(spilled: int, sass: str) -> Inspection:
    made = Inspection(Binary(KernelSpec("k", (), 128, 0, 90, "3.6.0"), b""))
    made.__dict__.update(_usage={"REG": 128, "STACK": spilled}, sass=sass)
    return made


def test_every_entry_has_a_reason_and_its_test_is_there() -> None:
    pytest.importorskip("triton")
    files = sorted({str(HERE / name.partition("::")[0]) for name in KNOWN})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=200, check=True)
    assert KNOWN.keys() <= {line.removeprefix("tests/kernels/") for line in done.stdout.splitlines()}
    assert all(known.reason and known != Difference(known.reason) for known in KNOWN.values())


def test_entries_are_for_one_release() -> None:
    name = next(iter(KNOWN))
    assert of(f"tests/kernels/{name}", "3.6.0") is KNOWN[name]
    assert of(f"tests/kernels/{name}", "3.9.0") is of("tests/kernels/test_other.py::test", "3.6.0") is NONE


def test_what_differs_otherwise_is_seen() -> None:
    known = Difference("", spilled=8, instead=MappingProxyType({"UTCIMMA": "IMMA"}))
    with allowed(known):
        assert inspection(8, "IMMA.16816 LDGSTS.E").spilled_bytes == 0
        assert inspection(16, "").spilled_bytes == 16
        assert inspection(0, "IMMA.16816 LDGSTS.E").count("UTCIMMA") == 1
        assert inspection(0, "IMMA.16816 LDGSTS.E").count("IMMA") == 0
        assert inspection(0, "UTCIMMA ").count("IMMA") == 1
        assert inspection(0, "IMMA.16816 LDGSTS.E").count("LDGSTS") == 1
    assert inspection(8, "").spilled_bytes == 8


@pytest.mark.parametrize("known", [Difference("", spilled=8), Difference("", instead={"UTCIMMA": "IMMA"})])
def test_a_difference_that_is_gone_fails(known: Difference) -> None:
    with pytest.raises(AssertionError, match="differs no longer"), allowed(known):
        assert inspection(0, "").spilled_bytes + inspection(0, "").count("UTCIMMA") == 0


def test_convolutions_pass_by_tiles_that_their_triton_spills() -> None:
    pytest.importorskip("triton")
    from infera_kernels.triton.conv import CONV, SPILLING

    problem = CONV.problem("half", {"m": 8 * 56 * 56, "batch": 1, "n": 72, "k": 9 * 24, "taps": 9}, "cc")
    usual = CONV.predict(problem, nominal_target(86))
    for triton in ("3.6.0", "3.7.1", "3.8.0", "3.9.0"):
        target = replace(nominal_target(86), triton=triton)
        assert usual in CONV.candidates(problem, target)
        assert (CONV.predict(problem, target) == usual) == (triton[:3] not in SPILLING)
        assert CONV.predict(problem, target) not in SPILLING.get(triton[:3], ())
    assert CONV.predict(problem, replace(nominal_target(90), triton="3.6.0")) == CONV.predict(
        problem, nominal_target(90)
    )
