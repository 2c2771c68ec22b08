"""What is marked `kernels` needs Triton, and is skipped, and counted, without it. Properties have no time limit and try
the same examples in every run; `--hypothesis-profile=others` has them try others.

Passes run whenever a model is loaded, in child processes too: no test may pass by what an earlier run has kept.
Packages that INFERA_TEST_WITHOUT names count as not installed, child processes apart.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

os.environ["INFERA_GRAPH_CACHE"] = "0"

for name in os.environ.get("INFERA_TEST_WITHOUT", "").split():
    sys.modules[name] = None  # type: ignore[assignment]

settings.register_profile(
    "others", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False, print_blob=True
)
settings.register_profile("same", settings.get_profile("others"), derandomize=True, database=None)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("triton") is None:
        for item in items:
            if item.get_closest_marker("kernels"):
                item.add_marker(pytest.mark.skip(reason="needs triton: pip install 'infera-gpu[kernels]'"))
