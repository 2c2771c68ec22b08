"""Where compiled kernels are kept on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """$INFERA_CACHE_DIR/kernels, else $XDG_CACHE_HOME/infera-gpu/kernels, else ~/.cache/infera-gpu/kernels."""
    if own := environ.get("INFERA_CACHE_DIR"):
        return Path(own) / "kernels"
    xdg = environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "infera-gpu" / "kernels"
