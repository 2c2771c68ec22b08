"""`infera verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from infera_gpu import departures, opening
from infera_gpu.devices import open_device
from infera_gpu.session import Session
from infera_gpu.verify import run_in_float64
from tests.commandline import assert_explained, assert_fails, infera, model, save_add


@pytest.fixture
def add(tmp_path: Path) -> Path:
    return save_add(tmp_path)


def test_verify_against_onnxruntime(add: Path) -> None:
    status, out, _ = infera("verify", add, "--device", "cpu")
    assert status == 0
    assert "cpu against onnxruntime" in out
    assert "ok" in out


def test_verify_reports_a_difference(add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infera_gpu.cli import verify

    monkeypatch.setattr(verify, "_run", lambda path, reference, threads, feeds: {"y": feeds["a"]})
    status, out, err = infera("verify", add, "--device", "cpu")
    assert_fails((status, out, err), "1 of 1 outputs differ", "y: error")
    assert "differs" in out


def test_verify_refuses_to_compare_a_device_with_itself(add: Path) -> None:
    assert_fails(infera("verify", add, "--device", "cpu", "--against", "cpu"), "compared with itself")


def test_verify_looks_at_the_reference_before_anything_runs(add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "run", lambda *_: pytest.fail("run"))
    result = infera("verify", add, "--device", "cpu", "--against", "recordin")
    assert_explained(result, "--against: unknown device 'recordin'", "recording, or onnxruntime or float64")
    assert_fails(infera("verify", add, "--device", "cpu", "--against", "cpu"), "compared with itself")


# ---- against float64


def test_float64_tells_who_rounds_worse(tmp_path: Path) -> None:
    """onnxruntime's Sigmoid is off by up to 1.6e-7, which is most of an output whose peak is about 1e-6."""
    path = tmp_path / "small.onnx"
    shift = numpy_helper.from_array(np.array(-14, np.float32), "shift")
    nodes = [helper.make_node("Add", ["x", "shift"], ["logit"]), helper.make_node("Sigmoid", ["logit"], ["p"])]
    made = model(nodes, {"x": [64]}, {"p": [64]})
    made.graph.initializer.append(shift)
    onnx.save(made, path)
    assert_fails(infera("verify", path, "--device", "cpu"), "1 of 1 outputs differ", "--against float64")
    status, out, err = infera("verify", path, "--device", "cpu", "--against", "float64")
    assert (status, err) == (0, "")
    assert "cpu against float64" in out
    assert "ok; onnxruntime differs" in out


