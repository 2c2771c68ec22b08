"""The BLAS that NumPy calls: the OpenBLAS that its extension module was linked with, else what threadpoolctl finds.

The system's loader knows what a module was linked with. To look through every library of the process, as threadpoolctl
does, takes as long as loading a small model.

Where NumPy's hides its inner loops, as from NumPy 2.5 on, those of the package scipy-openblas64 serve, if it is there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from infera_kernels.record import Record

AVX512 = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})
"""What OpenBLAS calls the processors for which it has kernels of AVX-512."""

_NAMES = tuple(product(("scipy_", ""), ("64_", "_64", "")))
"""What builds of OpenBLAS put before and after the names of its functions."""

Argument: TypeAlias = Any
"""What SIZE, ADDRESS or FACTOR made of a number: it goes to a function of `Inner` as it is. Half as long as to convert
numbers in each call, and garbage collection does not look at it, as it does at numbers of ctypes."""

SIZE: Callable[[int], Argument] = ctypes.c_ssize_t.from_param
ADDRESS: Callable[[int], Argument] = ctypes.c_void_p.from_param
FACTOR: Callable[[float], Argument] = ctypes.c_float.from_param

_INNER = ("itcopy", "oncopy", "kernel")
"""What OpenBLAS calls the functions of `Inner`, in its order."""

KNOWN_VERSIONS = frozenset({"0.3.27", "0.3.29", "0.3.30", "0.3.31"})
KNOWN_PROCESSORS = frozenset({"Haswell", "SkylakeX"})
"""Of OpenBLAS, for which its inner loops have been called as `Inner` says: those of NumPy 2.1 to 2.4."""


class Inner(Record):
    """What OpenBLAS makes its own products of, for the processor that it runs on (driver/level3/level3.c).

    It counts columns where NumPy counts rows: A (M, K) is a weight, B (K, N) the rows that are multiplied with it and
    C (M, N) their product, each with the elements from one column to the next. These functions are exported, but no
    part of its interface, so that they are asked of versions alone that are known. They take nothing but `Argument`s, a
    SIZE or an ADDRESS and alpha as a FACTOR: a plain number would be passed as 32 bits.
    """

    pack_weight: Callable[..., object]
    """(K, M, A, lda, packed A): panels of A's rows, so that whole panels of a part of them lie together."""
    pack_rows: Callable[..., object]
    """(K, N, B, ldb, packed B)"""
    multiply: Callable[..., object]
    """(M, N, K, alpha, packed A, packed B, C, ldc): C += alpha A B"""


class OpenBlas:
    """Functions of a loaded OpenBLAS. Raises AttributeError where the library has none of that spelling."""

    def __init__(self, library: ctypes.CDLL, before: str, after: str) -> None:
        self._get = library[f"{before}openblas_get_num_threads{after}"]
        self._set = library[f"{before}openblas_set_num_threads{after}"]
        corename = library[f"{before}openblas_get_corename{after}"]
        corename.restype = ctypes.c_char_p
        self.architecture: str = corename().decode()
        config = library[f"{before}openblas_get_config{after}"]
        config.restype = ctypes.c_char_p
        self.version = ".".join(config().decode().removeprefix("OpenBLAS ").split()[0].split(".")[:3])
        self._library = library

    def threads(self) -> int:
        return int(self._get())

    def inner(self) -> Inner | None:
        """The inner loops of products in float32; None of a version that is not known, and where they are hidden."""
        if self.version not in KNOWN_VERSIONS or self.architecture not in KNOWN_PROCESSORS:
            return None
        try:
            return Inner(*(self._library[f"sgemm_{name}_{self.architecture.upper()}"] for name in _INNER))
        except AttributeError:
            return None

    def use(self, threads: int) -> None:
        """Run on so many threads, in the whole process."""
        self._set(ctypes.c_int(threads))


@cache
def openblas() -> OpenBlas | None:
    """NumPy's OpenBLAS; None where it calls another BLAS."""
    return next(filter(None, map(_loaded, _libraries())), None)


def inner_loops() -> Inner | None:
    """The inner loops of NumPy's OpenBLAS, else those of the package scipy-openblas64; None where neither has them."""
    found = _with_loops()
    return None if found is None else found[1]


def spoken() -> str:
    """Changes with what decides how weights are laid out: the BLAS that there is, and the processor that it is for."""
    loops = _with_loops()
    there = (openblas(), None if loops is None else loops[0])
    return " ".join(f"{one.version} {one.architecture}" for one in there if one is not None)


def _with_loops() -> tuple[OpenBlas, Inner] | None:
    numpys = openblas()
    found = numpys.inner() if numpys is not None else None
    return _packaged() if numpys is None or found is None else (numpys, found)


def _packaged() -> tuple[OpenBlas, Inner] | None:
    """The package scipy-openblas64, whose library is loaded for its inner loops alone."""
    package = find_spec("scipy_openblas64")
    for folder in (package and package.submodule_search_locations) or ():
        for path in sorted(Path(folder, "lib").glob("libscipy_openblas*")):
            with suppress(OSError), _environment(OPENBLAS_NUM_THREADS="1"):  # it starts threads when it is loaded
                library = _loaded(str(path))
                found = library.inner() if library is not None else None
                return None if library is None or found is None else (library, found)
    return None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that this process and what it starts have in between."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _loaded(path: str) -> OpenBlas | None:
    """The OpenBLAS in a library, or that it is linked with; None where there is none."""
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
