"""The files beside a model that hold its large tensors: found without leaving the model's folder, mapped or read once.

ONNX's external data (docs/ExternalData.md in the onnx project). A location comes from the model file, so nothing in it
is trusted: it is walked one name after the other, and no name may be a link.
"""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import ExitStack
from pathlib import Path, PurePosixPath, PureWindowsPath

from infera_gpu.errors import InvalidModel

_NOTHING = memoryview(b"")

MOST_MAPS = 256
"""Files that stay open: a mapping holds a descriptor, of which a process has 1,024. Further files are read instead."""


class ExternalFiles:
    """The external data of one model. Each file is mapped once; its pages are read when they are needed.

    The mapping lives as long as an array that looks into it. A file that is cut short while a model uses it takes the
    process down (SIGBUS), as with every program that maps files, and one that is overwritten changes what the model
    computes: replace a model's files, or have them read instead (`mapped=False`).
    """

    def __init__(self, model: Path, mapped: bool = True) -> None:
        self._model = model
        self._most_maps = MOST_MAPS if mapped else 0
        self._target = model.resolve() if model.is_symlink() else None
        self._maps: dict[str, memoryview] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all files that have been mapped or read."""
        return sum(len(m) for m in self._maps.values())

    def read(self, location: str) -> memoryview:
        """The bytes of the file at `location`, relative to the model's folder. Raises InvalidModel."""
        found = self._maps.get(location)
        if found is None:
            found = self._maps[location] = self._map(location)
        return found

    def _map(self, location: str) -> memoryview:
        parts = PurePosixPath(location).parts
        windows = PureWindowsPath(location)
        if (
            not parts
            or "\0" in location
            or ".." in (*parts, *windows.parts)
            or parts[0] == "/"
            or windows.drive
            or windows.root
        ):
            raise InvalidModel(f"external data at {location!r:.200}: expected a path below the model's folder")
        try:
            with ExitStack() as stack:
                descriptor = self._open(parts, stack)
                about = os.fstat(descriptor)
                if not stat.S_ISREG(about.st_mode):
                    raise InvalidModel(f"external data at {location!r:.200} is no regular file")
                if about.st_nlink > 1 and about.st_uid != self._model.stat().st_uid:
                    raise InvalidModel(f"external data at {location!r:.200} is a hard link to a file of somebody else")
                if not about.st_size:
                    return _NOTHING
                if len(self._maps) >= self._most_maps:
                    with os.fdopen(os.dup(descriptor), "rb") as file:
                        return memoryview(file.read())
                return memoryview(mmap.mmap(descriptor, about.st_size, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            problem = (error.strerror if isinstance(error, OSError) else None) or error
            where = f"in the model's folder {self._model.parent.absolute()}"
            raise InvalidModel(f"external data at {location!r:.200} {where} cannot be read: {problem}") from None

    def _open(self, parts: tuple[str, ...], stack: ExitStack) -> int:
        """A descriptor of the file; no part of its path may be a link, but see `_beside_target`."""

        def opened(path: Path | str, flags: int, folder: int | None = None) -> int:
            descriptor = os.open(path, flags | os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
            stack.callback(os.close, descriptor)
            return descriptor

        folder = opened(self._model.parent, os.O_DIRECTORY)
        for name in parts[:-1]:
            folder = opened(name, os.O_DIRECTORY | os.O_NOFOLLOW, folder)
        about = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        name = parts[-1]
        if stat.S_ISLNK(about.st_mode):
            found = self._beside_target(os.readlink(name, dir_fd=folder), parts)
            folder, name = opened(found.parent, os.O_DIRECTORY), found.name
        return opened(name, os.O_NOFOLLOW | os.O_NONBLOCK, folder)

    def _beside_target(self, target: str, parts: tuple[str, ...]) -> Path:
        """A link's target, where the model is a link itself and both targets lie in one folder.

        Hugging Face's cache is laid out so. Raises InvalidModel for any other link.
        """
        here = self._model.parent.joinpath(*parts[:-1])
        if self._target is not None:
            there = Path(os.path.normpath(here.resolve() / target))
            if there.parent == self._target.parent:
                return there
        raise InvalidModel(
            f"external data at {'/'.join(parts)!r:.200} is a symbolic link; put the file itself into the model's folder"
        )
