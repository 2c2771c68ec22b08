"""Importing the runtime, and listing its operators, loads no device library and no ONNX."""

from __future__ import annotations

import subprocess
import sys

import pytest

from infera_gpu import ops
from infera_gpu.ops._index import INDEX

HEAVY = ("cupy", "triton", "onnx", "onnxruntime", "torch", "pynvml", "fastapi")


@pytest.mark.parametrize(
    "work",
    [
        "import infera_gpu",
        "import infera_gpu, infera_gpu.ops; assert len(list(infera_gpu.ops.registry())) > 100",
        "import infera_gpu.ops as o; o.registry().find('', 'Relu', 9); assert not hasattr(o, 'text')",
        "import infera_gpu.devices.cuda, infera_gpu.devices.recording, infera_kernels.launch",
    ],
    ids=["package", "operators", "operator", "devices"],
)
def test_nothing_heavy_is_loaded(work: str) -> None:
    look = f"{work}; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_checks_of_a_gpu_are_imported_where_no_triton_is_installed() -> None:
    work = "import sys; sys.modules['triton'] = None; import bench.gpu_check, bench.gpu_speed, bench.gpu_ahead"
    subprocess.run([sys.executable, "-c", work], check=True)


def test_what_most_models_need_comes_with_the_package_and_nothing_else() -> None:
    work = "import infera_gpu, sys; print(*(m for m in sys.modules if m.startswith('infera_gpu.ops.')))"
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    found = {name.removeprefix("infera_gpu.ops.") for name in done.stdout.split()}
    assert found >= {*ops.COMMON}
    assert found.isdisjoint(("attention", "ml", "recurrent", "text", "_jit_recurrent"))


def test_names_that_the_index_has_not_are_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is new, or an operator that moved: then every file is imported."""
    whole = ops.registry()
    for index in ("", INDEX.replace(" MaxPool", " Gelu").replace(" Relu ", " MaxPool ")):
        monkeypatch.setattr(ops, "INDEX", index)
        made = ops._Declared()
        for name in ("MaxPool", "Relu", "NoSuch"):
            assert made.find("", name, 17) is whole.find("", name, 17)
        assert {id(op) for op in made} == {id(op) for op in whole}
