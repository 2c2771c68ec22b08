"""Start, serve, drain, exit."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from infera_server.access import Access, is_local
from infera_server.http.app import create_app
from infera_server.http.gate import App, Gate
from infera_server.http.hotpath import HotPathProtocol
from infera_server.http.websocket import Streams
from infera_server.http.websocket_protocol import WebSocketProtocol
from infera_server.listening import BACKLOG, turn_away
from infera_server.models.repository import Entry, Repository
from infera_server.models.watch import Watch
from infera_server.processes.workers import Workers
from infera_server.service import DRAIN_PERIOD, Service

if TYPE_CHECKING:
    from infera_server.rpc.server import GrpcServer

log = logging.getLogger(__name__)

LAST_HANDSHAKES = 0.05
"""Seconds in which connections that had begun are taken before the listener closes, which would reset them."""

LAST_REQUESTS = 0.5
"""Seconds after which a connection that is idle is closed at the end. One where something has just come or gone may be
about to bring a request, which would be met by a reset."""

ACCEPTS = 8
"""How often each socket is listened at. libuv takes one connection of each listener in a turn of the event loop, which
takes milliseconds under load: the last of many that come at once would wait for as many turns."""

SWITCH_INTERVAL = 5e-5
"""Seconds for which a thread that has the interpreter's lock keeps it from one that waits, not 0.005. An engine
thread takes the lock for a few microseconds after each step of a run, which has hundreds. While the event loop is busy,
with refusals above all, each of them could wait for as long (`python -m bench.overload`)."""

_intervals: list[float] = []
"""For each server that runs the interval before the first of them."""

_INTERVAL_LOCK = threading.Lock()

MIN_FAREWELL = 0.5
"""Seconds that replies have to leave after a drain that took all its time."""


class Server(uvicorn.Server):
    """uvicorn, with three differences: many connections are taken at a time, and a signal drains before the listener
    closes, and is not raised again at the end.

    While draining, connections are still taken, so that probes see "not ready" and clients a 503 instead of a refusal.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.workers: Workers | None = None
        """Who takes the requests, where that is not this process; they are drained first."""

        self.deadline = 0.0
        """When all must be over; before `shutdown` there is no hurry and nothing to wait for."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop waiting at the second, be gone at the third."""
        if self.force_exit:
            os._exit(128 + sig)
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        again = [sock.dup() for sock in sockets or () for _ in range(ACCEPTS - 1)]
        try:
            await super().startup(sockets and [*sockets, *again])
        except BaseException:
            for sock in again:
                sock.close()
            raise

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timeout = self.service.settings.drain_timeout
        began = time.monotonic()
        self.deadline = began + timeout
        if self.workers is not None:
            self.service.draining = True
            await self.workers.drain(self.deadline, lambda: self.force_exit)
        if not await self.service.drain(self.deadline, lambda: self.force_exit):
            log.error("requests were still running after %.3g s and were given up", time.monotonic() - began)
        await self._stop_listening(sockets or ())
        left = max(MIN_FAREWELL, self.deadline - time.monotonic())
        self.config.timeout_graceful_shutdown = left  # type: ignore[assignment]  # asyncio.wait_for takes any number
        await super().shutdown()
        if self.force_exit:
            self.deadline = 0.0
            await self.lifespan.shutdown()  # which uvicorn leaves out; it waits for nothing

    async def _stop_listening(self, sockets: Sequence[socket.socket]) -> None:
        """Take no more connections, and answer what comes on those that there are: nobody is met by a reset."""
        for sock in sockets:
            turn_away(sock)
        if sockets and not self.force_exit:
            await asyncio.sleep(LAST_HANDSHAKES)
        last = [sock.dup() for sock in sockets]
        for server in self.servers:
            server.close()
        self.servers = []
        for sock in sockets:
            sock.close()
        await asyncio.sleep(0)  # now the event loop accepts no more
        waiting: list[socket.socket] = []
        for sock in last:
            with sock, suppress(OSError):
                sock.setblocking(False)
                while True:
                    waiting.append(sock.accept()[0])
        await asyncio.gather(*(self._take(connection) for connection in waiting))
        while not self.force_exit and self._expects_requests():
            await asyncio.sleep(DRAIN_PERIOD)

    def _expects_requests(self) -> bool:
        since = time.monotonic() - LAST_REQUESTS
        return any(c.is_idle and not c.is_over and c.waiting_since > since for c in self.service.connections)

    async def _take(self, connection: socket.socket) -> None:
        connection.setblocking(False)

        def protocol() -> HotPathProtocol:
            return HotPathProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        with suppress(OSError, TimeoutError):
            taken = asyncio.get_running_loop().connect_accepted_socket(protocol, connection, ssl=self.config.ssl)
            await asyncio.wait_for(taken, LAST_HANDSHAKES)


