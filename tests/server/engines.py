"""Sessions that the tests open in engine processes, by name. It imports little: each process does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from infera_gpu.errors import OutOfMemoryError
from infera_gpu.spec import TensorSpec
from infera_server.scheduling.independence import Facts
from infera_server.scheduling.rows import Arrays

CRASH, RAISE, HANG, EXHAUST = -1.0, -2.0, -3.0, -4.0
"""What a first element makes of the run."""


@dataclass
class Plain:
    """x -> what `run` makes of it."""

    run: Callable[[Arrays], Arrays]
    shape: tuple[Any, ...] = ("N", 4)
    overridable: Mapping[str, TensorSpec] = field(default_factory=dict)
    device: Any = field(default_factory=lambda: SimpleNamespace(name="cpu", lost=""))
    supervision: None = None

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return {"x": TensorSpec(self.shape, np.dtype(np.float32))}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return {"y": TensorSpec(self.shape, np.dtype(np.float32))}

    def facts(self, shared: Collection[str] = ()) -> Facts:
        return Facts(None, {}, {}, 0)

    def plan_for(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        return SimpleNamespace(arena_bytes=0)

    def reserve(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 0

    def close(self) -> None: ...


def fragile(started: str = "") -> Plain:
    """x [N, 4] -> y = 2x; ends its process where the first element is CRASH. The file `started` gets its id;
    where the element is HANG, a run does not end, and a file beside it appears.
    """
    if started:
        with Path(started).open("a") as file:
            file.write(f"{os.getpid()}\n")

    def run(feeds: Arrays) -> Arrays:
        first = feeds["x"].flat[0] if feeds["x"].size else 0
        if first == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        if first == RAISE:
            raise np.linalg.LinAlgError("singular")
        if first == HANG:
            Path(f"{started}.hangs").touch()
            time.sleep(600)
        if first == EXHAUST:
            raise OutOfMemoryError("a plan", needed=5, available=2)
        return {"y": feeds["x"] * 2}

    return Plain(run)


def echo() -> Plain:
    """Whatever it is fed."""
    return Plain(dict)


def stillborn() -> Plain:
    """Ends its process while it is loaded."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
