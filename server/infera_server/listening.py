"""Sockets to listen at, and the certificates to prove there who one is."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

BACKLOG = 2048


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
