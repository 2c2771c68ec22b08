"""What a load request asks for; files that it brings are in a private folder for as long as the model is served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from shutil import rmtree
from tempfile import mkdtemp
from weakref import finalize

from infera_server.codec import short
from infera_server.errors import BadRequest, NotFound
from infera_server.models.background import detached
from infera_server.models.definition import Definition, NoVersionError, define
from infera_server.models.discovery import Problem, Survey, is_free, versions
from infera_server.models.modelconfig import ConfigError, ModelConfig, from_json

MAX_FILES = 1000

PREFIX = "file:"
"""Before a path in the parameters of a load request."""


class Folder:
    """A private folder, there until nobody has this object any more."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="infera-model-")).resolve()
        finalize(self, rmtree, self.path, ignore_errors=True)


async def requested(
    name: str,
    config: str | None,
    files: Mapping[str, bytes] | None,
    most: int,
    survey: Callable[[], Awaitable[Survey]],
) -> Definition:
    """The model as its folder is now, or with this configuration (in JSON) and these files in place of it.

    There are `most` bytes of files. `survey()` looks for models. Raises NotFound, BadRequest, and what it raises.
    """
    unknown = f"failed to load '{short(name)}', failed to poll from model repository"
    if files and config is None:
        raise BadRequest(f"{unknown}: Load parameter 'config' must be specified for model file override")
    try:
        override = from_json(config, name) if config is not None else None
        if files:
            return await detached("infera-files", partial(from_files, name, override, files, most))
        found = await survey()
        if name in found.problems:
            raise BadRequest(f"{unknown}: {found.problems[name].reason}")
        sources = found.of(name)
        if not sources:
            raise NotFound(unknown)
        return await detached("infera-define", partial(define, name, sources, override))
    except NoVersionError as error:
        raise BadRequest(f"load failed for model '{name}': {error}\n") from None
    except ConfigError as error:
        raise BadRequest(f"{unknown}: {error}") from None


def from_files(name: str, config: ModelConfig, files: Mapping[str, bytes], most: int) -> Definition:
    """The model in `files`, by path in its folder, `most` bytes of them. Raises ConfigError."""
    if not is_free(name):
        raise ConfigError(f"'{short(name)}' is no name that a model can be served under")
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
    problems: dict[str, Problem] = {}
    sources = [replace(source, name=name) for source in versions(folder, folder, problems, configured=True)]
    return replace(define(name, sorted(sources, key=lambda s: int(s.version)), config), held=held)


def _inside(given: str) -> PurePosixPath:
    path = PurePosixPath(given.removeprefix(PREFIX))
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in given:
        raise ConfigError(f"Invalid file parameter '{given}' must stay within model directory.")
    return path
