"""Kernels whose files are imported when somebody asks for their kind, and cases when somebody looks at them. Declares
no operators itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from infera_gpu.graph import lazy
from infera_gpu.op import Cases, Kernel, Op


class Kinds(Mapping[str, Kernel]):
    """Kernels by kind: those given, and what `make` takes from a file of this package, imported for another kind.

    The CPU takes longer to import what wraps kernels of the GPU than to load a small model's nodes.
    """

    def __init__(self, given: Mapping[str, Kernel], file: str, make: Callable[[Any], Mapping[str, Kernel]]) -> None:
        self._given, self._file, self._make = given, file, make

    @lazy
    def _all(self) -> Mapping[str, Kernel]:
        return {**self._given, **self._make(import_module(f"{__package__}.{self._file}"))}

    def __getitem__(self, kind: str) -> Kernel:
        found = self._given.get(kind)
        return self._all[kind] if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def cases_in(file: str, *of: str | int) -> Cases:
    """What `cases` of a file of this package makes of these."""
    return Cases(lambda: import_module(f"{__package__}.{file}").cases(*of))


OPS: tuple[Op, ...] = ()
