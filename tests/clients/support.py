"""Where clients are that need packages of their own: `make test-clients` puts them there."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("INFERA_CLIENTS") or ROOT / ".venv-clients")
INSTALL = "make test-clients installs it"

PERF_GLIBC = (2, 38)
"""What perf_analyzer's wheel is linked with."""


def kserve_python() -> Path:
    """The Python that has kserve. Skips the test where there is none."""
    if not any(FOLDER.glob("lib/python*/site-packages/kserve")):
        pytest.skip(f"kserve is not in {FOLDER}: {INSTALL}")
    return FOLDER / "bin" / "python"


def schemathesis() -> str:
    """The command. Skips the test where it is not there."""
    binary = FOLDER / "bin" / "schemathesis"
    if not binary.exists():
        pytest.skip(f"schemathesis is not in {FOLDER}: {INSTALL}")
    return str(binary)


def perf_analyzer() -> list[str]:
    """The command. Skips the test where it is not there or cannot run.

    Where the C library is too old, INFERA_GLIBC may name a folder with a newer loader and its libraries.
    """
    binary = FOLDER / "perf" / "perf_analyzer" / "bin" / "perf_analyzer"
    if not binary.exists():
        pytest.skip(f"perf_analyzer is not in {FOLDER}: {INSTALL}")
    found = tuple(int(part) for part in platform.libc_ver()[1].split("."))
    if found >= PERF_GLIBC:
        return [str(binary)]
    libraries = Path(os.environ.get("INFERA_GLIBC", "/nowhere"))
    loader = shutil.which("ld-linux-x86-64.so.2", path=libraries)
    if loader is None:
        pytest.skip(
            f"perf_analyzer needs glibc {'.'.join(map(str, PERF_GLIBC))}; INFERA_GLIBC may name a folder with it"
        )
    return [loader, "--library-path", str(libraries), str(binary)]
