"""GPUs as numbers: rates times multiprocessors and clock are the TFLOP/s that NVIDIA states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from infera_gpu.devices.timing import EventTimer
from infera_kernels.launch import nominal_target
from infera_kernels.launch.devices import DEVICES, RATES, architecture_of, device_called, rates_of

STATED = {
    "H200": {"half": 989.4e12, "tf32": 494.7e12, "int8": 1978.9e12, "ieee": 66.9e12},
    "H100 SXM": {"half": 989.4e12, "tf32": 494.7e12, "int8": 1978.9e12, "ieee": 66.9e12},
    "H100 PCIe": {"half": 756e12, "tf32": 378e12, "int8": 1513e12, "ieee": 51.2e12},
    "A100 80GB": {"half": 312e12, "tf32": 156e12, "int8": 624e12, "ieee": 19.5e12},
    "A100 40GB": {"half": 312e12, "tf32": 156e12, "int8": 624e12, "ieee": 19.5e12},
    "L4": {"half": 121e12, "tf32": 60e12, "int8": 242e12, "ieee": 30.3e12},
    "RTX 3090": {"half": 71e12, "tf32": 35.6e12, "int8": 284e12, "ieee": 35.6e12},
    "RTX 4090": {"half": 165.2e12, "tf32": 82.6e12, "int8": 660.6e12, "ieee": 82.6e12},
}
"""Dense operations a second, from the whitepapers and datasheets that `DEVICES` names."""


def test_rates_give_what_is_stated() -> None:
    assert {d.name for d in DEVICES} == set(STATED)
    for device in DEVICES:
        for kind, stated in STATED[device.name].items():
            assert device.flops_per_s(kind) == pytest.approx(stated, rel=0.011), (device.name, kind)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_cards_are_known_by_what_cuda_calls_them(reported: str, name: str) -> None:
    found = device_called(reported)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("reported", ["NVIDIA L40S", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D", ""])
def test_other_cards_are_not(reported: str) -> None:
    assert device_called(reported) is None


def test_an_architecture_that_is_not_listed_has_what_all_have() -> None:
    for arch in (80, 86, 89, 90, 100, 120, 130):
        assert nominal_target(arch).shared_bytes == architecture_of(arch).block_shared_bytes
        assert architecture_of(arch).block_shared_bytes >= 99 * 1024
    assert rates_of(130) == RATES[120]
    assert rates_of(87) == RATES[86]


def test_calls_are_timed_between_events_behind_a_flushed_cache() -> None:
    log: list[object] = []

    class Event:
        def record(self, stream: object) -> None:
            log.append(("record", stream))

        def synchronize(self) -> None:
            log.append("synchronize")

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        return SimpleNamespace(fill=lambda value: log.append(("fill", shape, dtype)))

    cuda = SimpleNamespace(Event=Event, get_elapsed_time=lambda begin, end: 2.0)
    timer = EventTimer(SimpleNamespace(cuda=cuda, empty=empty), "stream", 50)
    assert timer([(log.append, ("one",)), (log.append, ("two",))]) == 2e-3
    recorded = ("record", "stream")
    assert log == [("fill", (100,), "uint8"), recorded, "one", "two", recorded, "synchronize"]
