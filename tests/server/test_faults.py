"""What goes wrong around a server: files, disks, descriptors, signals, clients that leave. It serves on."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from infera_server.http import connection
from tests.descriptors import open_files
from tests.server.malformed import BODY, VALID, Replies
from tests.server.support import WAIT, FakeSession, Running, doubler, http_request, request_of, serving, spec, until
from tests.server.test_serve import SERVE, WEIGHTS, Process, linear, process, write_linear, x_of


def running(served: Process) -> Running:
    """Requests to a process."""
    return Running(None, int(served.address.rpartition(":")[2]), None)  # type: ignore[arg-type]


def is_right(server: Running, name: str, factor: float = 1.0) -> bool:
    status, reply = server.infer(name, request_of(x_of(2)))
    if status != 200:
        return False
    return bool(np.allclose(reply["outputs"][0]["data"], factor * linear(x_of(2)).ravel(), rtol=1e-4, atol=1e-5))


# --- files ---------------------------------------------------------------------------------------------------------


def write_external(path: Path) -> Path:
    """The same model with its weights in a file beside it. Returns that."""
    model = onnx.load(write_linear(path))
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=0)
    return path.with_suffix(".bin")


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, 0),
    "overwritten": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "deleted": os.remove,
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    root = tmp_path_factory.mktemp("models")
    for how in CHANGES:
        write_linear(root / f"whole_{how}.onnx")
        write_external(root / f"split_{how}.onnx")
    with process(root) as served:
        yield running(served), root


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", ["whole", "split"])
def test_a_model_serves_on_whatever_becomes_of_its_files(repository: tuple[Running, Path], kind: str, how: str) -> None:
    server, root = repository
    name = f"{kind}_{how}"
    assert is_right(server, name)
    CHANGES[how](root / f"{name}.{'onnx' if kind == 'whole' else 'bin'}")
    assert is_right(server, name)
    status, _, reply = server.request("POST", f"/v2/repository/models/{name}/load")
    if (kind, how) != ("split", "overwritten"):  # which is a good model, of zeros
        assert status in (400, 404), reply
        assert is_right(server, name)
    write_linear(root / f"{name}.onnx", WEIGHTS * 2)
    assert server.request("POST", f"/v2/repository/models/{name}/load")[0] == 200
    assert is_right(server, name, 2)


def test_a_full_disk_loses_traces_and_messages_and_no_request(tmp_path: Path) -> None:
    """Every write to /dev/full fails as on a disk without room."""
    write_linear(tmp_path / "linear.onnx")
    (tmp_path / "traces").symlink_to("/dev/full")
    (tmp_path / "traces.0").symlink_to("/dev/full")
    kept = socket.socket()  # nobody else is given its port, and the server may listen there: this one does not
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    port = kept.getsockname()[1]
    command = [*SERVE, str(tmp_path / "linear.onnx"), "--port", str(port), "--trace-file", str(tmp_path / "traces")]
    command += ["--grpc-port", "off", "--metrics-port", "off"]  # what listens on the usual ports is not ours
    server = Running(None, port, None)  # type: ignore[arg-type]
    with kept, Path("/dev/full").open("w") as full, subprocess.Popen(command, stdout=full, stderr=full) as popen:
        try:
            until(lambda: popen.poll() is not None or is_up(server))
            assert popen.returncode is None, "the server did not start"
            settings = json.dumps({"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "log_frequency": "2"})
            assert server.request("POST", "/v2/trace/setting", settings)[0] == 200
            assert server.request("POST", "/v2/logging", json.dumps({"log_verbose_level": 1}))[0] == 200
            for _ in range(5):
                assert is_right(server, "linear")
            popen.terminate()
            assert popen.wait(WAIT) == 0
        finally:
            popen.kill()


def is_up(server: Running) -> bool:
    try:
        return server.get("/v2/health/ready")[0] == 200
    except OSError:
        return False


# --- signals -------------------------------------------------------------------------------------------------------

PIPELINED = 4
ROW = http_request(BODY.replace(b"[1, 4]", b"[1, 6]").replace(b"3.0", b"3.0, 4.0, 5.0"), "/v2/models/linear/infer")


class Caller(threading.Thread):
    """Asks until the server is gone. `error` is what it did not expect."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.statuses: Counter[int] = Counter()
        self.error: BaseException | None = None
        self.start()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.error = error

    def call(self) -> None:
        raise NotImplementedError


class Stayer(Caller):
    """Sends requests, some at a time, on one connection until it ends, which must be after a reply that says so."""

    def call(self) -> None:
        with self.connect() as sock:
            replies = Replies(sock)
            while not replies.over:
                sock.sendall(ROW * PIPELINED)
                for _ in range(PIPELINED):
                    if not replies.over:
                        self.statuses[replies.status()] += 1


class Comer(Caller):
    """Sends each request on a connection of its own, until none is to be had."""

    def call(self) -> None:
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                with self.connect() as sock:
                    sock.sendall(ROW)
                    self.statuses[Replies(sock).status()] += 1


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["one process", "workers"])
def test_sigterm_under_load_answers_every_request_that_was_sent(tmp_path: Path, options: list[str]) -> None:
    write_linear(tmp_path / "linear.onnx")
    with process(tmp_path / "linear.onnx", *options) as served:
        port = running(served).port
        callers: list[Caller] = [kind(port) for kind in (Stayer, Comer) for _ in range(4)]
        until(lambda: all(caller.statuses[200] > 20 for caller in callers))
        served.popen.terminate()
        for caller in callers:
            caller.join(WAIT)
        assert served.popen.wait(WAIT) == 0
    assert [caller.error for caller in callers] == [None] * len(callers)
    assert set().union(*(caller.statuses for caller in callers)) <= {200, 503}
    assert "Traceback" not in served.output


