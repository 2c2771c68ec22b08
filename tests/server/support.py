"""A server in a thread, models in NumPy, and a raw client: what the tests of the server share."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from infera_gpu.graph import Graph, Node
from infera_gpu.spec import Dim, TensorSpec
from infera_server.access import Access
from infera_server.listening import listen, reserve
from infera_server.models.discovery import Source
from infera_server.models.model import Model
from infera_server.models.repository import Repository
from infera_server.runtime import Session, Supervision
from infera_server.scheduling.batcher import Batcher
from infera_server.scheduling.costs import WINDOW
from infera_server.scheduling.independence import Facts, facts_of
from infera_server.scheduling.rows import Arrays, HostArray
from infera_server.server import Host
from infera_server.settings import Settings

Result = TypeVar("Result")

WAIT = 60.0
"""Seconds after which a test gives up on something that takes milliseconds, or a second where a process starts: on a
machine that others keep busy it may take many times as long."""


@dataclass(frozen=True)
class FakePlan:
    arena_bytes: int


@dataclass(frozen=True)
class FakeDevice:
    name: str = "cpu"
    lost: str = ""


@dataclass
class FakeSession:
    """A model written in NumPy. While `gate` is clear a run waits; `batches` has the rows of every run."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    fn: Callable[[Arrays], Arrays]
    device: FakeDevice = field(default_factory=FakeDevice)
    nodes: tuple[Node, ...] = ()
    overridable: Mapping[str, TensorSpec] = field(default_factory=dict)
    supervision: Supervision | None = None
    constants: dict[str, HostArray] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    batches: list[int] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.gate.set()

    def facts(self, shared: Collection[str] = ()) -> Facts:
        return facts_of(Graph(self.nodes, self.inputs, self.outputs, self.constants), self.inputs, shared)

    def run(self, feeds: Arrays) -> Arrays:
        self.batches.append(next(iter(feeds.values())).shape[0])
        self.entered.release()
        assert self.gate.wait(WAIT)
        return self.fn(feeds)

    def reserve(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return self.plan_for(shapes).arena_bytes

    def plan_for(self, shapes: Mapping[str, tuple[int, ...]]) -> FakePlan:
        return FakePlan(sum(int(np.prod(s)) * 4 for s in shapes.values()))

    def close(self) -> None:
        self.closed = True

    def block(self) -> None:
        """Make the next run wait for `gate`; forget what ran before."""
        self.gate.clear()
        while self.entered.acquire(blocking=False):
            pass
        self.batches.clear()

    def wait_entered(self) -> None:
        """Return once a run has begun since `block`."""
        assert self.entered.acquire(timeout=WAIT)


def spec(*shape: Dim, dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec(shape, np.dtype(dtype))


def doubler(width: int = 4) -> FakeSession:
    """x [N, width] -> y = 2x; a row holding -1 in its first place is an error of the model, 666 one of the server."""

    def fn(feeds: Arrays) -> Arrays:
        x = feeds["x"]
        if (x[:, 0] == -1).any():
            raise IndexError("row cannot be used")
        if (x[:, 0] == 666).any():
            raise RuntimeError("the device is on fire")
        return {"y": x * 2}

    return FakeSession({"x": spec("N", width)}, {"y": spec("N", width)}, fn)


def any_width() -> FakeSession:
    """x [N, W] -> y = 2x for any width."""
    return FakeSession({"x": spec("N", "W")}, {"y": spec("N", "W")}, lambda feeds: {"y": feeds["x"] * 2})


def flat(batcher: Batcher, group: Hashable = (("x", (), (4,)),), seconds: float = 1e-3) -> Batcher:
    """The batcher, which believes that every bucket takes the same time: it packs what it can."""
    costs = batcher.schedule.costs.of(group)
    for bucket in costs.buckets:
        for _ in range(WINDOW):
            costs.learn(bucket, seconds)
    return batcher


@dataclass
class Running:
    """A server that answers on `port`."""

    host: Host
    port: int
    loop: asyncio.AbstractEventLoop
    sessions: Mapping[str, Session] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()

    def get(self, path: str) -> tuple[int, Any]:
        status, _, body = self.request("GET", path)
        return status, json.loads(body)

    def infer(self, model: str, document: Any, **headers: str) -> tuple[int, Any]:
        body = document if isinstance(document, bytes | str) else json.dumps(document)
        status, _, reply = self.request("POST", f"/v2/models/{model}/infer", body, headers)
        return status, json.loads(reply)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What a coroutine returns or raises in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT)

    def index(self) -> dict[str, str]:
        """State and reason by `model/version`."""
        _, _, reply = self.request("POST", "/v2/repository/index")
        return {
            f"{e['name']}/{e.get('version', '')}": ": ".join(filter(None, (e.get("state"), e.get("reason"))))
            for e in json.loads(reply)
        }

    def model(self, name: str) -> Model:
        """A model over a session, without what is wrapped around it."""
        found = self.host.repository.get(name)
        while not isinstance(found, Model):
            found = found.model  # type: ignore[attr-defined]
        return found

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)


@contextlib.contextmanager
def serving(
    sessions: Mapping[str, Session], wait: bool = True, access: Access | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve sessions under their names in a thread of this process; with `wait`, from when they are loaded.

    Runs take place in the engine thread, since those of a `FakeSession` may wait for the test.
    """
    chosen = Settings(**{"inline_run": 0.0} | settings)
    sources = [Source(name, "1", Path(f"{name}.onnx")) for name in sessions]
    repository = Repository(chosen, sources, opener=lambda path, _: sessions[path.stem])
    with hosting(repository, wait, access) as running:
        running.sessions = sessions
        yield running


@contextlib.contextmanager
def hosting(repository: Repository, wait: bool = True, access: Access | None = None) -> Iterator[Running]:
    """Serve a repository in a thread of this process, on free ports; with `wait`, from when everything is loaded."""
    repository.settings = repository.settings.model_copy(update={"port": 0})
    sock = (reserve if repository.settings.workers else listen)("127.0.0.1", 0)
    host = Host(repository, sock, access)
    loaded = threading.Event()
    host.on_loaded = loaded.set
    thread = threading.Thread(target=host.run)
    thread.start()
    try:
        assert not wait or loaded.wait(WAIT)
        until(lambda: host.server.started)
        assert host.loop is not None
        yield Running(host, sock.getsockname()[1], host.loop)
    finally:
        host.server.should_exit = True
        thread.join(WAIT * 2)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def request_of(x: HostArray, **more: Any) -> dict[str, Any]:
    """A JSON inference request of input `x`."""
    return {"inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}], **more}


def http_request(
    body: bytes, path: str = "/v2/models/double/infer", headers: str = "", length: int | None = None
) -> bytes:
    """The bytes of a POST."""
    declared = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {declared}\r\n{headers}\r\n".encode() + body


def read_reply(stream: Any) -> tuple[int, dict[str, str], bytes]:
    """One HTTP reply off a socket's file; status 0 where the connection is closed instead."""
    line = stream.readline()
    if not line:
        return 0, {}, b""
    headers = {}
    while (header := stream.readline().strip()) != b"":
        name, _, value = header.decode().partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers, stream.read(int(headers.get("content-length", 0)))
