"""The BLAS that NumPy calls, as threadpoolctl finds it. Looking for it is done once."""

from __future__ import annotations

from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

AVX512 = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})
"""What OpenBLAS calls the processors for which it has kernels of AVX-512."""


@cache
def controller() -> Any:
    """A threadpoolctl.ThreadpoolController of the BLAS libraries that are loaded."""
    return ThreadpoolController().select(user_api="blas")


@cache
def openblas() -> Any:
    """The controller of the OpenBLAS that is loaded, None where there is none or more than one."""
    found = [c for c in controller().lib_controllers if c.internal_api == "openblas"]
    return found[0] if len(found) == 1 else None


def reads_as_it_lies() -> bool:
    """Whether small products are computed from operands as they lie: by OpenBLAS' kernels for AVX-512 alone."""
    found = openblas()
    return found is not None and found.architecture in AVX512
