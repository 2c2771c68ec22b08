"""`python -m bench.hotpath`: processor time of a request in the server, without sockets.

The server's protocol is handed requests on transports that keep nothing, in one event loop, by 1, 8 and 64 connections
that ask again as soon as they have their reply. Time of the event loop's thread and of the whole process, in
microseconds a request, minimum of many rounds. `pick` is a model with hardly any work; a `refused` request finds a full
queue. --profile prints where the event loop's thread spends its time; --against runs another checkout in turn, round by
round.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from rich.console import Console
from rich.table import Table
from uvicorn.server import ServerState

from bench.environment import thread_environment
from bench.served_model import save_bodies, save_model, save_pick
from infera_server.http.hotpath import HotPathProtocol
from infera_server.models.discovery import Source
from infera_server.models.repository import Repository
from infera_server.scheduling.backlog import Waiting
from infera_server.scheduling.jobs import Job
from infera_server.service import Service
from infera_server.settings import Settings

MODELS, BODIES = ("mlp", "pick"), ("binary", "json")
CONNECTIONS = (1, 8, 64)
"""How many requests are under way at a time."""


class Transport:
    """Takes what is written, and tells who asks next."""

    def __init__(self, load: Load, index: int) -> None:
        self._load, self._index = load, index

    def write(self, data: bytes) -> None:
        self._load.answered(self._index, data)

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name in ("sockname", "peername") else None

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_write_buffer_limits(self, **limits: int) -> None: ...


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    """Nothing is asked for but inference."""


class Load:
    """Connections that ask again once they are answered, all that were together, as readiness is told by the system."""

    def __init__(self, service: Service, request: bytes, status: int = 200) -> None:
        self.loop = asyncio.get_running_loop()
        self.request = request
        self._expected = b"HTTP/1.1 %d " % status
        config = uvicorn.Config(_no_app, http=HotPathProtocol, ws="none", log_config=None, interface="asgi3")
        config.load()
        state = ServerState()
        state.default_headers = [(b"date", b"Sat, 28 Nov 2026 00:00:00 GMT")]
        self.protocols = []
        for index in range(max(CONNECTIONS)):
            protocol = HotPathProtocol(config, state, {"service": service})
            protocol.connection_made(Transport(self, index))
            self.protocols.append(protocol)
        self._unasked = self._unanswered = 0
        self._done = asyncio.Event()
        self._next: list[int] = []

    def answered(self, index: int, data: bytes) -> None:
        """A connection has its reply."""
        if not data.startswith(self._expected):
            raise RuntimeError(f"answered {data!r}")
        self._unanswered -= 1
        if not self._unanswered:
            self._done.set()
        if self._unasked:
            self._unasked -= 1
            if not self._next:
                self.loop.call_soon(self._ask)
            self._next.append(index)

    def _ask(self) -> None:
        asking, self._next = self._next, []
        for index in asking:
            self.protocols[index].data_received(self.request)

    async def run(self, connections: int, requests: int) -> tuple[float, float]:
        """Microseconds a request: of this thread, of the process."""
        self._unanswered, self._unasked = requests, requests - connections
        self._done.clear()
        thread, process = time.thread_time(), time.process_time()
        for index in range(connections):
            self.protocols[index].data_received(self.request)
        await self._done.wait()
        thread, process = time.thread_time() - thread, time.process_time() - process
        return thread / requests * 1e6, process / requests * 1e6


async def measured(requests: int, profile: bool) -> dict[str, tuple[float, float]]:
    """(thread, process) microseconds a request by model, body and connections."""
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "mlp.onnx")
        save_pick(folder / "pick.onnx")
        save_bodies(folder)
        settings = Settings(device="cpu", threads=1)
        repository = Repository(settings, [Source(m, "1", folder / f"{m}.onnx") for m in MODELS])
        await asyncio.to_thread(repository.load, loop.call_soon_threadsafe)
        service = Service(settings, repository)
        found = {}
        for (model, body), status in product(product(MODELS, BODIES), (200, 429)):
            load = Load(service, request_bytes(folder, model, body), status)
            with full(repository.get(model)) if status == 429 else nullcontext():
                await load.run(1, 64)
                for connections in CONNECTIONS if status == 200 else CONNECTIONS[-1:]:
                    await load.run(connections, requests)
                    key = f"{model} {body} {connections if status == 200 else 'refused'}"
                    found[key] = await load.run(connections, requests)
                    if profile:
                        print(f"--- {key}: {requests} requests")
                        with cProfile.Profile(time.thread_time) as profiler:
                            await load.run(connections, requests)
                        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
        for served in repository.working():
            served.close(1.0)
        return found


@contextmanager
def full(model: Any) -> Iterator[None]:
    """The model's queue holds all that it may, and nobody runs it."""
    schedule = model.batcher.schedule
    for _ in range(schedule.max_queue):
        job = Job({}, lambda result, batch: None)
        schedule.put(job, schedule.group(None) or Waiting(None, schedule.costs.of(None)))
    yield
    schedule.clear()


def request_bytes(folder: Path, model: str, body: str) -> bytes:
    """As wrk sends it."""
    content = (folder / f"{body}.body").read_bytes()
    headers = (folder / f"{body}.headers").read_text().strip().replace("\n", "\r\n")
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n{headers}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content  # fmt: skip


def of_checkout(root: Path, requests: int) -> dict[str, list[float]]:
    """What a checkout's server takes, by this very file, in a process of its own."""
    path = ":".join(map(str, (root, root / "kernels", root / "server")))
    command = [sys.executable, "-P", __file__, "--json", "--requests", str(requests)]
    run = subprocess.run(command, env={**thread_environment(1), "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    found: dict[str, list[float]] = json.loads(run.stdout)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.hotpath", description=__doc__)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", action="store_true", help="one round in this process, as JSON")
    asked = parser.parse_args()
    if asked.json or asked.profile:
        found = uvloop.run(measured(asked.requests, asked.profile))
        print(json.dumps(found) if asked.json else "")
        return
    roots = [Path(__file__).parent.parent, *([asked.against] if asked.against else [])]
    rounds = [[of_checkout(root, asked.requests) for root in roots] for _ in range(asked.rounds)]
    table = Table("model", "body", "connections", *("thread, us", "process, us") * len(roots))
    for key in rounds[0][0]:
        best = [min(r[i][key][j] for r in rounds) for i in range(len(roots)) for j in range(2)]
        table.add_row(*key.split(), *(f"{value:.1f}" for value in best))
    Console().print(table)


if __name__ == "__main__":
    main()
