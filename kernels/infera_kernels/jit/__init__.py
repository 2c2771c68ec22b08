"""CPU kernels that numba compiles (the extra `jit`): what takes NumPy many passes over memory, in one.

Nothing here is imported before a device asks for it. Functions are compiled while a plan is made, for the types that
they are bound to, and kept on disk: see `infera_kernels.disk`.
"""

from __future__ import annotations

from importlib.util import find_spec


def installed() -> bool:
    """Whether there is a numba; does not import it."""
    return find_spec("numba") is not None
