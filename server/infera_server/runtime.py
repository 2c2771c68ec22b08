"""What the server needs of the runtime, so that tests can serve a model written in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

from infera_gpu.graph import Graph
from infera_gpu.spec import TensorSpec
from infera_server.rows import Arrays

Specs: TypeAlias = Mapping[str, TensorSpec]


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


class Session(Protocol):
    """The part of `infera_gpu.Session` that is used. `graph` is the one that runs, after rewrites."""

    @property
    def inputs(self) -> Specs: ...
    @property
    def outputs(self) -> Specs: ...
    @property
    def graph(self) -> Graph: ...
    @property
    def device(self) -> Device: ...
    def run(self, feeds: Arrays) -> Arrays: ...
    def plan_for(self, shapes: Mapping[str, tuple[int, ...]]) -> Plan: ...
    def reserve(self, shapes: Mapping[str, tuple[int, ...]]) -> int: ...
    def close(self) -> None: ...
