"""Which device each model goes to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from infera_gpu.budget import VramBudget
from infera_gpu.devices import ALL, check_name
from infera_gpu.devices.cuda import gpu_count
from infera_gpu.errors import DeviceError


def named_devices(text: str) -> list[str]:
    """The devices of a comma-separated list; `ALL` stays as it is. Raises DeviceError for none, and no such name."""
    named = [d.strip() for d in text.split(",") if d.strip()]
    if not named:
        raise DeviceError(f"'{text}' names no device")
    for name in named:
        if name != ALL:
            check_name(name)
    return named


@dataclass(frozen=True, slots=True)
class Place:
    """A device, and the GPU memory that all models there have together; None for what there is.

    `nbytes` is what the model that has the place counts for.
    """

    device: str
    budget: VramBudget | None
    nbytes: int = 0


class Placement:
    """Spreads models over the devices of a comma-separated list: the next goes where the fewest bytes of models are.

    `pins` maps a model's name to the device that it goes to in any case. `limit` is the GPU memory that all models of
    one device have together. Safe to use from several threads. Raises DeviceError for a list without a device.
    """

    def __init__(
        self,
        devices: str,
        limit: str | None = None,
        pins: Mapping[str, str] | None = None,
        count: Callable[[], int] = gpu_count,
    ) -> None:
        self._pins = dict(pins or {})
        named = named_devices(devices)
        self._devices = list(
            dict.fromkeys(d for n in named for d in ([f"cuda:{i}" for i in range(count())] if n == ALL else [n]))
        )
        self._limit = limit
        self._budgets: dict[str, VramBudget] = {}
        self._bytes = dict.fromkeys(self._devices, 0)
        self._changing = threading.Lock()

    def take(self, model: str, nbytes: int, wanted: str | None = None) -> Place:
        """Where a model of so many bytes goes: its pin, else `wanted`. They count until `give_back`."""
        with self._changing:
            device = self._pins.get(model) or wanted or min(self._devices, key=self._bytes.__getitem__)
            self._bytes[device] = self._bytes.get(device, 0) + nbytes
            if self._limit is None:
                return Place(device, None, nbytes)
            return Place(device, self._budgets.setdefault(device, VramBudget(self._limit)), nbytes)

    def give_back(self, place: Place) -> None:
        """The model has left."""
        with self._changing:
            self._bytes[place.device] -= place.nbytes
