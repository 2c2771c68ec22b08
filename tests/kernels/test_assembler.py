"""Which assembler is chosen for a driver."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infera_kernels.launch.assembler import VARIABLE, release_of, suit

pytestmark = pytest.mark.kernels


def assembler(path: Path, release: str) -> Path:
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assembler(tmp_path / "ptxas", "12.9")
    assembler(tmp_path / "ptxas-blackwell", "13.4")
    return tmp_path


@pytest.mark.parametrize(
    ("driver", "older"), [(13000, False), (13010, False), (12080, True), (12020, True), (11080, False)]
)
def test_a_driver_gets_code_of_its_own_release(driver: int, older: bool, folder: Path) -> None:
    suit(driver, folder)
    assert os.environ.get(VARIABLE) == (str(folder / "ptxas") if older else None)


def test_what_the_environment_says_stands(folder: Path) -> None:
    os.environ[VARIABLE] = "mine"
    suit(12080, folder)
    assert os.environ[VARIABLE] == "mine"


def test_a_triton_with_one_assembler_is_left_alone(folder: Path) -> None:
    (folder / "ptxas-blackwell").unlink()
    suit(12080, folder)
    assert VARIABLE not in os.environ


def test_what_is_no_assembler_has_no_release(tmp_path: Path) -> None:
    assert release_of(tmp_path / "absent") is None
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    assert release_of(silent) is None


def test_the_installed_triton_ships_one_that_says_its_release() -> None:
    triton = pytest.importorskip("triton")
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = release_of(shipped / "ptxas")
    assert found is not None
    assert found >= (12, 0)
