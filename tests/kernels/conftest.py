"""Triton's own cache for one test session only, so that compilations asked for do happen; and the interpreter's tests,
which come last: their processes begin with the session and leave the others a processor's time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import pytest

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.launch.assembler import VARIABLE
from tests.kernels import known_differences
from tests.kernels.interpretations import RUNS, Reports, interpreting, place_of
from tests.kernels.watching import WatchingLauncher

INTERPRETED = frozenset(place_of(*run) for run in RUNS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name in INTERPRETED)


@pytest.fixture(scope="session", autouse=True)
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="session", autouse=True)
def reports(
    triton_cache: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reports]:
    """Runs of the suites whose tests are in this session."""
    wanted = {item.name for item in request.session.items} if find_spec("triton") else set()
    with interpreting(wanted, tmp_path_factory.mktemp("reports")) as started:
        yield started


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest) -> Iterator[known_differences.Difference]:
    """What the installed Triton is known to make otherwise in a test: held to be so, and hidden from it."""
    found = known_differences.of(request.node.nodeid, version("triton") if find_spec("triton") else "")
    with known_differences.allowed(found):
        yield found


@pytest.fixture(autouse=True)
def assembler_restored() -> Iterator[None]:
    """The assembler that a launcher chose for a test's old driver is not the next test's."""
    before = os.environ.get(VARIABLE)
    yield
    if before is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = before


@pytest.fixture
def interpreter() -> InterpreterLauncher:
    """For the suites that test_interpreter.py runs: kernels that race fail."""
    return WatchingLauncher()
