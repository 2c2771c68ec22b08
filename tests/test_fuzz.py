"""A bounded run of tests.fuzz, and what it must be able to find."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import infera_gpu
from infera_gpu.errors import ModelError
from tests.fuzz import Leak, Trial, attempt, damaged, truncations
from tests.fuzz_models import models


def test_thousands_of_damaged_files_give_errors_of_ours() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--files", "4000", "--seed", "20"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4,000  files" in done.stdout
    counts = {kind: int(n.replace(",", "")) for n, kind in re.findall(r"([\d,]+)  (.+)", done.stdout)}
    assert counts["InvalidModel"] > 1000  # the damage is damage
    assert counts["ran"] > 500  # and not so much that nothing is reached


def test_what_it_starts_from_runs(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    for model in models():
        assert attempt(trial, model.SerializeToString()) == ("", "ran"), model.graph


def test_it_notices_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(tmp_path)
    data = next(iter(models())).SerializeToString()

    def reads_elsewhere(*_: object, **__: object) -> None:
        (tmp_path / "hidden-weights.bin").read_bytes()

    monkeypatch.setattr(infera_gpu, "load", reads_elsewhere)
    with pytest.raises(Leak):
        trial(data)

    def fails(*_: object, **__: object) -> None:
        raise KeyError("anything")

    monkeypatch.setattr(infera_gpu, "load", fails)
    assert attempt(trial, data)[0] == "KeyError: 'anything'"


def test_no_part_of_a_model_is_a_model() -> None:
    for model in models():
        data = model.SerializeToString()
        whole = 0
        for part in truncations(data, len(data)):
            try:
                infera_gpu.load(part, device="cpu")
                whole += 1
            except ModelError:
                pass
        assert whole <= 3, f"{whole} of {len(data)} truncations of {model.graph.name} load"


def test_files_differ() -> None:
    files = damaged(random.Random(0))
    assert len({next(files) for _ in range(300)}) > 270
    assert sum(_parses(next(files)) for _ in range(300)) > 100


def _parses(data: bytes) -> bool:
    try:
        onnx.ModelProto().ParseFromString(data)
    except Exception:
        return False
    return True