def test_float64_fails_where_infera_is_wrong(add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Session.run
    monkeypatch.setattr(
        Session,
        "run",
        lambda self, feeds: {k: v * (1.001 if v.dtype == np.float32 else 1) for k, v in run(self, feeds).items()},
    )
    result = infera("verify", add, "--device", "cpu", "--against", "float64")
    assert_fails(result, "1 of 1 outputs differ", "y: error 0.001")
    assert "onnxruntime differs" not in result[1]


def test_float64_needs_no_onnxruntime(add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, out, err = infera("verify", add, "--device", "cpu", "--against", "float64")
    assert status == 0
    assert "ok" in out
    assert err == "onnxruntime is not installed: pip install onnxruntime; its errors are left out\n"


def test_without_onnxruntime_there_is_another_reference(add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_explained(infera("verify", add, "--device", "cpu"), "pip install onnxruntime", "--against float64")


def test_a_whole_graph_is_widened() -> None:
    """Constants, casts, tensor attributes and their defaults, subgraphs; integers and strings stay as they are."""
    branch = [
        helper.make_graph([helper.make_node(op, ["wide"], [op])], op, [], [helper.make_tensor_value_info(op, 1, [2])])
        for op in ("Neg", "Exp")
    ]
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Cast", ["shape"], ["size"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["back"], to=TensorProto.FLOAT),
        helper.make_node("Sum", ["back", "zeros", "size", "tenth"], ["wide"]),
        helper.make_node("Greater", ["size", "tenth"], ["more"]),
        helper.make_node("Squeeze", ["more"], ["condition"]),
        helper.make_node("If", ["condition"], ["y"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("ArgMax", ["y"], ["at"]),
    ]
    made = model(nodes, {"x": [2]}, {"y": [2]})
    made.graph.initializer.append(numpy_helper.from_array(np.array([0.1], np.float32), "tenth"))
    made.graph.output.append(helper.make_tensor_value_info("at", TensorProto.INT64, [1]))
    x = np.array([1.00001, -3], np.float32)
    found = run_in_float64(made, {"x": x})
    assert found["y"].tolist() == (-(x.astype(np.float64) + 2 + np.float64(np.float32(0.1)))).tolist()
    assert found["y"].dtype == np.float64
    assert found["at"].dtype == np.int64
    assert found["at"].tolist() == [1]


# ---- the first node that differs


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (("--precision", "fp32"), (False, False)),
        (("--precision", "tf32"), (True, False)),
        pytest.param(("--precision", "tf32", "--batch-invariant"), (True, True), marks=pytest.mark.kernels),
    ],
)
def test_the_first_to_differ_is_looked_for_as_the_model_is_run(
    flags: tuple[str, ...], want: tuple[bool, bool], add: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        opened.append(open_device(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(departures, "open_device", noted)
    monkeypatch.setattr(opening, "open_device", noted)
    status, out, err = infera("verify", add, "--device", "recording", "--against", "cpu", "--first", *flags)
    assert (status, err) == (0, "")
    assert "no value before the outputs differs" in out
    tested = [(d.tf32, d.batch_invariant) for d in opened if d.name == "recording"]
    assert tested == [want] * 2


def save_overflowing(folder: Path) -> Path:
    """Three depthwise convolutions, each with ReLU, the second of which makes values beyond float16's."""
    weights = {f"w{i}": np.full((8, 1, 3, 3), scale, np.float32) for i, scale in enumerate((10, 1000, 1e-4))}
    nodes = []
    for i, (weight, value) in enumerate(zip(weights, ("x", "r0", "r1"), strict=True)):
        nodes.append(helper.make_node("Conv", [value, weight], [f"c{i}"], pads=[1, 1, 1, 1], group=8))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
    made = model(nodes, {"x": [1, 8, 32, 32]}, {"r2": [1, 8, 32, 32]})
    made.graph.initializer.extend([numpy_helper.from_array(w, name) for name, w in weights.items()])
    onnx.save(made, folder / "convover.onnx")
    np.save(folder / "ones.npy", np.ones((1, 8, 32, 32), np.float32))
    return folder / "convover.onnx"


@pytest.mark.kernels
def test_the_first_to_differ_is_found_where_channels_are_last(tmp_path: Path) -> None:
    """A GPU's plan has values with channels last, under other names: they are put back, and as many are compared."""
    path = save_overflowing(tmp_path)
    given = ("verify", path, "-i", f"x={tmp_path / 'ones.npy'}", "--first", "--precision", "fp16", "--device")
    lines = [infera(*given, device)[1].splitlines()[-1] for device in ("cpu", "recording")]
    assert [line.partition(": ")[2].partition(" ")[2] for line in lines] == [lines[0].partition("FusedConv ")[2]] * 2
    for line in lines:
        assert line.startswith("first to differ, after 1 that agree: FusedConv")
        assert "'r1': r1: [0, 0, 0, 0] is inf" in line
    feeds = {"x": np.load(tmp_path / "ones.npy")}
    for precision in ("fp16", "fp32"):
        found = list(departures.departures(path, feeds, device="recording", precision=precision))
        assert {d.difference.name for d in found} == {"r0", "r1", "r2"}


def test_values_with_channels_last_are_compared_on_the_cpu(tmp_path: Path) -> None:
    path = save_overflowing(tmp_path)
    found = list(departures.departures(path, {"x": np.load(tmp_path / "ones.npy")}, device="cpu"))
    assert {d.difference.name for d in found} == {"r0", "r1", "r2"}
    assert all(d.difference.within(1e-5) for d in found)


def test_little_that_could_be_compared_is_no_agreement(add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "_counterpart", lambda name, known: None)
    status, out, _ = infera("verify", add, "--device", "cpu", "--first")
    assert status == 0
    assert "no value before the outputs differs" not in out
    assert "little could be compared: 0 values" in out


def test_verify_says_where_nothing_is_rounded_to_tf32(add: Path) -> None:
    for device in ("cpu", "recording"):
        status, out, _ = infera("verify", add, "--device", device, "--precision", "tf32")
        assert status == 0
        assert f"{device} in float32 (only a GPU rounds to tf32: what that changes is not shown) against cpu" in out
