"""`infera tune`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from infera_gpu.cli.tune import duration
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.errors import InputError
from infera_kernels.launch import nominal_target
from infera_kernels.tuning import DeviceTiles, Store
from tests.commandline import assert_explained, assert_fails, infera, model, save_relu

kernels = pytest.mark.kernels


@pytest.fixture
def product(tmp_path: Path) -> Path:
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 256]}, {"y": ["N", 512]})
    w = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    made.graph.initializer.append(numpy_helper.from_array(w, "w"))
    path = tmp_path / "product.onnx"
    onnx.save(made, path)
    return path


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Devices that keep what is measured in a folder, and measure by a timer for which 64 rows are fastest."""
    usual = RecordingDevice.__init__

    def opened(device: RecordingDevice, *args: object, **options: object) -> None:
        usual(device, *args, **options)  # type: ignore[arg-type]
        device.tiles = DeviceTiles(nominal_target(90), Store("h200", "3.6.0", shipped=None, own=tmp_path / "kept"))

    def timer(device: RecordingDevice) -> object:
        def seconds(calls: list[tuple[object, tuple[object, ...]]]) -> float:
            for fn, args in calls:
                fn(*args)  # type: ignore[operator]
            return 1e-6 if calls[0][1][0].constexprs["BM"] == 64 else 2e-6  # type: ignore[attr-defined]

        return seconds

    monkeypatch.setattr(RecordingDevice, "__init__", opened)
    monkeypatch.setattr(RecordingDevice, "timer", timer)
    return tmp_path / "kept"


@kernels
def test_what_is_measured_is_shown_kept_exported_and_taken_over(product: Path, kept: Path, tmp_path: Path) -> None:
    command = "tune", product, "--device", "recording", "--shape", "x=32,256", "--precision", "fp16"
    status, out, _ = infera(*command, "--show")
    assert status == 0
    assert "predicted" in out
    assert "measured" not in out
    assert not list(kept.glob("*"))
    written = tmp_path / "tiles.json"
    status, out, err = infera(*command, "--budget", "2m", "--export", written)
    assert status == 0
    assert "2.00x" in out
    assert "m 64" in out
    assert "1 choices measured, 1 of them" in err
    entries = json.loads(written.read_text())["entries"]
    assert [e["family"] for e in entries] == ["matmul"]

    status, out, _ = infera("tune", "--show", "--device", "recording")
    assert (status, out.count("measured")) == (0, 1)
    (path,) = kept.glob("*.json")
    path.unlink()
    assert "measured" not in infera("tune", "--show", "--device", "recording")[1]
    assert infera("tune", "--import", written, "--device", "recording")[0] == 0
    assert "2.00x" in infera(*command, "--show")[1]
    written.write_text(written.read_text().replace("h200", "l4"))
    assert_fails(infera("tune", "--import", written, "--device", "recording"), "is not of h200")


def test_what_cannot_be_tuned_is_said(product: Path) -> None:
    assert_fails(infera("tune", "--device", "cpu"), "which model?")
    assert_fails(infera("tune", product, "--device", "cpu"), "nothing to tune")
    assert_fails(infera("tune", product, "--budget", "soon"), "expected a time such as 60s")


@kernels
def test_without_a_gpu_predictions_alone_are_shown(product: Path) -> None:
    assert_fails(infera("tune", product, "--device", "recording", "--shape", "x=8,256"), "only pretends")
    assert infera("tune", product, "--device", "recording", "--show")[0] == 0


@kernels
def test_what_has_no_tiles_is_said_in_place_of_an_empty_table(tmp_path: Path, kept: Path) -> None:
    status, out, err = infera("tune", save_relu(tmp_path), "--device", "recording", "--show", "--shape", "4,3")
    assert (status, out) == (0, "")
    assert err == "no step of this plan runs a kernel that has tiles: there is nothing to tune\n"
    status, out, err = infera("tune", "--device", "recording", "--show")
    assert (status, out) == (0, "")
    assert err == "nothing is measured on h200 with Triton 3.6.0: tiles are those predicted\n"


def test_without_triton_it_is_said_what_to_install(product: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infera_gpu.devices.recording.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    for arguments in (("--show",), ("--export", "tiles.json"), (product, "--show")):
        result = infera("tune", *arguments, "--device", "recording")
        assert_explained(result, "Triton is not installed", "infera-gpu[kernels]")


def test_without_a_gpu_show_names_the_device_that_is_there(product: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infera_gpu.cli.tune.why_unavailable", lambda: "no driver")
    assert_explained(infera("tune", product, "--show"), "no driver", "--device recording")


def test_durations() -> None:
    assert [duration(text) for text in ("90", "90s", " 1.5 m")] == [90.0, 90.0, 90.0]
    with pytest.raises(InputError, match="--budget"):
        duration("1h30")
