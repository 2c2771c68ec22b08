"""Where compiled kernels are kept on disk, and how files there are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """$INFERA_CACHE_DIR/kernels, else $XDG_CACHE_HOME/infera-gpu/kernels, else ~/.cache/infera-gpu/kernels."""
    if own := environ.get("INFERA_CACHE_DIR"):
        return Path(own).expanduser() / "kernels"
    xdg = environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "infera-gpu" / "kernels"


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole: whoever reads it sees the old content or the new one. Makes its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
