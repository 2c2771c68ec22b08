"""The operators' declarations: one file a family, each ending with its `OPS`."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from infera_gpu.op import Op, Registry
from infera_gpu.ops._index import INDEX


def modules() -> list[str]:
    """The files of this package that may declare operators."""
    return sorted(f[:-3] for path in __path__ for f in os.listdir(path) if f.endswith(".py") and f[0] != "_")


def declared(module: str) -> tuple[Op, ...]:
    """The operators of one file, which is imported."""
    found: tuple[Op, ...] = getattr(importlib.import_module(f"{__name__}.{module}"), "OPS", ())
    return found


COMMON = ("activation", "conv", "elementwise", "indexing", "matmul", "shape", "slicing")
"""The files that at least half of the models of `bench.first` need. They are imported with the registry, and so with
the package; a model that needs others imports those while it is loaded."""

OLDEST = "legacy"
"""The file of what operators were before opset 7. It makes them of newer ones, whose files it imports."""


class _Declared(Registry):
    """Imports the files that declare a name when it is looked up, as the index says; files that it has not, at once.

    Every file is imported only for a name that is nowhere else: that takes longer than loading a small model.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left = dict.fromkeys(modules())
        self._by_name: dict[str, list[str]] = {}
        self._importing = threading.RLock()
        indexed: set[str] = set()
        for module, *names in map(str.split, INDEX.splitlines()):
            indexed.add(module)
            for name in names:
                self._by_name.setdefault(name, []).append(module)
        self._new = [module for module in self._left if module not in indexed]
        self._import(COMMON)

    def _import(self, modules: Iterable[str]) -> None:
        with self._importing:
            for module in modules:
                if module in self._left:
                    self.add(declared(module))
                    del self._left[module]

    def _files(self, domain: str, name: str) -> Sequence[str]:
        return self._by_name.get(f"{domain}.{name}" if domain else name, ())

    def find(self, domain: str, name: str, opset: int) -> Op | None:
        found = self._found.get((domain, name, opset))
        if found is not None:  # asked for every node, again and again
            return found
        found = super().find(domain, name, opset)
        if found is None and OLDEST in self._left and OLDEST in self._files(domain, name):
            self._import([OLDEST])
            found = super().find(domain, name, opset)
        return found

    def _versions(self, domain: str, name: str) -> list[Op]:
        self._import([*self._new, *(m for m in self._files(domain, name) if m != OLDEST)])
        found = super()._versions(domain, name)
        if not found and self._left:
            self._import(list(self._left))
            found = super()._versions(domain, name)
        return found

    def __iter__(self) -> Iterator[Op]:
        self._import(list(self._left))
        return super().__iter__()


@cache
def registry() -> Registry:
    """Every operator declared in this package."""
    return _Declared()
