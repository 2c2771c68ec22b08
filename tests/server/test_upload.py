"""Large bodies, and the memory that they are received into."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any

import numpy as np
import pytest

from infera_server.access import Access, Key
from infera_server.http.upload import ALIGNMENT, LARGE, SCRATCH, Upload, room
from infera_server.scheduling.rows import HostArray
from tests.server.support import any_width, http_request, read_reply, request_of, serving, until

SIZE, FIRST = 10_007, 1_250


class Receiver:
    """Wants the first `wanted` bytes of a body."""

    def __init__(self, wanted: int = SIZE) -> None:
        self.received, self.wanted = 0, wanted
        self.body: memoryview | None = None

    def body_received(self, nbytes: int) -> bool:
        self.received += nbytes
        return self.received <= self.wanted

    def body_complete(self, body: memoryview) -> None:
        assert self.body is None
        self.body = body

    def connection_lost(self, exc: Exception | None) -> None: ...
    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


def given(upload: Upload, content: bytes, most: int) -> None:
    """The socket gives these bytes, at most so many at a time, as many as there is memory for."""
    while content:
        buffer = upload.get_buffer(-1)
        count = min(len(buffer), len(content), most)
        assert count, "a buffer without a byte is an error of the transport's"
        buffer[:count], content = content[:count], content[count:]
        upload.buffer_updated(count)


@pytest.mark.parametrize("first", [0, 1, FIRST])
@pytest.mark.parametrize("with_head", [0, FIRST - 1, FIRST, 4_000])
@pytest.mark.parametrize("most", [7, 1_000, SIZE])
@pytest.mark.parametrize("aligned", [0, 121])
def test_a_body_is_what_was_sent_and_aligned(first: int, with_head: int, most: int, aligned: int) -> None:
    content = np.random.default_rng(0).bytes(SIZE)
    receiver, asked = Receiver(), list[int]()

    def counted(nbytes: int) -> HostArray:
        asked.append(receiver.received)
        return room(nbytes)

    upload = Upload(receiver, SIZE, aligned, counted, first)
    assert len(asked) == (0 if first else 1)
    if with_head:
        upload.put(content[:with_head])
    given(upload, content[with_head:], most)
    assert receiver.body is not None
    assert receiver.body.readonly
    assert bytes(receiver.body) == content
    assert (np.frombuffer(receiver.body, np.uint8).ctypes.data + aligned) % ALIGNMENT == 0
    assert asked == [0 if with_head >= first else first - with_head], "once, and not before so much was there"


@pytest.mark.parametrize("wanted", [100, 5_000], ids=["before there is room", "after"])
def test_the_rest_of_a_refused_body_is_thrown_away(wanted: int) -> None:
    receiver = Receiver(wanted)
    upload = Upload(receiver, SIZE, 0, room, FIRST)
    given(upload, bytes(SIZE), 50)
    assert receiver.body is None
    assert len(upload.get_buffer(-1)) == SCRATCH
    assert receiver.received == wanted + 50


def test_who_announces_a_body_has_no_room_until_a_part_of_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"any": any_width()}) as running:
        service, asked = running.host.service, list[int]()

        def counted(nbytes: int) -> HostArray:
            asked.append(nbytes)
            return room(nbytes)

        monkeypatch.setattr(service, "room", counted)
        monkeypatch.setattr(service, "room_share", 0.25)
        x = np.random.default_rng(0).standard_normal((1, LARGE)).astype(np.float32)
        sent = whole(x)
        with contextlib.closing(running.connect()) as sock, sock.makefile("rb") as stream:
            sock.sendall(sent[: len(sent) // 5])
            until(lambda: service.intake.held > len(sent) // 6)
            assert not asked
            sock.sendall(sent[len(sent) // 5 :])
            status, _, body = read_reply(stream)
            assert status == 200
            assert len(asked) == 1
            np.testing.assert_array_equal(np.frombuffer(body[-x.nbytes :], np.float32), 2 * x[0])


def whole(x: HostArray) -> bytes:
    """A binary request for a binary reply."""
    document: dict[str, Any] = request_of(x[:, :0], parameters={"binary_data_output": True})
    (tensor,) = document["inputs"]
    del tensor["data"]
    tensor |= {"shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps(document).encode()
    return http_request(head + x.tobytes(), "/v2/models/any/infer", f"Inference-Header-Content-Length: {len(head)}\r\n")


@pytest.mark.parametrize(
    ("access", "more", "status"),
    [
        (Access(), "", 413),
        (Access(), "Expect: 100-continue\r\n", 413),
        (Access({"a": Key("a", bytes(32))}), "Expect: 100-continue\r\n", 401),
    ],
)
def test_what_is_refused_at_once_is_given_no_memory(
    access: Access, more: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """However much it announces."""
    with (
        serving({"double": any_width()}, access=access) as running,
        contextlib.closing(running.connect()) as sock,
        sock.makefile("rb") as stream,
    ):
        sock.sendall(http_request(b"", headers=more, length=10**18))
        assert read_reply(stream)[0] == status
        sock.sendall(b"x")  # what lingers reads on
    assert not [record.message for record in caplog.records if record.levelno > logging.INFO]
