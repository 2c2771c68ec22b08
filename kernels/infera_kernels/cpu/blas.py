"""The BLAS that NumPy calls: the OpenBLAS that its extension module was linked with, else what threadpoolctl finds.

The system's loader knows what a module was linked with. To look through every library of the process, as threadpoolctl
does, takes as long as loading a small model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from itertools import product

AVX512 = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})
"""What OpenBLAS calls the processors for which it has kernels of AVX-512."""

_NAMES = tuple(product(("scipy_", ""), ("64_", "_64", "")))
"""What builds of OpenBLAS put before and after the names of its functions."""


class OpenBlas:
    """Functions of a loaded OpenBLAS. Raises AttributeError where the library has none of that spelling."""

    def __init__(self, library: ctypes.CDLL, before: str, after: str) -> None:
        self._get = library[f"{before}openblas_get_num_threads{after}"]
        self._set = library[f"{before}openblas_set_num_threads{after}"]
        corename = library[f"{before}openblas_get_corename{after}"]
        corename.restype = ctypes.c_char_p
        self.architecture: str = corename().decode()

    def threads(self) -> int:
        return int(self._get())

    def use(self, threads: int) -> None:
        """Run on so many threads, in the whole process."""
        self._set(ctypes.c_int(threads))


@cache
def openblas() -> OpenBlas | None:
    """NumPy's OpenBLAS; None where it calls another BLAS."""
    for path in _libraries():
        library = ctypes.CDLL(path)
        for before, after in _NAMES:
            try:
                return OpenBlas(library, before, after)
            except AttributeError:
                continue
    return None


def _libraries() -> Iterator[str]:
    """Where the functions may be found: a module of NumPy's, whose libraries are searched with it, or its OpenBLAS."""
    yield str(import_module("numpy._core._multiarray_umath").__file__)
    from threadpoolctl import threadpool_info

    found = [str(lib["filepath"]) for lib in threadpool_info() if lib["internal_api"] == "openblas"]
    yield from found if len(found) == 1 else ()


def on_one_thread() -> Callable[[], object]:
    """BLAS has one thread from now on, in the whole process. What is returned gives it back what it had."""
    found = openblas()
    if found is not None:
        back = partial(found.use, found.threads())
        found.use(1)
        return back
    from threadpoolctl import threadpool_limits

    restore: Callable[[], object] = threadpool_limits(1, "blas").restore_original_limits
    return restore


def reads_as_it_lies() -> bool:
    """Whether small products are computed from operands as they lie: by OpenBLAS' kernels for AVX-512 alone."""
    found = openblas()
    return found is not None and found.architecture in AVX512
