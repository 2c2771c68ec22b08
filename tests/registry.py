"""Files of catalogue entries for tests that are marked `models`."""

from __future__ import annotations

from pathlib import Path

import pytest

from infera_gpu.fetch import UnreachableError, fetch_files


def fetched(name: str) -> tuple[Path, ...]:
    """The entry's files, the model first. Skips the test where nothing answers; any other failure is one."""
    try:
        return fetch_files(name)
    except UnreachableError as error:
        pytest.skip(f"{name} is out of reach: {error}")
