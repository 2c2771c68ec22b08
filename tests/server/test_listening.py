"""Sockets that listen."""

from __future__ import annotations

import socket
import sys
import threading

import pytest

from infera_server.listening import listen, turn_away


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has such filters")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_who_comes_after_the_end_began_is_refused_and_not_reset(host: str) -> None:
    try:
        sock = listen(host, 0)
    except OSError:
        pytest.skip(f"nothing can listen at {host} here")
    with sock, socket.create_connection(sock.getsockname()[:2]) as early:
        turn_away(sock)
        early.sendall(b"sent before")
        taken, _ = sock.accept()
        with taken:
            taken.settimeout(5)
            assert taken.recv(32) == b"sent before"
        with pytest.raises(BlockingIOError):
            sock.accept()
        late = socket.socket(sock.family)
        with late:
            late.settimeout(30)
            closing = threading.Timer(0.2, sock.close)
            closing.start()
            with pytest.raises(ConnectionRefusedError):
                late.connect((host, early.getpeername()[1]))
            closing.join()
