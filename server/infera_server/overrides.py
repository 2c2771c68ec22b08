"""Model files that a load request brings along, in a private folder for as long as the model is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from shutil import rmtree
from tempfile import mkdtemp
from weakref import finalize

from infera_server.definition import Definition, define
from infera_server.discovery import versions
from infera_server.modelconfig import ConfigError, ModelConfig

MAX_FILES = 1000

PREFIX = "file:"
"""Before a path in the parameters of a load request."""


class Folder:
    """A private folder, there until nobody has this object any more."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="infera-model-")).resolve()
        finalize(self, rmtree, self.path, ignore_errors=True)


def from_files(name: str, config: ModelConfig, files: Mapping[str, bytes], most: int) -> Definition:
    """The model in `files`, by path in its folder, `most` bytes of them. Raises ConfigError."""
    if len(files) > MAX_FILES:
        raise ConfigError(f"over {MAX_FILES} files")
    if (size := sum(map(len, files.values()))) > most:
        raise ConfigError(f"the files have {size:,} bytes, at most {most:,} are accepted")
    held = Folder()
    folder = held.path
    for given, content in files.items():
        path = folder / _inside(given)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise ConfigError(f"file '{given}' cannot be kept: {error.strerror}") from None
    problems: dict[str, str] = {}
    sources = [replace(source, name=name) for source in versions(folder, folder, problems, configured=True)]
    return replace(define(name, sorted(sources, key=lambda s: int(s.version)), config), held=held)


def _inside(given: str) -> PurePosixPath:
    path = PurePosixPath(given.removeprefix(PREFIX))
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in given:
        raise ConfigError(f"Invalid file parameter '{given}' must stay within model directory.")
    return path
