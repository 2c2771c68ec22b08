"""Which device a model goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest

from infera_gpu.errors import DeviceError, DeviceLostError
from infera_server.models.discovery import discover
from infera_server.models.model import Model
from infera_server.models.placement import Placement
from infera_server.models.repository import Repository, State
from infera_server.settings import Settings
from tests import fake_cupy
from tests.commandline import assert_fails, infera
from tests.text import parse


def test_models_are_spread_by_size() -> None:
    placement = Placement("cuda:0, cuda:1")
    taken = [
        placement.take(name, size).device for name, size in (("a", 100), ("b", 30), ("c", 50), ("d", 10), ("e", 90))
    ]
    assert taken == ["cuda:0", "cuda:1", "cuda:1", "cuda:1", "cuda:1"]


def test_a_pin_goes_first_and_counts() -> None:
    placement = Placement("cuda:0,cuda:1", pins={"big": "cuda:1", "odd": "cpu"})
    assert placement.take("big", 100).device == "cuda:1"
    assert placement.take("odd", 5).device == "cpu"
    assert [placement.take("x", 40).device for _ in range(3)] == ["cuda:0"] * 3
    assert placement.take("y", 1).device == "cuda:1"


def test_every_device_has_a_budget_of_its_own() -> None:
    placement = Placement("cuda:0,cuda:1", limit="1GiB")
    first, second, third = (placement.take("m", 1) for _ in range(3))
    assert first.budget is not None
    assert first.budget.limit == 1 << 30
    assert first.budget is third.budget is not second.budget
    assert Placement("auto").take("m", 1).budget is None


def test_all_gpus_are_those_that_cuda_shows() -> None:
    placement = Placement("cuda:all, cpu", count=lambda: 3)
    assert [placement.take("m", 1).device for _ in range(5)] == ["cuda:0", "cuda:1", "cuda:2", "cpu", "cuda:0"]


@pytest.mark.parametrize(
    ("devices", "says"),
    [("", "names no device"), (" , ", "names no device"), ("cpu,gpu", "unknown device 'gpu'"), ("cuda:", "'cuda:'")],
)
def test_a_list_of_nothing_and_names_of_nothing_are_refused(devices: str, says: str) -> None:
    with pytest.raises(DeviceError, match=says):
        Placement(devices)


def test_models_of_a_repository_run_where_they_are_placed(tmp_path: Path) -> None:
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }")
    for name in ("a", "b", "c"):
        onnx.save(model, tmp_path / f"{name}.onnx")
    settings = Settings(device="cpu,recording", pins={"c": "recording", "b": "cpu"})
    repository = Repository(settings, discover([tmp_path]).sources)
    repository.load(lambda fn, arg: fn(arg))
    assert {e.source.name: e.state for e in repository.entries()} == dict.fromkeys("abc", State.READY)
    devices = {m.signature.name: m.device for m in repository.ready()}
    assert (devices["b"], devices["c"]) == ("cpu", "recording")
    assert devices["a"] in ("cpu", "recording")
    for served in repository.ready():
        served.close()


def test_a_gpu_that_is_lost_takes_its_models_along_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake: Any = fake_cupy.install(monkeypatch, fake_cupy.module(gpus=2))
    x = np.ones((2, 4), np.float32)
    for name in ("a", "b"):
        onnx.save(parse("g (float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }"), tmp_path / f"{name}.onnx")
    settings = Settings(device="cuda:all", pins={"a": "cuda:0", "b": "cuda:1"})
    repository = Repository(settings, discover([tmp_path]).sources)
    repository.load(lambda fn, arg: fn(arg))
    a, b = (cast(Model, repository.get(name)) for name in ("a", "b"))
    for model in (a, b):
        np.testing.assert_array_equal(model.session.run({"x": x})["y"], -x)
    assert all(vram.used for vram in fake.vrams)
    assert repository.lost == ""
    fake_cupy.Device.faults[1] = 700
    with pytest.raises(DeviceLostError, match="cuda:1"):
        b.session.run({"x": x})
    np.testing.assert_array_equal(a.session.run({"x": x})["y"], -x)
    assert a.lost == ""
    assert repository.lost == b.lost != ""  # the server is not ready: a new process has both GPUs again
    for served in repository.ready():
        served.close()
    assert fake.vrams[0].used == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--pin m", "'m' is not MODEL=DEVICE"),
        ("--pin m=cpu --pin m=recording", "'m' is given twice, 'cpu' and 'recording'"),
        ("--share m=1 --share n=1 --share m=2", "'m' is given twice, '1' and '2'"),
        ("--pad m=off --pad m=T", "'m' is given twice, 'off' and 'T'"),
        ("--slo-p99 m=1ms --slo-p99 1s --slo-p99 m=2ms", "'m' is given twice, '1ms' and '2ms'"),
        ("--pin m=gpu", "pins.m: unknown device 'gpu'; expected auto, cpu, cuda, cuda:N or recording"),
        ("--pin m=cuda:all", "pins.m: 'cuda:all' is for `infera serve --device`"),
        ("--device gpu", "device: unknown device 'gpu'"),
        ("--device cpu,cuda:", "device: unknown device 'cuda:'"),
        ("--device ,", "device: ',' names no device"),
    ],
)
def test_devices_and_models_of_options_are_looked_at_first(tmp_path: Path, options: str, says: str) -> None:
    onnx.save(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"), tmp_path / "m.onnx")
    assert_fails(infera("serve", tmp_path / "m.onnx", *options.split()), says, status=2)
