"""Importing the runtime, and listing its operators, loads no device library and no ONNX."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("cupy", "triton", "onnx", "onnxruntime", "torch", "pynvml", "fastapi")


@pytest.mark.parametrize(
    "work",
    [
        "import infera_gpu",
        "import infera_gpu, infera_gpu.ops; assert len(list(infera_gpu.ops.registry())) > 100",
        "import infera_gpu.devices.cuda, infera_gpu.devices.recording, infera_kernels.launch",
    ],
    ids=["package", "operators", "devices"],
)
def test_nothing_heavy_is_loaded(work: str) -> None:
    look = f"{work}; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
