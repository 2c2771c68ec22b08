"""Runs of a session bound to be timed: as it is, and without what it has been given, the library or measured tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

from bench.gpu_peers import Feeds
from infera_gpu.graph import Graph
from infera_gpu.passes import Precision
from infera_gpu.plan import Plan
from infera_gpu.session import Session
from infera_kernels.launch import library_of

NOTHING: Mapping[str, str] = MappingProxyType({})


class Run(NamedTuple):
    """A plan, the call that runs it, its answers, and how many launches each of its steps is."""

    plan: Plan
    call: Callable[[], object]
    answers: Mapping[str, Any]
    launches: tuple[int, ...]


def bound_run(device: Any, session: Session, feeds: Feeds, kept: Mapping[str, str] = NOTHING) -> Run:
    """The calls of a run that reads arrays on the GPU where they lie, without copying answers out; and its answers.
    Outputs that are `kept` lie where the inputs do that they name.

    Of what a run has copied in, its steps may have overwritten everything: only such a binding can run again by itself.
    """
    with device.running():
        there = {name: device.constant(array, "device") for name, array in feeds.items()}
    out = {name: there[given] for name, given in kept.items()}
    for _ in range(4):  # copied, bound to, recorded, replayed
        answers = session.run(there, out)
    (lease,) = session._leases.values()
    *_, (bound_plan, _) = lease._direct.values()
    launches = tuple([b - a for a, b in pairwise(bound_plan.starts)])
    return Run(bound_plan.plan, bound_plan.run, answers, launches)


Without = Callable[[Any], AbstractContextManager[None]]
"""Takes something from a device, for as long as one plans and binds."""


@contextmanager
def without_library(device: Any) -> Iterator[None]:
    library, device.launcher.library = library_of(device.launcher), None
    try:
        yield
    finally:
        device.launcher.library = library


@contextmanager
def without_measurements(device: Any) -> Iterator[None]:
    tiles = device.tiles
    device.tiles = tiles.unmeasured()
    try:
        yield
    finally:
        device.tiles = tiles


def run_without(
    what: Without,
    device: Any,
    graph: Graph,
    feeds: Feeds,
    precision: Precision,
    sessions: ExitStack,
    kept: Mapping[str, str] = NOTHING,
) -> Run:
    """A run of another session on the same device and stream, which `sessions` close."""
    with what(device):
        session = sessions.enter_context(Session(graph, device, precision=precision))
        return bound_run(device, session, feeds, kept)


def chosen(session: Session, feeds: Feeds) -> dict[str, int]:
    """Columns: how many choices a run's kernels have, of how many something is measured (`tuned`), and where that is
    not what is predicted (`changed`). None where nothing has tiles."""
    if session.device.tiles is None:
        return {}
    choices = session.choices(feeds)
    measured = [c for c in choices if c.measured is not None]
    changed = sum(c.numbers != c.predicted for c in measured)
    return {"choices": len(choices), "tuned": len(measured), "changed": changed}
