"""Triton's own cache for one test session only, so that compilations asked for do happen; and an interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infera_kernels.launch import InterpreterLauncher


@pytest.fixture(scope="session", autouse=True)
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def interpreter() -> InterpreterLauncher:
    """For the suites that test_interpreter.py runs."""
    return InterpreterLauncher()
