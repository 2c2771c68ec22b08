"""NVIDIA's libraries, that CUDA, PyTorch or an extra installed: found by name, called through their C interfaces."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from infera_kernels.launch.types import LaunchError


class LibraryError(LaunchError):
    """A library did not do what it was asked."""


def find(name: str, off: str = "") -> Any | None:
    """A library, by its functions' names; None where it is not installed, or the environment has 0 for `off`."""
    if off and os.environ.get(off) == "0":
        return None
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib(name).abs_path)
    except (ImportError, OSError, RuntimeError):  # what pathfinder raises of its own is a RuntimeError
        return None


def release(found: Any | None, asked: str) -> str:
    """The release of a library, as 13.1.0, by the function that gives it as a number; empty where there is none."""
    if found is None:
        return ""
    ask = found[asked]
    ask.restype = ctypes.c_size_t
    number = int(ask())
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def loads(name: str, *folders: Path) -> bool:
    """Whether a library of that name is loaded, or can be, from one of `folders` or else as the system finds it. Then
    it is, and whoever asks for the name finds it."""
    loaded = getattr(os, "RTLD_NOLOAD", None)
    tried = [] if loaded is None else [(name, loaded)]
    for at, mode in (*tried, *((str(folder / name), 0) for folder in folders), (name, 0)):
        try:
            ctypes.CDLL(at, mode)
        except OSError:
            continue
        return True
    return False
