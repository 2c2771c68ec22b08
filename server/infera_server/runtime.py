"""What the server needs of the runtime, so that tests can serve a model written in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from infera_gpu.budget import VramBudget
from infera_gpu.errors import ModelError
from infera_gpu.passes import Precision
from infera_gpu.spec import TensorSpec, tensors_of
from infera_server.scheduling.independence import Facts, facts_of
from infera_server.scheduling.rows import Arrays

if TYPE_CHECKING:
    import infera_gpu

Specs: TypeAlias = Mapping[str, TensorSpec]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


class Plan(Protocol):
    """What is known of a run before it runs."""

    @property
    def arena_bytes(self) -> int: ...


class Device(Protocol):
    """Where a session runs: sessions on devices of one name take turns. `lost` says why nothing runs there any more."""

    @property
    def name(self) -> str: ...
    @property
    def lost(self) -> str: ...


class Supervision(Protocol):
    """Who starts the process again that a session runs in. Safe to use from several threads."""

    def wait(self) -> None:
        """Return once a run can begin, or none ever will: at once, except after a crash."""

    def interrupt(self) -> None:
        """End the process, and with it the run in progress; another is started."""


class Session(Protocol):
    """A loaded model. `supervision` is None where it runs in this process."""

    @property
    def inputs(self) -> Specs: ...
    @property
    def outputs(self) -> Specs: ...
    @property
    def overridable(self) -> Specs:
        """Constants that a run may be given values for."""

    @property
    def device(self) -> Device: ...
    @property
    def supervision(self) -> Supervision | None: ...
    def facts(self, shared: Collection[str] = ()) -> Facts:
        """Of the graph that runs, after rewrites; the `shared` inputs are not of one row but of all."""

    def run(self, feeds: Arrays) -> Arrays: ...
    def plan_for(self, shapes: Shapes) -> Plan: ...
    def reserve(self, shapes: Shapes) -> int: ...
    def close(self) -> None: ...


class LocalSession:
    """A session of the runtime in this process: its own methods, called directly."""

    supervision = None

    def __init__(self, session: infera_gpu.Session) -> None:
        """Raises TypeError where an input or output is no tensor."""
        self.inputs: Specs = tensors_of(session.inputs, "input")
        self.outputs: Specs = tensors_of(session.outputs, "output")
        self.overridable: Specs = {n: s for n, s in session.overridable.items() if isinstance(s, TensorSpec)}
        self.device: Device = session.device
        self.run: Callable[[Arrays], Arrays] = session.run
        self.plan_for: Callable[[Shapes], Plan] = session.plan_for
        self.reserve: Callable[[Shapes], int] = session.reserve
        self.close: Callable[[], None] = session.close
        self._graph = session.graph

    def facts(self, shared: Collection[str] = ()) -> Facts:
        return facts_of(self._graph, self.inputs, shared)


def open_file(
    path: str | Path,
    *,
    device: str,
    threads: int,
    precision: Precision,
    batch_invariant: bool,
    vram_limit: VramBudget | str | None,
) -> LocalSession:
    """Load an ONNX file with the runtime. Raises InferaError, also where it takes or gives what is no tensor.

    Its files are read, not mapped: whoever copies a new model over them would end the server.
    """
    import infera_gpu

    session = infera_gpu.load(
        path,
        device=device,
        threads=threads,
        precision=precision,
        batch_invariant=batch_invariant,
        vram_limit=vram_limit,
        mapped=False,
    )
    try:
        return LocalSession(session)
    except TypeError as error:
        session.close()
        raise ModelError(f"{Path(path).name} cannot be served: {error}") from None
