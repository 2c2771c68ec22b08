"""A path, bytes or a ModelProto -> a parsed model, its large initialisers read past the parser."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from infera_gpu.errors import InvalidModel
from infera_gpu.graph import HostArray
from infera_gpu.tensors import Buffer
from infera_gpu.wire import skim

if TYPE_CHECKING:
    import onnx

Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | onnx.ModelProto"

Bodies: TypeAlias = Mapping[int, Buffer]
"""The raw data of initialisers that have been cut out of a model, by the initialiser's number."""

Room: TypeAlias = Callable[[int], HostArray]
"""Memory of so many bytes."""

_NONE: Bodies = {}

SKIMMED = 1 << 20
"""Bytes of a file from which on its large initialisers do not go through the parser."""

MAX_BYTES = 1 << 31
"""Bytes of a model file: no protobuf is larger. What is, keeps its tensors in external files."""


def usual_room(nbytes: int) -> HostArray:
    """Memory of NumPy's."""
    return np.empty(nbytes, np.uint8)


def read_model(source: Source, *, weights: bool = True, room: Room = usual_room) -> tuple[onnx.ModelProto, str, Bodies]:
    """The model, its name, and what has been cut out of it, in `room`; without `weights` that is not read.

    Raises InvalidModel for what is no model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if isinstance(source, onnx.ModelProto):
        return source, source.graph.name or "model", _NONE
    if isinstance(source, bytes | bytearray | memoryview):
        name, payload = "model", bytes(source)
        size, bodies = len(payload), _NONE
        if size >= SKIMMED and (found := skim(payload)):
            bodies = {i: memoryview(payload)[start:stop] for i, (start, stop) in found.spans.items()}
            payload = found.skeleton
    elif not isinstance(source, str | os.PathLike) or "\0" in os.fsdecode(source):
        raise InvalidModel(f"a model is a path, bytes or an onnx.ModelProto, not {source!r:.60}")
    else:
        path = Path(os.fsdecode(source))
        name, (payload, size, bodies) = path.name, _payload(path, weights, room)
    if not payload:
        raise InvalidModel(f"{name}: the file is empty")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(payload)
    except DecodeError:
        what = next((what for start, what in _OTHER_FILES.items() if payload.lstrip().startswith(start)), "")
        raise InvalidModel(
            f"{name}: not an ONNX model, {what or 'or a truncated one'} ({size:,} bytes do not parse)"
        ) from None
    if not model.ir_version or not model.HasField("graph"):
        raise InvalidModel(f"{name}: not an ONNX model ({size:,} bytes parse, but hold no graph)")
    return model, name, bodies


_OTHER_FILES = {
    b"version https://git-lfs": "but a pointer to one in Git LFS: fetch it with `git lfs pull`",
    b"<": "but a page of a web site; was it downloaded from the right address?",
    b"PK": "but an archive: unpack it",
    b"\x1f\x8b": "but a compressed file: unpack it",
}
"""What files begin with that are often taken for models."""


def _hint(path: Path) -> str:
    """What else the path of a file that is not there was meant for: what shells and the command line take."""
    if str(path).startswith("~"):
        return "; '~' is left as it is: give os.path.expanduser of the path"
    if str(path).startswith(("https:/", "pypi:/")) or not (path.suffix or path.is_absolute() or path.parent.name):
        return "; fetch, in infera_gpu.fetch, brings a model of the catalogue or from an address, and gives its path"
    return ""


def _payload(path: Path, weights: bool, room: Room) -> tuple[bytes, int, Bodies]:
    """What is to be parsed, how many bytes the file has, and what has been cut out."""
    try:
        about = path.stat()
        if stat.S_ISFIFO(about.st_mode) or stat.S_ISCHR(about.st_mode):
            raise InvalidModel(f"{path}: no regular file")
        if about.st_size >= MAX_BYTES:
            raise InvalidModel(
                f"{path}: {about.st_size:,} bytes, an ONNX file has less than {MAX_BYTES:,}; "
                "save it with its tensors as external data"
            )
        with path.open("rb", buffering=0) as file:
            found = None
            if about.st_size >= SKIMMED:
                with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                    found = skim(data)
            if found is None:
                payload = file.read()
                return payload, len(payload), _NONE
            wanted = found.spans if weights else {}
            bodies = {i: _part(file, start, stop, room) for i, (start, stop) in wanted.items()}
            return found.skeleton, about.st_size, bodies
    except OSError as error:
        hint = _hint(path) if isinstance(error, FileNotFoundError) else ""
        raise InvalidModel(f"{path}: {error.strerror or error}{hint}") from None
    except ValueError as error:
        raise InvalidModel(f"the path {str(path)!r} is none: {error}") from None


def _part(file: FileIO, start: int, stop: int, room: Room) -> HostArray:
    """The bytes from `start` to `stop`; fewer where the file has become shorter."""
    found, done = room(stop - start), 0
    file.seek(start)
    while done < len(found) and (count := file.readinto(found[done:].data)):
        done += count
    return found[:done]


def read_metadata(source: Source) -> dict[str, Any]:
    """What a model says about itself, by the names of onnxruntime's ModelMetadata. External data is not read."""
    model = read_model(source, weights=False)[0]
    return {
        "custom_metadata_map": {p.key: p.value for p in model.metadata_props},
        "description": model.doc_string,
        "domain": model.domain,
        "graph_description": model.graph.doc_string,
        "graph_name": model.graph.name,
        "producer_name": model.producer_name,
        "version": int(model.model_version),
    }
