"""What the programs of an interpreted launch load and store: every address, by the lane that has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

Program = tuple[int, int, int]
"""Its place in the grid."""

LOAD, STORE, ATOMIC = range(3)

HOOKS = {
    "create_masked_load": (LOAD, 0, 1),
    "create_masked_store": (STORE, 0, 2),
    "create_atomic_rmw": (ATOMIC, 1, 3),
    "create_atomic_cas": (ATOMIC, 0, None),
    "create_atomic_load": (ATOMIC, 0, 1),
    "create_atomic_store": (ATOMIC, 0, 2),
    "create_atomic_poll": (ATOMIC, 0, None),
}
"""The interpreter's functions that touch memory: what they are, and where among their arguments pointers and mask are.

Those of block pointers and of tensor descriptors call these. A version of Triton may lack some.
"""


class Access(NamedTuple):
    """One load, store or atomic of one program. `lanes` are those that the mask lets through, in a tile of `shape`."""

    number: int
    mode: int
    program: int
    section: int
    """Counts the stretches of a launch that end with a barrier or with a program."""
    size: int
    """Bytes at each address."""
    shape: tuple[int, ...]
    lanes: Array
    addresses: Array
    values: Array | None
    """What a store writes."""


class Record:
    """The accesses of one launch, in the order of the interpreter: program after program."""

    def __init__(self, builder: Any) -> None:
        self.accesses: list[Access] = []
        self.programs: list[Program] = []
        """Those that touch memory, as `Access.program` counts them."""
        self._builder = builder
        self._section = 0
        self._inside = False

    def barrier(self) -> None:
        """In place of the interpreter's, which does nothing."""
        self._section += 1

    def hook(self, name: str) -> Callable[..., Any]:
        """The interpreter's function, which notes what it is asked for. What an atomic calls is part of it."""
        function = getattr(self._builder, name)
        mode, pointers_at, mask_at = HOOKS[name]

        def noting(*args: Any, **options: Any) -> Any:
            if self._inside:
                return function(*args, **options)
            mask = None if mask_at is None else args[mask_at]
            self._note(mode, args[pointers_at], mask, args[1].data if mode == STORE else None)
            self._inside = mode == ATOMIC
            try:
                return function(*args, **options)
            finally:
                self._inside = False

        return noting

    def _note(self, mode: int, pointers: Any, mask: Any, values: Any) -> None:
        program = self._builder.grid_idx
        if not self.programs or program != self.programs[-1]:
            self.programs.append(program)
            self._section += 1
        tile = pointers.data
        lanes = np.flatnonzero(np.broadcast_to(True if mask is None else mask.data, tile.shape))
        if not lanes.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if values is not None:
            values = np.broadcast_to(values, tile.shape).reshape(-1)[lanes]
        what = len(self.accesses), mode, len(self.programs) - 1, self._section, size
        self.accesses.append(Access(*what, tile.shape, lanes, tile.reshape(-1)[lanes], values))


@contextmanager
def recording() -> Iterator[Record]:
    """Of the launch that is interpreted meanwhile."""
    from triton.runtime.interpreter import interpreter_builder as builder

    record = Record(builder)
    hooks: dict[str, Any] = {name: record.hook(name) for name in HOOKS if hasattr(builder, name)}
    hooks["create_barrier"] = record.barrier
    for name, hook in hooks.items():
        setattr(builder, name, hook)
    try:
        yield record
    finally:
        for name in hooks:
            delattr(builder, name)
