"""A launcher that interprets kernels and refuses those that race, but for what is known of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from infera_kernels.launch import InterpreterLauncher
from infera_kernels.launch.recording import Launch
from infera_kernels.launch.types import Target, address_of
from tests.kernels.accesses import recording
from tests.kernels.known_races import KNOWN, Known
from tests.kernels.races import Race, races


class WatchingLauncher(InterpreterLauncher):
    """Raises AssertionError after a launch in which `races` finds what is not `known`. `found` keeps all that it finds,
    with the kernel."""

    def __init__(self, target: Target | None = None, known: Known = KNOWN) -> None:
        super().__init__(target)
        self._known = known
        self.found: list[tuple[str, Race]] = []

    def _run(self, kernel: Any, values: list[Any], launch: Launch) -> None:
        with recording() as record:
            super()._run(kernel, values, launch)
        for race in races(record):
            self.found.append((launch.kernel, race))
            assert (launch.kernel, race.kind) in self._known, _told(race, launch)


def _told(race: Race, launch: Launch) -> str:
    first, last = race.programs
    programs = f"program {first}" if first == last else f"programs {first} and {last}"
    names = " = ".join(_names(launch.args, int(race.addresses[0]))) or "memory of no argument"
    return (
        f"{launch.kernel}: {names} is {race.kind}: {len(race.addresses)} elements, the first by "
        f"{programs} of {launch.grid}"
    )


def _names(args: Mapping[str, Any], address: int) -> Iterator[str]:
    """The arguments between whose first and last byte an address lies."""
    for name, value in args.items():
        for i, array in enumerate(value if isinstance(value, tuple) else (value,)):
            if not hasattr(array, "strides") or not array.size:
                continue
            steps = np.array([(d - 1) * s for d, s in zip(array.shape, array.strides, strict=True)], np.int64)
            begin = address_of(array)
            if begin + steps[steps < 0].sum() <= address < begin + steps[steps > 0].sum() + array.dtype.itemsize:
                yield f"{name}[{i}]" if isinstance(value, tuple) else name
