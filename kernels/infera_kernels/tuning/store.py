"""Measurements in files: those that come with the package, and those of this machine. One file a device and Triton.

A file that is damaged, or of another device, Triton or format, is passed by and named in the log.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infera_kernels.disk import default_directory, replace_file
from infera_kernels.launch.devices import device_called
from infera_kernels.launch.types import Target
from infera_kernels.tuning.choice import Measured, Problem, Tuned

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "tuned"
"""Files that come with the package. `<device>.predicted.json` are estimates, for people and tests."""

_log = logging.getLogger(__name__)

Run = Mapping[str, str]
"""Where measurements come from: device, driver, versions, commit, time and way of measuring."""


def class_of(target: Target) -> str:
    """What measurements go for: the card, where it is listed, else its architecture and multiprocessors."""
    device = device_called(target.name)
    name = device.name if device else f"sm{target.arch} {target.multiprocessors}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def own_directory() -> Path:
    """`tuned` beside the folder of compiled kernels."""
    return default_directory().parent / "tuned"


class Store:
    """The measurements of one class of devices with one version of Triton."""

    def __init__(self, device: str, triton: str, *, shipped: Path | None = SHIPPED, own: Path | None = None) -> None:
        self.device, self.triton = device, triton
        self.path = (own_directory() if own is None else own) / self.file_name
        self._shipped = shipped and shipped / self.file_name

    @property
    def file_name(self) -> str:
        return f"{self.device}-triton-{self.triton}.json"

    def load(self) -> dict[Problem, Measured]:
        """What is measured; this machine's measurements before those of the package."""
        found: dict[Problem, Measured] = {}
        for path in (self._shipped, self.path):
            if path is not None:
                found |= {m.problem: m for m in self._read(path)[0]}
        return found

    def runs(self) -> list[Run]:
        """Where this machine's measurements come from."""
        return self._read(self.path)[1]

    def content(self) -> bytes:
        """This machine's measurements as a file's content; empty where there are none."""
        measured, runs = self._read(self.path)
        return self.dump(measured, runs) if measured else b""

    def add(self, measured: Iterable[Measured], run: Run) -> None:
        """Keep measurements, in place of older ones of the same problems. Several processes may do so at a time."""
        fresh = {m.problem: m for m in measured}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.with_suffix(".lock")):
                kept, runs = self._read(self.path)
                rest = [m for m in kept if m.problem not in fresh]
                replace_file(self.path, self.dump([*rest, *fresh.values()], [*runs, dict(run)]))
        except OSError as error:
            _log.warning("measurements are not kept: %s; set INFERA_CACHE_DIR to a writable directory", error)

    def dump(self, measured: Sequence[Measured], runs: Sequence[Run]) -> bytes:
        """A file's content: one measurement a line."""
        head = {"format": FORMAT, "device": self.device, "triton": self.triton, "measured": True, "runs": list(runs)}
        lines = ",\n ".join(json.dumps(m.to_json()) for m in sorted(measured, key=lambda m: repr(m.problem)))
        return f'{json.dumps(head)[:-1]}, "entries": [\n {lines}\n]}}\n'.encode()

    def _read(self, path: Path) -> tuple[list[Measured], list[Run]]:
        try:
            content = json.loads(path.read_bytes())
            for name, wanted in (("format", FORMAT), ("device", self.device), ("triton", self.triton)):
                if content[name] != wanted:
                    raise ValueError(f"its {name} is {content[name]!r}, expected {wanted!r}")
            if content["measured"] is not True:
                raise ValueError("it holds predictions")
            return [Measured.from_json(e) for e in content["entries"]], [dict(run) for run in content["runs"]]
        except FileNotFoundError:
            return [], []
        except (OSError, ValueError, TypeError, KeyError) as error:
            _log.warning("measured tiles in %s are passed by: %s", path, error)
            return [], []


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process is in here with the same path, where the system has locks on files."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


class DeviceTiles:
    """What is measured on one device, as plans read it: `tuned` is replaced, never changed. Files are read when it is
    first asked for."""

    def __init__(self, target: Target, store: Store | None = None) -> None:
        self.target, self.store = target, store
        self._tuned: Tuned | None = None

    @classmethod
    def of(cls, launcher: Any) -> DeviceTiles:
        """Those of a launcher's GPU, with the Triton that is installed."""
        import triton

        return cls(launcher.target, Store(class_of(launcher.target), triton.__version__))

    def unmeasured(self) -> DeviceTiles:
        """Those of the same device by prediction alone: nothing is read, nothing kept."""
        return DeviceTiles(self.target)

    @property
    def tuned(self) -> Tuned:
        if self._tuned is None:
            self._tuned = Tuned(self.target, self.store.load() if self.store else {})
        return self._tuned

    def learn(self, measured: Sequence[Measured], run: Run) -> None:
        """Go by these measurements from now on, and keep them where there is a store."""
        if self.store is not None and measured:
            self.store.add(measured, run)
        self._tuned = Tuned(self.target, {**self.tuned.measured, **{m.problem: m for m in measured}})


def write_file(store: Store, path: Path, measured: Sequence[Measured], runs: Sequence[Run]) -> None:
    """Measurements as a file for other machines, or for the package. Raises OSError."""
    replace_file(path.absolute(), store.dump(measured, runs))


def import_file(path: Path, store: Store) -> int:
    """Keep the measurements of a file that another machine has exported; how many there are. Raises ValueError."""
    content: Any = json.loads(path.read_bytes())
    if not isinstance(content, dict) or (content.get("device"), content.get("triton")) != (store.device, store.triton):
        raise ValueError(f"{os.fspath(path)} is not of {store.device} with Triton {store.triton}")
    measured, runs = store._read(path)
    store.add(measured, runs[-1] if runs else {})
    return len(measured)
