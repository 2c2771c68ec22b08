"""Sockets to listen at."""

from __future__ import annotations

import socket

BACKLOG = 2048


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """A listening socket; port 0 takes a free one. At a `shared` port others may listen too. Raises OSError."""
    sock = _bound(host, port, shared)
    try:
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def reserve(host: str, port: int) -> socket.socket:
    """A socket that keeps a port, 0 for a free one, for those that will share it. Raises OSError."""
    with _bound(host, port, shared=False) as probe:  # it does not get a port that others share already
        found = probe.getsockname()[1]
    return _bound(host, found, shared=True)


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock
