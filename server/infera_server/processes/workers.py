"""The processes that take requests, and what they are told: with `--workers` the models have this one to themselves.

Each worker listens at the same port (SO_REUSEPORT), and does all of HTTP and gRPC. What goes to a model is run here, at
the worker's `Desk`; what is about the server or its models is passed on to the application here. Workers are told of
every change before what was there is let go. One that ends is started again, and only its own clients notice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import orjson

from infera_server.access import BUCKET_BYTES
from infera_server.errors import Unavailable
from infera_server.http.gate import App
from infera_server.listening import reserve
from infera_server.models.audience import Audience
from infera_server.models.background import detached
from infera_server.models.servable import Servable
from infera_server.processes.bulletin import Numbers, bulletin
from infera_server.processes.channel import Channel
from infera_server.processes.forward import Answering
from infera_server.processes.ring import Signs
from infera_server.processes.segment import shared_file
from infera_server.processes.supervisor import Supervisor
from infera_server.processes.worker_process import WorkerProcess
from infera_server.service import DRAIN_PERIOD, Service

log = logging.getLogger(__name__)

START_PATIENCE = 60.0
"""Seconds that a worker has until it takes requests."""

PATIENCE = 5.0
"""Seconds that workers have to say that they know of a change, or what they have counted."""

FAREWELL = 1.0
"""Seconds that replies have to leave workers after a drain that took all its time."""

STEADY = 10.0
"""Seconds after which a worker that ends has not crashed at its start."""

GATHERING = 0.02
"""Seconds in which further changes are told together with the first, where nobody waits."""

PERIOD = 0.05
"""Seconds between looks at what workers are told of the engine, and at whether they live."""


class Worker:
    """A worker that runs: its process, and what is said to it."""

    def __init__(self, process: WorkerProcess, channel: Channel) -> None:
        self.process, self.channel = process, channel
        self.began_at: float | None = None
        """When it first took requests."""

    def wait(self) -> str:
        return self.process.wait()

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.close()


class Workers(Audience):
    """As many as the settings say. Lives in the event loop's thread."""

    def __init__(self, service: Service, app: App, reserved: socket.socket, fail: Callable[[], None]) -> None:
        """They share the `reserved` port; `app` answers what is no inference.

        `fail()` is called when no worker can be kept running. Raises OSError.
        """
        self._service, self._fail = service, fail
        self._http = reserved
        self._count = service.settings.workers
        self._handlers = Answering(service, app).handlers
        self._buckets = shared_file("infera-buckets")
        os.posix_fallocate(self._buckets, 0, max(1, len(service.access.keys)) * BUCKET_BYTES)
        self._full = Signs.create("infera-full")
        self._grpc: socket.socket | None = None
        self._numbers = Numbers()
        self._attached: set[Worker] = set()
        self._supervisors: list[Supervisor[Worker]] = []
        self._is_stale = False
        self._told = b""
        self._named: Sequence[Servable] = ()
        """What workers were last told to send requests to. Nobody else may have what only stands before a model."""

        self._outage = ""
        self._telling: dict[asyncio.Task[None], Worker] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = False
        self.started = asyncio.Event()
        """Set once all of them take requests."""

        service.repository.audience = self

    def reserve(self, port: int) -> int:
        """Keep a port for gRPC, 0 for a free one, and return which. Raises OSError where it cannot be had."""
        self._grpc = reserve(self._service.settings.host, port)
        return int(self._grpc.getsockname()[1])

    async def start(self) -> None:
        """Start them, beside whatever else goes on."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(work) for work in (self._start_all(), self._look())]

    async def _start_all(self) -> None:
        starting = [detached("infera-worker", lambda n=n: self._supervise(n)) for n in range(1, self._count + 1)]  # type: ignore[misc]
        started = await asyncio.gather(*starting, return_exceptions=True)
        self._supervisors = [found for found in started if isinstance(found, Supervisor)]
        failures = [found for found in started if not isinstance(found, Supervisor)]
        if failures:
            log.error("workers cannot be started: %s", failures[0])
            self._fail()
        else:
            self.started.set()

    def _supervise(self, number: int) -> Supervisor[Worker]:
        return Supervisor(f"worker {number}", lambda: self._start_one(number), f"{STEADY:g} s of service")

    def _start_one(self, number: int) -> Worker:
        """A worker that takes requests; called in a thread of its own. Raises OSError or Unavailable."""
        assert self._loop is not None
        if self._draining:
            raise Unavailable("the server is shutting down")
        most = self._service.settings.max_queue_bytes
        process = WorkerProcess(self._numbers.models, self._full, self._buckets, most)
        try:
            welcomed = asyncio.run_coroutine_threadsafe(self._welcome(process, number), self._loop)
            return welcomed.result(START_PATIENCE)
        except TimeoutError:
            process.close()
            raise Unavailable(f"it takes no requests after {START_PATIENCE:g} s") from None
        except BaseException:
            process.close()
            raise

    async def _welcome(self, process: WorkerProcess, number: int) -> Worker:
        channel = await Channel.over(process.sock, self._handlers, lambda: self._leave(worker))
        worker = Worker(process, channel)
        process.desk.open()
        self._publish()
        self._attached.add(worker)
        try:
            await channel.ask("begin", [self._settings(number), orjson.loads(self._told)])
            if self._draining:
                raise Unavailable("the server is shutting down")
        except BaseException:
            self._leave(worker)
            raise
        worker.began_at = time.monotonic()
        return worker

    def _settings(self, number: int) -> dict[str, Any]:
        """What a worker begins with; limits of the whole server are divided."""
        settings, access = self._service.settings, self._service.access
        shared = {name: -(-getattr(settings, name) // self._count) for name in ("max_connections", "max_intake_bytes")}
        return {
            "number": number,
            "settings": settings.model_copy(update=shared).model_dump(mode="json"),
            "port": self._http.getsockname()[1],
            "grpc_port": None if self._grpc is None else self._grpc.getsockname()[1],
            "keys": [[k.name, k.digest.hex(), k.models, k.rate, k.management] for k in access.keys.values()],
            "open_management": access.open_management,
        }

    def _leave(self, worker: Worker) -> None:
        """A worker is gone, or was never there."""
        if worker in self._attached:
            self._attached.discard(worker)
            worker.process.desk.close()

    async def _look(self) -> None:
        signs = Signs(self._full)
        while True:
            await asyncio.sleep(PERIOD)
            if self._service.why_not_ready != self._outage:
                self._publish()
            signs.hide_all()  # one of a model that others keep busy would stay
            now = time.monotonic()
            for worker in self._attached:
                worker.process.desk.flush()
            for supervisor in self._supervisors:
                if (ready := supervisor.process) and ready.began_at and now - ready.began_at > STEADY:
                    supervisor.succeeded()
            if self._supervisors and all(supervisor.failed for supervisor in self._supervisors):
                self._fail()
                return

    # --- telling -----------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Tell all workers what is otherwise, if anything is."""
        self._is_stale = False
        self._outage = self._service.why_not_ready
        told = orjson.dumps(bulletin(self._service, self._numbers))
        if told != self._told:
            before, self._named = self._named, list(self._service.repository.serving.find.values())
            self._told = told
            for worker in self._attached:
                task = asyncio.create_task(self._tell(worker, told, before))
                self._telling[task] = worker
                task.add_done_callback(self._telling.pop)

    async def _tell(self, worker: Worker, told: bytes, before: Sequence[Servable]) -> None:
        """What it was told `before` is there until it knows: requests to that may be on their way."""
        with suppress(Unavailable):  # it is gone
            await worker.channel.ask("bulletin", None, told)
            worker.process.desk.receive()  # what it has sent before it knew

    def changed(self) -> None:
        if self._loop is not None and not self._is_stale:
            self._is_stale = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._loop.call_later, GATHERING, self._publish)

    async def informed(self) -> None:
        self._publish()
        if telling := [task for task, worker in self._telling.items() if worker.began_at]:
            await asyncio.wait(telling, timeout=PATIENCE)

    async def counted(self) -> None:
        if asking := [asyncio.create_task(self._count_of(worker)) for worker in self._attached if worker.began_at]:
            await asyncio.wait(asking, timeout=PATIENCE)

    async def _count_of(self, worker: Worker) -> None:
        with suppress(Unavailable):
            counted, _ = await worker.channel.ask("counted")
            self._service.access.refused.update(counted["refused"])
            for number, found in counted["models"]:
                if (model := self._numbers.models.get(number)) is not None:
                    model.stats.add(found)

    # --- ending ------------------------------------------------------------------------------------------------------

    async def drain(self, deadline: float, forced: Callable[[], bool]) -> None:
        """Have all finish what they have accepted and end, at `deadline` in any case or when `forced()`."""
        self._draining = True
        for task in self._tasks:
            task.cancel()
        for supervisor in self._supervisors:
            supervisor.retire()
        draining = [asyncio.create_task(self._drain(worker, deadline)) for worker in self._attached]
        while not all(task.done() for task in draining) and not forced() and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_PERIOD)
        for worker in self._attached:  # none before the others: who connects is to find one
            worker.channel.tell("end")
        while self._attached and not forced() and time.monotonic() < deadline + FAREWELL:
            await asyncio.sleep(DRAIN_PERIOD)
        self._http.close()
        if self._grpc is not None:
            self._grpc.close()
        for file in (self._full, self._buckets):
            os.close(file)
        await asyncio.gather(*[detached("infera-close", supervisor.close) for supervisor in self._supervisors])

    async def _drain(self, worker: Worker, deadline: float) -> None:
        with suppress(Unavailable):
            await worker.channel.ask("drain", deadline)
