"""How long a fresh process needs from an ONNX file to the first answer on a GPU, its compiled kernels being on disk."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.first_worker import ON_GPU
from bench.gpu_models import images
from bench.gpu_report import Context
from bench.models import path_of

TIMEOUT_S = 300
MODEL = "resnet50"


def stages_of(model: Path, feeds: Path) -> dict[str, float]:
    """Seconds by stage in one fresh process. Raises RuntimeError with the last line of what it said."""
    command = [sys.executable, "-m", "bench.first_worker", ON_GPU, str(model), str(feeds)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def first_run(context: Context) -> tuple[str, Mapping[str, Any]]:
    """Load and first inference of ResNet-50 in float32, twice: the first process leaves its kernels on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        feeds = Path(folder) / "feeds.npz"
        np.savez(feeds, **images(1))  # type: ignore[arg-type]
        cold, warm = (stages_of(path_of(MODEL), feeds) for _ in range(2))
    seconds = warm["load"] + warm["run"]
    row = {"set": "first run", "name": MODEL, "precision": "fp32", "seconds": seconds, "peers": {}}
    facts = {"rows": [{**row, "stages": warm}], "before": cold}
    return f"load and first run {seconds:.2f} s with kernels on disk, {cold['load'] + cold['run']:.2f} s before", facts
