"""Requests that a browser makes for a page of somebody else's, which may send what needs no leave to any server.

A page can so reach a server that only programs of this machine are meant to reach: with a form, with a WebSocket, or
with a name of its own that leads to 127.0.0.1 (DNS rebinding).
https://developer.mozilla.org/docs/Web/Security/Attacks/CSRF
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from infera_server.errors import Forbidden


def check_origin(headers: Iterable[tuple[bytes, bytes]], local: bool) -> None:
    """Raises Forbidden for what a page of another origin has a browser send.

    A `local` server, which listens on a loopback address only, must be called by such an address or by this machine's
    name.
    """
    found = dict(headers)
    host, origin = found.get(b"host", b"").lower(), found.get(b"origin")
    foreign = origin is not None and origin.lower().partition(b"://")[2] != host
    if foreign or found.get(b"sec-fetch-site") == b"cross-site":
        raise Forbidden("a page of another origin may not ask for this; with --api-keys it may, with a key")
    if local and host and not _is_own(host.decode("latin-1")):
        raise Forbidden("this server listens on localhost and is not called so; with --api-keys any name will do")


def _is_own(host: str) -> bool:
    """Whether `name[:port]` is an address, localhost, or this machine's name."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
