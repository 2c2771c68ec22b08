"""Sockets to listen at, and the certificates to prove there who one is."""

from __future__ import annotations

import ctypes
import socket
import ssl
import struct
import sys
from contextlib import suppress
from pathlib import Path

BACKLOG = 2048

SO_ATTACH_FILTER = 26

DROP_SYN = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
"""Of the flags of a TCP header take SYN and ACK; where it is SYN alone drop the segment, else take all of it. Linux's
classic BPF: code, jump if true, jump if false, operand."""


class CertificateError(ValueError):
    """Files that TLS cannot be served with."""


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


def turn_away(sock: socket.socket) -> None:
    """No more connections begin at a listening socket; those that have begun can be accepted.

    Without it one that begins between the last look at them and the end of the socket would be reset. Clients that come
    now begin again by themselves, a second later, at whoever listens then. Linux only, elsewhere this does nothing.
    """
    if sys.platform == "linux":
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in DROP_SYN))
        with suppress(OSError):
            sock.setsockopt(
                socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(DROP_SYN), ctypes.addressof(code))
            )


def check_certificates(chain: Path, key: Path | None, clients: Path | None) -> None:
    """Raises CertificateError where TLS cannot be served with these PEM files, naming option, file and fault.

    Without `key` the private key is in the file of the chain.
    """
    _require(chain, "--tls-cert", "CERTIFICATE-----", "no certificate in PEM")
    if key is None:
        _require(chain, "--tls-cert", "PRIVATE KEY-----", "no private key; --tls-key gives its file")
    else:
        _require(key, "--tls-key", "PRIVATE KEY-----", "no private key in PEM")
    if clients is not None:
        _require(clients, "--tls-client-ca", "CERTIFICATE-----", "no certificate in PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if "ENCRYPTED" not in _text(key or chain, "--tls-key"):  # else its passphrase would be asked for twice
            context.load_cert_chain(chain, key)
        if clients is not None:
            context.load_verify_locations(clients)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise CertificateError(f"--tls-key: {key or chain} is not the key of the certificate in {chain}") from None
        files = " and ".join(str(file) for file in (chain, key, clients) if file is not None)
        raise CertificateError(f"the certificates in {files} cannot be used: {error.reason or error}") from None


def _require(file: Path, option: str, mark: str, otherwise: str) -> None:
    if mark not in _text(file, option):
        raise CertificateError(f"{option}: {file} holds {otherwise}")


def _text(file: Path, option: str) -> str:
    try:
        return file.read_text("latin-1")
    except OSError as error:
        raise CertificateError(f"{option}: {file} cannot be read: {error.strerror}") from None


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
