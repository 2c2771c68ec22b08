"""Compiled kernels, and plans of cuDNN's, on disk, shared by processes."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from infera_kernels.disk import default_directory, replace_file
from infera_kernels.launch.compile import Binary, KernelSpec

_log = logging.getLogger(__name__)


class _Files:
    """`<key>.<kind>`: the SHA-256 of what follows, a space, a line of text, a newline, bytes.

    Files are replaced whole, so a reader sees an old one or a new one. What cannot be read or does not match its
    checksum counts as absent. A directory that cannot be written costs time only, and is reported once in the log.
    """

    kind, what = "", ""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = default_directory() if directory is None else directory
        self._writable = True

    def path(self, key: str) -> Path:
        return self.directory / f"{key}.{self.kind}"

    def _read(self, key: str) -> tuple[str, bytes]:
        """Raises FileNotFoundError where there is none, OSError and ValueError where it cannot be read."""
        header, content = self.path(key).read_bytes().split(b"\n", 1)
        digest, text = header.decode().split(" ", 1)
        if digest != _digest(text, content):
            raise ValueError("checksum mismatch")
        return text, content

    def _unreadable(self, key: str, error: Exception) -> None:
        _log.warning("%s is unreadable and will be compiled again: %s", self.path(key), error)

    def _write(self, key: str, text: str, content: bytes) -> None:
        if not self._writable:
            return
        try:
            replace_file(self.path(key), f"{_digest(text, content)} {text}\n".encode() + content)
        except OSError as e:
            self._writable = False
            _log.warning("%s are not kept: %s; set INFERA_CACHE_DIR to a writable directory", self.what, e)


class KernelCache(_Files):
    """Kernels: the text is what launching them needs, as JSON, the bytes are the cubin."""

    kind, what = "kernel", "compiled kernels"

    def get(self, key: str) -> Binary | None:
        try:
            spec, cubin = self._read(key)
            return Binary(KernelSpec.from_json(spec), cubin)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as e:
            self._unreadable(key, e)
            return None

    def put(self, key: str, binary: Binary) -> None:
        self._write(key, binary.spec.to_json(), binary.cubin)


class PlanCache(_Files):
    """Plans as cuDNN writes them, with the kernels that it has compiled for them; the text says of what they are."""

    kind, what = "plan", "plans of cuDNN"

    def get(self, key: str) -> bytes | None:
        try:
            return self._read(key)[1]
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            self._unreadable(key, e)
            return None

    def put(self, key: str, about: str, plan: bytes) -> None:
        self._write(key, about, plan)


def _digest(text: str, content: bytes) -> str:
    return hashlib.sha256(text.encode() + b"\n" + content).hexdigest()
