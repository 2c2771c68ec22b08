"""How often an image of 4 MB is copied between the socket and the arena of its run: over HTTP once, if it is alone."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx.helper
import onnx.parser
import pytest

import infera_gpu
from infera_gpu.devices.ports import HostPorts
from infera_server.http import upload
from infera_server.http.upload import LARGE, Upload
from infera_server.protocols import v2_grpc
from infera_server.runtime import LocalSession
from infera_server.scheduling import rows
from infera_server.scheduling.rows import Arrays, HostArray
from tests.server.grpc_support import array_of, channel, infer, request
from tests.server.support import WAIT, Running, flat, http_request, read_reply, serving, until

SIZE = 592
SHAPE = (1, 3, SIZE, SIZE)
X = np.random.default_rng(0).random(SHAPE, np.float32)
MEANS = X.mean((2, 3))
GRAPH = f"g (float[N, 3, {SIZE}, {SIZE}] x) => (float[N, 3, 1, 1] y) {{ y = GlobalAveragePool(x) }}"


class Numpy:
    """NumPy for one module, of which some functions are counted."""

    def __init__(self, **counted: Any) -> None:
        self._counted = counted

    def __getattr__(self, name: str) -> Any:
        return self._counted.get(name) or getattr(np, name)


@dataclass
class Copies:
    """What large tensors went through, in order; and the memory that bodies and messages were received into."""

    received: list[HostArray] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    """Bytes of bodies that came with their heads and are put into this memory."""

    gathered: list[Sequence[HostArray]] = field(default_factory=list)
    entered: list[HostArray] = field(default_factory=list)
    """What was copied into an arena."""

    def lies(self, array: HostArray) -> bool:
        """Whether it is in memory that was received into."""
        begin = array.ctypes.data
        return any(
            at.ctypes.data <= begin and begin + array.nbytes <= at.ctypes.data + at.nbytes for at in self.received
        )


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    found = Copies()

    def fill(self: HostPorts, entering: Arrays) -> None:
        found.entered.extend(a for name, _ in self._inputs if (a := entering[name]).nbytes >= X.nbytes)
        filling(self, entering)

    def concatenate(parts: Sequence[HostArray], **more: Any) -> HostArray:
        if sum(part.nbytes for part in parts) >= X.nbytes:
            found.gathered.append(parts)
        return np.concatenate(parts, **more)

    def put(self: Upload, part: bytes) -> None:
        found.apart.append(len(part))
        putting(self, part)

    def cut(data: bytes) -> v2_grpc.Message:
        found.received.append(np.frombuffer(data, np.uint8))
        return cutting(data)

    putting, cutting, filling = Upload.put, v2_grpc.cut, HostPorts.fill
    monkeypatch.setattr(Upload, "put", put)
    monkeypatch.setattr(v2_grpc, "cut", cut)
    monkeypatch.setattr(rows, "np", Numpy(concatenate=concatenate))
    monkeypatch.setattr(HostPorts, "fill", fill)
    return found


@dataclass
class Gate:
    """Runs of a session wait while it is `shut`."""

    shut: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def before(self) -> None:
        self.entered.release()
        until(lambda: not self.shut.is_set())


@contextlib.contextmanager
def serving_means(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, Gate]]:
    """A server of the means of images, up to two at a time; what it did before it was ready is not counted."""
    graph = onnx.parser.parse_graph(GRAPH)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session, gate = LocalSession(infera_gpu.load(model, device="cpu", threads=1)), Gate()
    run = session.run

    def gated(feeds: Arrays) -> Arrays:
        gate.before()
        return run(feeds)

    def room(nbytes: int) -> HostArray:
        copies.received.append(upload.room(nbytes))
        return copies.received[-1]

    session.run = gated
    with serving({"means": session}, max_batch=2, warmup_seconds=0) as running:
        monkeypatch.setattr(running.host.service, "room", room)
        for kept in (copies.gathered, copies.entered):
            kept.clear()
        yield running, gate


def parts_of(chunked: bool = False, header: int = 0) -> tuple[bytes, bytes]:
    """The head of a binary request, and its body, whose JSON has at least `header` bytes."""
    document = {
        "inputs": [
            {"name": "x", "shape": SHAPE, "datatype": "FP32", "parameters": {"binary_data_size": X.nbytes}},
        ],
        "parameters": {"binary_data_output": True},
    }
    said = json.dumps(document).ljust(header).encode()
    fields = f"Inference-Header-Content-Length: {len(said)}\r\n"
    body = said + X.tobytes()
    head = http_request(b"", "/v2/models/means/infer", fields, len(body))
    if chunked:
        head = head.replace(b"Content-Length: %d\r\n" % len(body), b"Transfer-Encoding: chunked\r\n", 1)
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return head, body


def until_it_is(want: int, value: Callable[[], int]) -> None:
    until(lambda: value() == want)


def check_reply(stream: Any) -> None:
    status, _, body = read_reply(stream)
    assert status == 200, body
    np.testing.assert_allclose(np.frombuffer(body[-MEANS.nbytes :], np.float32), MEANS[0], rtol=1e-4)


@pytest.mark.parametrize("at_once", [False, True], ids=["the head before the body", "in one piece"])
def test_alone_over_http_it_is_copied_once(copies: Copies, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """Into the arena, from where it was read from the socket, but for what was read together with the head."""
    head, body = parts_of()
    with serving_means(copies, monkeypatch) as (running, _), running.connect() as sock, sock.makefile("rb") as stream:
        for count in (1, 2):  # the second is looked up by its document
            if at_once:
                sock.sendall(head + body)
            else:
                sock.sendall(head)
                until_it_is(count, lambda: len(copies.received))
                sock.sendall(body)
            check_reply(stream)
            assert len(copies.entered) == len(copies.received) == count
        assert all(map(copies.lies, copies.entered))
        assert not copies.gathered
        assert sum(copies.apart) <= (2 * LARGE if at_once else 0)


def test_in_a_batch_over_http_it_is_copied_twice(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of several requests are gathered, and what is gathered goes into the arena."""
    head, body = parts_of()
    with serving_means(copies, monkeypatch) as (running, gate), contextlib.ExitStack() as stack:
        model = running.model("means")
        flat(model.batcher, (("x", (), SHAPE[1:]),))
        while gate.entered.acquire(blocking=False):
            pass
        gate.shut.set()
        streams = []
        for sent in range(3):
            sock = stack.enter_context(running.connect())
            streams.append(stack.enter_context(sock.makefile("rb")))
            sock.sendall(head + body)
            if sent == 0:
                assert gate.entered.acquire(timeout=WAIT)
            else:
                until_it_is(sent, lambda: model.queued)
        gate.shut.clear()
        for stream in streams:
            check_reply(stream)
        (parts,) = copies.gathered
        assert len(parts) == 2
        assert all(map(copies.lies, parts))
        assert [copies.lies(source) for source in copies.entered] == [True, False]
        assert copies.entered[1].nbytes == 2 * X.nbytes


@pytest.mark.parametrize("aligned", [True, False])
def test_a_chunked_body_is_joined_first(copies: Copies, monkeypatch: pytest.MonkeyPatch, aligned: bool) -> None:
    """Nothing says how long it will be: it is received in pieces."""
    head, body = parts_of(chunked=True, header=256 if aligned else 257)
    with serving_means(copies, monkeypatch) as (running, _), running.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(head + body)
        check_reply(stream)
        assert not copies.received
        assert len(copies.entered) == 1


@pytest.mark.parametrize("aligned", [True, False])
def test_over_grpc_it_is_read_in_the_message(copies: Copies, monkeypatch: pytest.MonkeyPatch, aligned: bool) -> None:
    """It is a view of the bytes that grpc hands over, and copied once, wherever in them it begins."""
    with serving_means(copies, monkeypatch) as (running, _), channel(running) as made:
        sent = request("means", X)
        while ((sent.ByteSize() - X.nbytes) % X.itemsize == 0) is not aligned:
            sent.id += "i"
        np.testing.assert_allclose(array_of(infer(made, sent))[..., 0, 0], MEANS, rtol=1e-4)
        (source,) = copies.entered
        assert copies.lies(source)
        assert source.flags.aligned is aligned
        assert not copies.gathered
