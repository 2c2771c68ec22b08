"""How functions are compiled, kept on disk, and bound to their arguments."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys
from numba.extending import intrinsic

from infera_kernels.calls import Call
from infera_kernels.disk import default_directory

KEPT_S = 30 * 24 * 3600
"""Seconds for which what other versions compiled is kept."""

_log = logging.getLogger(__name__)

FAST_MATH = frozenset({"contract", "nsz", "arcp", "reassoc"})
"""Fused multiply-adds, and sums in vector lanes. NaN and infinity keep their meaning."""

Function = Callable[..., Any]

_binding = threading.Lock()
"""Of `bound_by_address`, which several sessions may call at the same time."""

_compiled_for: dict[Function, set[tuple[Any, ...]]] = {}
"""The kinds of arguments for which `bound` has compiled functions."""

_made: dict[str, list[Function]] = {}
"""What `compiled` made for each module, in order."""


def compiled(function: Function, flags: frozenset[str] = FAST_MATH) -> Function:
    """`function` compiled: without the GIL, bounds checks or exceptions for a division by zero; kept on disk.

    What is kept has `told`, by which other processes find it.
    """
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": set(flags)}
    made: Any
    try:
        with _kept_below(_directory()):
            made = numba.njit(cache=True, **options)(function)
        kept = _made.setdefault(function.__module__, [])
        made.told = partial(_told, made, function.__module__, len(kept))  # see `infera_kernels.cpu.process`
        kept.append(made)
    except (OSError, RuntimeError) as error:  # numba finds no directory that it may write to
        _log.warning("%s is compiled anew in every process: %s", function.__qualname__, error)
        made = numba.njit(**options)(function)
    compiled: Function = made
    return compiled


def exact(function: Function) -> Function:
    """`compiled`, every operation rounded as IEEE 754 says: the same floats as NumPy's."""
    return compiled(function, frozenset())


def inlined(function: Function) -> Function:
    """`function` as a part of the compiled functions that call it."""
    made: Function = numba.njit(inline="always")(function)
    return made


@intrinsic
def widest_vectors(context: Any) -> Any:
    """Called in a compiled function, has LLVM write the loops of this function with the widest vectors there are: of
    AVX-512's it takes halves otherwise, as early processors slowed down with whole ones."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows attributes of one word
        return context.get_dummy_value()

    return types.void(), generate


def bound(function: Any, *args: Any) -> Call:
    """The call of a compiled function with these arguments, compiled for their types now and not in the first run."""
    kinds = tuple(map(_kind, args))
    compiled_for = _compiled_for.setdefault(function, set())
    if kinds not in compiled_for:
        _compile(function, tuple(map(numba.typeof, args)))
        compiled_for.add(kinds)
    return function, args


def _kind(arg: Any) -> Any:
    """What numba's type of an argument depends on: finding that out takes longer than all else of a binding."""
    if isinstance(arg, np.ndarray):
        flags = arg.flags
        return arg.dtype, arg.ndim, flags.c_contiguous, flags.f_contiguous, flags.writeable, flags.aligned
    return type(arg)


def bound_by_address(function: Any, *args: Any) -> Call:
    """As `bound`, for a function that asks arrays for their address, shape and strides alone: one compiled form takes
    arrays of any layout, read-only ones too."""
    if function._can_compile:
        types = map(numba.typeof, args)
        anyhow = (t.copy(layout="A", readonly=True) if isinstance(t, numba.types.Array) else t for t in types)
        with _binding:
            if function._can_compile:  # still: numba refuses what another thread has compiled meanwhile
                _compile(function, tuple(anyhow))
                function.disable_compile()
    return function, args


def _compile(function: Any, types: tuple[Any, ...]) -> Function:
    """The function compiled for these types, from disk if it is there.

    `compile` looks there too, but has numba register all that it knows the types of before: that is needed to compile
    alone, and takes a process longer than all else that it does for its first functions.
    """
    try:
        load, target = function._cache._load_overload, function.targetctx
    except AttributeError:  # nothing is kept, or by another numba
        load = None
    with global_compiler_lock:
        if load is not None and function._can_compile and types not in function.overloads:
            rtsys.initialize(target)
            try:
                kept = load(types, target)
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                _log.warning("%s is compiled anew, what was kept cannot be read: %r", function.__qualname__, error)
                function._cache.disable()
                kept = None
            if kept is not None:
                target.insert_user_function(kept.entry_point, kept.fndesc, [kept.library])
                function.add_overload(kept)
        made: Function = function.compile(types)
    return made


class _Form:
    """Unpickled, it is the compiled function."""

    def __init__(self, *where: Any) -> None:
        self._where = where

    def __reduce__(self) -> tuple[Function, tuple[Any, ...]]:
        return _load, self._where


def _told(function: Any, module: str, number: int, args: tuple[Any, ...]) -> bytes:
    """What a process unpickles to have what `bound` or `bound_by_address` compiled for such arguments."""
    types = tuple(map(numba.typeof, args)) if function._can_compile else next(iter(function.overloads))
    return _pickled(module, number, types)


@cache
def _pickled(*where: Any) -> bytes:
    return pickle.dumps(_Form(*where))


def _load(module: str, number: int, types: tuple[Any, ...]) -> Function:
    """A module's compiled function for arguments of these types, which it takes as they are: the interpreter's calls of
    it choose by types, and an array that was sent may be read-only where the other process's is not."""
    import_module(module)
    return _compile(_made[module][number], types)


@cache
def _directory() -> Path:
    """Where functions of these sources are kept. Those of others go when a new one comes, once no process has looked at
    them for `KEPT_S`."""
    own = default_directory() / f"numba-{_sources()}"
    if own.exists():
        with suppress(OSError):
            os.utime(own)
        return own
    for other in own.parent.glob("numba-*"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > KEPT_S:
                shutil.rmtree(other)
    return own


@cache
def _sources() -> str:
    """A digest of this package: numba looks at the file of a function alone, not at what it inlines from others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _kept_below(directory: Path) -> Iterator[None]:
    """numba decides where a function is kept when it is decorated."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(directory)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
