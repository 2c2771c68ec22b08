"""What the tests of the command line share: calling it, and small models to call it with."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from infera_gpu.cli import main

Result = tuple[int, str, str]


def infera(*arguments: object) -> Result:
    """Runs a command line in this process and returns (status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


def assert_fails(result: Result, *words: str, status: int = 1) -> None:
    """One line on stderr that holds the words, and the status."""
    got, _, err = result
    assert got == status, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


def assert_explained(result: Result, *words: str) -> None:
    """As `assert_fails`, and the failure is not one that nobody thought of."""
    assert_fails(result, *words)
    assert "(unexpected: " not in result[2], result[2]


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model of opset 17; inputs and outputs by name with their shapes, all of one type."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, dtype, s) for n, s in outputs.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save_relu(folder: Path) -> Path:
    """x [N,3] -> y [N,3]"""
    path = folder / "relu.onnx"
    onnx.save(model([helper.make_node("Relu", ["x"], ["y"], name="cut")], {"x": ["N", 3]}, {"y": ["N", 3]}), path)
    return path


def save_add(folder: Path) -> Path:
    """a [2,3] + b [2,3] -> y"""
    path = folder / "add.onnx"
    onnx.save(model([helper.make_node("Add", ["a", "b"], ["y"])], {"a": [2, 3], "b": [2, 3]}, {"y": [2, 3]}), path)
    return path


def save(path: Path, array: np.ndarray[Any, Any]) -> Path:
    np.save(path, array)
    return path