def test_a_server_that_was_killed_is_started_again_at_once(tmp_path: Path) -> None:
    path = write_linear(tmp_path / "linear.onnx")
    with process(path) as served:
        port = running(served).port
        with socket.create_connection(("127.0.0.1", port)) as open_one:
            open_one.sendall(VALID)
            served.popen.kill()
            served.popen.wait(WAIT)
            with subprocess.Popen(
                [*SERVE, str(path), "--port", str(port), "--grpc-port", "0"], stderr=subprocess.DEVNULL
            ) as again:
                until(lambda: again.poll() is not None or is_up(running(served)))
                assert is_right(running(served), "linear")
                again.terminate()
                assert again.wait(WAIT) == 0


# --- descriptors ---------------------------------------------------------------------------------------------------


def test_more_connections_than_descriptors(tmp_path: Path) -> None:
    """Those that are idle make room, and the server neither spins nor stops."""
    path = write_linear(tmp_path / "linear.onnx")
    with process(path) as served, contextlib.ExitStack() as stack:
        resource.prlimit(served.popen.pid, resource.RLIMIT_NOFILE, (64, 64))
        server = running(served)
        for _ in range(200):
            with contextlib.suppress(ConnectionError):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=WAIT))
        stack.close()

        def answers() -> bool:
            with contextlib.suppress(ConnectionError):  # it may be the one that makes room
                return is_right(server, "linear")
            return False

        until(answers)
        until(lambda: is_idle(served.popen.pid))


def is_idle(pid: int) -> bool:
    """Whether a process leaves the CPU alone for a while."""
    before = cpu_seconds(pid)
    time.sleep(0.3)
    return cpu_seconds(pid) - before < 0.1


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- clients -------------------------------------------------------------------------------------------------------


def test_slow_writers_are_cut_off_and_hold_nobody_up() -> None:
    """However busily they send bytes: the time is for the whole of a head, and of a body."""
    with serving({"double": doubler()}, request_timeout=2.0) as server, contextlib.ExitStack() as stack:
        connections = server.host.service.connections
        slow = [stack.enter_context(server.connect()) for _ in range(40)]
        for sock in slow:
            sock.sendall(VALID[:30] if sock is not slow[0] else VALID[:-40])
        until(lambda: sum(connection.in_head or connection.in_body for connection in connections) == len(slow))
        assert server.infer("double", BODY)[0] == 200
        assert len(connections) >= len(slow)  # it was answered while they went on
        for at in range(30, 55):  # for longer than they have
            for sock in slow:
                with contextlib.suppress(OSError):
                    sock.sendall(VALID[at : at + 1] if sock is not slow[0] else b" ")
            time.sleep(0.1)
        assert {Replies(sock).status() for sock in slow} == {408}
        stack.close()
        until(lambda: not connections)


def wide() -> FakeSession:
    """x [N, 1] -> y [N, 250,000]: a megabyte a row."""
    width = 250_000
    return FakeSession(
        {"x": spec("N", 1)}, {"y": spec("N", width)}, lambda feeds: {"y": np.repeat(feeds["x"], width, axis=1)}
    )


WIDE = http_request(
    json.dumps({
        "inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }).encode(),
    path="/v2/models/wide/infer",
)  # fmt: skip


def test_clients_that_do_not_read_or_leave_in_a_reply(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)
    with serving({"wide": wide()}, max_batch=2) as server, contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(server.connect()) for _ in range(4)]
        for sock in stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(WIDE * 4)
        for reset in (False, True) * 4:
            with server.connect() as sock:
                sock.sendall(WIDE * 2)
                assert sock.recv(1000)
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: not server.host.service.connections)
        assert server.host.repository.get("wide").queued == 0
        assert server.host.service.intake.held == 0
        assert server.infer("wide", WIDE.partition(b"\r\n\r\n")[2].split(b', "outputs"')[0] + b"}")[0] == 200
    assert not [record for record in caplog.records if record.exc_info]


class Reset:
    """A transport of uvloop's that is closed beneath, and does not say so yet."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


def test_a_client_that_has_just_gone_does_not_break_the_end() -> None:
    """Who is to be told of it in the middle of a request."""
    with serving({"double": doubler()}) as server, server.connect() as sock:
        sock.sendall(VALID[:-3])
        connections = server.host.service.connections
        until(lambda: any(connection.in_body for connection in connections))
        for connection in connections:
            connection.transport = Reset(connection.transport)  # type: ignore[assignment]
        server.host.server.should_exit = True
        until(lambda: all(connection.deaf for connection in connections))


def come_and_go(server: Running) -> None:
    """Connections that end in all states, until nothing of them is left but perhaps their sockets."""
    for i in range(300):
        with server.connect() as sock:
            sock.sendall((b"", VALID[:20], VALID[:-3], VALID, b"junk\r\n\r\n")[i % 5])
            if i % 3 == 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    service, model = server.host.service, server.host.repository.get("double")
    until(lambda: not (service.connections or model.queued or service.intake.held))


def test_connections_that_come_and_go() -> None:
    """None of them stays open."""
    with serving({"double": doubler()}) as server:
        come_and_go(server)
        most = open_files()
        come_and_go(server)
        until(lambda: open_files() <= most)
        assert server.infer("double", BODY)[0] == 200
