"""Compiled kernels on disk, shared by processes: one file holds a binary and what launching it needs."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from infera_kernels.disk import default_directory, replace_file
from infera_kernels.launch.compile import Binary, KernelSpec

_log = logging.getLogger(__name__)


class KernelCache:
    """`<key>.kernel`: the cubin's SHA-256, a space, the spec as JSON, a newline, the cubin.

    Files are replaced whole, so a reader sees an old one or a new one. What cannot be read or does not match its
    checksum counts as absent. A directory that cannot be written costs time only, and is reported once in the log.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = default_directory() if directory is None else directory
        self._writable = True

    def path(self, key: str) -> Path:
        return self.directory / f"{key}.kernel"

    def get(self, key: str) -> Binary | None:
        try:
            header, cubin = self.path(key).read_bytes().split(b"\n", 1)
            digest, spec = header.decode().split(" ", 1)
            if digest != _digest(spec, cubin):
                raise ValueError("checksum mismatch")
            return Binary(KernelSpec.from_json(spec), cubin)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as e:
            _log.warning("%s is unreadable and will be compiled again: %s", self.path(key), e)
            return None

    def put(self, key: str, binary: Binary) -> None:
        if not self._writable:
            return
        spec = binary.spec.to_json()
        try:
            replace_file(self.path(key), f"{_digest(spec, binary.cubin)} {spec}\n".encode() + binary.cubin)
        except OSError as e:
            self._writable = False
            _log.warning("compiled kernels are not kept: %s; set INFERA_CACHE_DIR to a writable directory", e)


def _digest(spec: str, cubin: bytes) -> str:
    return hashlib.sha256(spec.encode() + b"\n" + cubin).hexdigest()