def make_server(app: App, service: Service) -> Server:
    """Serves a service, and an application behind its gate."""
    settings = service.settings
    return Server(
        uvicorn.Config(
            Gate(Streams(app, service), service.access, service.metrics_port, local=is_local(settings.host)),
            http=HotPathProtocol,
            ws=WebSocketProtocol,
            ws_max_size=settings.max_body_bytes,
            ws_per_message_deflate=False,  # a thousandth of what a message is in memory would be counted
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            backlog=BACKLOG,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            ssl_ca_certs=None if settings.tls_client_ca is None else str(settings.tls_client_ca),
            ssl_cert_reqs=ssl.CERT_NONE if settings.tls_client_ca is None else ssl.CERT_REQUIRED,
        ),
        service,
    )


@contextmanager
def _handing_over() -> Iterator[None]:
    """Threads hand the interpreter's lock over soon while a server runs, or several in one process."""
    with _INTERVAL_LOCK:
        if not _intervals:
            _intervals.append(sys.getswitchinterval())
            sys.setswitchinterval(min(_intervals[0], SWITCH_INTERVAL))
        else:
            _intervals.append(_intervals[0])
    try:
        yield
    finally:
        with _INTERVAL_LOCK:
            before = _intervals.pop()
            if not _intervals:
                sys.setswitchinterval(before)


class Host:
    """One server process: listens at once, loads while it listens, exits when asked or when nothing could be loaded."""

    def __init__(
        self,
        repository: Repository,
        sock: socket.socket,
        access: Access | None = None,
        metrics: socket.socket | None = None,
    ) -> None:
        """`sock` listens, or with workers keeps their port; `metrics` listens for who asks for metrics alone."""
        settings = repository.settings
        access = Access() if access is None else access
        self.repository = repository
        self.service = Service(settings, repository, access)
        self._sockets = [sock] if metrics is None else [sock, metrics]
        self.service.metrics_port = None if metrics is None else metrics.getsockname()[1]
        self.failed = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.grpc: GrpcServer | None = None
        self.grpc_port: int | None = None
        """Where gRPC is served, once it is."""
        app = create_app(self.service, self._lifespan)
        self.server = make_server(app, self.service)
        self.workers = self.server.workers = None
        if settings.workers:
            self.workers = self.server.workers = Workers(self.service, app, sock, self._fail)
            self._sockets.remove(sock)
        self.on_settled: Callable[[Entry], None] = lambda entry: None
        self.on_loaded: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[dict[str, Any]]:
        self.loop = asyncio.get_running_loop()
        await self._start_grpc()
        if self.workers is not None:
            await self.workers.start()
        tasks = [asyncio.create_task(self._load()), asyncio.create_task(self.service.expire())]
        settings = self.repository.settings
        if settings.watch or settings.model_control == "poll":
            tasks.append(asyncio.create_task(Watch(self.repository, self.service.control).run()))
        try:
            yield {"service": self.service}
        finally:
            self.repository.stop()
            if self.grpc is not None:
                await self.grpc.stop(max(0.0, self.server.deadline - time.monotonic()))
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _start_grpc(self) -> None:
        port, host = self.service.settings.listen_grpc, self.service.settings.host
        if port is None:
            return
        try:
            self.grpc_port = await self._listen_grpc(port)
        except OSError as error:
            log.error("cannot serve gRPC on %s:%d: %s; choose another --grpc-port, or off", host, port, error)
            self._fail()

    def _fail(self) -> None:
        """End with a status that says so."""
        self.failed = self.server.should_exit = True

    async def _listen_grpc(self, port: int) -> int:
        """The port where gRPC is served, here or by the workers. Raises OSError."""
        if self.workers is not None:
            return self.workers.reserve(port)
        from infera_server.rpc.server import GrpcServer  # grpc takes a while to import

        self.grpc = GrpcServer(self.service)
        return await self.grpc.start(port)

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        finished = asyncio.Event()

        def work() -> None:
            try:
                self.repository.load(loop.call_soon_threadsafe, self.on_settled)
            finally:
                with suppress(RuntimeError):  # the loop is closed: the server was stopped meanwhile
                    loop.call_soon_threadsafe(finished.set)

        threading.Thread(target=work, name="infera-loading", daemon=True).start()  # not the executor: it is waited for
        await finished.wait()
        if self.workers is not None:
            await self.workers.started.wait()
        if not any(self.repository.ready()) and self.repository.has_failed:
            self._fail()
        self.on_loaded()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit status: 1 where no model could be loaded, else 0."""
        try:
            with _handing_over():
                self.server.run(self._sockets)
        finally:
            self.service.log_settings.restore()
            self.repository.stop()
            for model in self.repository.working():
                model.close(self.server.deadline - time.monotonic())
        return 1 if self.failed else 0
