"""Kernels bound to CuPy's own arrays, which lie in host memory: `make test-cupy`. Nothing here runs on a GPU."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy")
pytest.importorskip("triton")

from bench.build import bert
from bench.gpu_operators import bound
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_gpu.spec import spec_of
from infera_kernels.launch import RecordingLauncher
from tests.cases import compute, covered
from tests.fake_cublaslt import FakeCublasLt, with_library
from tests.real_cupy import HostCudaDevice

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parents[2]


def test_every_kernel_binds_to_cupys_arrays() -> None:
    """In every binding of every case: what a kernel asks of an array CuPy has, and nothing copies one to the host."""
    device, bindings, problems = HostCudaDevice(), 0, list[str]()
    with device.running():
        for op, case, variants in covered("triton"):
            for site, ins in variants:
                specs = [spec_of(w) for w in compute(op, site, ins)[: case.n_outs]]
                try:
                    bindings += sum(1 for _ in bound(device, op, site, ins, specs))
                except Exception as error:
                    problems.append(f"{op.qualified} {case.id}: {type(error).__name__}: {error}")
    assert not problems
    assert bindings > 5000


def test_a_model_is_planned_bound_and_run() -> None:
    graph = load_graph(bert(layers=1, hidden=16, heads=2, inner=16, vocabulary=50))
    ids = np.random.default_rng(1).integers(0, 50, (2, 7))
    library = FakeCublasLt()
    launcher = with_library(RecordingLauncher(), library)
    session = Session(graph, HostCudaDevice(launcher))
    runs = []
    for _ in range(3):
        before = len(launcher.launches)
        out = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
        runs.append([launch.kernel for launch in launcher.launches[before:]])
        assert {a.shape[:1] for a in out.values()} == {(2,)}
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) > 5
    assert len(library.asked) >= 3 * 3  # merged projections, those of attention, one of the feed-forward part


def _asked() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call of a function of `xp`, outside of what is NumPy's alone: its name, the call, and where."""
    for folder in (ROOT / "infera_gpu", ROOT / "kernels" / "infera_kernels"):
        for path in sorted(folder.rglob("*.py")):
            if {"cpu", "jit"} & set(path.parts):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    _, xp, name = f".{ast.unparse(node.func)}".rpartition(".xp.")
                    if xp and name.replace(".", "").isidentifier():
                        yield name, node, f"{path.name}:{node.lineno}"


def test_what_is_asked_of_cupy_is_there() -> None:
    """Names, and arguments as far as CuPy says what it takes."""
    import cupy

    problems, seen = [], set()
    for name, call, where in _asked():
        found: Any = cupy
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            problems.append(f"{where}: there is no cupy.{name}")
            continue
        seen.add(name)
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            continue
        try:
            signature = inspect.signature(found)
        except ValueError:  # what is compiled may not say
            continue
        try:
            signature.bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})
        except TypeError as error:
            problems.append(f"{where}: cupy.{name}: {error}")
    assert not problems
    assert len(seen) > 50
