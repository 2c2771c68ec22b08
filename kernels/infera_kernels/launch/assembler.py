"""Which of the assemblers that Triton ships makes code that a driver loads."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from functools import cache
from pathlib import Path

VARIABLE = "TRITON_PTXAS_BLACKWELL_PATH"
"""What Triton 3.9 takes the assembler for sm_90 and later from, before the newer of the two that it ships."""

_NEWER, _OLDER = "ptxas-blackwell", "ptxas"

_log = logging.getLogger(__name__)


@cache
def release_of(assembler: Path) -> tuple[int, int] | None:
    """The CUDA release of a ptxas; None where there is none or it does not say."""
    try:
        done = subprocess.run([assembler, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None


def _shipped() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def suit(driver: int, folder: Path | None = None) -> None:
    """Have Triton assemble for a driver of CUDA `driver`, as cuDriverGetVersion says it: 12080 is 12.8.

    A driver loads what any release of its own major version made, and nothing of a later one ("CUDA Compatibility",
    section "Minor Version Compatibility"). Where that rules out the assembler that Triton would take, and the other one
    that it ships will do, this process takes that from now on. What the environment says already stands. `folder` is
    where the assemblers are.
    """
    if os.environ.get(VARIABLE):
        return
    folder = folder or _shipped()
    newer, older = release_of(folder / _NEWER), release_of(folder / _OLDER)
    if newer is not None and older is not None and newer[0] > driver // 1000 >= older[0]:
        os.environ[VARIABLE] = str(folder / _OLDER)
        _log.info("the driver is of CUDA %d: kernels are assembled by ptxas %d.%d", driver // 1000, *older)
