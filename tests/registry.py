"""Models for the tests of the examples: from the registry, and run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from examples.v2client import Infer
from infera_gpu.errors import UnreachableError
from infera_gpu.fetch import fetch_files


def fetched(name: str) -> tuple[Path, ...]:
    """The entry's files, the model first. Skips the test where nothing answers; any other failure is one."""
    try:
        return fetch_files(name)
    except UnreachableError as error:
        pytest.skip(f"{name} is out of reach: {error}")


def by_onnxruntime(model: Path) -> Infer:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))
